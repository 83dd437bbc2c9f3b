"""Figures in docs/ that are computed: each is computed again, so that none becomes wrong unseen.

The zoo's parameters and memory, the memory of the recipes for one card, and the settings of `generate`.
"""

import json
import re
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import full_size
import pytest
import torch
from pages import DOCS, ROOT, blocks, code, table
from torch import nn

from lavis_lite.cli.dry_run import build_without_weights
from lavis_lite.cli.memory import GIB, memory_lines, weight_bytes
from lavis_lite.cli.published import ALL, read_recipes
from lavis_lite.common.config.config import Config
from lavis_lite.common.config.files import resolve
from lavis_lite.common.config.sections import MODEL_KEYS
from lavis_lite.common.config.zoo import model_layers
from lavis_lite.models import model_zoo
from lavis_lite.nn.decoding import GenerationConfig

CHECKPOINTS = table(DOCS / "zoo.md", "| type | for |")
FILES = table(DOCS / "zoo.md", "| type | parameters")
TYPES = [(arch, kind) for arch, kinds in model_zoo for kind in kinds if not kind.startswith("tiny")]
METRICS = {"CIDEr": "CIDEr", "TR@1": "txt_r1", "IR@1": "img_r1"}
"""Metrics as the papers call them; other values of the table are accuracies."""


# The zoo


def on_a_gpu(arch: str, kind: str) -> dict[str, Any]:
    """A type's `model` section with the precisions that a GPU has."""
    section: dict[str, Any] = dict(resolve(model_layers(arch, kind))["model"])
    if section.get("vit_precision") == "auto":
        section["vit_precision"] = "fp16" if section.get("freeze_vit", True) else "fp32"
    return section


def zoo_model(arch: str, kind: str) -> nn.Module:
    """The model of a type, without memory; types that differ only in their weights share one."""
    section = on_a_gpu(arch, kind)
    return built(
        json.dumps({key: section[key] for key in section.keys() - (MODEL_KEYS.keys() - {"arch"})}, sort_keys=True)
    )


@cache
def built(section: str) -> nn.Module:
    return full_size.meta_model(json.loads(section))


def gib(count: int) -> str:
    return f"{count / GIB:.2f}"


def test_the_table_of_checkpoints_has_every_type_that_fetches_weights() -> None:
    for rows in (CHECKPOINTS, FILES):
        assert [code(row[0])[0] for row in rows] == ["/".join(names) for names in TYPES]


@pytest.mark.parametrize("index", range(len(TYPES)), ids=["/".join(names) for names in TYPES])
@pytest.mark.slow
def test_parameters_memory_and_files_of_a_type(index: int) -> None:
    names, memory, (_, parameters, weights, _) = TYPES[index], CHECKPOINTS[index][-1], FILES[index]
    section, model = on_a_gpu(*names), zoo_model(*names)
    assert parameters == f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:,.0f}"
    assert memory == gib(weight_bytes(model))
    key = "finetuned" if section.get("load_finetuned", True) and "finetuned" in section else "pretrained"
    files = [section[key].rpartition("/")[2]] if key in section else []
    files += [section[name] for name in ("opt_model", "t5_model", "llm_model") if name in section]
    assert (code(weights) or weights) == (files or "none")


@pytest.fixture(scope="module")
def published() -> dict[str, list[tuple[str, float]]]:
    """Metric and value of each evaluation recipe's entries, by type."""
    found = defaultdict(list)
    for recipe in read_recipes(ROOT / "projects", ALL):
        for entry in recipe.entries if "/eval/" in recipe.name else []:
            found[entry.model or recipe.model].append((entry.metric, entry.value))
    return found


@pytest.mark.parametrize("row", CHECKPOINTS, ids=lambda row: code(row[0])[0])
def test_published_values_of_a_type(row: list[str], published: dict[str, list[tuple[str, float]]]) -> None:
    names, _, values, _ = row
    of_another = code(values)
    entries = published[(of_another or code(names))[0]]
    assert bool(published[code(names)[0]]) == (values != "none" and not of_another)
    for label, value in re.findall(r"(\S+) (\d+\.\d+)", values):
        assert (METRICS.get(label, "other"), float(value)) in [
            (metric if metric in METRICS.values() else "other", number) for metric, number in entries
        ]
    assert values == "none" or of_another or re.search(r"\d", values)


def test_licences_follow_from_the_parts() -> None:
    for names, _, weights, licences in FILES:
        assert ("OPT-175B" in licences) == ("facebook/opt" in weights)
        assert ("LLaMA" in licences) == ("vicuna" in weights)
        assert ("research only" in licences) == ("_instruct/" in names)
        assert ("Apache-2.0" in licences) == ("flan-t5" in weights or "Qwen" in weights)


@pytest.mark.slow
def test_the_language_model_in_four_bits() -> None:
    ((four, whole),) = re.findall(r"for Vicuna-7B ([\d.]+) GiB in place of ([\d.]+)\.", (DOCS / "zoo.md").read_text())
    model = zoo_model("blip2_vicuna_instruct", "vicuna7b")
    saved = weight_bytes(model) - weight_bytes(model, "int4")
    size = weight_bytes(model.get_submodule("llm_model"))
    assert (f"{(size - saved) / GIB:.1f}", f"{size / GIB:.1f}") == (four, whole)


# Recipes for one card


def memory_rows() -> list[tuple[str, list[str], list[str]]]:
    """Recipe, options and figures of each row of the table of memory; a blank recipe is that of the row above."""
    found: list[tuple[str, list[str], list[str]]] = []
    for recipe, options, *figures in table(DOCS / "finetune_llm.md", "| recipe | options |"):
        name = code(recipe)[0] if recipe else found[-1][0]
        found.append((name, " ".join(code(options)).split(), figures))
    return found


def memory_line(name: str, options: list[str]) -> str:
    """The dry run's line for a recipe, with texts of the full length."""
    small = [f"model.tokenizer={full_size.TINY_HF / 'bert'}", "model.qformer={vocab_size: 30523}"]  # BERT's sizes
    with full_size.hub_stand_ins():
        cfg = Config.from_file(ROOT / f"projects/one_gpu/{name}.yaml", [*small, *options])
        model = build_without_weights(cfg.model)
        text = [cfg.model.get("prompt", "") + " word" * 400]
        batch = {"image": torch.empty(1, 3, 224, 224, device="meta"), "text_input": text}
        if cfg.run.task == "instruct":
            batch["text_output"] = text
        return memory_lines(cfg, model, batch)[0]


@pytest.mark.parametrize(("name", "options", "figures"), memory_rows(), ids=lambda value: str(value)[:60])
@pytest.mark.slow
def test_memory_by_part(name: str, options: list[str], figures: list[str]) -> None:
    pytest.importorskip("bitsandbytes")
    line = memory_line(name, options)
    found = re.findall(r"(?:weights|gradients|optimizer|activations about|in all about) ([\d.]+) GiB", line)
    assert found == figures


def test_the_line_that_is_shown_is_in_the_table() -> None:
    (shown,) = [block.text for block in blocks(DOCS / "finetune_llm.md") if block.text.startswith("memory ")]
    figures = re.findall(r"([\d.]+) GiB", shown)
    assert ("instructblip_int4", [], figures) in memory_rows()


def test_every_recipe_for_one_card_is_on_the_page() -> None:
    recipes = {path.stem for path in Path(ROOT / "projects/one_gpu").glob("[!_]*.yaml")}
    assert recipes == {code(row[0])[0] for row in table(DOCS / "finetune_llm.md", "| recipe | from |")}
    assert recipes == {name for name, options, _ in memory_rows() if not options}


# transformers


def test_settings_of_generate_are_taken_or_refused_as_the_page_says() -> None:
    settings = GenerationConfig(max_length=20, num_beams=5)
    for names, here in table(DOCS / "transformers.md", "| setting of transformers |"):
        for name in (text.partition("=")[0] for text in code(names)):
            if here == "an error" or name == "output_scores":
                with pytest.raises(ValueError, match=f"^{name}: unknown"):
                    settings.changed(**{name: 1})
            else:
                settings.changed(**{name: 0.5 if name in ("top_p", "temperature") else 1})
