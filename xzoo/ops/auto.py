"""The rule of `auto`: which backend, and so which kernel, runs a layer of given sizes, and why.

`choose` is the rule. Among the 3x3 kernels of `native`, `stride_one` of native/conv3_pixels.h
chooses.

No stop-watch, so that runs are reproducible.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import group, native
from .rows import output_shape

# ---- the library's


class GatherBounds(NamedTuple):
    """Where `gather` is taken."""

    # Share * inputs / degree: how many times fewer the weights are, times the share.
    least_saving: int
    most_copies: int  # of an input, one for each block that reads it


# `gather` copies an input once for each block that reads it and leaves out the multiplications by
# zero. At or above these figures, with no more copies than were measured, it won everywhere,
# forward and training, at batch 1, 16 and 128: 1.4 to 13 times (tests/golden/auto.csv; 2026-11-24,
# torch 2.14, one thread of a Zen 4, float32). Not so in channels_last (0.5 to 2.2 on two threads),
# nor for 1x1 convolutions at batch 128 (0.2 to 2.7). Other devices and types: not measured.
GATHER = {"conv2d": GatherBounds(128, 4), "linear": GatherBounds(256, 8)}


# ---- our own kernels


class LeastCompression(NamedTuple):
    """Inputs / degree from which a product is faster by our own kernels, by the kind of layer."""

    conv3: int  # 3x3
    conv3_strided: int  # 3x3 with a stride
    conv1: int  # 1x1
    linear: int
    conv1_shared: int  # of a share of SHARED or more, whose outputs read the same inputs
    linear_shared: int


class NativeRule(NamedTuple):
    """For layers with so many lanes: samples, or pixels of all samples where a kernel is 1x1."""

    least_lanes: int
    forward: LeastCompression
    input_grad: LeastCompression
    weight_grad: LeastCompression


SHARED = 4

# Classes of CPUs: floats in a vector of the kernels, and whether `native.fast`. Vectors of 4 floats
# were not measured, so that the kernels are not taken.
AVX512, AVX512_FAST, AVX2 = (16, False), (16, True), (8, False)

# Of each class, the first rule of which there are lanes enough. Faster is 1.1 times what `library`
# takes, in either memory format, in all but one of a hundred of the sizes that were measured (of
# forty on fast CPUs, where the library is twice as fast as well), and nowhere a loss of more than a
# fifth (tests/golden/native.csv; torch 2.14, one thread; AVX-512: 2026-11-24, a Zen 4; fast:
# 2026-11-28, an Emerald Rapids; AVX2: the Zen 4 with torch and our kernels held to it).
NATIVE: dict[tuple[int, bool], tuple[NativeRule, ...]] = {
    AVX512: (
        NativeRule(
            16,
            forward=LeastCompression(2, 2, 2, 2, 2, 2),
            input_grad=LeastCompression(2, 2, 2, 8, 2, 2),
            weight_grad=LeastCompression(2, 2, 4, 2, 2, 2),
        ),
        NativeRule(
            0,
            forward=LeastCompression(2, 4, 2, 2, 2, 2),
            input_grad=LeastCompression(2, 4, 4, 8, 2, 2),
            weight_grad=LeastCompression(8, 8, 2, 4, 2, 2),
        ),
    ),
    AVX512_FAST: (
        NativeRule(
            16,
            forward=LeastCompression(2, 2, 4, 2, 2, 2),
            input_grad=LeastCompression(2, 2, 4, 8, 2, 2),
            weight_grad=LeastCompression(2, 2, 8, 2, 2, 2),
        ),
        NativeRule(
            2,
            forward=LeastCompression(2, 4, 2, 2, 2, 2),
            input_grad=LeastCompression(2, 4, 8, 8, 2, 2),
            weight_grad=LeastCompression(8, 8, 2, 2, 2, 2),
        ),
        NativeRule(
            0,
            forward=LeastCompression(2, 2, 2, 2, 2, 2),
            input_grad=LeastCompression(2, 4, 8, 8, 2, 2),
            weight_grad=LeastCompression(8, 8, 2, 2, 2, 2),
        ),
    ),
    AVX2: (
        NativeRule(
            16,
            forward=LeastCompression(2, 4, 4, 2, 2, 2),
            input_grad=LeastCompression(2, 2, 4, 8, 2, 2),
            weight_grad=LeastCompression(2, 2, 4, 4, 4, 2),
        ),
        NativeRule(
            0,
            forward=LeastCompression(2, 2, 2, 2, 2, 2),
            input_grad=LeastCompression(2, 4, 4, 8, 2, 2),
            weight_grad=LeastCompression(8, 8, 2, 2, 2, 2),
        ),
    ),
}


# ---- torch's grouped operations


class GroupBounds(NamedTuple):
    """Where `group` is taken, for graphs that it can run."""

    most_compression: int  # inputs / degree
    least_degree: int = 1
    pixels: tuple[float, float] = (1, math.inf)  # least and most, of a sample's input
    samples: tuple[float, float] = (0, math.inf)
    most_results: float = math.inf  # numbers in the result
    last: bool | None = None  # whether in channels_last; None for both formats
    permuted: bool = False  # also where the inputs are not in the order of their groups


ONE, FEW, SEVERAL, MANY = (1, 1), (1, 4), (2, math.inf), (16, math.inf)  # samples
ALL, AT_7, TO_14 = (1, math.inf), (7**2, 7**2), (1, 14**2)  # pixels
FROM_4, FROM_7, FROM_14, FROM_16, FROM_28 = ((n**2, math.inf) for n in (4, 7, 14, 16, 28))
# Numbers of a result that the last cache holds; our kernels write around it, which pays for more.
FITS = 2**23

# Of each class of CPUs, by product and kind of layer; a class that was not measured takes what it
# takes for other graphs. Where a bound holds, `group` was 1.0 to 9 times as fast as what is taken
# for other graphs in all but one of twenty of the sizes that were measured, and nowhere a loss of
# more than a fifth (tests/golden/group.csv; 2026-11-29, torch 2.14, one thread of a Zen 3,
# float32).
GROUP: dict[tuple[int, bool], dict[tuple[str, str], tuple[GroupBounds, ...]]] = {
    AVX2: {
        ("forward", "conv3"): (GroupBounds(4, 32, FROM_14),),
        ("forward", "conv3_strided"): (
            GroupBounds(4, 32, FROM_16, SEVERAL),
            GroupBounds(4, 32, FROM_28),
            GroupBounds(4, 64, FROM_16, last=False, permuted=True),
        ),
        ("forward", "conv1"): (
            GroupBounds(2, samples=ONE),
            GroupBounds(2, last=True),
            GroupBounds(16, 64, AT_7, ONE),
            GroupBounds(16, 64, ALL, MANY, FITS, last=True),
        ),
        ("forward", "conv1_shared"): (
            GroupBounds(4, 128, AT_7, ONE),
            GroupBounds(8, 64, ALL, MANY, FITS, last=True),
        ),
        ("forward", "linear"): (GroupBounds(8, samples=SEVERAL), GroupBounds(16, 128)),
        ("forward", "other"): (GroupBounds(16, 8, permuted=True),),
        ("input_grad", "conv3"): (GroupBounds(4, 32, FROM_14),),
        ("input_grad", "conv3_strided"): (
            GroupBounds(4, 32, last=True),
            GroupBounds(8, 16, samples=ONE),
            GroupBounds(8, 16, samples=ONE, last=False, permuted=True),
        ),
        ("input_grad", "conv1"): (
            GroupBounds(2),
            GroupBounds(16, 64, AT_7, ONE),
            GroupBounds(16, 32, ALL, MANY, FITS, last=True),
        ),
        ("input_grad", "conv1_shared"): (
            GroupBounds(4, 128, AT_7, ONE),
            GroupBounds(16, 32, ALL, MANY, FITS, last=True),
        ),
        ("input_grad", "linear"): (GroupBounds(16, samples=SEVERAL), GroupBounds(16, 128)),
        ("input_grad", "linear_shared"): (
            GroupBounds(8, samples=SEVERAL),
            GroupBounds(16, 128),
            GroupBounds(8, 128, permuted=True),
        ),
        ("input_grad", "other"): (GroupBounds(16, 8, permuted=True),),
        ("weight_grad", "conv3"): (
            GroupBounds(16, 8, FROM_4, FEW),
            GroupBounds(16, 32, FROM_4, FEW, permuted=True),
        ),
        ("weight_grad", "conv3_strided"): (GroupBounds(16, 16, samples=FEW, permuted=True),),
        ("weight_grad", "conv1"): (
            GroupBounds(2, samples=FEW),
            GroupBounds(2, 1, FROM_7, last=False),
        ),
        ("weight_grad", "conv1_shared"): (
            GroupBounds(2, samples=FEW),
            GroupBounds(2, 1, TO_14, FEW, permuted=True),
            GroupBounds(2, 1, FROM_7, last=False),
        ),
        ("weight_grad", "linear"): (GroupBounds(8, samples=SEVERAL), GroupBounds(16, 128)),
        ("weight_grad", "linear_shared"): (
            GroupBounds(8, samples=SEVERAL),
            GroupBounds(16, 128, samples=SEVERAL),
            GroupBounds(8, 128, samples=SEVERAL, permuted=True),
        ),
        ("weight_grad", "other"): (GroupBounds(16, 8, permuted=True),),
    },
}


# ---- the choice


def choose(name: str, x: Tensor, weight: Tensor, neighbours: Tensor, *geometry: list[int]) -> str:
    """The backend of an operation, or of one of its gradients (conv2d_input_grad), for such a
    layer.

    `geometry` is a convolution's stride, padding and dilation.
    """
    bounds = grouped(name, x, weight, neighbours, *geometry)
    order = group.order_of(neighbours, x.shape[1]) if bounds else ""
    if any(order == "ascending" or (order and each.permuted) for each in bounds):
        return "group"
    operation, _, gradient = name.partition("_")
    if not native.missing(operation, x, weight, neighbours, *geometry):
        kind = _kind(operation, weight, neighbours, *geometry)
        lanes = x.shape[0] if kind in ("conv3", "conv3_strided") else x.numel() // x.shape[1]
        for rule in NATIVE.get((native.lanes(), native.fast()), ()):
            if lanes >= rule.least_lanes:
                least = getattr(getattr(rule, gradient or "forward"), kind)
                if x.shape[1] >= least * neighbours.shape[1]:
                    return "native"
                break
    return library(operation, x, weight, neighbours)


def grouped(
    name: str, x: Tensor, weight: Tensor, neighbours: Tensor, *geometry: list[int]
) -> list[GroupBounds]:
    """The bounds that such a layer keeps. Where there are any, `choose` looks at the numbers of
    neighbours too."""
    operation, _, gradient = name.partition("_")
    n_in, (blocks, degree) = x.shape[1], neighbours.shape
    if n_in == degree or n_in % degree or blocks % (n_in // degree):
        return []
    if not x.is_cpu or x.dtype != torch.float32 or not native.available():
        return []
    rule = GROUP.get((native.lanes(), native.fast()), {})
    kind = "other"  # which our kernels do not do
    if not native.missing(operation, x, weight, neighbours, *geometry):
        kind = _kind(operation, weight, neighbours, *geometry)
    batch, pixels = x.shape[0], math.prod(x.shape[2:])
    shapes = {"": output_shape(x, weight, *geometry), "input_grad": x.shape}
    results = math.prod(shapes.get(gradient, weight.shape))
    found = []
    for bounds in rule.get((gradient or "forward", kind), ()):
        small = n_in <= bounds.most_compression * degree and degree >= bounds.least_degree
        sized = _within(pixels, bounds.pixels) and results <= bounds.most_results
        form = bounds.last in (None, not x.is_contiguous())
        if small and sized and form and _within(batch, bounds.samples):
            found.append(bounds)
    return found


def _within(value: int, bounds: tuple[float, float]) -> bool:
    return bounds[0] <= value <= bounds[1]


def _kind(operation: str, weight: Tensor, neighbours: Tensor, *geometry: list[int]) -> str:
    """The field of LeastCompression for a layer that our kernels do."""
    shared = weight.shape[0] >= SHARED * neighbours.shape[0]
    if operation == "linear":
        return "linear_shared" if shared else "linear"
    if math.prod(weight.shape[2:]) == 1:
        return "conv1_shared" if shared else "conv1"
    return "conv3_strided" if geometry[0][0] > 1 else "conv3"


def library(operation: str, x: Tensor, weight: Tensor, neighbours: Tensor) -> str:
    """The better one of the backends that are made of torch's own operations."""
    # `triton` was not measured: time it against dense, in both memory formats, for share 8 and 16.
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return "dense"
    if operation == "conv2d" and (math.prod(weight.shape[2:]) == 1 or not x.is_contiguous()):
        return "dense"
    n_out, (blocks, degree), n_in = weight.shape[0], neighbours.shape, x.shape[1]
    bounds = GATHER[operation]
    saves = n_out * n_in >= bounds.least_saving * blocks * degree
    fits = saves and blocks * degree <= bounds.most_copies * n_in
    return "gather" if fits else "dense"
