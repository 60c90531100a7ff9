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

# Our own kernels, by the floats in a vector, and apart for CPUs that are `native.fast`: inputs / degree from which each
# of the three products is faster than what `library` takes, in either memory format: for 3x3, 3x3 with a stride,
# 1x1, linear, and for 1x1 and linear of a SHARE, whose outputs read the same inputs. Faster is 1.1 times in all but
# one of a hundred of the sizes that were measured (of forty on fast CPUs, where the library is twice as fast as well),
# and nowhere a loss of more than a fifth. Kernels whose lanes are samples (pixels, where the kernel is 1x1) need many
# of them, for fewer there are others: a rule holds from its number of lanes on (tests/golden/native.csv; 2026-11-24,
# torch 2.14, one thread of a Zen 4, the last part with torch and our kernels held to AVX2; fast: 2026-11-28, an Emerald
# Rapids). Vectors of 4 floats: not measured, so not taken.
Rule = dict[str, tuple[int, ...]]
NATIVE: dict[tuple[int, bool], dict[int, Rule]] = {
    (16, False): {
        16: {"": (2, 2, 2, 2, 2, 2), "input_grad": (2, 2, 2, 8, 2, 2), "weight_grad": (2, 2, 4, 2, 2, 2)},
        0: {"": (2, 4, 2, 2, 2, 2), "input_grad": (2, 4, 4, 8, 2, 2), "weight_grad": (8, 8, 2, 4, 2, 2)},
    },
    (16, True): {
        16: {"": (2, 2, 4, 2, 2, 2), "input_grad": (2, 2, 4, 8, 2, 2), "weight_grad": (2, 2, 8, 2, 2, 2)},
        2: {"": (2, 4, 2, 2, 2, 2), "input_grad": (2, 4, 8, 8, 2, 2), "weight_grad": (8, 8, 2, 2, 2, 2)},
        0: {"": (2, 2, 2, 2, 2, 2), "input_grad": (2, 4, 8, 8, 2, 2), "weight_grad": (8, 8, 2, 2, 2, 2)},
    },
    (8, False): {
        16: {"": (2, 4, 4, 2, 2, 2), "input_grad": (2, 2, 4, 8, 2, 2), "weight_grad": (2, 2, 4, 4, 4, 2)},
        0: {"": (2, 2, 2, 2, 2, 2), "input_grad": (2, 4, 4, 8, 2, 2), "weight_grad": (8, 8, 2, 2, 2, 2)},
    },
}
SHARE = 4


def choose(name: str, x: Tensor, weight: Tensor, neighbours: Tensor, *geometry: list[int]) -> str:
    """`name` is an operation's, or one of its gradients' (conv2d_input_grad); `geometry` a convolution's."""
    operation, _, gradient = name.partition("_")
    point = operation == "linear" or math.prod(weight.shape[2:]) == 1
    lanes = x.shape[0] * (math.prod(x.shape[2:]) if point else 1)
    if native.supports(operation, x, weight, *geometry) and native.available():
        kind = 3 if operation == "linear" else 2 if point else int(geometry[0][0] > 1)
        kind += 2 if point and weight.shape[0] >= SHARE * neighbours.shape[0] else 0
        rules = NATIVE.get((native.lanes(), native.fast()), {})
        rule = next((rule for least, rule in rules.items() if lanes >= least), None)
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
