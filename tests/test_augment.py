"""Augmentation of batches: against slow numpy, and as a function of nothing but seed, epoch and
index.
"""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from xzoo.data import augment
from xzoo.data.augment import Augment, colours_of, mixed
from xzoo.data.order import AUGMENT, HELD_OUT, ORDER, STEP, keys
from xzoo.errors import DataError

PLAIN = colours_of((0, 0, 0), (1, 1, 1))
SEEDS = st.integers(0, 2**31)


def noise(n: int, side: int, seed: int = 0) -> Tensor:
    return torch.randint(
        0, 256, (n, 3, side, side), generator=torch.Generator().manual_seed(seed)
    ).byte()


def key(seed: int, epoch: int, stream: int, index: int) -> int:
    return int(keys(seed, epoch, stream, torch.tensor(index)))


def one_by_one(images: Tensor, index: Tensor, seed: int, epoch: int, knobs: Augment) -> Tensor:
    """Shift, flip and cutout of one image at a time, with a padded copy and slices."""
    result = []
    for image, i in zip(images.numpy(), index.tolist(), strict=True):
        p, side = knobs.shift, knobs.side
        padded = np.pad(image, ((0, 0), (p, p), (p, p)), mode="reflect")
        y, x = (
            key(seed, epoch, s, i) * (2 * p + 1) >> 32 for s in (augment.SHIFT_Y, augment.SHIFT_X)
        )
        image = padded[:, y : y + side, x : x + side]
        random = key(seed, epoch, augment.FLIP, i) >> 31
        alternating = ((key(seed, 0, augment.FLIP, i) >> 31) + epoch) % 2
        if {"random": random, "alternating": alternating, "none": 0}[knobs.flip]:
            image = image[:, :, ::-1]
        image = image / 255.0
        if knobs.cutout:
            y, x = (key(seed, epoch, s, i) * side >> 32 for s in (augment.CUT_Y, augment.CUT_X))
            y, x = y - knobs.cutout // 2, x - knobs.cutout // 2
            image[:, max(0, y) : max(0, y + knobs.cutout), max(0, x) : max(0, x + knobs.cutout)] = 0
        result.append(image)
    return torch.from_numpy(np.stack(result))


@settings(max_examples=30, deadline=None)
@given(
    side=st.integers(2, 13),
    shift=st.integers(0, 12),
    cutout=st.integers(0, 13),
    flip=st.sampled_from(augment.FLIPS),
    seed=SEEDS,
    epoch=st.integers(0, 300),
)
def test_a_batch_is_what_each_image_gets_alone(
    side: int, shift: int, cutout: int, flip: str, seed: int, epoch: int
) -> None:
    knobs = Augment(side, side, shift=min(shift, side - 1), cutout=min(cutout, side), flip=flip)
    images, index = noise(7, side), torch.tensor([3, 0, 99, 50_000, 7, 8, 1])
    ours = knobs(images, index, seed, epoch, PLAIN)
    assert ours.dtype == torch.float32
    # 1 / 255 is rounded twice in float32.
    torch.testing.assert_close(
        ours.double(), one_by_one(images, index, seed, epoch, knobs), rtol=2e-7, atol=0
    )


@pytest.mark.parametrize("crop", augment.CROPS)
@pytest.mark.parametrize("img_size", [12, 19])
def test_the_batch_an_image_is_in_changes_no_bit(crop: str, img_size: int) -> None:
    knobs = Augment(12, img_size, crop=crop, cutout=5)
    images, index, colours = (
        noise(23, 12),
        torch.arange(100, 123),
        colours_of((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)),
    )
    whole = knobs(images, index, 5, 3, colours)
    for size in (1, 2, 9):
        parts = [
            knobs(i, n, 5, 3, colours)
            for i, n in zip(images.split(size), index.split(size), strict=True)
        ]
        assert torch.equal(torch.cat(parts), whole), f"batches of {size}"
    assert not torch.equal(knobs(images, index, 5, 4, colours), whole), (
        "another epoch shows the same"
    )
    assert not torch.equal(knobs(images, index, 6, 3, colours), whole), (
        "another seed shows the same"
    )


def test_alternating_flips_show_both_views_in_any_two_epochs() -> None:
    images, index, knobs = (
        noise(64, 8),
        torch.arange(64),
        Augment(8, 8, shift=0, flip="alternating"),
    )
    views = [knobs(images, index, 1, epoch, PLAIN) for epoch in range(4)]
    for one, next_ in pairwise(views):
        assert torch.equal(one, next_.flip(3))
    mirrored = (views[0] != augment.normalised(images, PLAIN)).flatten(1).any(1)
    assert 16 < int(mirrored.sum()) < 48, "all images are turned the same way"


def test_choices_are_uniform_and_streams_independent() -> None:
    index = torch.arange(40_000)
    for seed, epoch in ((0, 0), (0, 1), (17, 200)):
        dy, dx = (
            augment.randint(keys(seed, epoch, s, index), 9)
            for s in (augment.SHIFT_Y, augment.SHIFT_X)
        )
        for choices, n in ((dy, 9), (dx, 9), (dy * 9 + dx, 81)):
            counts = torch.bincount(choices, minlength=n).numpy()
            # Deterministic: the same three seeds pass or fail for ever.
            assert stats.chisquare(counts).pvalue > 0.001, f"seed {seed}, epoch {epoch}: {counts}"
        u = augment.uniform(keys(seed, epoch, augment.AREA, index))
        assert bool(((u >= 0) & (u < 1)).all())
        assert stats.kstest(u.numpy(), "uniform").pvalue > 0.001


def test_every_stream_has_its_own_number() -> None:
    names = ("SHIFT_Y", "SHIFT_X", "FLIP", "CUT_Y", "CUT_X", "MIX", "ERASE", "AREA", "RATIO")
    numbers = [*(getattr(augment, name) for name in names), ORDER, HELD_OUT, AUGMENT, STEP]
    assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize("img_size", [16, 24, 33])
def test_a_resized_crop_of_everything_is_the_image(img_size: int) -> None:
    images, index = noise(5, 16), torch.arange(5)
    knobs = Augment(16, img_size, crop="resized", scale=(1, 1), ratio=(1, 1), flip="none")
    expected = augment.upscaled(images.float() / 255, img_size)
    # Positions are float32 numbers up to 16: an ulp of 1e-6, times a slope of 1 a pixel.
    torch.testing.assert_close(knobs(images, index, 0, 0, PLAIN), expected, rtol=0, atol=8e-6)


def test_a_resized_crop_is_the_box_that_was_drawn() -> None:
    line = torch.arange(32.0)
    images = torch.stack(
        [line[None, :].expand(32, 32), line[:, None].expand(32, 32), torch.zeros(32, 32)]
    )
    draws = torch.tensor([[0.0, 0.5, 1.0], [0.5, 0.2, 0.9], [0.0, 0.5, 1.0], [1.0, 0.3, 0.0]])
    box = augment.boxes(draws, (0.25, 0.81), (0.5, 2.0))
    top, left, height, width = box
    torch.testing.assert_close(
        height * width, torch.tensor([0.25, 0.53, 0.81]).clamp(max=height * width)
    )
    assert bool(
        ((top >= 0) & (left >= 0) & (top + height <= 1 + 1e-6) & (left + width <= 1 + 1e-6)).all()
    )
    crops = augment.resized(
        images.expand(3, 3, 32, 32), box, torch.tensor([False, True, False]), 16
    )
    for i in range(3):
        columns = (left[i] + (torch.arange(16) + 0.5) / 16 * width[i]) * 32 - 0.5
        expected = columns.flip(0) if i == 1 else columns
        torch.testing.assert_close(crops[i, 0, 0], expected.clamp(0, 31), rtol=0, atol=1e-4)
        rows = (top[i] + (torch.arange(16) + 0.5) / 16 * height[i]) * 32 - 0.5
        torch.testing.assert_close(crops[i, 1, :, 0], rows.clamp(0, 31), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"crop": "centre"}, "crop='centre': use one of shift, resized"),
        ({"flip": "yes"}, "flip='yes': use one of random, alternating, none"),
        ({"shift": 8}, "shift=8 of images of 8 pixels: use 0 to 7"),
        ({"cutout": 9}, "cutout=9 of images of 8 pixels: use 0 to 8"),
        ({"scale": (0.5, 1.5)}, r"scale=\(0.5, 1.5\): shares"),
        ({"ratio": (2.0, 1.0)}, r"ratio=\(2.0, 1.0\): width over height"),
    ],
)
def test_a_wrong_knob_is_named(knobs: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Augment(8, 8, **knobs)


# ---- mixup and cutmix


def batch(n: int) -> tuple[Tensor, Tensor]:
    """Image i has the value i everywhere, and the label i."""
    return torch.arange(float(n))[:, None, None, None].expand(n, 3, 16, 16), torch.arange(n)


@pytest.mark.parametrize("n", [2, 5, 8])
def test_mixup_is_the_stated_share_of_two_images(n: int) -> None:
    images, labels = batch(n)
    for number in range(20):
        x, partner, share = mixed(images, labels, 0.4, 0.0, 3, 1, number)
        assert 0 <= share <= 1
        assert not bool((partner == labels).any())
        expected = share * labels + (1 - share) * partner
        torch.testing.assert_close(x, expected.float()[:, None, None, None].expand_as(x))


@pytest.mark.parametrize("n", [2, 7])
def test_cutmix_pastes_the_stated_share_of_pixels(n: int) -> None:
    images, labels = batch(n)
    shares = []
    for number in range(20):
        x, partner, share = mixed(images, labels, 0.0, 1.0, 3, 1, number)
        own = (x == images).flatten(1).double().mean(1)
        torch.testing.assert_close(own, torch.full((n,), share, dtype=torch.float64))
        assert bool(((x == images) | (x == partner[:, None, None, None])).all())
        shares.append(share)
    assert len(set(shares)) > 10


def test_mixing_does_not_depend_on_the_ranks() -> None:
    images, labels = noise(12, 8).float(), torch.arange(12)
    for mixup, cutmix in ((0.2, 0.0), (0.0, 1.0), (0.2, 1.0)):
        for number in range(6):
            x, partner, share = mixed(images, labels, mixup, cutmix, 0, 0, number)
            parts = [
                mixed(i, n, mixup, cutmix, 0, 0, number)
                for i, n in zip(images.split(4), labels.split(4), strict=True)
            ]
            assert torch.equal(torch.cat([p[0] for p in parts]), x)
            assert torch.equal(torch.cat([p[1] for p in parts]), partner)
            assert {p[2] for p in parts} == {share}


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_shares_are_distributed_as_beta(alpha: float) -> None:
    images, labels = torch.zeros(2, 1, 1, 1), torch.arange(2)
    shares = [
        mixed(images, labels, alpha, 0.0, 0, epoch, b)[2] for epoch in range(20) for b in range(100)
    ]
    assert stats.kstest(shares, stats.beta(alpha, alpha).cdf).pvalue > 0.001


def test_no_mixing_is_the_batch_itself() -> None:
    images, labels = batch(4)
    x, partner, share = mixed(images, labels, 0.0, 0.0, 0, 0, 0)
    assert x is images
    assert partner is labels
    assert share == 1
    with pytest.raises(DataError, match=r"mixup=-1, cutmix=0: 0 for none"):
        mixed(images, labels, -1.0, 0.0, 0, 0, 0)
