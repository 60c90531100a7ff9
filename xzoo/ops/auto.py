"""The rule of `auto`: which backend runs a layer of given sizes. No stop-watch, so that runs are reproducible."""

import torch
from torch import Tensor

# `gather` copies an input once for each block that reads it and saves the multiplications by zero. How many
# times the weights are fewer than the dense ones, times the share, tells how well that pays; at or above
# these figures, and with no more copies than were measured, it won everywhere: forward and training, batch
# 1, 16 and 128, 1.4 to 13 times. Convolutions of 1x1 are not here: at batch 128 they lose (0.4 to 1.4
# below the largest shares). Measured 2026-11-24 on one thread of a Zen 4 with torch 2.14, float32:
# tests/golden/auto.csv. Elsewhere nothing was measured, and `dense` is never far off.
GATHER = {"conv2d": (128, 4), "linear": (256, 8)}  # least share * inputs / degree, most copies


def choose(operation: str, x: Tensor, weight: Tensor, neighbours: Tensor) -> str:
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return "dense"
    if operation == "conv2d" and weight.shape[2] * weight.shape[3] == 1:
        return "dense"
    n_out, (blocks, degree), n_in = weight.shape[0], neighbours.shape, x.shape[1]
    saves, copies = GATHER[operation]
    fits = n_out * n_in >= saves * blocks * degree and blocks * degree <= copies * n_in
    return "gather" if fits else "dense"
