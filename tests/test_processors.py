"""Processors against the tables recorded from LAVIS, and images of every mode."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.numpy import load_file

from lavis_lite.processors import load_processor
from lavis_lite.processors.randaugment import (
    MOST,
    OPERATIONS,
    RandomAugment,
    apply_operation,
    autocontrast,
    brightness,
    equal_opencv,
    equalize,
    interpolated,
    moving_matrix,
    sharpness,
    warp_affine,
)

TABLES = Path(os.environ.get("LAVIS_LITE_REFERENCE_DIR", Path(__file__).parent / "reference")) / "tables"
RANDAUGMENT = json.loads((TABLES / "randaugment_ops.json").read_text())["args"]
CLIP_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
CLIP_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])


@pytest.fixture(scope="module")
def recorded() -> dict[str, np.ndarray]:
    return load_file(TABLES / "randaugment_ops.safetensors")


@pytest.mark.parametrize(
    ("name", "arguments", "key"),
    [
        ("blip_image_eval", {"image_size": 64}, "blip_image_eval/64"),
        ("blip_image_eval", {"image_size": 112}, "blip_image_eval/112"),
        ("blip_image_eval", {"image_size": 224}, "blip_image_eval/224"),
        (
            "blip_image_eval",
            {"image_size": 48, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.3, 0.35]},
            "blip_image_eval/custom_mean_std/48",
        ),
    ],
)
def test_eval_processor_equals_table(name: str, arguments: dict, key: str) -> None:
    expected = load_file(TABLES / "vis_processors.safetensors")[key]
    actual = load_processor(name, {"name": name, **arguments})(Image.open(TABLES / "image_97x61.png"))
    assert actual.dtype == torch.float32
    np.testing.assert_allclose(actual.numpy(), expected, atol=1e-5, rtol=0)


def test_grey_image_equals_table() -> None:
    expected = load_file(TABLES / "vis_processors.safetensors")["blip_image_eval/L_converted_RGB/64"]
    image = Image.open(TABLES / "image_97x61_L.png")
    assert image.mode == "L"
    actual = load_processor("blip_image_eval", {"image_size": 64})(image)
    np.testing.assert_allclose(actual.numpy(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("key", RANDAUGMENT)
def test_randaugment_operation_equals_table(key: str, recorded: dict[str, np.ndarray]) -> None:
    name, sign = key.split("/")
    # the recorded arguments are authoritative: a negative number is the move turned round
    negative = bool(RANDAUGMENT[key]) and RANDAUGMENT[key][0] < 0
    assert sign in ("pos", "neg")
    actual = apply_operation(recorded["input"], name, magnitude=5, negative=negative)
    np.testing.assert_array_equal(actual, recorded[key])


@pytest.mark.parametrize("name", ["AutoContrast", "Brightness", "Equalize"])
def test_low_contrast_operations_equal_table(name: str, recorded: dict[str, np.ndarray]) -> None:
    actual = apply_operation(recorded["input_lowcontrast"], name, legacy_autocontrast=True)
    np.testing.assert_array_equal(actual, recorded[f"lowcontrast_{name}/pos"])


def test_autocontrast_is_mended_by_default(recorded: dict[str, np.ndarray]) -> None:
    image = recorded["input_lowcontrast"]
    assert (recorded["lowcontrast_AutoContrast/pos"] == 255).all(), "LAVIS's defect: all white"
    expected = np.asarray(ImageOps.autocontrast(Image.fromarray(image)))
    np.testing.assert_allclose(autocontrast(image).astype(int), expected.astype(int), atol=1)
    assert autocontrast(image).min() == 0
    assert autocontrast(image).max() == 255
    flat = np.full((4, 5, 3), 77, dtype=np.uint8)
    np.testing.assert_array_equal(autocontrast(flat), flat)


def test_equalize_equals_pillow() -> None:
    image = np.random.default_rng(0).integers(20, 90, (31, 17, 3)).astype(np.uint8)
    np.testing.assert_array_equal(equalize(image), np.asarray(ImageOps.equalize(Image.fromarray(image))))
    tiny = image[:2, :2]
    np.testing.assert_array_equal(equalize(tiny), tiny)


def test_brightness_and_sharpness_at_other_magnitudes() -> None:
    image = np.random.default_rng(0).integers(0, 256, (9, 9, 3)).astype(np.uint8)
    np.testing.assert_array_equal(brightness(image, 0.5), image // 2)
    step = np.zeros((5, 6, 3), dtype=np.uint8)
    step[:, 3:] = 130
    # a 3x3 box with centre 5: beside the edge (3/13, 10/13 of 130), doubled away from it by factor 2
    smooth = {2: 30, 3: 100}
    for column, value in smooth.items():
        expected = np.clip(2 * int(step[2, column, 0]) - value, 0, 255)
        assert sharpness(step, 2.0)[2, column, 0] == expected


def test_warp_is_bilinear_with_grey_outside() -> None:
    image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3) * 10
    half = warp_affine(image, np.array([[1, 0, 0.5], [0, 1, 0]], dtype=float))
    expected = np.stack([(128 + image[:, 0].astype(float)) / 2, (image[:, 0].astype(float) + image[:, 1]) / 2], axis=1)
    np.testing.assert_array_equal(half, np.rint(expected).astype(np.uint8))
    far = warp_affine(image, np.array([[1, 0, 50.0], [0, 1, 0]]))
    assert (far == 128).all()


@pytest.mark.parametrize("size", [(61, 97), (4, 3), (40, 40)])
@pytest.mark.parametrize("share", [0.5, -0.5, 0.37, 1.0])
@pytest.mark.parametrize("name", MOST)
def test_moves_have_the_bytes_of_opencv_with_it_and_without(name: str, share: float, size: tuple[int, int]) -> None:
    opencv = equal_opencv()
    assert opencv is not None
    image = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    matrix = moving_matrix(name, share * MOST[name], width=size[1], height=size[0])
    expected = opencv.warpAffine(image, matrix, (size[1], size[0]), borderValue=(128, 128, 128))
    np.testing.assert_array_equal(interpolated(image, matrix), expected)
    np.testing.assert_array_equal(warp_affine(image, matrix), expected)


def test_an_opencv_that_rounds_otherwise_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    equal_opencv.cache_clear()
    monkeypatch.setattr("cv2.warpAffine", lambda image, *_, **__: np.zeros_like(image))
    assert equal_opencv() is None
    equal_opencv.cache_clear()


def test_random_augment_draws_by_torch_seed_and_probability() -> None:
    image = Image.open(TABLES / "image_97x61.png").convert("RGB")
    outputs = []
    for seed in (3, 3, 4, 5, 6):
        torch.manual_seed(seed)
        outputs.append(np.asarray(RandomAugment(4, 8, probability=1.0)(image)))
    np.testing.assert_array_equal(outputs[0], outputs[1])
    assert any(not np.array_equal(outputs[0], other) for other in outputs[2:])
    np.testing.assert_array_equal(np.asarray(RandomAugment(4, 8, probability=0.0)(image)), np.asarray(image))
    assert len(OPERATIONS) == 10


@pytest.mark.parametrize(
    ("name", "size"), [("blip_image_train", 384), ("blip2_image_train", 364), ("blip_image_eval", 384)]
)
def test_default_sizes(name: str, size: int) -> None:
    assert load_processor(name)(Image.new("RGB", (8, 5), (10, 200, 30))).shape == (3, size, size)


@pytest.mark.parametrize("name", ["blip_image_train", "blip2_image_train"])
def test_train_crop_keeps_its_scale_and_flips(name: str) -> None:
    ramp = np.broadcast_to(np.linspace(0, 255, 100)[None, :, None], (100, 100, 3)).astype(np.uint8)
    extra = {"randaugment": False} if name == "blip_image_train" else {}
    keep = load_processor(name, {"image_size": 10, "min_scale": 1.0, "hflip": False, **extra})
    flip = load_processor(name, {"image_size": 10, "min_scale": 1.0, "hflip": True, **extra})
    torch.manual_seed(0)
    kept = [bool(image[0, 5, -1] > image[0, 5, 0]) for image in (keep(Image.fromarray(ramp)) for _ in range(20))]
    flipped = [bool(image[0, 5, -1] > image[0, 5, 0]) for image in (flip(Image.fromarray(ramp)) for _ in range(20))]
    assert all(kept)
    assert 2 < sum(flipped) < 18
    # a crop of at least 64 % of the area keeps at least 0.8 * sqrt(3/4) of the width's range
    crop = load_processor(name, {"image_size": 50, "min_scale": 0.64, "hflip": False, **extra})
    spans = [
        float((image[0].max() - image[0].min()) * CLIP_STD[0])
        for image in (crop(Image.fromarray(ramp)) for _ in range(20))
    ]
    assert min(spans) > 0.65
    assert max(spans) - min(spans) > 0.02


def test_blip2_crops_and_mirrors_and_nothing_else() -> None:
    """A square's largest crop is the square, so that only RandAugment could tell training from evaluation."""
    square = Image.open(TABLES / "image_97x61.png").convert("RGB").resize((60, 60))
    still = {"image_size": 32, "min_scale": 1.0, "hflip": False}
    expected = load_processor("blip_image_eval", {"image_size": 32})(square)
    torch.manual_seed(0)
    plain, augmented = (
        [load_processor(name, still)(square) for _ in range(4)] for name in ("blip2_image_train", "blip_image_train")
    )
    assert all(torch.allclose(image, expected, atol=1e-6) for image in plain)
    assert not all(torch.allclose(image, expected, atol=1e-6) for image in augmented)


def test_images_of_other_modes_become_rgb() -> None:
    process = load_processor("blip_image_eval", {"image_size": 4})

    def colour(image: Image.Image) -> list[float]:
        pixels = process(image).permute(1, 2, 0) * CLIP_STD + CLIP_MEAN
        return [round(float(c) * 255) for c in pixels[2, 2]]

    sixteen = Image.fromarray(np.full((5, 5), 128 * 257, dtype=np.uint16))
    assert sixteen.mode == "I;16"
    assert colour(sixteen) == [128, 128, 128]
    assert colour(Image.new("I", (5, 5), 65535)) == [255, 255, 255]
    assert colour(Image.new("CMYK", (5, 5), (0, 255, 255, 0))) == [255, 0, 0]
    assert colour(Image.new("RGBA", (5, 5), (10, 20, 30, 255))) == [10, 20, 30]
    assert colour(Image.new("1", (1, 1), 1)) == [255, 255, 255]


@pytest.mark.parametrize("name", ["blip_image_eval", "blip_image_train", "blip2_image_train", "blip_video_eval"])
def test_transparent_pixels_show_the_processor_s_background(name: str) -> None:
    def colour(**settings: str) -> list[float]:
        process = load_processor(
            name,
            {"image_size": 4, **settings} | ({"randaugment": False} if "blip_i" in name and "train" in name else {}),
        )
        image = Image.new("RGBA", (5, 5), (10, 20, 30, 0))
        tensor = process([image] * 4)[:, 0] if "video" in name else process(image)
        return [round(float(c) * 255) for c in tensor[:, 2, 2] * CLIP_STD + CLIP_MEAN]

    assert colour() == [255, 255, 255]
    assert colour(background="#102030") == [16, 32, 48]
    assert colour(background="ignore_alpha") == [10, 20, 30]  # LAVIS's


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1)])
def test_degenerate_images_just_work(size: tuple[int, int]) -> None:
    for name in ("blip_image_train", "blip2_image_train", "blip_image_eval"):
        out = load_processor(name, {"image_size": 16})(Image.new("L", size, 7))
        assert out.shape == (3, 16, 16)
        assert torch.isfinite(out).all()


@pytest.mark.parametrize(
    ("key", "name", "arguments"),
    [
        ("blip_caption(prompt='',max_words=50)", "blip_caption", {}),
        (
            "blip_caption(prompt='a picture of ',max_words=5)",
            "blip_caption",
            {"prompt": "a picture of ", "max_words": 5},
        ),
        ("blip_question(max_words=50)", "blip_question", {"max_words": 50}),
        ("blip_question(max_words=5)", "blip_question", {"max_words": 5}),
    ],
)
def test_text_processors_equal_table(key: str, name: str, arguments: dict) -> None:
    table = json.loads((TABLES / "text_processors.json").read_text())
    process = load_processor(name, {"name": name, **arguments})
    assert [process(text) for text in table["strings"]] == table[key]


def test_mistakes_are_named() -> None:
    with pytest.raises(KeyError, match="blip_caption"):
        load_processor("blip_captoin")
    with pytest.raises(ValueError, match=r"image_sise: unknown key.*image_size"):
        load_processor("blip_image_eval", {"image_sise": 3})
    with pytest.raises(ValueError, match="image_size"):
        load_processor("blip_image_eval", {"image_size": 0})
    with pytest.raises(ValueError, match="min_scale"):
        load_processor("blip_image_train", {"min_scale": 1.5})
    with pytest.raises(ValueError, match="std above 0"):
        load_processor("blip_image_eval", {"std": [0.2, 0.2, 0]})
    with pytest.raises(ValueError, match="background: expected a colour such as white"):
        load_processor("blip_image_eval", {"background": "whitish"})
    with pytest.raises(ValueError, match=r"max_pixels: must be a whole number from 1 to .*, got 0"):
        load_processor("blip_image_eval", {"max_pixels": 0})
    with pytest.raises(ValueError, match=r"has 3 x 2 pixels, more than max_pixels=5: shrink it"):
        load_processor("blip_image_eval", {"max_pixels": 5})(Image.new("RGB", (3, 2)))
    with pytest.raises(ValueError, match="magnitude"):
        load_processor("blip_image_train", {"magnitude": 11})
    with pytest.raises(TypeError, match="PIL"):
        load_processor("blip_image_eval")(np.zeros((3, 3, 3)))
    with pytest.raises(TypeError, match="one string"):
        load_processor("blip_caption")(None)
    with pytest.raises(ValueError, match="max_words"):
        load_processor("blip_question", {"max_words": 0})


def test_clip_s_evaluation_crops_the_centre() -> None:
    """Of a wide image of three vertical stripes only the middle one is left; its shorter side fills the square."""
    image = Image.new("RGB", (90, 30), "red")
    image.paste("lime", (30, 0, 60, 30))
    image.paste("blue", (60, 0, 90, 30))
    plain = {"mean": [0, 0, 0], "std": [1, 1, 1]}
    pixels = load_processor("clip_image_eval", {"image_size": 30, **plain})(image)
    assert pixels.shape == (3, 30, 30)
    assert torch.equal(pixels, torch.tensor([0.0, 1.0, 0.0])[:, None, None].expand(3, 30, 30))


def test_clip_s_training_neither_mirrors_nor_augments() -> None:
    image = Image.new("RGB", (40, 40), "red")
    image.paste("blue", (20, 0, 40, 40))
    process = load_processor("clip_image_train", {"image_size": 40, "mean": [0, 0, 0], "std": [1, 1, 1]})
    for seed in range(8):
        torch.manual_seed(seed)
        pixels = process(image)
        assert pixels[0, :, 0].min() > 0.9
        assert pixels[2, :, -1].min() > 0.9
