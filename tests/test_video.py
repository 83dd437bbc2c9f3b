"""Videos: which frames are taken and how they are processed, against files whose every frame is known.

The files are AVIs written here: MJPEG, whose frames are JPEGs, and ZMBV, which is lossless and whose frames are XORed
with the ones before them, so that a frame reached by a wrong seek is nothing like the right one.
"""

import io
import json
import random
import struct
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lavis_lite.common import video_io
from lavis_lite.common.errors import UnreadableSample
from lavis_lite.common.registry import registry
from lavis_lite.datasets.processing import identity
from lavis_lite.datasets.video import read_frames, record_part
from lavis_lite.models import load_model_and_preprocess, load_preprocess
from lavis_lite.processors import load_processor

pytest.importorskip("decord", reason="there is no decord for this machine")

WIDTH, HEIGHT, KEY_EVERY = 40, 24, 4
Packets = list[tuple[bytes, bool]]


@pytest.fixture(autouse=True)
def kept_generators() -> Iterator[None]:
    """Leaves python's, numpy's and torch's generators as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        yield
    random.setstate(python)
    np.random.set_state(numpy)


# writing videos


def noise(count: int) -> list[np.ndarray]:
    """Frames (H,W,3) of noise, redder and less blue with each."""
    drawn = np.random.default_rng(0).integers(0, 100, (count, HEIGHT, WIDTH, 3))
    drawn[..., 0] += np.arange(count)[:, None, None] * 150 // count
    drawn[..., 2] += 150 - np.arange(count)[:, None, None] * 150 // count
    return list(drawn.astype(np.uint8))


def zmbv(images: Sequence[np.ndarray]) -> Packets:
    """One packet a frame: 32 bits a pixel; a key frame, or one block that stays in place, XORed with the last frame."""
    packets, deflate, last = [], zlib.compressobj(), None
    for number, image in enumerate(images):
        pixels = np.concatenate([image[..., ::-1], np.zeros_like(image[..., :1])], axis=2)
        is_key = number % KEY_EVERY == 0
        if is_key:
            deflate = zlib.compressobj()
            head, body = bytes([1, 0, 1, 1, 8, WIDTH, HEIGHT]), pixels.tobytes()
        else:
            head, body = bytes([0]), bytes([1, 0, 0, 0]) + (pixels ^ last).tobytes()
        packets.append((head + deflate.compress(body) + deflate.flush(zlib.Z_SYNC_FLUSH), is_key))
        last = pixels
    return packets


def mjpeg(images: Sequence[np.ndarray]) -> Packets:
    packets = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=95, subsampling=0)
        packets.append((buffer.getvalue(), True))
    return packets


def chunk(name: bytes, *parts: bytes) -> bytes:
    data = b"".join(parts)
    return name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)


def avi(packets: Packets, codec: bytes, *, has_index: bool = True) -> bytes:
    """An AVI file at 10 frames a second."""
    count = len(packets)
    main = struct.pack("<14I", 100_000, 0, 0, 0x10, count, 0, 1, 0, WIDTH, HEIGHT, 0, 0, 0, 0)
    stream = b"vids" + codec + struct.pack("<10I4H", 0, 0, 0, 1, 10, 0, count, 0, 0xFFFFFFFF, 0, 0, 0, WIDTH, HEIGHT)
    bitmap = struct.pack("<IiiHH4s5I", 40, WIDTH, HEIGHT, 1, 32, codec, 0, 0, 0, 0, 0)
    head = [b"hdrl", chunk(b"avih", main), chunk(b"LIST", b"strl", chunk(b"strh", stream), chunk(b"strf", bitmap))]
    movie, index = b"movi", b""
    for data, is_key in packets:
        index += b"00dc" + struct.pack("<3I", 0x10 if is_key else 0, len(movie), len(data))
        movie += chunk(b"00dc", data)
    tail = chunk(b"idx1", index) if has_index else b""
    return chunk(b"RIFF", b"AVI ", chunk(b"LIST", *head), chunk(b"LIST", movie), tail)


def written(path: Path, images: Sequence[np.ndarray], **settings: Any) -> Path:
    path.write_bytes(avi(zmbv(images), b"ZMBV", **settings))
    return path


def pixels(image: Image.Image) -> Tensor:
    """A processor that changes nothing: (3,H,W) bytes."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


# which frames


@pytest.mark.parametrize(
    ("there", "asked", "numbers"),
    [
        (10, 4, [0, 2, 5, 7]),
        (100, 4, [0, 25, 50, 75]),
        (7, 3, [0, 2, 4]),
        (4, 4, [0, 1, 2, 3]),
        (9, 1, [0]),
        (1900, 19, list(range(0, 1900, 100))),
        (3, 4, [0, 0, 1, 2]),
        (1, 3, [0, 0, 0]),
    ],
)
def test_frames_are_spread_uniformly(there: int, asked: int, numbers: list[int]) -> None:
    assert video_io.sampled(there, asked, source="it") == numbers


@pytest.mark.parametrize("num_frames", [1, 4, 10])
def test_frames_are_those_written(tmp_path: Path, num_frames: int) -> None:
    """Bit for bit, red first, in time order."""
    images = noise(10)
    wanted = {1: [0], 4: [0, 2, 5, 7], 10: range(10)}[num_frames]
    clip = read_frames(written(tmp_path / "clip é.avi", images), num_frames, pixels)
    assert clip.shape == (3, num_frames, HEIGHT, WIDTH)
    expected = np.stack([images[number] for number in wanted], axis=0).transpose(3, 0, 1, 2)
    np.testing.assert_array_equal(clip.numpy(), expected)


def test_a_relative_name_with_a_colon_is_no_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "cut:1.avi", noise(4))
    assert read_frames(Path("cut:1.avi"), 4, pixels).shape == (3, 4, HEIGHT, WIDTH)


def test_frames_of_a_lossy_video(tmp_path: Path) -> None:
    ramp = np.add.outer(np.arange(HEIGHT), np.arange(WIDTH)).astype(np.uint8)
    images = [np.stack([ramp + 20 * i, 200 - ramp, ramp // 2 + 10], axis=2) for i in range(9)]
    path = tmp_path / "clip.avi"
    path.write_bytes(avi(mjpeg(images), b"MJPG"))
    clip = read_frames(path, 3, pixels)
    expected = np.stack([images[number] for number in (0, 3, 6)]).transpose(3, 0, 1, 2)
    np.testing.assert_allclose(clip.numpy().astype(int), expected.astype(int), atol=4)


def test_frames_are_right_where_decord_seeks_wrongly(tmp_path: Path) -> None:
    """Without an index every frame passes for a key frame, and decord's `get_batch` starts in the middle of a group."""
    images = noise(24)
    clip = read_frames(written(tmp_path / "clip.avi", images, has_index=False), 4, pixels)
    expected = np.stack([images[number] for number in (0, 6, 12, 18)]).transpose(3, 0, 1, 2)
    np.testing.assert_array_equal(clip.numpy(), expected)


def test_a_bridge_that_the_user_set_is_no_hindrance(tmp_path: Path) -> None:
    import decord

    path = written(tmp_path / "clip.avi", noise(5))
    expected = read_frames(path, 4, pixels)
    with decord.bridge.use_torch():
        assert torch.equal(read_frames(path, 4, pixels), expected)


class Clips(Dataset):
    """Video files as frames; -1 for an unreadable one."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        try:
            return read_frames(self.paths[index], 4, pixels)
        except UnreadableSample:
            return torch.tensor(-1)


def test_worker_processes_read_what_this_one_reads(tmp_path: Path) -> None:
    """After this process has read videos: what FFmpeg keeps must survive the fork."""
    images = noise(12)
    paths = [written(tmp_path / f"{i}.avi", images[i:]) for i in range(6)]
    paths.insert(3, tmp_path / "broken.avi")
    paths[3].write_bytes(paths[2].read_bytes()[:900])
    here = [Clips(paths)[i] for i in range(len(paths))]
    loader = DataLoader(Clips(paths), batch_size=None, num_workers=2, timeout=60, multiprocessing_context="fork")
    assert [torch.equal(ours, theirs) for ours, theirs in zip(here, loader, strict=True)] == [True] * 7
    assert here[3].tolist() == -1


# what cannot be read


def broken_at(number: int, count: int) -> bytes:
    packets = zmbv(noise(count))
    packets[number] = (b"\x05", False)
    return avi(packets, b"ZMBV")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: b"", "broken, truncated or of an unknown codec"),
        (lambda: b"no video" * 99, "broken, truncated or of an unknown codec"),
        (lambda: avi([], b"MJPG"), "broken, truncated or of an unknown codec"),
        (lambda: avi(zmbv(noise(10)), b"ZMBV")[:9000], r"EOFError: 9000 bytes of \d+"),
        (lambda: broken_at(3, 10), "DECORDError: Check failed: avcodec_send_packet"),
        (lambda: broken_at(199, 200), "DECORDError"),
    ],
    ids=["empty", "text", "no frames", "cut off", "broken", "broken behind the last frame"],
)
def test_an_unreadable_video_is_named(tmp_path: Path, content: Callable[[], bytes], message: str) -> None:
    path = tmp_path / "clip.avi"
    path.write_bytes(content())
    with pytest.raises(UnreadableSample, match=message) as caught:
        read_frames(path, 4, pixels)
    assert str(path) in str(caught.value)


@pytest.mark.slow
def test_a_short_clip_repeats_frames_or_is_an_error(tmp_path: Path) -> None:
    images = noise(3)
    path = written(tmp_path / "clip.avi", images)
    clip = read_frames(path, 4, pixels)
    expected = np.stack([images[number] for number in (0, 0, 1, 2)]).transpose(3, 0, 1, 2)
    np.testing.assert_array_equal(clip.numpy(), expected)
    with pytest.raises(UnreadableSample, match=r"clip\.avi has 3 frames, and num_frames=4: lower num_frames, or set"):
        read_frames(path, 4, pixels, short_clips="error")
    settings = {"image_size": 16, "short_clips": "error"}
    for video in (path, [Image.fromarray(image) for image in images]):
        assert load_processor("blip_video_eval", {"image_size": 16})(video).shape == (3, 4, 16, 16)
        with pytest.raises(ValueError, match="has 3 frames, and num_frames=4"):
            load_processor("blip_video_eval", settings)(video)
    with pytest.raises(ValueError, match="the list of frames has no frames"):
        load_processor("blip_video_eval")([])
    with pytest.raises(ValueError, match=r"short_clips: .*'loop'"):
        load_processor("blip_video_eval", {"short_clips": "loop"})([Image.fromarray(image) for image in images])


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_an_animation_is_a_video(tmp_path: Path, suffix: str) -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)]
    first, *others = (Image.new("RGB", (WIDTH, HEIGHT), colour) for colour in colours)
    path = tmp_path / f"clip.{suffix}"
    lossless = {"lossless": True} if suffix == "webp" else {}
    first.save(path, save_all=True, append_images=others, duration=50, **lossless)
    clip = read_frames(path, 3, pixels)
    assert clip.shape == (3, 3, HEIGHT, WIDTH)
    assert clip[:, :, 0, 0].T.tolist() == [list(colours[number]) for number in (0, 1, 3)]
    assert (clip == clip[..., :1, :1]).all()
    assert read_frames(path, 7, pixels)[:, :, 5, 5].T.tolist() == [list(colours[i * 5 // 7]) for i in range(7)]
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UnreadableSample, match=rf"clip\.{suffix}"):
        read_frames(path, 3, pixels)


def test_an_instruct_dataset_of_short_clips(tmp_path: Path) -> None:
    written(tmp_path / "a.avi", noise(3))
    (tmp_path / "train.json").write_text(json.dumps([{"video": "a.avi", "instruction": "what?", "output": "red"}]))

    def sample(**settings: Any) -> Any:
        builder = registry.get_builder_class("instruct")(
            build_info={
                "annotations": {"train": {"storage": str(tmp_path / "train.json")}},
                "videos": {"storage": str(tmp_path)},
            },
            vis_processor={"train": {"name": "blip_image_eval", "image_size": 16}},
            **settings,
        )
        return builder.build(["train"])["train"][0]

    assert sample()["image"].shape == (3, 4, 16, 16)
    with pytest.raises(UnreadableSample, match="short_clips: repeat"):
        sample(short_clips="error")
    with pytest.raises(ValueError, match=r"short_clips: .*'pad'"):
        sample(short_clips="pad")


def test_a_stream_whose_size_was_never_written_is_read(tmp_path: Path) -> None:
    path = written(tmp_path / "clip.avi", noise(8))
    whole, content = read_frames(path, 4, pixels), path.read_bytes()
    path.write_bytes(content[:4] + b"\xff" * 4 + content[8:])
    assert torch.equal(read_frames(path, 4, pixels), whole)


def test_a_missing_video(tmp_path: Path) -> None:
    with pytest.raises(UnreadableSample, match=r"video file not found: .*gone\.mp4\. Check the dataset's build_info"):
        read_frames(tmp_path / "gone.mp4", 4, pixels)
    with pytest.raises(UnreadableSample, match="video file not found"):
        read_frames(tmp_path, 4, pixels)
    with pytest.raises(FileNotFoundError, match=r"video file not found: .*gone\.mp4"):
        load_processor("blip_video_eval")(tmp_path / "gone.mp4")


def test_decord_is_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "decord", None)
    monkeypatch.setitem(sys.modules, "av", None)
    images = [Image.fromarray(image) for image in noise(4)]
    processor = load_processor("blip_video_eval", {"image_size": 16})
    assert processor(images).shape == (3, 4, 16, 16)
    with pytest.raises(ImportError, match="reading videos needs decord or av: `pip install decord`"):
        read_frames(written(tmp_path / "clip.avi", noise(4)), 4, pixels)


# processing


def test_all_frames_get_the_same_crop_and_operations(tmp_path: Path) -> None:
    picture = np.add.outer(np.arange(HEIGHT) * 5, np.arange(WIDTH) * 3)
    still = written(
        tmp_path / "still.avi", [np.stack([picture, 255 - picture, picture // 2], axis=2).astype(np.uint8)] * 4
    )
    processor = load_processor("blip_video_train", {"image_size": 16, "min_scale": 0.2})
    clips = []
    for seed in range(8):
        torch.manual_seed(seed)
        clips.append(processor(still))
        assert torch.equal(clips[-1], clips[-1][:, :1].expand(-1, 4, -1, -1))
    assert len({clip.numpy().tobytes() for clip in clips}) == 8


def test_one_frame_s_worth_of_randomness_is_used() -> None:
    """Whatever generator a processor draws from, every frame sees the same numbers, and the next video others."""
    images = [Image.fromarray(image) for image in noise(3)]

    def drawn(_: Image.Image) -> Tensor:
        return torch.tensor([random.random(), np.random.random(), torch.rand(()).item()])[:, None, None]

    first, second = video_io.processed(images, drawn), video_io.processed(images, drawn)
    assert first.shape == (3, 3, 1, 1)
    assert all(len(set(row)) == 1 for row in first.flatten(1).tolist())
    assert not (first == second).any()


def test_video_processors_do_to_frames_what_image_processors_do(tmp_path: Path) -> None:
    images = noise(10)
    path, listed = written(tmp_path / "clip.avi", images), [Image.fromarray(image) for image in images]
    settings = {"image_size": 16, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2]}
    one = load_processor("blip_image_eval", settings)
    clip = load_processor("blip_video_eval", settings)(str(path))
    expected = torch.stack([one(listed[number]) for number in (0, 2, 5, 7)], dim=1)
    assert torch.equal(clip, expected)
    assert torch.equal(load_processor("blip_video_eval", settings)(listed), expected)
    assert torch.equal(read_frames(path, 4, one), expected)
    settings |= {"hflip": False, "num_ops": 1}
    torch.manual_seed(3)
    trained = load_processor("blip_video_train", settings | {"num_frames": 2})(path)
    for number, image in enumerate((listed[0], listed[5])):
        torch.manual_seed(3)
        assert torch.equal(trained[:, number], load_processor("blip_image_train", settings)(image))


def test_video_processors_refuse_what_is_no_video() -> None:
    images = [Image.fromarray(image) for image in noise(3)]
    processor = load_processor("blip_video_eval")
    with pytest.raises(TypeError, match=r"takes a video's path or a list of PIL images, got Image"):
        processor(images[0])
    with pytest.raises(ValueError, match="num_frames: must be a whole number from 1 to 10,000, got 0"):
        load_processor("blip_video_eval", {"num_frames": 0})
    with pytest.raises(ValueError, match="num_frames: must be a whole number from 1 to 10,000, got 1000000"):
        video_io.sampled(3, 1_000_000, source="it")
    with pytest.raises(ValueError, match=r"vis_processor .*Image"):
        video_io.processed(images, identity)
    for name in ("blip_video_eval", "blip_video_train"):
        with pytest.raises(ValueError, match=r"num_frame.*num_frames"):
            load_preprocess({"vis_processor": {"eval": {"name": name, "num_frame": 8}}})


# models


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["blip2_vicuna_instruct", "blip2_t5_instruct"])
def test_an_instruct_model_answers_about_a_clip(arch: str, tmp_path: Path) -> None:
    path = written(tmp_path / "clip.avi", noise(10))
    torch.manual_seed(0)
    model, vis_processors, _ = load_model_and_preprocess(arch, "tiny", is_eval=True)
    clip = load_processor("blip_video_eval", {"image_size": 48})(path)[None]
    assert torch.equal(clip[0], read_frames(path, 4, vis_processors["eval"]))
    asked = {"image": clip, "prompt": "what color is the square?"}
    each = [model.image_embeds({"image": clip[:, :, number]}, [asked["prompt"]]) for number in range(4)]
    torch.testing.assert_close(model.image_embeds(asked, [asked["prompt"]]), torch.cat(each, dim=1))
    (answer,) = model.generate(asked, max_length=6, num_beams=2)
    assert isinstance(answer, str)
    colors = ["red", "green", "blue"]
    losses = model.class_losses(asked, colors)
    assert model.predict_class(asked, colors)[0].tolist() == losses[0].argsort().tolist()
    backwards = model.class_losses(asked | {"image": clip.flip(2)}, colors)
    assert not torch.allclose(losses, backwards)


def test_an_instruct_dataset_of_videos_is_learned(tmp_path: Path) -> None:
    for number in range(2):
        written(tmp_path / f"{number}.avi", noise(8 + number))
    records = [{"video": f"{i}.avi", "instruction": "what color is it?", "output": "red"} for i in range(2)]
    (tmp_path / "train.json").write_text(json.dumps(records))
    builder = registry.get_builder_class("instruct")(
        build_info={
            "annotations": {"train": {"storage": str(tmp_path / "train.json")}},
            "images": {"storage": str(tmp_path)},
        },
        vis_processor={"train": {"name": "blip2_image_train", "image_size": 48}},
        num_frames=3,
    )
    dataset = builder.build(["train"])["train"]
    batch = dataset.collater([dataset[0], dataset[1]])
    assert batch["image"].shape == (2, 3, 3, 48, 48)
    model, *_ = load_model_and_preprocess("blip2_t5_instruct", "tiny")
    model(batch)["loss"].backward()
    assert model.query_tokens.grad.abs().sum() > 0


@pytest.fixture
def animation(tmp_path: Path) -> Path:
    """Eight frames of 250 ms; frame i is of the grey 30 i."""
    frames = [Image.new("RGB", (16, 16), (30 * i,) * 3) for i in range(8)]
    frames[0].save(tmp_path / "clip.png", save_all=True, append_images=frames[1:], duration=250)
    return tmp_path / "clip.png"


def greys(clip: torch.Tensor) -> list[int]:
    return [round(255 * float(value)) for value in clip[0, :, 0, 0]]


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [(None, None, [0, 60, 120, 180]), (1.0, None, [120, 150, 180, 210]), (0.5, 1.5, [60, 90, 120, 150])],
)
def test_lavis_s_video_processor_reads_the_record_s_part(
    start: float | None, end: float | None, expected: list[int], animation: Path
) -> None:
    keys = {"n_frms": 4, "image_size": 16, "mean": [0, 0, 0], "std": [1, 1, 1]}
    process = load_processor("alpro_video_eval", {**keys, "full_video": False})
    part = record_part({"video": "clip.png", "start_sec": start, "end": end})
    assert greys(read_frames(animation, 9, process, part=part)) == expected
    assert greys(load_processor("alpro_video_eval", keys)(animation)) == [0, 60, 120, 180]


def test_a_part_outside_the_video_is_an_unreadable_sample(animation: Path) -> None:
    process = load_processor("alpro_video_train", {"image_size": 16, "full_video": False})
    with pytest.raises(UnreadableSample, match=r"clip\.png lasts 2\.0 s: it has no part of 2\.5 s to 3\.0 s"):
        read_frames(animation, 4, process, part=(2.5, 3.0))
    with pytest.raises(ValueError, match=r"clip\.png: start and end must be seconds, got 'soon'"):
        record_part({"video": "clip.png", "start": "soon"})


# other packages than decord


def encoded(path: Path, codec: str, *, size: tuple[int, int] = (64, 48), is_vfr: bool = False) -> Path:
    """A clip of 20 frames written by PyAV; with `is_vfr` of uneven durations."""
    av = pytest.importorskip("av")
    width, height = size
    ramp = np.add.outer(np.arange(height) * 3, np.arange(width) * 2)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        if is_vfr:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(20):
            image = np.stack([ramp + 10 * number, 255 - ramp, ramp * number], axis=2) % 256
            frame = av.VideoFrame.from_ndarray(image.astype(np.uint8), format="rgb24")
            if is_vfr:
                frame.pts, frame.time_base = 40 * number + 9 * (number % 4), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    ("name", "codec", "settings"),
    [
        ("a.mp4", "libx264", {}),
        ("odd.mp4", "libx264", {"size": (70, 46)}),
        ("vfr.mp4", "libx264", {"is_vfr": True}),
        ("a.avi", "mpeg4", {}),
        ("h264.avi", "libx264", {}),
    ],
)
def test_both_packages_read_the_same_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, codec: str, settings: dict[str, Any]
) -> None:
    path, clips = encoded(tmp_path / name, codec, **settings), []
    for package in ("decord", "av"):
        monkeypatch.setenv("LAVIS_LITE_VIDEO", package)
        clips.append(read_frames(path, 7, pixels))
        clips.append(read_frames(path, 20, pixels))
        clips.append(torch.stack([pixels(image) for image in video_io.decode(path, 3, part=(0.5, 1.2))]))
    for by_decord, by_av in zip(clips[:3], clips[3:], strict=True):
        assert torch.equal(by_decord, by_av)
    assert len({bytes(clips[1][:, number].numpy()) for number in range(20)}) == 20


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_both_packages_turn_a_clip_upright(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, degrees: int) -> None:
    path = encoded(tmp_path / "a.mp4", "libx264")
    content = bytearray(path.read_bytes())
    cos, sin = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    at = content.index(b"tkhd") + 44  # the track's matrix
    content[at : at + 36] = struct.pack(">9i", *(65536 * n for n in (cos, sin, 0, -sin, cos, 0, 0, 0)), 2**30)
    path.write_bytes(content)
    clips = []
    for package in ("decord", "av"):
        monkeypatch.setenv("LAVIS_LITE_VIDEO", package)
        clips.append(read_frames(path, 4, pixels))
    assert clips[0].shape == ((3, 4, 48, 64) if degrees == 180 else (3, 4, 64, 48))
    assert torch.equal(*clips)


def test_the_other_package_reads_what_decord_does_not_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AV1, and all videos where there is no decord."""
    path = encoded(tmp_path / "a.mp4", "libx264")
    expected = read_frames(path, 4, pixels)
    try:
        unknown = encoded(tmp_path / "a.mkv", "libsvtav1")
    except Exception as error:
        pytest.skip(f"PyAV cannot write AV1 here: {error}")
    assert read_frames(unknown, 5, pixels).shape == (3, 5, 48, 64)
    monkeypatch.setenv("LAVIS_LITE_VIDEO", "decord")
    with pytest.raises(UnreadableSample, match=r"unknown codec: .*a\.mkv .*DECORDError"):
        read_frames(unknown, 5, pixels)
    monkeypatch.setenv("LAVIS_LITE_VIDEO", "ffmpeg")
    with pytest.raises(ValueError, match=r"LAVIS_LITE_VIDEO: .*decord or av.*'ffmpeg'"):
        read_frames(path, 4, pixels)
    monkeypatch.delenv("LAVIS_LITE_VIDEO")
    monkeypatch.setitem(sys.modules, "decord", None)
    assert torch.equal(read_frames(path, 4, pixels), expected)
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(UnreadableSample, match=r"a\.mp4"):
        read_frames(path, 4, pixels)
