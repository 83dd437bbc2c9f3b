"""The page: one tab per task that the models can do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import gradio as gr

from lavis_lite.demo.actions import Actions
from lavis_lite.demo.models import DemoModels
from lavis_lite.demo.tabs import ask_tab, caption_tab, chat_tab, compare_tab, match_tab, search_tab

Tab = Callable[[Actions, Sequence[Path]], None]
TABS: dict[str, tuple[Tab, Callable[[DemoModels], bool]]] = {
    "Caption": (caption_tab, lambda models: bool(models.names("caption"))),
    "Ask": (ask_tab, lambda models: bool(models.names("ask"))),
    "Chat": (chat_tab, lambda models: bool(models.names("chat"))),
    "Match": (match_tab, lambda models: bool(models.names("match"))),
    "Search": (search_tab, lambda models: bool(models.names("embed"))),
    "Compare": (compare_tab, lambda models: any(len(models.names(task)) > 1 for task in ("caption", "ask"))),
}
INTRODUCTION = "Models of vision and language. Nothing that you upload leaves the machine that runs this page."
SYSTEM_FONTS = ("system-ui", "sans-serif")
SYSTEM_MONO = ("ui-monospace", "monospace")
CSS = """
.gradio-container { max-width: 1200px !important; width: 100%; margin: 0 auto !important }
.photo img { width: 100%; height: 100%; object-fit: contain }
.pictures .grid-wrap { min-height: 0 !important; max-height: none !important }
.pictures .thumbnail-lg { aspect-ratio: auto; height: auto; display: block }
.pictures .thumbnail-lg img { aspect-ratio: 1; height: auto }
.pictures .caption-label { position: static; max-width: 100%; margin: 0; padding: .25rem; border: 0; box-shadow: none;
  background: none; font-size: .8rem; white-space: normal; overflow-wrap: anywhere }
.gradio-container input[role=combobox] { text-overflow: ellipsis; padding-right: 1.25rem }
.gradio-container .prose code { white-space: pre-wrap; overflow-wrap: anywhere }
"""


def tabs_of(models: DemoModels) -> list[str]:
    """Return the tabs that a demo of the models has."""
    return [name for name, (_, offered) in TABS.items() if offered(models)]


def page(actions: Actions, shown: Sequence[Path]) -> gr.Blocks:
    """Return the page, with examples to click on."""
    names = ", ".join(f"`{name}`" for name in actions.models.by_name)
    with gr.Blocks(title="lavis_lite demo", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        gr.Markdown(f"# lavis_lite\n{INTRODUCTION} Loaded: {names}")
        with gr.Tabs():
            for name in tabs_of(actions.models):
                with gr.Tab(name, id=name.lower()):
                    TABS[name][0](actions, shown)
    return blocks


def theme() -> gr.themes.Base:
    """Return a theme with fonts of the system: nothing is fetched from other hosts."""
    soft = gr.themes.Soft(primary_hue="blue", font=list(SYSTEM_FONTS), font_mono=list(SYSTEM_MONO))
    fill = {"button_primary_background_fill": "*primary_700", "button_primary_background_fill_hover": "*primary_800"}
    return soft.set(**fill, **{f"{name}_dark": value for name, value in fill.items()})
