"""Images become the tiles that Meta's code makes of them, whatever file they come from."""

import io
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from herd.config import VISION
from herd.errors import SourceError
from herd.media import cut, open_image
from herd.media.image import canvas
from tests.media import meta_preprocess

# Spec §4.5: width, height; columns, rows of the canvas; size within it; tiles; tokens.
TABLE = [
    ((100, 100), (1, 1), (336, 336), 1, 147),
    ((200, 300), (1, 1), (224, 336), 1, 147),
    ((337, 336), (2, 1), (337, 336), 3, 437),
    ((640, 480), (2, 2), (640, 480), 5, 727),
    ((800, 600), (3, 2), (800, 600), 7, 1017),
    ((672, 1008), (2, 3), (672, 1008), 7, 1017),
    ((1280, 720), (4, 3), (1280, 720), 13, 1887),
    ((1920, 1080), (5, 3), (1680, 945), 16, 2322),
    ((4032, 3024), (4, 3), (1344, 1008), 13, 1887),
    ((300, 2000), (1, 6), (300, 2000), 7, 1017),
    ((10000, 100), (16, 1), (5376, 53), 17, 2467),
]


def noise(width: int, height: int, bands: int = 3, seed: int = 0) -> np.ndarray:
    """Pixels that are never black."""
    shape = (height, width, bands) if bands > 1 else (height, width)
    return np.random.default_rng(seed).integers(1, 256, shape, dtype=np.uint8)


def saved(image: Image.Image, kind: str, **how: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


@pytest.mark.parametrize(("size", "grid", "within", "count", "tokens"), TABLE)
def test_the_table_of_the_spec(
    size: tuple[int, int], grid: tuple[int, int], within: tuple[int, int], count: int, tokens: int
) -> None:
    image = Image.fromarray(noise(*size))
    pixels, rows, columns = cut(image, VISION)
    assert ((columns, rows), len(pixels)) == (grid, count)
    assert tokens == 144 * count + 3 + (rows * columns if rows * columns > 1 else 0)
    local = pixels[: rows * columns].unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)
    filled = (local != -1).any(0)
    assert (int(filled.any(0).sum()), int(filled.any(1).sum())) == within, "the rest is black"
    expected, expected_grid = meta_preprocess.tiles(image)
    assert (rows, columns) == expected_grid and torch.equal(pixels, expected)


def test_pixels_equal_meta_on_random_sizes() -> None:
    """200 sizes, as many small, wide and high ones as there are large ones."""
    chosen, counts = random.Random(4), set[int]()
    for number in range(200):
        size = [max(1, round(2 ** chosen.uniform(2, 10.5))) for _ in range(2)]
        image = Image.fromarray(noise(*size, seed=number))
        expected, grid = meta_preprocess.tiles(image)
        pixels, rows, columns = cut(image, VISION)
        assert (rows, columns) == grid and torch.equal(pixels, expected), size
        counts.add(len(pixels))
    assert {1, 3, 17} <= counts and len(counts) > 8


@pytest.mark.parametrize("size", [(1, 1), (1, 6000), (6000, 1), (335, 337), (5376, 336), (5377, 336), (1344, 1344)])
def test_pixels_equal_meta_at_the_edges(size: tuple[int, int]) -> None:
    image = Image.fromarray(noise(*size))
    expected, grid = meta_preprocess.tiles(image)
    pixels, rows, columns = cut(image, VISION)
    assert (rows, columns) == grid and torch.equal(pixels, expected)


@given(st.integers(1, 1 << 24), st.integers(1, 1 << 24))
@settings(max_examples=300)
def test_the_canvas_equals_meta(width: int, height: int) -> None:
    """Also of sizes far too large to have pixels here."""
    transform = meta_preprocess.load("preprocess").VariableSizeImageTransform(336)
    possible = torch.tensor(transform.find_supported_resolutions(16, 336))
    assert len(possible) == 50
    expected = transform.get_best_fit((width, height), possible)
    assert tuple(336 * tiles for tiles in canvas(width, height, 336)) == expected


def test_paths_and_bytes(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(saved(Image.fromarray(noise(30, 20)), "PNG"))
    for source in (path, str(path), path.read_bytes()):
        image = open_image(source)
        assert (image.mode, image.size) == ("RGB", (30, 20))
        assert (np.asarray(image) == noise(30, 20)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    """The upper left of the upright picture is red, its upper right green."""
    upright = np.zeros((12, 20, 3), np.uint8)
    upright[:6, :10, 0] = upright[:6, 10:, 1] = upright[6:, :, 2] = 255
    # How the pixels must be stored for a viewer that does what the tag says to see the picture upright.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = open_image(saved(Image.fromarray(np.ascontiguousarray(stored)), "PNG", exif=exif))
    assert (np.asarray(image) == upright).all()


def test_alpha_is_put_on_white() -> None:
    rgba = noise(16, 16, 4)
    rgba[:8, :, 3], rgba[8:, :, 3] = 0, 255
    for image, kind in (
        (Image.fromarray(rgba), "PNG"),
        (Image.fromarray(rgba).convert("LA"), "PNG"),
        (Image.fromarray(rgba), "WEBP"),
        (Image.fromarray(rgba).quantize(16), "PNG"),
    ):
        pixels = np.asarray(open_image(saved(image, kind)))
        assert (pixels[:8] == 255).all() and not (pixels[8:] == 255).all(-1).all(), (image.mode, kind)
    half = open_image(saved(Image.new("RGBA", (2, 2), (0, 0, 0, 127)), "PNG"))
    assert half.getpixel((0, 0)) == (128, 128, 128)


def test_alpha_equals_meta() -> None:
    image = Image.fromarray(noise(40, 30, 4))
    expected = meta_preprocess.load("chat_format").convert_image_to_rgb(image)
    assert (np.asarray(open_image(saved(image, "PNG"))) == np.asarray(expected)).all()


def test_a_colour_that_means_transparent() -> None:
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), (9, 9, 9))
    opened = open_image(saved(image, "PNG", transparency=(1, 2, 3)))
    assert [opened.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (9, 9, 9)]


@pytest.mark.parametrize("kind", ["GIF", "PNG"])
def test_a_palette_without_transparency(kind: str) -> None:
    image = Image.fromarray(noise(30, 20)).quantize(32)
    opened = open_image(saved(image, kind))
    assert (np.asarray(opened) == np.asarray(image.convert("RGB"))).all()


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animation_is_its_first_picture(kind: str) -> None:
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    frames = [Image.new("RGB", (20, 20), colour) for colour in colours]
    how = {"lossless": True} if kind == "WEBP" else {}
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:], **how)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert open_image(data).getpixel((10, 10)) == colours[0]


def test_sixteen_bits() -> None:
    grey = np.array([[0, 128, 257, 40000, 65535]], np.uint16)
    for kind in ("PNG", "TIFF"):
        opened = open_image(saved(Image.fromarray(grey), kind))
        assert [opened.getpixel((x, 0)) for x in range(5)] == [(v, v, v) for v in (0, 0, 1, 156, 255)], kind


def test_sixteen_bits_of_which_one_value_is_transparent() -> None:
    opened = open_image(saved(Image.fromarray(np.array([[300, 0]], np.uint16)), "PNG", transparency=300))
    assert [opened.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (0, 0, 0)]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_grey_of_32_bits_is_stretched(dtype: type) -> None:
    opened = open_image(saved(Image.fromarray(np.array([[-5, 0, 15]], dtype)), "TIFF"))
    assert [opened.getpixel((x, 0)) for x in range(3)] == [(v, v, v) for v in (0, 64, 255)]
    flat = open_image(saved(Image.fromarray(np.array([[7, 7]], dtype)), "TIFF"))
    assert flat.getpixel((0, 0)) == (0, 0, 0)


def test_cmyk_and_other_modes() -> None:
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert open_image(saved(image, "TIFF")).getpixel((0, 0)) == (255, 0, 0)
    red, green, blue = open_image(saved(image, "JPEG")).getpixel((0, 0))  # type: ignore[misc]
    assert red > 250 and green < 5 and blue < 5
    assert open_image(saved(Image.new("1", (8, 8), 1), "PNG")).getpixel((0, 0)) == (255, 255, 255)
    assert open_image(saved(Image.new("L", (8, 8), 7), "PNG")).getpixel((0, 0)) == (7, 7, 7)
    lab = open_image(saved(Image.new("LAB", (8, 8), (255, 128, 128)), "TIFF"))
    assert min(lab.getpixel((0, 0))) > 250  # type: ignore[type-var]


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_a_file_that_is_cut_off(kind: str, tmp_path: Path) -> None:
    data = saved(Image.fromarray(noise(64, 64)), kind)
    path = tmp_path / "cut"
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(SourceError, match=r"cannot read \S+cut as an image: .") as caught:
        open_image(path)
    assert "\n" not in str(caught.value)


def test_what_is_no_image(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="cannot read an image of 11 bytes as an image: it is none, or of a kind"):
        open_image(b"hello world")
    with pytest.raises(SourceError, match="No such file"):
        open_image(tmp_path / "missing.png")
    with pytest.raises(SourceError, match="cannot read"):
        open_image(tmp_path)
    with pytest.raises(SourceError, match="it is none"):
        open_image(b"")
    with pytest.raises(SourceError, match="it is none"):
        open_image(saved(Image.new("RGB", (4, 4)), "EPS"))
    nan = saved(Image.fromarray(np.array([[0, np.nan]], np.float32)), "TIFF")
    with pytest.raises(SourceError, match="not finite"):
        open_image(nan)


def png(width: int, height: int) -> bytes:
    """A file of a few bytes that says to hold so many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")


def test_more_pixels_than_an_image_has() -> None:
    with pytest.raises(SourceError, match=r"cannot read an image of .* exceeds limit of \d+ pixels"):
        open_image(png(60_000, 60_000))


@given(st.data())
@settings(max_examples=150)
def test_damaged_files_are_images_or_one_error(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"]))
    whole = bytearray(saved(Image.fromarray(noise(20, 12)), kind))
    for at in data.draw(st.lists(st.integers(0, len(whole) - 1), min_size=1, max_size=8)):
        whole[at] = data.draw(st.integers(0, 255))
    try:
        image = open_image(bytes(whole))
    except SourceError as error:
        assert "\n" not in str(error)
    else:
        assert image.mode == "RGB"
