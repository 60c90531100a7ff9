"""Augmentation of whole batches on their device; every choice is a hash of where the image stands.

    stream  draws                                  index
    0       the order of the images (order.py)     image
    1, 2    vertical, horizontal place of a crop   image
    3       flip                                   image
    4, 5    row, column of the cutout's centre     image
    6       mixup and cutmix                       8 * batch + number of the draw
    7       erasing (kept for it)                  image
    8, 9    area, aspect ratio of a resized crop   image
    10      images held out of training            image
    100, 101   transforms of single images (loader.py), torch's generator in a step (task.py)

So an image looks the same in an epoch whatever batch, device, rank or process it is seen by.

Not here: transforms of single images of any size (timm's, in loader.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log, sqrt

import torch
from scipy.special import betaincinv
from torch import Tensor
from torch.nn import functional as F

from ..errors import DataError
from .order import key, keys

SHIFT_Y, SHIFT_X, FLIP, CUT_Y, CUT_X, MIX, ERASE, AREA, RATIO = range(1, 10)
CROPS, FLIPS = ("shift", "resized"), ("random", "alternating", "none")


@dataclass(frozen=True)
class Augment:
    """What training shows of square images of `side` pixels; see `CIFAR10` for what the arguments
    mean.

    Raises: DataError for values that mean nothing.
    """

    side: int
    img_size: int
    crop: str = "shift"
    shift: int = 4
    scale: tuple[float, float] = (0.25, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: str = "random"
    cutout: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (("crop", CROPS), ("flip", FLIPS)):
            if getattr(self, name) not in allowed:
                raise DataError(f"{name}={getattr(self, name)!r}: use one of {', '.join(allowed)}")
        if not 0 <= self.shift < self.side:
            raise DataError(
                f"shift={self.shift} of images of {self.side} pixels: use 0 to {self.side - 1}"
            )
        if not 0 <= self.cutout <= self.img_size:
            raise DataError(
                f"cutout={self.cutout} of images of {self.img_size} pixels: use 0 to "
                f"{self.img_size}"
            )
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise DataError(f"scale={self.scale}: shares of the area, 0 < smallest <= largest <= 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise DataError(f"ratio={self.ratio}: width over height, 0 < smallest <= largest")

    def __call__(
        self, images: Tensor, index: Tensor, seed: int, epoch: int, colours: Tensor
    ) -> Tensor:
        """The images as they are seen in an epoch.

        Args:
            images: uint8 [B, 3, side, side].
            index: their numbers in the data set, int64 [B].
            colours: of `colours_of`, on the device.
        Returns: float32 [B, 3, img_size, img_size], normalised.
        """
        # [streams, B]
        draws = keys(seed, epoch, torch.arange(RATIO + 1, device=index.device)[:, None], index)
        mirrored = self._mirrored(draws[FLIP], index, seed, epoch)
        if self.crop == "resized":
            box = boxes(uniform(draws[[AREA, RATIO, SHIFT_Y, SHIFT_X]]), self.scale, self.ratio)
            x = resized(normalised(images, colours), box, mirrored, self.img_size)
        else:
            dy, dx = randint(draws[[SHIFT_Y, SHIFT_X]], 2 * self.shift + 1) - self.shift
            x = upscaled(normalised(shifted(images, dy, dx, mirrored), colours), self.img_size)
        if self.cutout:
            y, column = randint(draws[[CUT_Y, CUT_X]], self.img_size)
            x = cut_out(x, y, column, self.cutout)
        return x

    def _mirrored(self, draw: Tensor, index: Tensor, seed: int, epoch: int) -> Tensor:
        if self.flip == "none":
            return torch.zeros_like(index, dtype=torch.bool)
        if self.flip == "alternating":
            # A draw for the whole run, then both views in turn (Jordan, "94% on CIFAR-10 in 3.29
            # seconds", 2.1).
            return (randint(keys(seed, 0, FLIP, index), 2) + epoch) % 2 == 1
        return randint(draw, 2) == 1


# ---- from a key to a choice


def randint(draws: Tensor, n: int) -> Tensor:
    """Integers 0 to n - 1 from 32-bit keys."""
    return (draws * n) >> 32


def uniform(draws: Tensor) -> Tensor:
    """float32 in [0, 1) from 32-bit keys; of the upper 24 bits, which it holds exactly."""
    return (draws >> 8).float() * 2.0**-24


# ---- what is done to a batch


def colours_of(mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Factor and offset [2, 3, 1, 1] that turn 0..255 into (x / 255 - mean) / std."""
    centre, spread = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (mean, std))
    return torch.stack([1 / (255 * spread), -centre / spread]).float()


def normalised(images: Tensor, colours: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] -> float32; 0 is the mean colour."""
    return images.float().mul_(colours[0]).add_(colours[1])


def upscaled(x: Tensor, size: int) -> Tensor:
    """float [B, C, S, S] -> [B, C, size, size], bilinear."""
    return (
        x
        if x.shape[-1] == size
        else F.interpolate(x, (size, size), mode="bilinear", align_corners=False)
    )


def shifted(images: Tensor, dy: Tensor, dx: Tensor, mirrored: Tensor) -> Tensor:
    """Window of each image that starts dy, dx pixels from it, filled by reflection at the border,
    then mirrored.

    Args: images [B, C, S, S] of any type; dy, dx int64 [B], below S in size; mirrored bool [B].
    """
    side = images.shape[-1]
    line = torch.arange(side, device=images.device)
    rows, columns = (_reflected(line + d[:, None], side) for d in (dy, dx))  # [B, S]
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    # Two gathers of lines: no padded copy of the data set, and on one core of an EPYC (2026-11,
    # torch 2.14) 99,000 images/s at 32 px against 50,000 for indexing each pixel.
    images = images.gather(2, rows[:, None, :, None].expand_as(images))
    return images.gather(3, columns[:, None, None, :].expand_as(images))


def _reflected(position: Tensor, side: int) -> Tensor:
    last = side - 1
    return last - (last - position.abs()).abs()


def cut_out(x: Tensor, y: Tensor, column: Tensor, side: int) -> Tensor:
    """Set a square to zero, the mean colour, in place; y, column [B]: its centre, so that it may
    leave the image.
    """
    line = torch.arange(x.shape[-1], device=x.device)
    rows, columns = (
        (line >= c[:, None] - side // 2) & (line < c[:, None] - side // 2 + side)
        for c in (y, column)
    )
    return x.masked_fill_(rows[:, None, :, None] & columns[:, None, None, :], 0.0)


def boxes(draws: Tensor, scale: tuple[float, float], ratios: tuple[float, float]) -> Tensor:
    """Top, left, height and width of crops, as shares of the side, from uniform draws: both float
    [4, B].

    As torchvision's RandomResizedCrop: the area uniform in `scale`, width over height log-uniform.
    A side that would be too long is cut to the image's, where torchvision draws again up to ten
    times.
    """
    area, ratio, y, x = draws
    area = scale[0] + (scale[1] - scale[0]) * area
    aspect = torch.exp(log(ratios[0]) + (log(ratios[1]) - log(ratios[0])) * ratio)
    height, width = (area / aspect).sqrt().clamp(max=1.0), (area * aspect).sqrt().clamp(max=1.0)
    return torch.stack([y * (1 - height), x * (1 - width), height, width])


def resized(x: Tensor, box: Tensor, mirrored: Tensor, size: int) -> Tensor:
    """The box of each image (of `boxes`) as [B, C, size, size], bilinear, then mirrored."""
    top, left, height, width = box
    # centres of the pixels that are asked for
    line = (torch.arange(size, device=x.device) + 0.5) / size
    rows, columns = (
        start[:, None] + line * length[:, None] for start, length in ((top, height), (left, width))
    )
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    # Elementwise, not affine_grid: its small matrix product may differ in the last bit with the
    # batch. [B, size, size, 2]
    grid = torch.stack(torch.broadcast_tensors(columns[:, None, :], rows[:, :, None]), dim=3)
    return F.grid_sample(
        x, 2 * grid - 1, mode="bilinear", padding_mode="border", align_corners=False
    )


# ---- mixup and cutmix


def mixed(
    images: Tensor, labels: Tensor, mixup: float, cutmix: float, seed: int, epoch: int, batch: int
) -> tuple[Tensor, Tensor, float]:
    """Mix each image with a neighbour: mixup (Zhang et al. 2018), cutmix (Yun et al. 2019), or
    either at random.

    The partner of an image is the next one or the one before: the order is random already, and
    pairs stay together however a batch of an even number per rank is divided. In an odd batch the
    last image takes a third party. The share is drawn once a batch, the same on every rank: it is
    the value of the inverse distribution function of Beta(alpha, alpha) at a hash, in float64 on
    the host.

    Args:
        images, labels: [B, C, H, W] and [B].
        mixup, cutmix: alpha of each, 0 for none; where both are given, each takes half of the
            batches.
        batch: number of the batch in its epoch.
    Returns: the images, the labels of the partners, and the share of the images' own labels: the
        loss is share * loss(labels) + (1 - share) * loss(partner labels).
    Raises: DataError for a negative alpha.
    """
    if min(mixup, cutmix) < 0:
        raise DataError(
            f"mixup={mixup:g}, cutmix={cutmix:g}: 0 for none, or a positive alpha of Beta(alpha, "
            "alpha)"
        )
    if not (mixup or cutmix) or len(images) < 2:
        return images, labels, 1.0
    which, share, y, x = ((key(seed, epoch, MIX, 8 * batch + i) + 0.5) / 2**32 for i in range(4))
    partner = torch.arange(len(images), device=images.device) ^ 1
    partner = partner.where(partner < len(images), 0)
    if mixup and (not cutmix or which < 0.5):
        share = float(betaincinv(mixup, mixup, share))
        return images.lerp(images[partner], 1 - share), labels[partner], share
    side = sqrt(1 - float(betaincinv(cutmix, cutmix, share)))
    height, width = images.shape[2:]
    (top, bottom), (left, right) = _span(y, side, height), _span(x, side, width)
    result = images.clone()
    result[:, :, top:bottom, left:right] = images[partner, :, top:bottom, left:right]
    # What the border cut off belongs to the image itself.
    return result, labels[partner], 1 - (bottom - top) * (right - left) / (height * width)


def _span(centre: float, side: float, length: int) -> tuple[int, int]:
    """Pixels [from, to) of a stretch of `side` * length around `centre` * length, cut at the
    border.
    """
    middle, half = int(centre * length), int(side * length) // 2
    return max(0, middle - half), min(length, middle + half)
