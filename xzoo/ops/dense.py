"""The definition: scatter the weights into a dense tensor and call the library.

Slow, short enough to trust, and at home wherever torch is. An input that is NaN or infinite spreads
to outputs that are not connected to it, because 0 * NaN is NaN: the one exception of the ops.
TorchScript compiles the two forward functions, hence their hints and plain loops.
"""

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from .rows import Pair

# ---- as backends.Backend says

ACTIVATIONS: Collection[str] = ()
CHECKS_NEIGHBOURS = False


def possible() -> bool:
    return True


def missing(operation: str, x: Tensor, weight: Tensor, neighbours: Tensor, *geometry: Any) -> str:
    return ""


def conv2d(
    x: Tensor,
    weight: Tensor,
    neighbours: Tensor,
    bias: torch.Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> Tensor:
    return F.conv2d(x, scatter(weight, neighbours, x.shape[1]), bias, stride, padding, dilation)


def conv2d_input_grad(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    neighbours: Tensor,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> Tensor:
    return conv2d_input(
        x.shape, scatter(weight, neighbours, x.shape[1]), grad, stride, padding, dilation
    )


def conv2d_weight_grad(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    neighbours: Tensor,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> Tensor:
    shape = [weight.shape[0], x.shape[1], *weight.shape[2:]]
    x, stride = only_read(x, weight, stride, padding)
    return gather(conv2d_weight(x, shape, grad, stride, padding, dilation), neighbours)


def linear(x: Tensor, weight: Tensor, neighbours: Tensor, bias: torch.Tensor | None) -> Tensor:
    return F.linear(x, scatter(weight, neighbours, x.shape[1]), bias)


def linear_input_grad(grad: Tensor, x: Tensor, weight: Tensor, neighbours: Tensor) -> Tensor:
    return grad @ scatter(weight, neighbours, x.shape[1])


def linear_weight_grad(grad: Tensor, x: Tensor, weight: Tensor, neighbours: Tensor) -> Tensor:
    return gather(grad.t() @ x, neighbours)


def only_read(x: Tensor, weight: Tensor, stride: Pair, padding: Pair) -> tuple[Tensor, Pair]:
    """(x without the pixels that a 1x1 kernel passes over, stride 1); what is given, for other
    kernels.

    For a gradient of weights: oneDNN's own way of leaving them out writes outside its memory, or
    leaves the result wrong, where x is channels_last and has fewer channels than a vector has
    floats (oneDNN#6035; torch 2.14).
    """
    if tuple(weight.shape[2:]) != (1, 1) or any(padding):
        return x, stride
    return x[:, :, :: stride[0], :: stride[1]], (1, 1)


# Rows of a matrix, and whole kernels where those have several numbers: 2 to 10 times as fast on a
# CPU as an index for each number of a weight with four dimensions.


def scatter(weight: Tensor, neighbours: Tensor, n_in: int) -> Tensor:
    """The dense weight [out, n_in, ...] of a compact one [out, degree, ...]: zero where there is no
    edge."""
    n_out = weight.shape[0]
    shape = [n_out, n_in] + list(weight.shape)[2:]  # noqa: RUF005 (TorchScript)
    dense = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
    rows = index(neighbours, n_out)
    if weight.numel() == rows.numel():
        dense.view(n_out, n_in).scatter_(1, rows, weight.reshape(rows.shape))
    else:
        dense.view(n_out * n_in, -1).index_copy_(
            0, edges(rows, n_in), weight.reshape(rows.numel(), -1)
        )
    return dense


def gather(dense: Tensor, neighbours: Tensor) -> Tensor:
    """The compact weight [out, degree, ...] of a dense one [out, n_in, ...]: what `scatter` would
    put there."""
    n_out, n_in = dense.shape[:2]
    rows = index(neighbours, n_out)
    if dense.numel() == n_out * n_in:
        return dense.reshape(n_out, n_in).gather(1, rows).reshape([*rows.shape, *dense.shape[2:]])
    kernels = dense.reshape(n_out * n_in, -1).index_select(0, edges(rows, n_in))
    return kernels.reshape([*rows.shape, *dense.shape[2:]])


def index(neighbours: Tensor, n_out: int) -> Tensor:
    """The inputs that each output reads, int64 [out, degree]."""
    share = n_out // neighbours.shape[0]
    return neighbours.long().repeat_interleave(share, dim=0) if share > 1 else neighbours.long()


def edges(rows: Tensor, n_in: int) -> Tensor:
    """Where the kernel of each edge lies in a dense weight of [out * n_in, ...]."""
    first = torch.arange(rows.shape[0], device=rows.device).mul_(n_in)
    return (rows + first.unsqueeze(1)).flatten()
