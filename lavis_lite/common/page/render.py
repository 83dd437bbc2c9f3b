"""Self-contained HTML pages from Jinja2 templates that extend `base.html`: no scripts, nothing fetched.

`style.css` has the colours of the light and the dark scheme, and works from 390 pixels on.
"""

import base64
import io
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

QUALITY = 85


def render(template: str, *, package: str, **values: Any) -> str:
    """Return the page of a template file of `package`; values are escaped."""
    own = resources.files("lavis_lite.common.page")
    shared = {name: own.joinpath(name).read_text(encoding="utf-8") for name in ("base.html", "style.css")}
    environment = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        loader=jinja2.ChoiceLoader([jinja2.DictLoader(shared), jinja2.FunctionLoader(_reader(package))]),
    )
    return environment.get_template(template).render(**values)


def _reader(package: str) -> Any:
    folder = resources.files(package)
    return lambda name: folder.joinpath(name).read_text(encoding="utf-8")


def data_address(image: Image.Image, pixels: int) -> str:
    """Return the image, made at most `pixels` wide and high, as a `data:` address."""
    small = image.copy()
    small.thumbnail((pixels, pixels))
    buffer = io.BytesIO()
    small.convert("RGB").save(buffer, "JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def plural(number: int, noun: str) -> str:
    """Return `1 job`, `1,204 jobs`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def file_name(path: str) -> str:
    """Return the last part of a path, for captions."""
    return Path(path).name
