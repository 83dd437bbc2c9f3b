"""Every kind of image opens as 8-bit RGB; missing and broken files are named."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from lavis_lite.datasets.image import open_image
from lavis_lite.errors import UnreadableSample


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


def test_grey_alpha_and_cmyk(tmp_path: Path, picture: Image.Image) -> None:
    Image.new("L", (2, 2), 77).save(tmp_path / "l.png")
    assert (colours(open_image(tmp_path / "l.png")) == 77).all()
    Image.new("RGBA", (2, 2), (10, 20, 30, 0)).save(tmp_path / "rgba.png")
    assert colours(open_image(tmp_path / "rgba.png"))[0, 0].tolist() == [10, 20, 30]
    picture.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    opened = colours(open_image(tmp_path / "cmyk.jpg")).astype(int)
    assert abs(opened - np.asarray(picture)).max() < 12
    Image.new("1", (2, 2), 1).save(tmp_path / "bit.png")
    assert (colours(open_image(tmp_path / "bit.png")) == 255).all()


def test_palette_with_transparency(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    image.save(tmp_path / "p.png", transparency=bytes([0, 128]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert colours(open_image(tmp_path / "p.png")).tolist() == [[[255, 0, 0], [0, 0, 255]]]


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
    with pytest.raises(UnreadableSample, match=r"page\.jpg"):
        open_image(tmp_path / "page.jpg")
    with pytest.raises(UnreadableSample, match="broken"):
        open_image(tmp_path)
    with pytest.raises(ValueError, match="page"):  # so that callers need not know our class
        open_image(tmp_path / "page.jpg")
