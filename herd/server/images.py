"""Images of requests, whose size is looked at before anything is decoded."""

import base64
import io
import re
from dataclasses import dataclass

from PIL import Image

from herd.server.errors import ApiError

MAX_IMAGES, MAX_BYTES, MAX_PIXELS = 16, 20 << 20, 1 << 25
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
_DATA = re.compile(r"data:image/[a-z0-9.+-]{1,40};base64,", re.IGNORECASE)


@dataclass(frozen=True)
class Sized:
    """What the head of an image's file says: its media type, and its size in pixels."""

    kind: str
    width: int
    height: int


def sized(data: bytes, param: str | None = None) -> Sized:
    """Of an image's file. ApiError for what is no image or too large for one; param: see there."""
    if len(data) > MAX_BYTES:
        raise _refuse(f"an image is larger than {MAX_BYTES:,} bytes", param)
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:  # reads no pixels
            (width, height), kind = image.size, str(image.format)
    except Exception as error:  # readers of damaged files raise whatever they run into
        raise _refuse(f"an image cannot be read; it can be one of {', '.join(_FORMATS)}", param) from error
    if width * height > MAX_PIXELS:
        raise _refuse(f"an image has {width:,} × {height:,} pixels; it may have {MAX_PIXELS:,}", param)
    return Sized(f"image/{kind.lower()}", width, height)


def of_url(url: str) -> bytes:
    """The file that a data URL holds. ApiError for other URLs, and for what is no image or too large for one."""
    found = _DATA.match(url)
    if found is None:
        kind = url.partition(":")[0][:20]
        raise _refuse(f"images are given as data:image/…;base64,… URLs; this server fetches nothing (given: {kind}:…)")
    if len(url) - found.end() > MAX_BYTES * 4 // 3 + 4:
        raise _refuse(f"an image is larger than {MAX_BYTES:,} bytes")
    try:
        data = base64.b64decode(url[found.end() :], validate=True)
    except ValueError as error:
        raise _refuse(f"the data URL of an image is not valid base64: {error}") from error
    sized(data, "messages")
    return data


def _refuse(message: str, param: str | None = "messages") -> ApiError:
    return ApiError(400, message, param=param, code="invalid_image")
