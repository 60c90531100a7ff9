"""Each block's inputs side by side, then one grouped operation of the library.

Copies the input degree * blocks / n_in times, so it pays where `share` is large. Keeps NaN to the
outputs that are connected to it. The input gradient adds into channels in order on the CPU; on a
GPU `index_add` adds in any order unless torch.use_deterministic_algorithms is on.
"""

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from .dense import only_read
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
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> Tensor:
    gathered = x.index_select(1, neighbours.flatten())  # [B, blocks * degree, H, W]
    return F.conv2d(gathered, weight, bias, stride, padding, dilation, groups=len(neighbours))


def conv2d_input_grad(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    neighbours: Tensor,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> Tensor:
    shape = [x.shape[0], neighbours.numel(), *x.shape[2:]]
    gathered = conv2d_input(shape, weight, grad, stride, padding, dilation, groups=len(neighbours))
    return _add(gathered, x, neighbours)


def conv2d_weight_grad(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    neighbours: Tensor,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> Tensor:
    x, stride = only_read(x, weight, stride, padding)
    gathered = x.index_select(1, neighbours.flatten())
    return conv2d_weight(
        gathered, weight.shape, grad, stride, padding, dilation, groups=len(neighbours)
    )


def linear(x: Tensor, weight: Tensor, neighbours: Tensor, bias: Tensor | None) -> Tensor:
    # [blocks, B, degree] @ [blocks, degree, share] -> [blocks, B, share]
    y = _rows(x, neighbours) @ _blocks(weight, neighbours).transpose(1, 2)
    y = y.transpose(0, 1).reshape(len(x), len(weight))
    return y if bias is None else y + bias


def linear_input_grad(grad: Tensor, x: Tensor, weight: Tensor, neighbours: Tensor) -> Tensor:
    rows = _outputs(grad, neighbours) @ _blocks(weight, neighbours)  # [blocks, B, degree]
    columns = rows.transpose(0, 1).reshape(len(grad), neighbours.numel())
    return _add(columns, x, neighbours)


def linear_weight_grad(grad: Tensor, x: Tensor, weight: Tensor, neighbours: Tensor) -> Tensor:
    # [blocks, share, degree].
    blocks = _outputs(grad, neighbours).transpose(1, 2) @ _rows(x, neighbours)
    return blocks.reshape(weight.shape)


def _rows(x: Tensor, neighbours: Tensor) -> Tensor:
    """The inputs of each block: [blocks, B, degree]."""
    return x.index_select(1, neighbours.flatten()).unflatten(1, neighbours.shape).transpose(0, 1)


def _outputs(grad: Tensor, neighbours: Tensor) -> Tensor:
    """The outputs of each block: [blocks, B, share]."""
    return grad.unflatten(1, (len(neighbours), grad.shape[1] // len(neighbours))).transpose(0, 1)


def _blocks(weight: Tensor, neighbours: Tensor) -> Tensor:
    """The weights of each block: [blocks, share, degree]."""
    return weight.unflatten(0, (len(neighbours), len(weight) // len(neighbours)))


def _add(columns: Tensor, x: Tensor, neighbours: Tensor) -> Tensor:
    """The sum of the columns [B, blocks * degree, ...] of each input, of x's shape."""
    # Half types add in float32: one rounding for each reader would cost more digits than plain
    # torch loses.
    dtype = torch.promote_types(columns.dtype, torch.float32)
    zeros = torch.zeros(x.shape, dtype=dtype, device=x.device)
    return zeros.index_add(1, neighbours.flatten(), columns.to(dtype)).to(columns.dtype)
