"""The definition: scatter the weights into a dense tensor and call the library.

Slow, short enough to trust, and at home wherever torch is. An input that is NaN or infinite spreads
to outputs that are not connected to it, because 0 * NaN is NaN: the one exception of the ops.
TorchScript compiles the two forward functions, hence their hints and plain loops.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight


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


def conv2d_input_grad(grad, x, weight, neighbours, stride, padding, dilation):
    return conv2d_input(x.shape, scatter(weight, neighbours, x.shape[1]), grad, stride, padding, dilation)


def conv2d_weight_grad(grad, x, weight, neighbours, stride, padding, dilation):
    shape = [weight.shape[0], x.shape[1], *weight.shape[2:]]
    return conv2d_weight(x, shape, grad, stride, padding, dilation).gather(1, index(neighbours, weight.shape))


def linear(x: Tensor, weight: Tensor, neighbours: Tensor, bias: torch.Tensor | None) -> Tensor:
    return F.linear(x, scatter(weight, neighbours, x.shape[1]), bias)


def linear_input_grad(grad, x, weight, neighbours):
    return grad @ scatter(weight, neighbours, x.shape[1])


def linear_weight_grad(grad, x, weight, neighbours):
    return (grad.t() @ x).gather(1, index(neighbours, weight.shape))


def scatter(weight: Tensor, neighbours: Tensor, n_in: int) -> Tensor:
    """The dense weight [out, n_in, ...] of a compact one [out, degree, ...]: zero where there is no edge."""
    shape = list(weight.shape)
    dense = torch.zeros([shape[0], n_in] + shape[2:], dtype=weight.dtype, device=weight.device)  # noqa: RUF005
    return dense.scatter(1, index(neighbours, shape), weight)


def index(neighbours: Tensor, weight_shape: list[int]) -> Tensor:
    """The input that each weight multiplies, int64 and of the compact weight's shape [out, degree, ...]."""
    share = weight_shape[0] // neighbours.shape[0]
    rows = neighbours.long().repeat_interleave(share, dim=0)  # [out, degree]
    return rows.reshape(list(rows.shape) + [1] * (len(weight_shape) - 2)).expand(weight_shape)
