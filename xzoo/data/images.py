"""One image at a time: whatever a file holds becomes an upright 8-bit RGB picture, or a DataError.

Pillow's `convert("RGB")` alone is not enough: it ignores the EXIF orientation, shows the hidden
colours under transparent pixels and clips 16-bit and float images to white. `load_rgb` is the one
place where images are opened; training, validation and `xzoo classify` all go through it.

Files of 16 and 32 bits do not say how much of their range they use: a camera of 12 bits writes 0 to
4095 into 16. One image does not tell either, so whoever has all of them finds the range once
(`grey_ranges`) and passes it to each.

Not here: finding images on a disk (sources.py), transforms (loader.py).
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from ..errors import DataError, first_line
from .walk import no_regular_file

Pixels = NDArray[np.uint8]
Source = str | Path | bytes | BinaryIO | Pixels | Image.Image
# Largest value that is shown as white, of each kind of grey image with more than 8 bits (`_kind`).
Ranges = Mapping[str, float]

BITS = (8, 10, 12, 14, 16)  # that cameras and scanners use
FULL = 65535.0
# Floats go from 0 to 1, or have the values of one of BITS.
LIMITS = (1.0, *(2.0**bits - 1 for bits in BITS))
# Filters overshoot a little: values up to this share over the range are white, not another range.
OVER = 1.1
# Of EXIF's orientations, what makes the image upright.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_rgb(
    source: Source, at_least: int | None = None, ranges: Ranges | None = None
) -> Image.Image:
    """Open an image as it is meant to be seen.

    Args:
        source: a path, the bytes of an image file, an open binary file, pixels [H, W, 3], or a
            Pillow image.
        at_least: an image that is large is reduced by a whole factor, with both sides kept at this
            many pixels or more. A photograph then takes a fraction of the time and memory, and the
            transform that follows still only ever shrinks it.
        ranges: of `grey_ranges`; without one for its kind, integers are read as 16-bit and floats
            by their largest value.
    Returns: an RGB image: turned by its EXIF orientation (one that cannot be parsed is none),
        transparency composited on white, 16-bit and float values scaled by their range; of an
        animation the first frame.
    Raises: DataError that names the source, if it is missing, truncated, no image, no regular file,
        has more pixels than Pillow's limit against decompression bombs (89 million), or values
        beyond the range.
    """
    if isinstance(source, np.ndarray):
        return Image.fromarray(source)
    with _opened(source) as image:
        return _rgb(image, at_least, ranges or {})


def grey_ranges(sources: Iterable[tuple[str, float] | None]) -> dict[str, float]:
    """The range of each kind of grey image with more than 8 bits, from what `grey_peak` found in
    all images.
    """
    peaks: dict[str, float] = {}
    for found in sources:
        if found is not None:
            peaks[found[0]] = max(found[1], peaks.get(found[0], 0.0))
    return {kind: _range(kind, peak) for kind, peak in sorted(peaks.items())}


def grey_peak(source: Source) -> tuple[str, float] | None:
    """Kind and largest value of a grey image with more than 8 bits; None for any other, or one that
    is broken.
    """
    if isinstance(source, np.ndarray):
        return None
    try:
        with _opened(source) as image:
            kind = _kind(image)
            if kind is None:
                return None
            values = np.asarray(image)
            low, high = float(values.min()), float(values.max())
            return (kind, high) if low >= 0 and high <= FULL else None
    except DataError:
        return None


def told_range(kind: str, full: float) -> str:
    """A range in words."""
    bits = [f" ({bits} bits)" for bits in BITS if full == 2**bits - 1]
    return f"{kind} values from 0 to {full:g}{''.join(bits)}"


@contextmanager
def unwarned() -> Iterator[None]:
    """Without Pillow's warnings about single files, which do not name them. For the main thread."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


@contextmanager
def _opened(source: Source) -> Iterator[Image.Image]:
    """The image, its header read. Raises: DataError, also for what goes wrong in the block."""
    name = str(source) if isinstance(source, str | Path) else f"<{type(source).__name__}>"
    try:
        if isinstance(source, Image.Image):
            yield source.copy()
            return
        odd = no_regular_file(source) if isinstance(source, str | Path) else None
        if odd:
            raise DataError(odd)
        assert not isinstance(source, np.ndarray)
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as image:
            if image.width * image.height > (Image.MAX_IMAGE_PIXELS or float("inf")):
                raise DataError(
                    f"{image.width} x {image.height} pixels are more than Pillow's limit"
                )
            yield image
    except FileNotFoundError:
        link = (
            "a link to a file that is not there"
            if Path(name).is_symlink()
            else "there is no such file"
        )
        raise DataError(f"{name}: {link}") from None
    # Pillow's readers meet a broken file with a dozen classes of exception (OSError, SyntaxError,
    # ValueError, struct.error, a bomb's warning made an error, ...), and every one means the same:
    # not an image for us.
    except Exception as error:
        reason = first_line(error)
        reason = reason.split(" <_io.")[0].split(f" '{name}'")[0]
        raise DataError(f"{name}: {reason}") from error


def _rgb(image: Image.Image, at_least: int | None, ranges: Ranges) -> Image.Image:
    factor = max(1, min(image.size) // at_least) if at_least else 1
    if factor > 1:
        # JPEG only: let the decoder leave out the fine coefficients, by a power of two up to the
        # factor.
        image.draft("RGB", (image.width // factor, image.height // factor))
        factor = max(1, min(image.size) // at_least) if at_least else 1
    turn = UPRIGHT.get(_orientation(image))
    image.load()
    if turn is not None:
        image = image.transpose(turn)
    image = _eight_bits(image, ranges)
    return image.reduce(factor) if factor > 1 else image


def _orientation(image: Image.Image) -> int:
    if image.format == "PNG":
        # its EXIF may lie behind its pixels, and what is wrong with those is not EXIF's fault
        image.load()
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        # as many classes as for a broken file; every viewer shows the image all the same
        return 1
    return found if isinstance(found, int) else 1


def _kind(image: Image.Image) -> str | None:
    if image.mode.startswith("I;16"):
        return "16-bit"
    return {"I": "32-bit", "F": "float"}.get(image.mode)


def _eight_bits(image: Image.Image, ranges: Ranges) -> Image.Image:
    kind = _kind(image)
    if kind is not None:
        return Image.fromarray(_scaled(np.asarray(image), kind, ranges.get(kind))).convert("RGB")
    # "transparency" is also how palette, grey and RGB files mark one colour as see-through.
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, "white")
        paper.alpha_composite(image)
        return paper.convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _range(kind: str, peak: float) -> float:
    """The range that images of a kind use whose largest value is `peak`.

    Integers have one of BITS. Floats that come nowhere near one of LIMITS have a range of their
    own.
    """
    if kind != "float":
        return next(2.0**bits - 1 for bits in BITS if peak < 2**bits)
    limit = next(limit for limit in LIMITS if peak <= OVER * limit)
    return limit if peak == 0 or peak > limit / 2 else peak


def _scaled(values: NDArray, kind: str, full: float | None) -> Pixels:
    """Grey values of 16 or 32 bits, or float, to 8 bits; without a range, integers are read as
    16-bit.
    """
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite(low) and np.isfinite(high)) or low < 0 or high > FULL:
        raise DataError(
            f"grey values from {low:g} to {high:g}; allowed are 0 to 65535: convert it to 8 bits"
        )
    if full is None:
        full = (
            FULL
            if kind != "float"
            else next(limit for limit in (1.0, 255.0, FULL) if high <= OVER * limit)
        )
    if high > OVER * full:
        raise DataError(
            f"grey values up to {high:g}, and the other {kind} images use 0 to {full:g}"
        )
    return np.round(values.astype(np.float64).clip(max=full) * (255.0 / full)).astype(np.uint8)
