"""The rule of `auto`: which backend runs a layer of given sizes. No stop-watch, so that runs are reproducible."""

import math

import torch
from torch import Tensor

from . import native

# `gather` copies an input once for each block that reads it and leaves out the multiplications by zero. How
# many times fewer the weights are than the dense ones, times the share, tells how well that pays. At or above
# these figures, with no more copies than were measured, it won everywhere, forward and training, at batch 1,
# 16 and 128: 1.4 to 13 times (tests/golden/auto.csv; 2026-11-24, torch 2.14, one thread of a Zen 4, float32).
# Not so in channels_last (0.5 to 2.2 on two threads), nor for 1x1 convolutions at batch 128 (0.2 to 2.7).
# Other devices and types: not measured.
GATHER = {"conv2d": (128, 4), "linear": (256, 8)}  # least share * inputs / degree, most copies

# Our own kernels: inputs / degree at which each of the three products was at least 1.1 times as fast as what
# `library` takes, in either memory format, for 3x3, for 1x1 and for linear; the gradients only from MANY samples
# (or pixels, where the kernel is 1x1) on, because their lanes are samples (tests/golden/native.csv; 2026-11-24,
# torch 2.14, one thread of a Zen 4 with vectors of 16 floats). Vectors of 4 floats: not measured.
NATIVE = {"": (2, 2, 4), "input_grad": (2, 2, 4), "weight_grad": (2, 4, 2)}
MANY = 16


def choose(name: str, x: Tensor, weight: Tensor, neighbours: Tensor, *geometry: list[int]) -> str:
    """`name` is an operation's, or one of its gradients' (conv2d_input_grad); `geometry` a convolution's."""
    operation, _, gradient = name.partition("_")
    kind = 2 if operation == "linear" else math.prod(weight.shape[2:]) == 1
    lanes = x.shape[0] * (math.prod(x.shape[2:]) if kind else 1)
    pays = x.shape[1] >= NATIVE[gradient][kind] * neighbours.shape[1] and (lanes >= MANY or not gradient)
    if pays and native.supports(operation, x, weight, *geometry) and native.available() and native.lanes() >= 8:
        return "native"
    return library(operation, x, weight, neighbours)


def library(operation: str, x: Tensor, weight: Tensor, neighbours: Tensor) -> str:
    """The better one of the backends that are made of torch's own operations."""
    # `triton` has not been measured: time it against dense, in both memory formats, for share 8 and 16 (triton.py).
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return "dense"
    if operation == "conv2d" and (weight.shape[2] * weight.shape[3] == 1 or not x.is_contiguous()):
        return "dense"
    n_out, (blocks, degree), n_in = weight.shape[0], neighbours.shape, x.shape[1]
    saves, copies = GATHER[operation]
    fits = n_out * n_in >= saves * blocks * degree and blocks * degree <= copies * n_in
    return "gather" if fits else "dense"
