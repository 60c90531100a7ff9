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

# Our own kernels, by the floats in a vector: inputs / degree from which each of the three products is faster than what
# `library` takes, in either memory format, for 3x3, for 3x3 with a stride, for 1x1, for linear, and for 1x1 and linear
# of a SHARE, whose outputs read the same inputs. Faster is 1.1 times in all but one of a hundred of the sizes that were
# measured, and nowhere a loss of more than a fifth (7x7 pixels of four samples). Kernels whose lanes are samples
# (pixels, where the kernel is 1x1) need MANY of them; for fewer there are others (tests/golden/native.csv; 2026-11-24,
# torch 2.14, one thread of a Zen 4, the second part with torch and our kernels held to AVX2). Vectors of 4 floats: not
# measured, so not taken.
NATIVE = {
    16: {"": (2, 2, 2, 2, 2, 2), "input_grad": (2, 2, 2, 8, 2, 2), "weight_grad": (2, 2, 4, 2, 2, 2)},
    8: {"": (2, 4, 4, 2, 2, 2), "input_grad": (2, 2, 4, 8, 2, 2), "weight_grad": (2, 2, 4, 4, 4, 2)},
}
FEW = {
    16: {"": (2, 4, 2, 2, 2, 2), "input_grad": (2, 4, 4, 8, 2, 2), "weight_grad": (8, 8, 2, 4, 2, 2)},
    8: {"": (2, 2, 2, 2, 2, 2), "input_grad": (2, 4, 4, 8, 2, 2), "weight_grad": (8, 8, 2, 2, 2, 2)},
}
MANY, SHARE = 16, 4


def choose(name: str, x: Tensor, weight: Tensor, neighbours: Tensor, *geometry: list[int]) -> str:
    """`name` is an operation's, or one of its gradients' (conv2d_input_grad); `geometry` a convolution's."""
    operation, _, gradient = name.partition("_")
    point = operation == "linear" or math.prod(weight.shape[2:]) == 1
    lanes = x.shape[0] * (math.prod(x.shape[2:]) if point else 1)
    if native.supports(operation, x, weight, *geometry) and native.available():
        kind = 3 if operation == "linear" else 2 if point else int(geometry[0][0] > 1)
        kind += 2 if point and weight.shape[0] >= SHARE * neighbours.shape[0] else 0
        rule = (NATIVE if lanes >= MANY else FEW).get(native.lanes())
        if rule and x.shape[1] >= rule[gradient][kind] * neighbours.shape[1]:
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
