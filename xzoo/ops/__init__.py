"""The two operations of an X-layer, differentiable, and the choice of a backend: the only door to them.

    conv2d(x [B, C_in, H, W], weight [C_out, degree, kh, kw], neighbours [C_out / share, degree], ...)
    linear(x [..., in],       weight [out, degree],           neighbours [out / share, degree], ...)

What is right is defined by `dense`. A backend is a module with six functions (each operation, its input
gradient, its weight gradient) and a row in `_BACKENDS`; it only computes. The operations are registered
with torch (`torch.ops.xzoo.*`), so that one node stands for them under torch.compile and torch.export,
and torch.fx records a call of the functions here; which backend runs is decided when the node runs.
TorchScript and ONNX know neither and get the `dense` form.
"""

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.nn import Parameter
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils.flop_counter import register_flop_formula

from ..errors import XzooError
from . import dense, gather, native, triton
from .auto import choose

__all__ = ["available", "backend", "conv2d", "linear"]

_BACKENDS: dict[str, ModuleType] = {"dense": dense, "gather": gather, "native": native, "triton": triton}

# A plain module variable: torch.compile guards on it, and the backward pass, which may run in another
# thread, is told what the forward pass used.
_forced = os.environ.get("XZOO_BACKEND", "auto")


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Use one backend for everything inside: `with xzoo.ops.backend("dense"): ...`.

    `name` is one of `available()` or "auto"; the environment variable XZOO_BACKEND does the same for a
    process. A graph made by torch.export keeps what was set while it was made. Raises XzooError for
    other names.
    """
    global _forced
    if name != "auto":
        _known(name)
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def available() -> tuple[str, ...]:
    """The backends that can run on this machine; `native` and `triton` only what their `supports` says."""
    return tuple(name for name, module in _BACKENDS.items() if not hasattr(module, "possible") or module.possible())


def conv2d(
    x: Tensor,
    weight: Tensor,
    neighbours: Tensor,
    bias: Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    activation: str = "",
) -> Tensor:
    """2-D convolution in which output o reads the inputs neighbours[o // share] (torch's F.conv2d otherwise).

    Args:
        x: [B, C_in, H, W], floating point; B may be 0.
        weight: [C_out, degree, kh, kw], of x's dtype (under autocast: any floating dtype).
        neighbours: [C_out / share, degree], integers from 0 to C_in - 1.
        bias: [C_out] or None.
        stride, padding, dilation: two integers each, for H and W.
        activation: "relu", "relu6" or none (""), done to the result.

    Returns: [B, C_out, H', W'], channels_last where x is (and not contiguous as well), else contiguous.
    """
    if torch.jit.is_scripting():
        return activate(dense.conv2d(x, weight, neighbours, bias, stride, padding, dilation), activation)
    if has_torch_function((x, weight)):  # torch.fx: a leaf
        args = (x, weight, neighbours, bias, stride, padding, dilation, activation)
        return handle_torch_function(conv2d, (x, weight), *args)
    x, weight, bias = _autocast(x, weight, bias)
    if _exports():
        return activate(dense.conv2d(x, weight, neighbours, bias, stride, padding, dilation), activation)
    if _needs_grad(x, weight, bias):
        return activate(_Conv2d.apply(x, weight, neighbours, bias, stride, padding, dilation, _forced), activation)
    return _do("conv2d", x, weight, neighbours, bias, stride, padding, dilation, _forced, activation)


def linear(x: Tensor, weight: Tensor, neighbours: Tensor, bias: Tensor | None = None, activation: str = "") -> Tensor:
    """x @ W.T + bias, where row o of W has its weights at the inputs neighbours[o // share].

    Args:
        x: [..., in], floating point; any leading size may be 0.
        weight: [out, degree], of x's dtype (under autocast: any floating dtype).
        neighbours: [out / share, degree], integers from 0 to in - 1.
        bias: [out] or None.
        activation: "relu", "relu6" or none (""), done to the result.

    Returns: [..., out], contiguous.
    """
    if torch.jit.is_scripting():
        shape = list(x.shape)[:-1] + [weight.shape[0]]  # noqa: RUF005 (TorchScript)
        y = dense.linear(x.reshape(-1, x.shape[-1]), weight, neighbours, bias)
        return activate(y.reshape(shape), activation)
    if has_torch_function((x, weight)):
        return handle_torch_function(linear, (x, weight), x, weight, neighbours, bias, activation)
    x, weight, bias = _autocast(x, weight, bias)
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if _exports():
        y = activate(dense.linear(rows, weight, neighbours, bias), activation)
    elif _needs_grad(x, weight, bias):
        y = activate(_Linear.apply(rows, weight, neighbours, bias, _forced), activation)
    else:
        y = _do("linear", rows, weight, neighbours, bias, _forced, activation)
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], weight.shape[0])


def activate(y: Tensor, activation: str) -> Tensor:
    """relu(y), relu6(y) or y, by name; ValueError for others. TorchScript compiles it."""
    if activation == "":
        return y
    if activation == "relu":
        return F.relu(y)
    if activation == "relu6":
        return F.relu6(y)
    raise ValueError("activation '{}' is not relu, relu6 or none ('')".format(activation))  # noqa: UP032 (TorchScript)


class _Conv2d(torch.autograd.Function):
    # An autograd.Function over the registered operations: 24 us less for each call of a layer than
    # torch.library.register_autograd (torch 2.15, Zen 4).
    @staticmethod
    def forward(ctx, x, weight, neighbours, bias, stride, padding, dilation, backend):
        ctx.save_for_backward(x, weight, neighbours)
        ctx.args = (stride, padding, dilation, backend)
        return _do("conv2d", x, weight, neighbours, bias, stride, padding, dilation, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, neighbours = ctx.saved_tensors
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = _do("conv2d_input_grad", grad, x, weight, neighbours, *ctx.args)
        if ctx.needs_input_grad[1]:
            dw = _do("conv2d_weight_grad", grad, x, weight, neighbours, *ctx.args)
        if ctx.needs_input_grad[3]:
            db = grad.sum((0, 2, 3))
        return dx, dw, None, db, None, None, None, None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, neighbours, bias, backend):
        ctx.save_for_backward(x, weight, neighbours)
        ctx.backend = backend
        return _do("linear", x, weight, neighbours, bias, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, neighbours = ctx.saved_tensors
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = _do("linear_input_grad", grad, x, weight, neighbours, ctx.backend)
        if ctx.needs_input_grad[1]:
            dw = _do("linear_weight_grad", grad, x, weight, neighbours, ctx.backend)
        if ctx.needs_input_grad[3]:
            db = grad.sum(0)
        return dx, dw, None, db, None


def _do(name: str, *arguments: Any) -> Tensor:
    """A registered operation; its function itself where nothing looks on that has to see one operation.

    torch's dispatcher takes 7 us for an operation in Python, and some 40 while its caches are cold: a quarter of a
    small network's time at batch 1 (x_vgg16_c8, Zen 4).
    """
    plain = type(arguments[0]) is Tensor and type(arguments[1]) in (Tensor, Parameter)
    if torch.compiler.is_compiling() or not plain or _watched():
        return getattr(torch.ops.xzoo, name)(*arguments)
    return _FUNCTIONS[name](*arguments)


def _watched() -> bool:
    """By a mode (fake tensors, a FLOP counter), a transform (vmap) or the profiler."""
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    return transformed or is_in_torch_dispatch_mode() or torch.autograd._profiler_enabled()


# The registered operations. A gradient takes the tensor x or weight even where only its shape matters:
# that keeps one signature, and a fake tensor then knows the layout of the result.

_LIBRARY = torch.library.Library("xzoo", "DEF")
_TENSORS = {
    "": "Tensor x, Tensor weight, Tensor neighbours, Tensor? bias",
    "_input_grad": "Tensor grad, Tensor x, Tensor weight, Tensor neighbours",
    "_weight_grad": "Tensor grad, Tensor x, Tensor weight, Tensor neighbours",
}
_FUNCTIONS: dict[str, Callable[..., Tensor]] = {}  # what each one does
_GEOMETRY = {"conv2d": "SymInt[] stride, SymInt[] padding, SymInt[] dilation, ", "linear": ""}


def _register(operation: str, part: str) -> None:
    name = operation + part

    count = 4 + (3 if _GEOMETRY[operation] else 0)

    def run(*args):
        tensors, backend, activation = args[:count], args[count], args[count + 1 :]  # torch leaves out a default
        x, weight, neighbours = tensors[:3] if not part else tensors[1:4]
        if backend == "auto":
            backend = choose(name, x, weight, neighbours, *tensors[4:])
        elif backend == "native":
            _native(operation, x, weight, *tensors[4:])
        elif backend == "triton":
            triton.check(operation, x, weight, neighbours, *tensors[4:])
        function = getattr(_known(backend), name)
        if activation and not (backend == "native" and activation[0] in native.ACTIVATIONS):
            y = activate(function(*tensors), *activation)
        else:
            y = function(*tensors, *activation)
        like = weight if part == "_weight_grad" else x
        return y if y.is_contiguous() and like.is_contiguous() else y.contiguous(memory_format=_format(like))

    def fake(*args):
        x, weight = args[:2] if not part else args[1:3]
        like = weight if part == "_weight_grad" else x
        shape = like.shape if part else _output_shape(x, weight, *args[4:count])
        return like.new_empty(shape).contiguous(memory_format=_format(like))

    def flops(*args, out_shape=None, **kwargs):
        """One multiply and one add for each weight and output position, in each of the three products."""
        y, weight = (args[0], args[2]) if part else (out_shape, args[1])
        return 2 * math.prod(weight) * y[0] * math.prod(y[2:])

    _FUNCTIONS[name] = run
    last = "" if part else ', str activation=""'
    _LIBRARY.define(f"{name}({_TENSORS[part]}, {_GEOMETRY[operation]}str backend{last}) -> Tensor")
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"xzoo::{name}", fake, lib=_LIBRARY)
    # torch's FLOP counter then reports what an X-layer needs, not what its dense fallback does.
    register_flop_formula(getattr(torch.ops.xzoo, name))(flops)


for _operation in _GEOMETRY:
    for _part in _TENSORS:
        _register(_operation, _part)


def _output_shape(x, weight, *geometry):
    size = [
        (x.shape[i + 2] + 2 * padding - dilation * (weight.shape[i + 2] - 1) - 1) // stride + 1
        for i, (stride, padding, dilation) in enumerate(zip(*geometry, strict=True))
    ]
    return [x.shape[0], weight.shape[0], *size]


def _format(x: Tensor) -> torch.memory_format:
    last = not x.is_contiguous() and x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _known(name: str) -> ModuleType:
    if name not in _BACKENDS:
        raise XzooError(f"backend {name!r} is not one of auto, {', '.join(_BACKENDS)}")
    return _BACKENDS[name]


def _native(operation: str, x: Tensor, weight: Tensor, *geometry: list[int]) -> None:
    if not native.supports(operation, x, weight, *geometry):
        sizes = f"{operation} of {x.dtype} on {x.device.type} with weight {list(weight.shape)}, geometry {geometry}"
        raise XzooError(f"backend 'native' has no kernel for {sizes}; use 'auto', which takes another backend here")
    if not native.available():
        raise XzooError("backend 'native' is not available here (no compiler, or compiling failed); use 'auto'")


def _exports() -> bool:
    """Whether the call is recorded in a form that knows no operation of ours."""
    return torch.jit.is_tracing() or (torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export())


def _needs_grad(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if forward_ad._current_level >= 0:  # the functions below refuse it; an operation would drop the tangents
        return True
    some = x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    return some and torch.is_grad_enabled()


def _autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The casts that torch.autocast does for F.conv2d and F.linear: all to its dtype, unless x is float64."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return x, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
