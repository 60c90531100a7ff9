"""The rule of `auto`: which backend, and so which kernel, runs a layer of given sizes, and why.

`choose` is the rule. Among the 3x3 kernels of `native`, `stride_one` of native/conv3_pixels.h
chooses.

No stop-watch while it chooses, so that runs are reproducible. What `xzoo tune` measured beforehand
comes before the rule written here, on the machine where it was measured (rules.py). Another kernel
sums in another order, so that results differ by rounding from those without the table, as they do
on another CPU.
"""

import functools
import logging
import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import XzooError
from ..machine import cpuinfo
from . import group, native, rules
from .rules import LeastCompression, NativeRule

_logger = logging.getLogger(__name__)

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


SHARED = 4

# Classes of CPUs: floats in a vector of the kernels, and whether `native.fast`. Vectors of 4 floats
# were not measured, so that the kernels are not taken but by a user's own table.
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


class MostCompression(NamedTuple):
    """Inputs / degree up to which a product is faster by `group`, by the kind of layer."""

    conv3: int
    conv3_strided: int
    conv1: int
    linear: int
    conv1_shared: int
    linear_shared: int
    other: int  # what our kernels do not do


class GroupRule(NamedTuple):
    """For so many samples."""

    least_samples: int
    forward: MostCompression
    input_grad: MostCompression
    weight_grad: MostCompression


ANY = rules.NEVER  # no layer has more
# Where the inputs are not in the order of the groups, ordering them costs more than these gain.
ORDERED = ("conv1", "conv1_shared", "linear", "linear_shared")

# Of each class of CPUs, the first rule of which there are samples enough; a class that was not
# measured takes what it takes for other graphs. Where `group` is taken it is 1.0 to 9 times as fast
# in all but one of twenty of the sizes that were measured, and at least 0.59 times
# (tests/golden/group.csv; 2026-11-29, torch 2.14, one thread of a Zen 3, float32).
GROUP: dict[tuple[int, bool], tuple[GroupRule, ...]] = {
    AVX2: (
        GroupRule(
            5,
            forward=MostCompression(0, 4, 0, 4, 0, 0, ANY),
            input_grad=MostCompression(0, 2, 2, 16, 0, 16, ANY),
            weight_grad=MostCompression(0, 0, 0, 4, 0, 4, ANY),
        ),
        GroupRule(
            0,
            forward=MostCompression(0, 0, 2, 4, 0, 0, ANY),
            input_grad=MostCompression(0, 4, 2, 16, 0, 4, ANY),
            weight_grad=MostCompression(8, 8, 2, 4, 2, 4, ANY),
        ),
    ),
}


# ---- the choice


def choose(name: str, x: Tensor, weight: Tensor, neighbours: Tensor, *geometry: list[int]) -> str:
    """The backend of an operation, or of one of its gradients (conv2d_input_grad), for such a
    layer.

    `geometry` is a convolution's stride, padding and dilation.
    """
    kind = grouped(name, x, weight, neighbours, *geometry)
    order = group.order_of(neighbours, x.shape[1]) if kind else ""
    if order == "ascending" or (order and kind not in ORDERED):
        return "group"
    operation, _, gradient = name.partition("_")
    if not native.missing(operation, x, weight, neighbours, *geometry):
        kind = _kind(operation, weight, neighbours, *geometry)
        lanes = x.shape[0] if kind in ("conv3", "conv3_strided") else x.numel() // x.shape[1]
        for rule in _rules(native.lanes(), native.fast()):
            if lanes >= rule.least_lanes:
                least = getattr(getattr(rule, gradient or "forward"), kind)
                if x.shape[1] >= least * neighbours.shape[1]:
                    return "native"
                break
    return library(operation, x, weight, neighbours)


@functools.cache
def _rules(lanes: int, fast: bool) -> tuple[NativeRule, ...]:
    """Those of this machine, read once: of `xzoo tune`, else those above for this class of CPUs."""
    try:
        table = rules.read()
    except XzooError as error:
        _logger.warning("%s; the rule of `auto` is the built-in one meanwhile", error)
        table = None
    if table is not None and not rules.difference(table):
        return table.rules
    return NATIVE.get((lanes, fast), ())


def is_measured() -> bool:
    """Whether NATIVE has a rule for this CPU that was measured on one of its make and family.

    Loads no kernels. Not measured are vectors of 4 floats (ARM, Apple), Intel's CPUs before
    Sapphire Rapids, and all of AMD's but Zen 3 and 4. (On a Zen 3 `xzoo tune` found no class of the
    AVX2 rule to be slower, 2026-11-29.)
    """
    facts, levels = cpuinfo(), native.levels()
    if not levels:
        return False
    if facts.get("vendor_id") == "GenuineIntel":
        return levels[0] == "v4" and "avx512_fp16" in facts.get("flags", "").split()
    return facts.get("vendor_id") == "AuthenticAMD" and facts.get("cpu family") == "25"


def grouped(name: str, x: Tensor, weight: Tensor, neighbours: Tensor, *geometry: list[int]) -> str:
    """The kind of a layer whose sizes are such that `group` is faster, if its graph is one of
    groups: that, `choose` finds out of the numbers. Empty for other layers."""
    operation, _, gradient = name.partition("_")
    n_in, (blocks, degree) = x.shape[1], neighbours.shape
    if n_in == degree or n_in % degree or blocks % (n_in // degree):
        return ""
    if not x.is_cpu or x.dtype != torch.float32 or not native.available():
        return ""
    kind = "other"
    if not native.missing(operation, x, weight, neighbours, *geometry):
        kind = _kind(operation, weight, neighbours, *geometry)
    for rule in GROUP.get((native.lanes(), native.fast()), ()):
        if x.shape[0] >= rule.least_samples:
            most = getattr(getattr(rule, gradient or "forward"), kind)
            return kind if n_in <= most * degree else ""
    return ""


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
