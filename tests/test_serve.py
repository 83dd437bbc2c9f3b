"""`lavis-lite serve`: OpenAI's wire format by plain HTTP to a process of its own, limits, batches, and mistakes."""

import base64
import contextlib
import http.client
import http.server
import io
import json
import signal
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cli_helpers
import numpy as np
import pytest
import torch
from PIL import Image
from ports import free_port

from lavis_lite.inference.chat import Conversation
from lavis_lite.inference.inputs import Item
from lavis_lite.inference.loading import Loaded, load
from lavis_lite.inference.pipelines import AskPipeline, CaptionPipeline
from lavis_lite.server import images
from lavis_lite.server.requests import ChatRequest, RequestError, read_request
from lavis_lite.server.worker import Worker, kind_of

CHAT = "blip2_t5_instruct/tiny"
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8))


def encoded(image: Image.Image = NOISE) -> str:
    """The image as a data: URL."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def part(url: str | None = None) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url or encoded()}}


def body(text: str = "what is it", **more: Any) -> dict[str, Any]:
    content = [part(), {"type": "text", "text": text}]
    return {"messages": [{"role": "user", "content": content if text else content[:1]}], **more}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("serve") / "chat.pth"
    torch.manual_seed(0)
    torch.save({"model": load(CHAT, device="cpu").model.state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def loaded(weights: Path) -> Loaded:
    return load(CHAT, checkpoint=str(weights), device="cpu")


@contextlib.contextmanager
def serving(*arguments: str) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    """The command in a process of its own, and its port."""
    port = free_port()
    command = [sys.executable, "-m", "lavis_lite", "serve", "--device", "cpu", "--port", str(port), *arguments]
    process = subprocess.Popen(command, cwd=cli_helpers.ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert f"http://127.0.0.1:{port}/v1" in line, line + process.communicate()[1]
        yield port, process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def port(weights: Path) -> Iterator[int]:
    with serving("--model", CHAT, "--checkpoint", str(weights), "--max-mib", "1") as (port, _):
        yield port


def ask(port: int, content: Any, path: str = "/v1/chat/completions", **headers: str) -> tuple[int, Any]:
    """Status and body of a POST request, or of a GET one without a content."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    sent = content if content is None or isinstance(content, bytes) else json.dumps(content).encode()
    how = {"Content-Type": "application/json", "Authorization": "Bearer none", **headers}
    connection.request("GET" if content is None else "POST", path, body=sent, headers=how)
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, text if response.headers["content-type"].startswith("text") else json.loads(text)


def texts_of(answer: Any) -> list[str]:
    return [choice["message"]["content"] for choice in answer["choices"]]


@pytest.mark.slow
def test_the_models_and_the_health(port: int) -> None:
    assert ask(port, None, "/health") == (200, {"status": "ok", "model": CHAT, "waiting": 0})
    status, models = ask(port, None, "/v1/models")
    assert status == 200
    assert models["object"] == "list"
    (model,) = models["data"]
    assert (model["id"], model["object"], model["owned_by"]) == (CHAT, "model", "lavis_lite")
    assert ask(port, None, f"/v1/models/{CHAT}") == (200, model)


@pytest.mark.slow
def test_an_answer_is_the_models_own(port: int, loaded: Loaded) -> None:
    """Of a question, and of one after another, as `Conversation` gives them; PNG keeps the pixels."""
    conversation = Conversation(loaded)
    item = Item(name="noise", image=NOISE)
    conversation.image = loaded.process_image(item.image)[None]
    status, answer = ask(port, body(model=CHAT))
    assert status == 200
    assert (answer["object"], answer["model"]) == ("chat.completion", CHAT)
    assert answer["id"].startswith("chatcmpl-")
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": conversation.ask("what is it"), "refusal": None}
    assert (choice["index"], choice["finish_reason"]) == (0, "length"), "random weights seldom end a text"
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] > 0
    again = body()
    again["messages"] += [
        {"role": "assistant", "content": texts_of(answer)[0]},
        {"role": "user", "content": "and its colour"},
    ]
    status, answer = ask(port, again)
    assert (status, texts_of(answer)) == (200, [conversation.ask("and its colour")])


@pytest.mark.slow
def test_settings_reach_the_model(port: int, loaded: Loaded) -> None:
    samples = {"image": loaded.process_image(NOISE)[None], "prompt": "what is it"}
    with torch.no_grad():
        greedy = loaded.model.generate(samples, num_beams=1, max_new_tokens=6)[0].strip()
    status, answer = ask(port, body(temperature=0, max_tokens=6))
    assert (status, texts_of(answer)) == (200, [greedy])
    drawn = [texts_of(ask(port, body(temperature=1.5, n=3, seed=seed, max_tokens=8))[1]) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0]) == 3
    assert len(set(drawn[0])) > 1
    status, answer = ask(port, body("", max_completion_tokens=8))  # without a text: a caption
    caption = CaptionPipeline(loaded)(NOISE, max_new_tokens=8)["caption"].strip()
    assert (status, texts_of(answer)) == (200, [caption])


@pytest.mark.slow
def test_a_stream_has_the_same_text(port: int) -> None:
    whole = texts_of(ask(port, body(temperature=1, n=2, seed=3))[1])
    status, text = ask(port, body(temperature=1, n=2, seed=3, stream=True, stream_options={"include_usage": False}))
    assert status == 200
    events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert events.pop() == "[DONE]"
    parts = [json.loads(event) for event in events]
    assert {one["object"] for one in parts} == {"chat.completion.chunk"}
    found, roles = ["", ""], ["", ""]
    for one in parts:
        (choice,) = one["choices"]
        found[choice["index"]] += choice["delta"].get("content", "")
        roles[choice["index"]] += choice["delta"].get("role", "")
    assert (found, roles) == (whole, ["assistant", "assistant"])
    assert len(parts) > 4, "in several pieces"
    reasons = [one["choices"][0]["finish_reason"] for one in parts]
    assert [reason for reason in reasons if reason] == reasons[-2:] == ["length", "length"]


def bomb() -> str:
    """A PNG of 30,000 x 30,000 pixels, whose file has a few kilobytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4) + kind + content + zlib.crc32(kind + content).to_bytes(4)

    head = (30_000).to_bytes(4) * 2 + bytes([1, 0, 0, 0, 0])
    packed = zlib.compress(bytes(3751) * 100)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def of_image(url: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [part(url), {"type": "text", "text": "what"}]}]}


@pytest.mark.slow
def test_mistakes_have_openais_form(port: int) -> None:
    large = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (700, 700, 3), dtype=np.uint8)))
    for content, status, words in (
        (body(model="gpt-4o"), 404, ["gpt-4o", CHAT]),
        (b"{", 400, ["not JSON"]),
        (b"[" * 100_000, 400, ["not JSON"]),
        (b"\xff\xfe", 400, ["not JSON"]),
        (of_image(bomb()), 400, ["pixels"]),
        (of_image("data:image/png;base64,@@"), 400, ["base64"]),
        (of_image(encoded()[:-400]), 400, ["broken"]),
        (of_image("data:text/html,hello"), 400, ["broken"]),
        (of_image("https://example.org/a.png"), 400, ["--allow-urls"]),
        (of_image("file:///etc/passwd"), 400, ["data: URL"]),
        (of_image(large), 413, ["1,048,576 bytes"]),
        (body(max_tokens=10**6), 400, ["max_tokens"]),
        (body("word " * 1000, max_tokens=4), 400, ["token"]),
        (body(tools=[{"type": "function"}]), 400, ["tools"]),
    ):
        found, answer = ask(port, content)
        assert found == status, (words, answer)
        error = answer["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
        assert not [word for word in words if word not in error["message"]], error
    assert ask(port, body(), **{"Content-Type": "text/plain"})[0] == 415
    assert ask(port, None)[0] == 405
    status, answer = ask(port, {}, "/v1/completions")
    assert status == 404
    assert "/v1/chat/completions" in answer["error"]["message"]
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    chunks = (b" " * 2**16 for _ in range(40))  # without a length in its head
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        connection.request("POST", "/v1/chat/completions", chunks, {"Content-Type": "application/json"})
    assert connection.getresponse().status == 413
    assert ask(port, body())[0] == 200, "the server goes on"


@pytest.mark.slow
def test_a_signal_ends_the_command(weights: Path) -> None:
    with serving("--model", "blip_vqa/tiny", "--name", "vqa") as (port, process):
        status, answer = ask(port, body("what colour is it", model="vqa"))
        assert (status, answer["model"]) == (200, "vqa")
        assert ask(port, body(""))[1]["error"]["message"].startswith("messages: has no question")
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 143
        assert "Traceback" not in errors, errors


# Without a process


def request(text: str = "what", **more: Any) -> ChatRequest:
    return ChatRequest(model=None, image_url="", text=text, rounds=[], **more)


def test_requests_that_wait_share_a_batch(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those with the same settings, up to the batch size; others follow; each gets its own texts."""
    worker = Worker(loaded, max_waiting=8, max_batch=3)
    sizes, before = [], worker.pipeline.stream

    def stream(items: Any, **settings: Any) -> Any:
        sizes.append(len(items))
        return before(items, **settings)

    monkeypatch.setattr(worker.pipeline, "stream", stream)
    asked = [request(f"what is {word}", decoding={"num_beams": 1}) for word in ("this", "that", "red", "blue")]
    asked.append(request("what is this", decoding={"num_beams": 2}))
    drawn = {"use_nucleus_sampling": True, "temperature": 1.0, "top_p": 1.0}
    asked += [request("what is this", decoding=drawn, num_choices=2, seed=seed) for seed in (5, 5)]
    futures = [worker.submit(one, NOISE).done for one in asked]
    cancelled = worker.submit(asked[0], NOISE)
    cancelled.cancel()
    assert cancelled.done.cancelled()
    with pytest.raises(RequestError, match="8 requests wait already") as full:
        worker.submit(request(), NOISE)
    assert (full.value.status, full.value.to_json()["error"]["type"]) == (429, "rate_limit_error")
    with worker:
        found = [future.result(timeout=120) for future in futures]
    assert sizes == [3, 1, 1, 2, 2]
    assert found[5] == found[6]
    assert len(found[5]) == 2
    alone = Worker(loaded, max_waiting=8, max_batch=1)
    with alone:
        assert [alone.submit(one, NOISE).done.result(timeout=120) for one in asked[:5]] == found[:5]


def test_a_failure_ends_its_batch_only(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(loaded, max_waiting=8, max_batch=1)
    with worker:
        with pytest.raises(RequestError, match="num_beams") as refused:
            worker.submit(request(decoding={"num_beams": 0}), NOISE).done.result(timeout=60)
        assert refused.value.status == 400
        with monkeypatch.context() as patch:
            patch.setattr(worker.pipeline, "stream", lambda *a, **k: 1 / 0)
            with pytest.raises(RequestError, match="log") as failed:
                worker.submit(request(), NOISE).done.result(timeout=60)
        assert failed.value.to_json()["error"]["type"] == "server_error"
        assert worker.submit(request(), NOISE).done.result(timeout=60)


def test_other_models_answer_in_their_own_way() -> None:
    vqa, caption = (load(f"{name}/tiny", device="cpu") for name in ("blip_vqa", "blip_caption"))
    with Worker(vqa, max_waiting=1, max_batch=1) as worker:
        answer = AskPipeline(vqa)(NOISE, question="what colour")["answer"]
        (written,) = worker.submit(request("what colour"), NOISE).done.result(timeout=60)
        assert written.text == answer.strip()
        with pytest.raises(RequestError, match="single questions"):
            worker.submit(ChatRequest(model=None, image_url="", text="b", rounds=[("a", "b")]), NOISE)
    with Worker(caption, max_waiting=1, max_batch=1) as worker:
        for text, given in (("", {}), ("a photo of", {"prompt": "a photo of"})):
            (written,) = worker.submit(request(text), NOISE).done.result(timeout=60)
            assert written.text == CaptionPipeline(caption)(NOISE, **given)["caption"].strip()
    with pytest.raises(ValueError, match="writes no texts"):
        kind_of(load("blip_image_text_matching/tiny", device="cpu"))


USER = {"role": "user", "content": [part("data:,x")]}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "system", "content": "be kind"}, USER]}, "messages[0].role"),
        ({"messages": [USER, USER]}, "messages[1].role"),
        ({"messages": [USER, {"role": "assistant", "content": "a"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "no image"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [part("data:,x"), part("data:,x")]}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [part("data:,x"), {"type": "text", "text": "a" * 9000}]}]},
            "messages",
        ),
        ({"model": 3}, "model"),
        ({"n": 3}, "n"),
        ({"n": 17, "temperature": 1}, "n"),
        ({"n": True}, "n"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": "1"}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"stream": "yes"}, "stream"),
        ({"stop": ["."]}, "stop"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"num_beams": 3}, "num_beams"),
        ({"max_tokens": 2, "min_tokens": 5}, "min_tokens"),
        ({"\ud800": 1}, "\ud800"),
    ],
)
def test_a_mistake_names_its_field(change: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as error:
        read_request({"messages": [USER], **change})
    assert (error.value.status, error.value.param) == (400, param)
    assert json.dumps(error.value.to_json(), ensure_ascii=False).encode()


def test_fields_become_settings() -> None:
    found = read_request({"messages": [USER], "stop": None, "user": "me", "presence_penalty": 0, "tools": []})
    assert (found.decoding, found.num_choices, found.stream, found.text) == ({}, 1, False, "")
    assert read_request({"messages": [USER], "temperature": 0}).decoding == {"num_beams": 1}
    drawn = read_request({"messages": [USER], "top_p": 0.5, "max_tokens": 9, "min_tokens": 2, "n": 2})
    assert drawn.decoding == {
        "use_nucleus_sampling": True,
        "temperature": 1.0,
        "top_p": 0.5,
        "max_new_tokens": 9,
        "min_new_tokens": 2,
    }


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "10.1.2.3", "169.254.169.254", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0", "2130706433"],
)
def test_addresses_of_this_machine_are_not_fetched(host: str) -> None:
    with pytest.raises(RequestError, match="public internet"):
        images.image_of(f"http://{host}:80/a.png", allow_urls=True, max_bytes=100)


def test_an_image_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    content = base64.b64decode(encoded().partition(",")[2])

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response({"/a.png": 200, "/moved": 302}.get(self.path, 404))
            if self.path == "/moved":
                self.send_header("Location", "/a.png")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(images, "check_public", lambda url: None)
        image = images.image_of(f"{address}/a.png", allow_urls=True, max_bytes=10**6)
        assert np.array_equal(np.asarray(image), np.asarray(NOISE))
        for path, most, word in (
            ("/a.png", 100, "more than 100 bytes"),
            ("/moved", 10**6, "302"),
            ("/b", 10**6, "404"),
        ):
            with pytest.raises(RequestError, match=word):
                images.image_of(f"{address}{path}", allow_urls=True, max_bytes=most)
        server.shutdown()
