"""The demo's page: over HTTP where Gradio is installed, and in a headless browser where there is one."""

import json
import shutil
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from ports import free_port

from lavis_lite.common.errors import InputError
from lavis_lite.demo.models import DemoModel, DemoModels, load_models
from lavis_lite.demo.serve import LOCAL, MAX_UPLOAD, running

pytestmark = pytest.mark.skipif(  # not imported here: that takes seconds of each process's collection
    find_spec("gradio") is None, reason='the page needs gradio: pip install "lavis-lite[demo]"'
)

NAMES = ("blip_caption/tiny", "blip2_t5_instruct/tiny", "blip_image_text_matching/tiny")


@pytest.fixture(scope="module")
def models() -> DemoModels:
    torch.manual_seed(0)
    found = load_models(NAMES, device="cpu")
    chatty = found[NAMES[1]].loaded.model
    chatty.generation = chatty.generation.changed(max_length=8)  # random weights end no text
    return found


@pytest.fixture(scope="module")
def address(models: DemoModels) -> Iterator[str]:
    with running(models, port=free_port()) as found:
        yield found


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    Image.new("RGB", (60, 40), "red").save(tmp_path / "holiday.png")
    return tmp_path / "holiday.png"


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    (tmp_path / "broken.png").write_text("not a picture")
    return tmp_path / "broken.png"


# Over HTTP


class Client:
    """A user of the page, as its JavaScript speaks to it."""

    def __init__(self, address: str, session: str) -> None:
        import httpx  # a dependency of gradio

        self.http = httpx.Client(base_url=address, timeout=120, trust_env=False)
        self.session = session
        self.config = self.http.get("config").json()
        self.components = {one["id"]: one for one in self.config["components"]}

    def upload(self, path: Path) -> dict[str, Any]:
        (there,) = self.http.post("gradio_api/upload", files={"files": (path.name, path.read_bytes())}).json()
        return {"path": there, "orig_name": path.name, "meta": {"_type": "gradio.FileData"}}

    def click(self, button: str, **values: Any) -> Any:
        """The outputs of a button's function, whose inputs have their first values but for those labelled so."""
        (target,) = [
            key for key, one in self.components.items() if one["type"] == "button" and one["props"]["value"] == button
        ]
        (found,) = [one for one in self.config["dependencies"] if [target, "click"] in one["targets"]]
        inputs = [self.components[key]["props"] for key in found["inputs"]]
        data = [values.get(one.get("label", ""), one.get("value")) for one in inputs]
        body = {"data": data, "fn_index": found["id"], "session_hash": self.session}
        self.http.post("gradio_api/queue/join", json=body).raise_for_status()
        with self.http.stream("GET", "gradio_api/queue/data", params={"session_hash": self.session}) as stream:
            for line in stream.iter_lines():
                message = json.loads(line.removeprefix("data: ") or "{}")
                if message.get("msg") == "process_completed":
                    return message
        raise AssertionError("no answer")


def test_an_upload_is_captioned(address: str, photo: Path, models: DemoModels) -> None:
    client = Client(address, "one")
    message = client.click("Caption", Image=client.upload(photo))
    assert message["success"], message
    caption, _, _, python, command = message["output"]["data"]
    assert caption == models[NAMES[0]].pipeline("caption")(photo)["caption"]
    assert "'holiday.png'" in python
    assert command == f"lavis-lite caption holiday.png --model {NAMES[0]}"


def test_errors_name_the_users_file(address: str, broken: Path) -> None:
    client = Client(address, "two")
    for values in ({"Image": client.upload(broken)}, {}):
        message = client.click("Caption", **values)
        assert not message["success"]
        assert ("broken.png" if values else "upload") in message["output"]["error"]
        assert "uploads" not in message["output"]["error"]


def test_files_of_the_machine_are_not_read(address: str, photo: Path) -> None:
    client = Client(address, "three")
    for path in (photo, Path("/etc/passwd")):
        message = client.click("Caption", Image={"path": str(path), "meta": {"_type": "gradio.FileData"}})
        assert not message["success"]
        assert client.http.get(f"gradio_api/file={path}").status_code == 403


def test_uploads_are_limited_and_deleted_at_the_end(models: DemoModels, tmp_path: Path) -> None:
    large = tmp_path / "large.png"
    with large.open("wb") as file:
        file.truncate(MAX_UPLOAD + 1)
    with running(models, port=free_port()) as address:
        client = Client(address, "four")
        assert client.http.post("gradio_api/upload", files={"files": ("large.png", large.open("rb"))}).is_error
        Image.new("RGB", (8, 8)).save(tmp_path / "small.png")
        there = Path(client.upload(tmp_path / "small.png")["path"])
        assert there.is_file()
    assert not there.exists()
    assert not there.parents[2].exists()


def test_the_page_names_no_other_host_and_has_no_public_functions(address: str) -> None:
    client = Client(address, "five")
    assert client.config["analytics_enabled"] is False
    assert client.config["stylesheets"] == []
    assert {one["api_visibility"] for one in client.config["dependencies"]} == {"private"}
    assert "lavis_lite" in client.http.get("").text
    assert address.startswith(f"http://{LOCAL}:")


@pytest.mark.parametrize(
    ("names", "tabs"),
    [
        (["blip_caption/tiny"], ["Caption"]),
        (["blip_vqa/tiny"], ["Ask"]),
        (["blip_retrieval/tiny"], ["Match", "Search"]),
        (["blip2_opt/tiny"], ["Caption", "Ask", "Chat"]),
        (["blip_caption/tiny", "blip2/tiny"], ["Caption", "Match", "Search", "Compare"]),
    ],
)
def test_tabs_are_what_the_models_can_do(names: list[str], tabs: list[str]) -> None:
    from lavis_lite.demo.page import tabs_of

    assert tabs_of(load_models(names, device="cpu")) == tabs


def test_a_port_in_use_stops_the_start(models: DemoModels, address: str) -> None:
    port = int(address.rstrip("/").rpartition(":")[2])
    with pytest.raises(InputError, match=str(port)), running(models, port=port):
        pass


# In a browser

CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="the browser tests need playwright")
    if CHROMIUM is None:
        pytest.skip("the browser tests need chromium: apt-get install chromium")
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def visit(browser: Any, address: str) -> Iterator[Callable[[str], Any]]:
    """Opens the page at a tab, as another user each time; every request has gone to the demo."""
    requested: list[str] = []
    contexts: list[Any] = []

    def open_at(tab: str) -> Any:
        contexts.append(browser.new_context())
        page = contexts[-1].new_page()
        page.on("request", lambda request: requested.append(request.url))
        page.goto(address)
        page.get_by_role("tab", name=tab).click()
        return page

    yield open_at
    for context in contexts:
        context.close()
    assert requested
    assert [url for url in requested if not url.startswith((address, "blob:", "data:"))] == []


def upload(page: Any, path: Path) -> None:
    pane = page.get_by_role("tabpanel").filter(visible=True)
    pane.locator("input[type=file]").first.set_input_files(path)
    pane.locator(".photo img").first.wait_for(state="attached")


@pytest.mark.slow
def test_long_names_fit_a_phone(browser: Any, models: DemoModels) -> None:
    """A name that is cut ends with an ellipsis left of the arrow; the open list and the heading have it whole."""
    long = "output/BLIP/Caption_coco_finetuned/20261201_121530/checkpoint_best.pth"
    found = [DemoModel(name=name, checkpoint=None, loaded=models[NAMES[0]].loaded) for name in (long, "other")]
    with running(DemoModels(found), port=free_port()) as address:
        page = browser.new_page(viewport={"width": 390, "height": 844})
        page.goto(address)
        field = page.get_by_role("combobox", name="Model").filter(visible=True).first
        cut = field.evaluate("one => [one.scrollWidth > one.clientWidth, getComputedStyle(one).textOverflow]")
        assert cut == [True, "ellipsis"]
        field.click()
        page.get_by_role("option").first.wait_for()
        edges = """one => { const all = document.createRange(); all.selectNodeContents(one);
                            return all.getBoundingClientRect().right <= innerWidth }"""
        assert page.get_by_role("option").first.evaluate(edges)
        lines = """one => { const all = document.createRange(); all.selectNodeContents(one);
                            return [...all.getClientRects()].map(line => line.right) }"""
        ends = page.locator(".prose code").first.evaluate(lines)
        assert len(ends) > 1
        assert max(ends) <= 390
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        page.close()


@pytest.mark.slow
def test_upload_caption_and_a_broken_file(visit: Any, photo: Path, broken: Path, models: DemoModels) -> None:
    page = visit("Caption")
    upload(page, photo)
    page.get_by_role("button", name="Caption", exact=True).click()
    caption = models[NAMES[0]].pipeline("caption")(photo)["caption"]
    page.wait_for_function(
        "wanted => [...document.querySelectorAll('textarea')].some(one => one.value == wanted)", arg=caption
    )
    page.get_by_role("button", name="Remove Image").or_(page.get_by_label("Clear")).first.click()
    upload(page, broken)
    page.get_by_role("button", name="Caption", exact=True).click()
    page.get_by_text("broken.png").first.wait_for()
    assert "Traceback" not in page.content()


@pytest.mark.slow
def test_maps_of_a_caption_are_shown_if_wanted(visit: Any, photo: Path) -> None:
    page = visit("Caption")
    upload(page, photo)
    page.get_by_role("button", name="Caption", exact=True).click()
    page.wait_for_function("() => document.querySelector('textarea[disabled]')?.value")
    assert page.get_by_text("Where the model looked", exact=True).count() == 0
    page.get_by_label("Show where the model looked for the first caption").check()
    page.get_by_role("button", name="Caption", exact=True).click()
    page.locator(".pictures img").nth(1).wait_for()
    assert page.get_by_text("mean of all").first.is_visible()


@pytest.mark.slow
def test_the_map_is_shown(visit: Any, photo: Path) -> None:
    page = visit("Match")
    upload(page, photo)
    page.get_by_role("button", name="Compare with the image").click()
    page.locator(".pictures img").nth(4).wait_for()  # mean, [ENC], three words


@pytest.mark.slow
def test_two_users_have_conversations_of_their_own(visit: Any, photo: Path) -> None:
    pages = [visit("Chat"), visit("Chat")]
    for number, page in enumerate(pages):
        upload(page, photo)
        page.get_by_label("Instruction or question").fill(f"what is it, asks user {number}")
    for page in pages:
        page.get_by_role("button", name="Send").click()
    for number, page in enumerate(pages):
        page.locator(".bot.message, .bot .message").first.wait_for()
        assert page.get_by_text(f"asks user {number}").count() == 1
        assert page.get_by_text(f"asks user {1 - number}").count() == 0
