"""Every kind of image opens as 8-bit RGB; missing, broken and hostile files are named."""

import contextlib
import copy
import json
import os
import subprocess
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageFile

from lavis_lite.common.errors import UnreadableSample
from lavis_lite.common.image_io import to_rgb
from lavis_lite.common.registry import registry
from lavis_lite.datasets.image import open_image


def colours(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.fixture
def picture() -> Image.Image:
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[:, :15] = (200, 40, 40)
    pixels[:, 15:] = (40, 60, 220)
    return Image.fromarray(pixels)


def test_one_pixel(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1), (7, 8, 9)).save(tmp_path / "a.png")
    assert colours(open_image(tmp_path / "a.png")).tolist() == [[[7, 8, 9]]]


def test_grey_and_cmyk(tmp_path: Path, picture: Image.Image) -> None:
    Image.new("L", (2, 2), 77).save(tmp_path / "l.png")
    assert (colours(open_image(tmp_path / "l.png")) == 77).all()
    picture.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    opened = colours(open_image(tmp_path / "cmyk.jpg")).astype(int)
    assert abs(opened - np.asarray(picture)).max() < 12
    Image.new("1", (2, 2), 1).save(tmp_path / "bit.png")
    assert (colours(open_image(tmp_path / "bit.png")) == 255).all()


def first(path: Path, **settings: Any) -> list[list[int]]:
    """The pixels of the first row."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return colours(open_image(path, **settings))[0].tolist()


def transparent(kind: str) -> tuple[Image.Image, dict[str, Any]]:
    """An image of three pixels that are red, or grey of value 100: opaque, 100 of 255 and transparent."""
    if kind == "RGBA":
        image = Image.new("RGBA", (3, 1))
        image.putdata([(255, 0, 0, 255), (255, 0, 0, 100), (255, 0, 0, 0)])
        return image, {}
    if kind == "LA":
        image = Image.new("LA", (3, 1))
        image.putdata([(100, 255), (100, 100), (100, 0)])
        return image, {}
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0] * 3)
    image.putdata([0, 1, 2])
    return image, {"transparency": bytes([255, 100, 0])}


@pytest.mark.parametrize(
    ("kind", "suffix"),
    [("RGBA", "png"), ("RGBA", "tif"), ("RGBA", "webp"), ("LA", "png"), ("LA", "tif"), ("LA", "webp"), ("P", "png")],
)
def test_transparency_is_composited(tmp_path: Path, kind: str, suffix: str) -> None:
    """By hand: 100 of 255 of the colour and 155 of 255 of the background."""
    image, settings = transparent(kind)
    lossless = {"lossless": True, "exact": True} if suffix == "webp" else {}
    image.save(tmp_path / f"a.{suffix}", **settings, **lossless)
    red, grey = [255, 0, 0], [100, 100, 100]
    colour = grey if kind == "LA" else red
    mixed = {
        "white": [194, 194, 194] if kind == "LA" else [255, 155, 155],
        "black": [39] * 3 if kind == "LA" else [100, 0, 0],
    }
    path = tmp_path / f"a.{suffix}"
    assert first(path) == [colour, mixed["white"], [255, 255, 255]]
    assert first(path, background="black") == [colour, mixed["black"], [0, 0, 0]]
    assert first(path, background="ignore_alpha") == [colour] * 3  # LAVIS's: what colour lies under it shows


@pytest.mark.parametrize(("mode", "value"), [("RGB", (7, 8, 9)), ("L", 7), ("1", 0)])
def test_a_transparent_colour_is_composited(tmp_path: Path, mode: str, value: Any) -> None:
    """PNG's third way beside alpha and palettes: one colour that is transparent."""
    Image.new(mode, (1, 1), value).save(tmp_path / "a.png", transparency=value)
    assert first(tmp_path / "a.png") == [[255, 255, 255]]
    assert first(tmp_path / "a.png", background="#010203") == [[1, 2, 3]]


def test_a_transparent_gif(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    image.save(tmp_path / "a.gif", transparency=0)
    assert first(tmp_path / "a.gif") == [[255, 255, 255], [0, 0, 255]]


@pytest.mark.parametrize(
    "mode",
    [
        "1",
        "L",
        "LA",
        "La",
        "P",
        "PA",
        "RGB",
        "RGBA",
        "RGBa",
        "RGBX",
        "CMYK",
        "YCbCr",
        "LAB",
        "HSV",
        "I",
        "F",
        "I;16",
        "I;16B",
    ],
)
def test_every_mode_of_pillow(mode: str) -> None:
    for background in ("white", "ignore_alpha"):
        assert to_rgb(Image.new(mode, (2, 3)), background=background).size == (2, 3)


def test_opaque_rgb_is_converted_once() -> None:
    image = Image.new("RGB", (4, 4))
    assert to_rgb(image) is image


def floats(path: Path, *values: float) -> Path:
    Image.fromarray(np.array([values], np.float32)).save(path)
    return path


def test_floats_and_wide_integers_are_scaled_by_their_range(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    assert first(floats(path, 0, 0.5, 1)) == [[0] * 3, [128] * 3, [255] * 3]
    assert first(floats(path, 0, 0.5, 128, 255)) == [[0] * 3, [0] * 3, [128] * 3, [255] * 3]
    for values, dark in (((0, 128, 255), 128), ((0, 128 * 257, 65535), 128)):
        Image.fromarray(np.array([values], np.int32)).save(path)
        assert first(path) == [[0] * 3, [dark] * 3, [255] * 3]


@pytest.mark.parametrize("values", [(0, np.nan, 1), (0, np.inf), (-1, 1), (0, 65535)])
def test_floats_outside_the_ranges_are_an_error(tmp_path: Path, values: tuple[float, ...]) -> None:
    with pytest.raises(UnreadableSample, match=r"a\.tif.*floats go from .* expected 0 to 1 or 0 to 255"):
        open_image(floats(tmp_path / "a.tif", *values))


@pytest.mark.parametrize("values", [(-1, 5), (0, 65536)])
def test_integers_outside_the_ranges_are_an_error(tmp_path: Path, values: tuple[int, ...]) -> None:
    Image.fromarray(np.array([values], np.int32)).save(tmp_path / "a.tif")
    with pytest.raises(UnreadableSample, match=r"a\.tif.*integers go from .* expected 0 to 255 or 0 to 65535"):
        open_image(tmp_path / "a.tif")


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_is_scaled_not_clipped(tmp_path: Path, suffix: str) -> None:
    values = np.array([[0, 257, 128 * 257, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / f"deep.{suffix}")
    assert colours(open_image(tmp_path / f"deep.{suffix}"))[0, :, 1].tolist() == [0, 1, 128, 255]


def test_animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue", "green")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert colours(open_image(tmp_path / "a.gif"))[0, 0].tolist() == [255, 0, 0]


def test_exif_orientation_is_ignored(tmp_path: Path, picture: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (30, 20)


def test_a_jpeg_of_several_pictures_gives_the_first(tmp_path: Path, picture: Image.Image) -> None:
    """An MPO, as phones write it."""
    picture.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[Image.new("RGB", picture.size)])
    assert abs(colours(open_image(tmp_path / "a.jpg"))[2, 2].astype(int) - (200, 40, 40)).max() < 12


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnreadableSample, match=r"not found: .*nowhere\.jpg.*LAVIS_LITE_DATA"):
        open_image(tmp_path / "nowhere.jpg")


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "bmp", "tif", "webp"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.6, 0.9])
def test_truncated_files_are_named(tmp_path: Path, suffix: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    path = tmp_path / f"cut.{suffix}"
    Image.fromarray(noise).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    with pytest.raises(UnreadableSample, match=rf"cut\.{suffix}"):
        open_image(path)


def test_other_files_and_folders_are_named(tmp_path: Path) -> None:
    (tmp_path / "page.jpg").write_text("<html>404</html>")
    with pytest.raises(UnreadableSample, match=r"page\.jpg .*JPEG.*PNG"):
        open_image(tmp_path / "page.jpg")
    with pytest.raises(UnreadableSample, match="not a regular file"):
        open_image(tmp_path)
    with pytest.raises(ValueError, match="page"):  # so that callers need not know our class
        open_image(tmp_path / "page.jpg")
    for name in ("nul\0.jpg", "half an emoji \ud83d.jpg", "long" * 100):
        with pytest.raises(UnreadableSample):
            open_image(tmp_path / name)


def test_an_eps_is_not_given_to_ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named .jpg; a stand-in `gs` on the PATH would leave a file."""
    gs = tmp_path / "gs"
    gs.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    gs.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    path = tmp_path / "a.jpg"
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n")
    with Image.open(path) as image, contextlib.suppress(OSError, subprocess.CalledProcessError):
        image.load()
    assert (tmp_path / "ran").exists(), "Pillow alone runs it"
    (tmp_path / "ran").unlink()
    with pytest.raises(UnreadableSample, match="of another kind"):
        open_image(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
def test_a_named_pipe_or_device_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jpg")
    for path in (tmp_path / "a.jpg", Path("/dev/null")):
        with pytest.raises(UnreadableSample, match="not a regular file"):
            open_image(path)
    (tmp_path / "b.png").symlink_to(tmp_path / "c.png")
    Image.new("RGB", (1, 1)).save(tmp_path / "c.png")
    assert open_image(tmp_path / "b.png").size == (1, 1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_large_images_are_refused_before_they_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    Image.new("L", (13_000, 13_000)).save(path)
    assert path.stat().st_size < 300_000
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("decoded"))
    with pytest.raises(UnreadableSample, match=r"a\.png.*13000 x 13000 pixels, more than max_pixels=120,000,000"):
        open_image(path)
    Image.new("L", (20_000, 20_000)).save(path)
    with pytest.raises(UnreadableSample, match=r"a\.png.*max_pixels is 120,000,000"):
        open_image(path)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_limit_is_a_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # Pillow's own is lower
    Image.new("RGB", (10, 10)).save(tmp_path / "a.png")
    with pytest.raises(UnreadableSample, match="more than max_pixels=99"):
        open_image(tmp_path / "a.png", max_pixels=99)
    assert open_image(tmp_path / "a.png", max_pixels=100).size == (10, 10)


class TestDataset:
    """What a dataset does with its processor's settings."""

    def build(self, folder: Path, *, split: str = "train", **settings: Any) -> Any:
        (folder / "a.json").write_text(json.dumps([{"image": f"{i}.png", "caption": "a"} for i in range(3)]))
        builder = registry.get_builder_class("pairs")(
            build_info={
                "annotations": {split: {"storage": str(folder / "a.json")}},
                "images": {"storage": str(folder)},
            },
            vis_processor={
                "train" if split == "train" else "eval": {"name": "blip_image_eval", "image_size": 8, **settings}
            },
        )
        return builder.build([split])[split]

    def draw(self, folder: Path) -> None:
        """Two black drawings without background, and a picture."""
        for i in range(2):
            image = Image.new("RGBA", (9, 9))
            image.paste((0, 0, 0, 255), (2, 2, 6, 6))
            image.save(folder / f"{i}.png")
        Image.linear_gradient("L").save(folder / "2.png")

    @pytest.mark.slow
    def test_black_drawings_are_seen(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        self.draw(tmp_path)
        dataset = self.build(tmp_path)
        assert all(dataset[i]["image"].std() > 0.1 for i in range(3))
        assert not caplog.records

    def test_a_constant_image_is_warned_about_once(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """Also in another process, as loaders' workers are."""
        self.draw(tmp_path)
        dataset = self.build(tmp_path, background="ignore_alpha")
        dataset[2]
        assert not caplog.records
        child = os.fork()
        if not child:
            dataset[1]
            os._exit(0)
        os.waitpid(child, 0)
        dataset[0], dataset[1]
        assert not caplog.records
        dataset = copy.deepcopy(self.build(tmp_path, background="ignore_alpha"))
        dataset[0], dataset[1]
        (record,) = caplog.records
        assert f"{tmp_path / '0.png'} has one colour only, (0, 0, 0)" in record.message

    def test_evaluation_does_not_warn(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        self.draw(tmp_path)
        self.build(tmp_path, split="val", background="ignore_alpha")[0]
        assert not caplog.records

    def test_the_limit_reaches_the_file(self, tmp_path: Path) -> None:
        self.draw(tmp_path)
        with pytest.raises(UnreadableSample, match=r"0\.png.*9 x 9 pixels, more than max_pixels=80"):
            self.build(tmp_path, max_pixels=80)[0]
