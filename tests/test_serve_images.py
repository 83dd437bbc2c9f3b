"""`lavis-lite serve`: images that it refuses, and why."""

import io

import numpy as np
import pytest
from PIL import Image
from test_serve import bomb

from lavis_lite.server import images
from lavis_lite.server.requests import RequestError


def image_error(image: Image.Image) -> RequestError:
    """The error of an image's TIFF."""
    file = io.BytesIO()
    image.save(file, "TIFF")
    with pytest.raises(RequestError) as error:
        images.decode(file.getvalue())
    return error.value


def test_an_image_is_refused_for_what_is_wrong_with_it() -> None:
    with pytest.raises(RequestError, match="50,000,000") as huge:
        images.image_of(bomb(), allow_urls=False, max_bytes=2**20)
    large = image_error(Image.new("1", (10_000, 6_000)))
    assert [huge.value.code, large.code] == ["image_too_large"] * 2
    assert "60,000,000 pixels" in str(large)
    numbers = image_error(Image.fromarray(np.full((2, 2), np.nan, np.float32)))
    assert numbers.code == "invalid_image_format"
    assert "NaN" in str(numbers)


def test_an_address_that_utf8_cannot_encode_is_escaped() -> None:
    with pytest.raises(RequestError) as error:
        images.image_of("http://\ud800/a.png", allow_urls=True, max_bytes=100)
    assert "\\ud800" in error.value.to_json()["error"]["message"]
