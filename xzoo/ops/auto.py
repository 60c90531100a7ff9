"""The rule of `auto`: which backend runs a layer of given sizes. No stop-watch, so that runs are reproducible."""

import torch
from torch import Tensor

# `gather` copies an input once for each block that reads it and leaves out the multiplications by zero. How
# many times fewer the weights are than the dense ones, times the share, tells how well that pays. At or above
# these figures, with no more copies than were measured, it won everywhere, forward and training, at batch 1,
# 16 and 128: 1.4 to 13 times (tests/golden/auto.csv; 2026-11-24, torch 2.14, one thread of a Zen 4, float32).
# Not so in channels_last (0.5 to 2.2 on two threads), nor for 1x1 convolutions at batch 128 (0.2 to 2.7).
# Other devices and types: not measured.
GATHER = {"conv2d": (128, 4), "linear": (256, 8)}  # least share * inputs / degree, most copies


def choose(operation: str, x: Tensor, weight: Tensor, neighbours: Tensor) -> str:
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return "dense"
    if operation == "conv2d" and (weight.shape[2] * weight.shape[3] == 1 or not x.is_contiguous()):
        return "dense"
    n_out, (blocks, degree), n_in = weight.shape[0], neighbours.shape, x.shape[1]
    saves, copies = GATHER[operation]
    fits = n_out * n_in >= saves * blocks * degree and blocks * degree <= copies * n_in
    return "gather" if fits else "dense"
