"""What the demo does, without Gradio: actions, copied code, limits, and the command's errors."""

import contextlib
import io
import shlex
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from ports import free_port
from typer.testing import CliRunner

from lavis_lite.cli.app import app
from lavis_lite.common.address import check_address
from lavis_lite.common.config.zoo import model_zoo
from lavis_lite.common.errors import InputError
from lavis_lite.demo.actions import MAX_TEXT, Actions, Upload
from lavis_lite.demo.code import Code
from lavis_lite.demo.examples import NUM_IMAGES, write_examples
from lavis_lite.demo.models import TASKS, DemoModels, load_models
from lavis_lite.demo.settings import METHODS, TextSettings
from lavis_lite.inference.loading import load
from lavis_lite.models.image_text import ImageTextModel
from lavis_lite.models.protocols import AnswersQuestions, Generates

NAMES = ("blip_caption/tiny", "blip_vqa/tiny", "blip_image_text_matching/tiny", "blip2_t5_instruct/tiny")
SAMPLING = TextSettings(method="sampling", top_p=0.8, temperature=1.3, max_length=12, seed=7)
SHORT = TextSettings(method="beam search", num_beams=2, max_length=11)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def images(folder: Path) -> list[Path]:
    return write_examples(folder / "images")


@pytest.fixture(scope="module")
def actions(folder: Path, images: list[Path]) -> Actions:
    """A demo of tiny models whose random weights are in checkpoints, so that copied code finds the same ones."""
    found = {}
    for name in NAMES:
        path = folder / f"{name.replace('/', '_')}.pth"
        torch.manual_seed(0)
        torch.save({"model": load(name, device="cpu").model.state_dict()}, path)
        found |= load_models([name], checkpoint=str(path), device="cpu").by_name
    return Actions(DemoModels(list(found.values())), {"shapes": images[0].parent}, index_storage={"shapes": folder})


@pytest.fixture
def photo(images: list[Path], monkeypatch: pytest.MonkeyPatch) -> Upload:
    """An upload whose copied code runs in its folder."""
    monkeypatch.chdir(images[0].parent)
    return Upload(images[0], images[0].name)


def run_python(code: Code) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code.python, {})
    return printed.getvalue().strip()


def run_command(code: Code, **given: Any) -> str:
    program, *arguments = shlex.split(code.command)
    assert program == "lavis-lite"
    result = CliRunner().invoke(app, arguments, **given)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout.strip()


@pytest.mark.parametrize(("settings", "count"), [(TextSettings(), 3), (SHORT, 1), (SAMPLING, 3)], ids=METHODS)
def test_a_caption_is_what_the_copied_code_prints(
    actions: Actions, photo: Upload, settings: TextSettings, count: int
) -> None:
    (captions, maps), code = actions.caption(NAMES[0], photo, "a picture of", count, settings)
    assert not maps
    assert len(captions) == count
    assert run_python(code) == (captions[0] if count == 1 else str(captions))
    name, caption = run_command(code).split("\t")
    assert (name, caption) == (photo.name, captions[0])


@pytest.mark.slow
@pytest.mark.parametrize(("model", "settings"), [(NAMES[1], SAMPLING), (NAMES[3], SHORT)])
def test_an_answer_is_what_the_copied_code_prints(
    actions: Actions, photo: Upload, model: str, settings: TextSettings
) -> None:
    ((answer,), _), code = actions.ask(model, photo, "-- what color is 'it'?", settings)
    assert run_python(code) == answer
    assert run_command(code) == f"{photo.name}\t{answer}".strip()


@pytest.mark.slow
def test_scores_and_maps_are_of_the_texts(actions: Actions, photo: Upload, monkeypatch: pytest.MonkeyPatch) -> None:
    found, code = actions.match(NAMES[2], photo, "a red circle\n\n a blue cross \n", True)
    assert [one["text"] for one in found.scores] == ["a red circle", "a blue cross"]
    assert found.text == max(found.scores, key=lambda one: one["itm"])["text"]
    assert [one.label for one in found.maps] == ["mean of all", "[ENC]", *found.text.split()]
    assert run_python(code).splitlines()[0] == str(found.scores)
    match, explain = code.command.splitlines()
    assert photo.name in run_command(Code("", match))
    assert found.text in run_command(Code("", explain))
    assert not actions.match(NAMES[2], photo, "a red circle", False)[0].maps


@pytest.mark.slow
@pytest.mark.parametrize("model", [NAMES[0], NAMES[1], NAMES[3]])
def test_maps_of_captions_and_answers_are_those_of_the_copied_code(
    actions: Actions, photo: Upload, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if model == NAMES[0]:
        (texts, maps), code = actions.caption(model, photo, "", 1, SHORT, True)
    else:
        (texts, maps), code = actions.ask(model, photo, "What color is it?", SHORT, True)
    labels = [one.label for one in maps]
    assert labels[0] == "mean of all"
    wanted = {NAMES[1]: ["what", "color", "is"], NAMES[3]: ["query 1", "query 2"]}.get(model, [])
    assert labels[1 : 1 + len(wanted)] == wanted
    assert len(labels) > 2
    printed = run_python(code).splitlines()
    assert printed[-1].startswith(str(labels[1:]))
    command, explain = code.command.splitlines()
    assert texts[0] in run_command(Code("", command))
    monkeypatch.chdir(photo.path.parent)
    run_command(Code("", explain.replace("explained.png", str(tmp_path / "maps.npz"))))
    assert np.load(tmp_path / "maps.npz")["labels"].tolist() == labels[1:]


@pytest.mark.slow
def test_an_image_is_found_by_itself_and_by_a_text(actions: Actions, photo: Upload, folder: Path) -> None:
    by_image, code = actions.search(NAMES[2], "shapes", " ", photo, 3, 5)
    assert by_image[0].name == photo.name
    assert by_image[0].score == pytest.approx(1, abs=1e-5)
    assert run_command(code).splitlines()[0].endswith(photo.name)
    by_text, code = actions.search(NAMES[2], "shapes", "a red circle", photo, 4, 2)
    printed = [line.split("\t") for line in run_command(code).splitlines()]
    assert [(Path(name).name, score) for score, name in printed] == [(hit.name, f"{hit.score:.4f}") for hit in by_text]
    assert [line.split(" ", 1)[1] for line in run_python(code).splitlines()] == [name for _, name in printed]
    with pytest.raises(InputError, match="elsewhere"):
        actions.search(NAMES[2], "elsewhere", "a red circle", None, 4, 0)


@pytest.mark.slow
def test_a_conversation_goes_on_until_another_image(actions: Actions, photo: Upload, images: list[Path]) -> None:
    how: dict[str, Any] = {"num_rounds": 2, "num_frames": None, "settings": SAMPLING}
    session, _ = actions.chat(None, NAMES[3], photo, "what is it?", **how)
    again, code = actions.chat(session, NAMES[3], photo, "and its color?", **how)
    assert again.conversation is session.conversation
    rounds = again.conversation.rounds
    assert [question for question, _ in rounds] == ["what is it?", "and its color?"]
    answers = [answer for _, answer in rounds]
    assert run_python(code) == "\n".join(answers)
    printed = run_command(code, input="what is it?\nand its color?\n")
    assert printed == "> {}\n> {}\n>".format(*answers)
    other, _ = actions.chat(again, NAMES[3], Upload(images[1], "other.png"), "what is it?", **how)
    assert len(other.conversation.rounds) == 1


@pytest.mark.slow
def test_a_conversation_about_a_video(actions: Actions, photo: Upload, tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width = stream.height = 48
        for number in range(8):
            frame = av.VideoFrame.from_image(Image.new("RGB", (48, 48), (30 * number, 0, 0)))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    how: dict[str, Any] = {"num_rounds": 0, "settings": SHORT}
    session, code = actions.chat(None, NAMES[3], Upload(path, "clip.mp4"), "what?", num_frames=2, **how)
    assert session.conversation.image is not None
    assert session.conversation.image.shape[:3] == (1, 3, 2)
    code = Code(*(text.replace("clip.mp4", str(path)) for text in code))
    assert run_python(code) == session.conversation.rounds[0][1]
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    with pytest.raises(InputError, match=r"mine\.mp4") as error:
        actions.chat(None, NAMES[3], Upload(broken, "mine.mp4"), "what?", num_frames=2, **how)
    assert str(broken) not in str(error.value)


def test_two_models_are_compared(actions: Actions, photo: Upload) -> None:
    sides = actions.compare([NAMES[0], NAMES[3]], photo, "", SHORT)
    assert [side.text for side in sides] == [
        actions.caption(name, photo, "", 1, SHORT)[0].texts[0] for name in (NAMES[0], NAMES[3])
    ]
    answers = actions.compare([NAMES[1], NAMES[3]], photo, "what color?", SHORT)
    assert answers[0].text == actions.ask(NAMES[1], photo, "what color?", SHORT)[0].texts[0]
    with pytest.raises(InputError, match=r"blip_vqa/tiny.*blip_caption/tiny"):
        actions.compare([NAMES[0], NAMES[1]], photo, "", SHORT)


def test_what_a_user_can_do_wrong_is_said(actions: Actions, photo: Upload, tmp_path: Path) -> None:
    broken = Upload(tmp_path / "b3f0.png", "holiday.png")
    broken.path.write_text("not a picture")
    with pytest.raises(InputError, match=r"holiday\.png") as error:
        actions.caption(NAMES[0], broken, "", 1, SHORT)
    assert str(tmp_path) not in str(error.value)
    with pytest.raises(InputError, match="upload"):
        actions.caption(NAMES[0], None, "", 1, SHORT)
    with pytest.raises(InputError, match=f"100,000.*{MAX_TEXT:,}"):
        actions.caption(NAMES[0], photo, "x" * 100_000, 1, SHORT)
    with pytest.raises(InputError, match="question"):
        actions.ask(NAMES[1], photo, "  ", SHORT)
    with pytest.raises(KeyError, match=r"blip_vqa/huge"):
        actions.ask("blip_vqa/huge", photo, "what?", SHORT)
    with pytest.raises(InputError, match="51"):
        actions.match(NAMES[2], photo, "a\n" * 51, True)
    with pytest.raises(InputError, match="guess"):
        TextSettings(method="guess")
    with pytest.raises(InputError, match="top_p"):
        actions.caption(NAMES[0], photo, "", 1, TextSettings(method="sampling", top_p=2.0))


def test_users_wait_for_each_other(actions: Actions, images: list[Path]) -> None:
    uploads = [Upload(path, path.name) for path in images[:4]]
    alone = [actions.caption(NAMES[0], upload, "", 1, SAMPLING)[0].texts for upload in uploads]
    together: dict[int, list[str]] = {}

    def use(number: int) -> None:
        together[number] = actions.caption(NAMES[0], uploads[number], "", 1, SAMPLING)[0].texts

    threads = [threading.Thread(target=use, args=(number,)) for number in range(len(uploads))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[number] for number in range(len(uploads))] == alone  # each with its own seed


def test_examples_are_the_same_each_time(tmp_path: Path, images: list[Path]) -> None:
    again = write_examples(tmp_path)
    assert len(again) == NUM_IMAGES
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in images]


# The command


@pytest.fixture
def busy_port() -> Iterator[int]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def test_a_port_in_use_and_a_wrong_host_are_refused(busy_port: int) -> None:
    with pytest.raises(InputError, match=str(busy_port)):
        check_address("127.0.0.1", busy_port)
    with pytest.raises(InputError, match=r"192\.0\.2\.1"):
        check_address("192.0.2.1", free_port())
    with pytest.raises(InputError, match="70000"):
        check_address("127.0.0.1", 70_000)


def test_models_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match=r"weights\.pth: 2 models"):
        load_models(["blip_caption/tiny", "blip_vqa/tiny"], checkpoint="weights.pth")
    with pytest.raises(InputError, match=r"blip_nlvr/tiny.*BlipNLVR"):
        load_models(["blip_nlvr/tiny"], device="cpu")
    with pytest.raises(InputError, match=r"blip2/tiny_features.*features"):
        load_models(["blip2/tiny_features"], device="cpu")


@pytest.mark.slow
@pytest.mark.parametrize("arch", [name for name in model_zoo.names() if "tiny" in model_zoo.types(name)])
def test_every_architecture_is_shown_or_refused(arch: str, images: list[Path], tmp_path: Path) -> None:
    name, upload = f"{arch}/tiny", Upload(images[0], "it.png")
    model = load(name, device="cpu").model
    if not isinstance(model, Generates | AnswersQuestions | ImageTextModel):
        with pytest.raises(InputError, match=name):
            load_models([name], device="cpu")
        return
    models = load_models([name], device="cpu")
    actions = Actions(models, {"shapes": images[0].parent}, index_storage={"shapes": tmp_path})
    tried = {
        "caption": lambda: actions.caption(name, upload, "", 1, SHORT),
        "ask": lambda: actions.ask(name, upload, "what?", SHORT),
        "match": lambda: actions.match(name, upload, "a dog", True),
        "embed": lambda: actions.search(name, "shapes", "a dog", None, 2, 0),
    }
    able = [task for task in TASKS if models.names(task)]
    assert able
    for task in able:
        if task != "chat":
            tried[task]()
    if models.names("embed") and not models.names("match"):
        with pytest.raises(InputError, match="rerank"):
            actions.search(name, "shapes", "a dog", None, 2, 1)


def test_the_command_lines_of_its_page_stop_at_a_port_in_use(busy_port: int) -> None:
    text = (Path(__file__).parents[1] / "docs/demo.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("lavis-lite demo")]
    assert len(lines) > 4
    for line in lines:
        words = [word for word in shlex.split(line)[1:] if word != "7861"]
        words = [word for word in words if word != "--port"]
        result = CliRunner().invoke(app, [*words, "--port", str(busy_port)])
        assert result.exit_code == 2, (line, result.output)
        assert str(busy_port) in result.stderr
