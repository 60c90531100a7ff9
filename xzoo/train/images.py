"""One image at a time: whatever a file holds becomes an upright 8-bit RGB picture, or a DataError.

Pillow's `convert("RGB")` alone is not enough: it ignores the EXIF orientation, shows the hidden colours
under transparent pixels and clips 16-bit and float images to white. `load_rgb` is the one place where
images are opened; training, validation and `xzoo classify` all go through it.

Not here: finding images on a disk (sources.py), transforms (data.py).
"""

from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from ..errors import DataError

Pixels = NDArray[np.uint8]
Source = str | Path | bytes | BinaryIO | Pixels | Image.Image


def load_rgb(source: Source, at_least: int | None = None) -> Image.Image:
    """Open an image as it is meant to be seen.

    Args:
        source: a path, the bytes of an image file, an open binary file, pixels [H, W, 3], or a Pillow image.
        at_least: an image that is large is reduced by a whole factor, with both sides kept at this many
            pixels or more. A photograph then takes a fraction of the time and memory, and the transform
            that follows still only ever shrinks it.
    Returns: an RGB image: turned by its EXIF orientation, transparency composited on white, 16-bit and
        float values scaled by the range of their type; of an animation the first frame.
    Raises: DataError that names the source, if it is missing, truncated, no image, or has more pixels than
        Pillow's limit against decompression bombs (89 million).
    """
    if isinstance(source, np.ndarray):
        return Image.fromarray(source)
    name = str(source) if isinstance(source, str | Path) else f"<{type(source).__name__}>"
    try:
        if isinstance(source, Image.Image):
            return _rgb(source.copy(), at_least)
        file = BytesIO(source) if isinstance(source, bytes) else source
        with Image.open(file) as image:
            if image.width * image.height > (Image.MAX_IMAGE_PIXELS or float("inf")):
                raise DataError(f"{image.width} x {image.height} pixels are more than Pillow's limit")
            return _rgb(image, at_least)
    except FileNotFoundError:
        raise DataError(f"{name}: there is no such file") from None
    # Pillow's readers meet a broken file with a dozen classes of exception (OSError, SyntaxError, ValueError,
    # struct.error, a bomb's warning made an error, ...), and every one means the same: not an image for us.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        reason = reason.split(" <_io.")[0].split(f" '{name}'")[0]
        raise DataError(f"{name}: {reason}") from error


def _rgb(image: Image.Image, at_least: int | None) -> Image.Image:
    factor = max(1, min(image.size) // at_least) if at_least else 1
    if factor > 1:
        # JPEG only: let the decoder leave out the fine coefficients, by a power of two up to the factor.
        image.draft("RGB", (image.width // factor, image.height // factor))
        factor = max(1, min(image.size) // at_least) if at_least else 1
    # Asked first, since exif_transpose copies what needs no turning; a copy is a tenth of the time of a photograph.
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    image.load()
    image = _eight_bits(image)
    return image.reduce(factor) if factor > 1 else image


def _eight_bits(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_scaled(np.asarray(image))).convert("RGB")
    # "transparency" is also how palette, grey and RGB files mark one colour as see-through.
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, "white")
        paper.alpha_composite(image)
        return paper.convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _scaled(values: NDArray) -> Pixels:
    """Grey values of 16 or 32 bits, or float, to 8 bits.

    Integers are read as 16-bit (Pillow gives 16-bit files as 32-bit ones in some formats). Floats have no
    fixed range: images use 0 to 1, 0 to 255 or 0 to 65535, and the smallest that fits is taken.
    """
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite(low) and np.isfinite(high)) or low < 0 or high > 65535:
        raise DataError(f"grey values from {low:g} to {high:g}; allowed are 0 to 65535: convert it to 8 bits")
    full = 65535.0
    if values.dtype.kind == "f":
        full = next(limit for limit in (1.0, 255.0, 65535.0) if high <= limit)
    return np.round(values.astype(np.float64) * (255.0 / full)).astype(np.uint8)
