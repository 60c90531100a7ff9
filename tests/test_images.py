"""`load_rgb` against what each kind of file shows in a viewer, and against files that are broken."""

import io
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from xzoo.data.images import grey_peak, grey_ranges, load_rgb, told_range, unwarned
from xzoo.errors import DataError

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def halves(width: int = 40, height: int = 20) -> Image.Image:
    """Left half red, right half blue."""
    image = Image.new("RGB", (width, height), RED)
    image.paste(BLUE, (width // 2, 0, width, height))
    return image


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def near(found: tuple[int, ...], wanted: tuple[int, ...], by: int = 12) -> bool:
    return all(abs(a - b) <= by for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    ("orientation", "size", "first"),
    [(1, (40, 20), RED), (3, (40, 20), BLUE), (6, (20, 40), RED), (8, (20, 40), BLUE)],
)
def test_exif_orientation_is_applied(form, orientation, size, first):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = load_rgb(encoded(halves(), form, exif=exif.tobytes()))
    assert image.mode == "RGB" and image.size == size
    assert near(image.getpixel((2, 2)), first)


BROKEN_EXIF = [
    b"Exif\0\0not a TIFF header",
    b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12",  # ends within its first entry
    b"Exif\0\0II*\0\xff\xff\xff\x7f",  # begins beyond its end
    b"Exif\0\0",
    b"\0" * 40,
    # its orientation is a word
    b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x04abc\0\0\0\0\0",
]


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("exif", BROKEN_EXIF)
def test_exif_that_cannot_be_parsed_is_none(form, exif):
    with unwarned():
        image = load_rgb(encoded(halves(), form, exif=exif))
    assert image.size == (40, 20) and near(image.getpixel((2, 2)), RED)


def test_exif_is_read_where_only_what_follows_it_is_broken():
    """Orientation 6, then an entry that points beyond the end."""
    entries = b"\x01\x12\0\x03\0\0\0\x01\0\x06\0\0" + b"\x87\x69\0\x02\0\0\xff\xff\x7f\0\0\0"
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x02" + entries + b"\0\0\0\0"
    for form in ("JPEG", "PNG", "WEBP"):
        with unwarned():
            assert load_rgb(encoded(halves(), form, exif=exif)).size == (20, 40), form


def test_broken_exif_behind_the_pixels_of_a_png():
    content = encoded(halves(), "PNG")
    chunk = b"eXIf" + b"no EXIF at all"
    chunk = (len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    assert load_rgb(content[:-12] + chunk + content[-12:]).size == (40, 20)


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "CMYK", "YCbCr", "LA", "RGBA"])
def test_every_mode_becomes_rgb(mode):
    form = {"CMYK": "TIFF", "YCbCr": "TIFF"}.get(mode, "PNG")
    image = load_rgb(encoded(halves().convert(mode), form))
    assert image.mode == "RGB" and image.size == (40, 20)
    if mode not in ("L", "1", "LA"):
        assert near(image.getpixel((2, 2)), RED) and near(image.getpixel((38, 2)), BLUE)


def test_cmyk_jpeg_keeps_its_colours():
    image = load_rgb(encoded(halves().convert("CMYK"), "JPEG", quality=95))
    assert near(image.getpixel((5, 5)), RED, by=30)


def test_what_lies_under_transparency_is_not_shown():
    hidden = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([9, 9, 9, 255, 0, 0])
    assert load_rgb(encoded(hidden, "PNG")).getpixel((0, 0)) == WHITE
    assert near(load_rgb(encoded(half, "PNG")).getpixel((0, 0)), (127, 127, 127), by=1)
    assert load_rgb(encoded(palette, "PNG", transparency=1)).getpixel((0, 0)) == WHITE
    assert (
        load_rgb(encoded(Image.new("RGB", (4, 4), RED), "PNG", transparency=RED)).getpixel((0, 0))
        == WHITE
    )


@pytest.mark.parametrize(
    ("values", "form"),
    [
        (np.linspace(0, 65535, 256).astype(np.uint16), "PNG"),
        (np.linspace(0, 65535, 256).astype(np.uint16), "TIFF"),
        (np.linspace(0, 65535, 256).astype(np.int32), "TIFF"),
        (np.linspace(0, 1, 256, dtype=np.float32), "TIFF"),
        (np.linspace(0, 255, 256, dtype=np.float32), "TIFF"),
    ],
)
def test_deep_greys_are_scaled_not_clipped(values, form):
    ramp = Image.fromarray(np.tile(values, (8, 1)))
    found = np.asarray(load_rgb(encoded(ramp, form)))[0, :, 0]
    assert np.abs(found.astype(int) - np.arange(256)).max() <= 1


def deep(values: np.ndarray, form: str = "PNG") -> bytes:
    return encoded(Image.fromarray(values), form)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize(
    "kind", [(np.uint16, "PNG"), (np.uint16, "TIFF"), (np.int32, "TIFF"), (np.float32, "TIFF")]
)
def test_the_range_that_images_use_is_white(bits, kind):
    """That of all of them: a dark one stays dark."""
    (dtype, form), full = kind, 2**bits - 1
    ramp = np.tile(np.linspace(0, full, 256).round().astype(dtype), (8, 1))
    sources = [
        deep(ramp, form),
        deep((ramp // 4).astype(dtype), form),
        encoded(halves().convert("L"), "PNG"),
    ]
    ranges = grey_ranges(map(grey_peak, sources))
    assert list(ranges.values()) == [full]
    bright, dark, plain = (
        np.asarray(load_rgb(source, ranges=ranges))[..., 0].astype(int) for source in sources
    )
    assert (
        np.abs(bright[0] - np.arange(256)).max() <= 1
        and np.abs(dark[0] - np.arange(256) // 4).max() <= 1
    )
    assert np.array_equal(plain, np.asarray(halves().convert("L")))


@pytest.mark.parametrize(
    ("largest", "white"),
    [(1.0, 1.0), (1.001, 1.0), (1.05, 1.0), (1.5, 1.5), (2.0, 2.0), (100.0, 100.0), (0.9, 1.0)],
)
def test_floats_have_the_range_of_their_largest_value(largest, white):
    ramp = np.tile(np.linspace(0, largest, 256, dtype=np.float32), (8, 1))
    ranges = grey_ranges([grey_peak(deep(ramp, "TIFF"))])
    assert ranges == {"float": pytest.approx(white)}
    found = np.asarray(load_rgb(deep(ramp, "TIFF"), ranges=ranges))[0, :, 0].astype(int)
    assert np.abs(found - np.round(ramp[0] / white * 255).clip(max=255)).max() <= 1
    assert told_range("float", 1.0) == "float values from 0 to 1"


def test_kinds_of_images_have_ranges_of_their_own():
    ramp = np.tile(np.linspace(0, 1, 256), (8, 1))
    sources = [deep((ramp * 4095).astype(np.uint16)), deep((ramp * 65535).astype(np.int32), "TIFF")]
    sources += [
        deep(ramp.astype(np.float32), "TIFF"),
        b"broken",
        deep(np.full((4, 4), np.nan, np.float32), "TIFF"),
    ]
    ranges = grey_ranges(map(grey_peak, sources))
    assert ranges == {"16-bit": 4095.0, "32-bit": 65535.0, "float": 1.0}
    for source in sources[:3]:
        found = np.asarray(load_rgb(source, ranges=ranges))[0, :, 0].astype(int)
        assert np.abs(found - np.arange(256)).max() <= 1
    with pytest.raises(
        DataError, match=r"grey values up to 65535, and the other 16-bit images use 0 to 4095"
    ):
        load_rgb(deep((ramp * 65535).astype(np.uint16)), ranges=ranges)


def test_a_float_slightly_over_one_is_white_by_itself():
    found = load_rgb(deep(np.full((4, 4), 1.001, np.float32), "TIFF"))
    assert found.getpixel((0, 0)) == WHITE


def test_a_pipe_is_never_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(DataError, match=r"pipe.png: a named pipe, and no regular file"):
        load_rgb(tmp_path / "pipe.png")
    with pytest.raises(DataError, match="null: a device, and no regular file"):
        load_rgb("/dev/null")
    (tmp_path / "gone.png").symlink_to("away.png")
    with pytest.raises(DataError, match="gone.png: a link to a file that is not there"):
        load_rgb(tmp_path / "gone.png")


def test_greys_beyond_any_range_are_refused():
    ramp = Image.fromarray(np.full((4, 4), 70000, np.int32))
    with pytest.raises(DataError, match=r"70000; allowed are 0 to 65535"):
        load_rgb(encoded(ramp, "TIFF"))
    with pytest.raises(DataError, match="nan"):
        load_rgb(encoded(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"))


def test_of_an_animation_the_first_frame():
    frames = [Image.new("RGB", (8, 8), color) for color in (RED, BLUE)]
    image = load_rgb(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert image.getpixel((0, 0)) == RED


def test_path_bytes_file_pixels_and_image_are_the_same(tmp_path: Path):
    content = encoded(halves(), "PNG")
    path = tmp_path / "wrong_ending.jpg"
    path.write_bytes(content)
    wanted = np.asarray(halves())
    for source in (path, str(path), content, io.BytesIO(content), wanted, halves()):
        assert np.array_equal(np.asarray(load_rgb(source)), wanted)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "TIFF"])
def test_a_cut_file_is_an_error_that_names_it(form, tmp_path: Path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    content = encoded(Image.fromarray(noise), form)
    path = tmp_path / f"cut.{form.lower()}"
    path.write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(DataError, match=f"cut.{form.lower()}: ") as caught:
        load_rgb(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\xff\xd8\xff\xe0" + bytes(50)])
def test_no_image_is_an_error(content, tmp_path: Path):
    path = tmp_path / "broken.jpg"
    path.write_bytes(content)
    with pytest.raises(DataError, match="broken.jpg: "):
        load_rgb(path)
    with pytest.raises(DataError, match="gone.jpg: there is no such file"):
        load_rgb(tmp_path / "gone.jpg")


def test_a_decompression_bomb_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    # 800: more than the limit, less than Pillow's own error
    with pytest.raises(DataError, match="pixels"):
        load_rgb(encoded(halves(), "PNG"))
    with pytest.raises(DataError, match="pixels"):
        load_rgb(encoded(halves(400, 200), "PNG"))


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_large_images_are_reduced_and_never_below(form):
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(halves(1300, 900), form, exif=exif.tobytes())
    image = load_rgb(content, at_least=128)
    assert 128 <= image.width < 256 and image.height / image.width == pytest.approx(
        1300 / 900, rel=0.02
    )
    assert near(image.getpixel((64, 5)), RED) and near(image.getpixel((64, image.height - 5)), BLUE)
    assert load_rgb(content, at_least=901).size == (900, 1300)
