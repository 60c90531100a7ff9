"""Batch norm and the activation that follows it as one operation, forward and backward.

torch runs them one after the other: it reads and writes each tensor more often, and keeps the
result of both for the backward pass. The kernels (native/norms.h) do the same sums in two passes.

Used for float32 on CPUs with vectors of 8 floats or more; everything else, and whoever traces, gets
torch's own functions.
"""

import struct
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native
from .operations import activate, forced, is_observed

ACTIVATIONS = {"": 0, "relu": 1, "relu6": 2, "gelu": 3}  # of native/norms.h
_NORM = struct.Struct("7q2d")  # norms.h's


def batch_norm_act(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: str = "",
) -> Tensor:
    """F.batch_norm, then the activation.

    Args:
        x: [B, C, H, W], floating point.
        running_mean, running_var: [C]; moved by `momentum` in training, used otherwise.
        weight, bias: [C] or None.
        training: normalize by the batch's own statistics.
        momentum, eps: as F.batch_norm takes them.
        activation: "relu", "relu6", "gelu" (the exact one) or none ("").

    Returns: as x, in its memory format.
    Raises: ValueError for one number per channel in training, as F.batch_norm does.
    """
    tensors = (running_mean, running_var, weight, bias)
    if _has_kernel(x, training, *tensors):
        # Here and not in the Function: its second derivatives start from the x that it was given.
        x = native.laid_out(x)
        arguments = (x, weight, bias, running_mean, running_var, training, momentum, eps)
        return _BatchNormAct.apply(*arguments, activation)
    y = F.batch_norm(x, *tensors, training, momentum, eps)
    return _activate(y, activation)


def _has_kernel(x: Tensor, training: bool, *tensors: Tensor | None) -> bool:
    if forced() not in ("auto", "native") or is_observed(x):
        return False
    if x.dim() != 4 or not x.numel() or (training and x.numel() == x.shape[1]):
        return False
    for t in (x, *tensors):
        if t is None:
            continue
        if t.dtype != torch.float32 or not t.is_cpu or t.layout != torch.strided:
            return False
        if t is not x and (t.shape != x.shape[1:2] or not t.is_contiguous()):
            return False
    if not training and tensors[0] is None:
        return False
    if not native.available():
        return False
    # As auto.py: nobody measured vectors of 4 floats.
    return forced() == "native" or native.lanes() > 4


def _activate(y: Tensor, activation: str) -> Tensor:
    return F.gelu(y) if activation == "gelu" else activate(y, activation)


class _BatchNormAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        activation: str,
    ) -> Tensor:
        y = torch.empty_like(x)
        statistics = x.new_empty(4, x.shape[1])  # mean, 1 / deviation, scale, shift
        ctx.sizes = _sizes(x, training, momentum, eps, activation)
        tensors = (x, weight, bias, running_mean, running_var, statistics, y)
        native.call("xzoo_norm", ctx.sizes, tensors)
        ctx.save_for_backward(x, weight, bias, statistics)
        ctx.training, ctx.eps, ctx.activation = training, eps, activation
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, statistics = ctx.saved_tensors
        if torch.is_grad_enabled():
            return (*_differentiable(ctx, grad, x, weight, bias, statistics), *[None] * 6)
        form = torch.contiguous_format if x.is_contiguous() else torch.channels_last
        grad = native.readable(grad).contiguous(memory_format=form)
        dx = torch.empty_like(x)
        dweight, dbias = statistics.new_empty(2, x.shape[1])
        tensors = (grad, x, statistics, dweight, dbias, dx)
        native.call("xzoo_norm_grad", ctx.sizes, tensors)
        dweight = None if weight is None else dweight
        return dx, dweight, None if bias is None else dbias, *[None] * 6


def _sizes(x: Tensor, training: bool, momentum: float, eps: float, activation: str) -> bytes:
    batch, channels, height, width = x.shape
    last, threads = not x.is_contiguous(), torch.get_num_threads()
    sizes = (batch, channels, height * width, last, threads, ACTIVATIONS[activation], training)
    return _NORM.pack(*sizes, eps, momentum)


def _differentiable(
    ctx: Any,
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
) -> list[Tensor | None]:
    """The gradients by x, weight and bias by torch's own functions, to be derived again."""
    if ctx.training:
        y = F.batch_norm(x, None, None, weight, bias, True, 0.0, ctx.eps)
    else:
        mean, inverse = (row.view(-1, 1, 1) for row in statistics[:2])
        y = (x - mean) * inverse
        y = y if weight is None else y * weight.view(-1, 1, 1)
        y = y if bias is None else y + bias.view(-1, 1, 1)
    inputs = [t for t in (x, weight, bias) if t is not None and t.requires_grad]
    y = _activate(y, ctx.activation)
    grads = iter(torch.autograd.grad(y, inputs, grad, create_graph=True))
    return [next(grads) if needed else None for needed in ctx.needs_input_grad[:3]]
