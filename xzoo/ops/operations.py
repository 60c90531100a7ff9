"""The two operations, their derivatives, and how torch knows them.

What is right is defined by `dense`. A backend (backends.py) only computes. The operations are
registered with torch (`torch.ops.xzoo.*`), so that one node stands for them under torch.compile and
torch.export, and torch.fx records a call of the functions here; which backend runs is decided when
the node runs. TorchScript and ONNX know neither and get the `dense` form.

Whatever way a call takes, it ends in `run` of `_register`, which checks its tensors before a
backend sees them; and whatever derives it (autograd, torch.func, forward mode, any number of
times), ends in `_Product`.
"""

import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils.flop_counter import register_flop_formula

from ..errors import XzooError
from . import dense, group, native
from .auto import choose, grouped
from .backends import BACKENDS, known
from .rows import checked, output_shape, unfit

# A plain module variable: torch.compile guards on it, and the backward pass, which may run in
# another thread, is told what the forward pass used.
_forced = os.environ.get("XZOO_BACKEND", "auto")


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Use one backend for everything inside: `with xzoo.ops.backend("dense"): ...`.

    `name` is one of `available()` or "auto"; the environment variable XZOO_BACKEND does the same
    for a process. A graph made by torch.export keeps what was set while it was made. Raises
    XzooError for other names.
    """
    global _forced
    if name != "auto":
        known(name)
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def forced() -> str:
    """The backend that `backend` or XZOO_BACKEND asks for, or auto."""
    return _forced


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
    """2-D convolution in which output o reads the inputs neighbours[o // share] (torch's F.conv2d
    otherwise).

    Args:
        x: [B, C_in, H, W], floating point; B may be 0.
        weight: [C_out, degree, kh, kw], of x's dtype (under autocast: any floating dtype).
        neighbours: [C_out / share, degree], integers from 0 to C_in - 1.
        bias: [C_out] or None.
        stride, padding, dilation: two integers each, for H and W.
        activation: "relu", "relu6" or none (""), done to the result.

    Returns: [B, C_out, H', W'], channels_last where x is (and not contiguous as well), else
        contiguous.
    """
    if torch.jit.is_scripting():
        return activate(
            dense.conv2d(x, weight, neighbours, bias, stride, padding, dilation), activation
        )
    if has_torch_function((x, weight)):
        if not torch.compiler.is_dynamo_compiling():  # torch.fx: a leaf
            args = (x, weight, neighbours, bias, stride, padding, dilation, activation)
            return handle_torch_function(conv2d, (x, weight), *args)
        x = _unwrapped(x)
    x, weight, bias = _autocast(x, weight, bias)
    if _exports():
        return activate(
            dense.conv2d(x, weight, neighbours, bias, stride, padding, dilation), activation
        )
    args = (x, weight, neighbours, bias, stride, padding, dilation, _forced)
    if _differentiated(x, weight, bias):
        return activate(_product("conv2d", *args), activation)
    return _do("conv2d", *args, activation)


def linear(
    x: Tensor, weight: Tensor, neighbours: Tensor, bias: Tensor | None = None, activation: str = ""
) -> Tensor:
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
        if not torch.compiler.is_dynamo_compiling():
            return handle_torch_function(
                linear, (x, weight), x, weight, neighbours, bias, activation
            )
        x = _unwrapped(x)
    x, weight, bias = _autocast(x, weight, bias)
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if _exports():
        y = activate(dense.linear(rows, weight, neighbours, bias), activation)
    elif _differentiated(x, weight, bias):
        y = activate(_product("linear", rows, weight, neighbours, bias, _forced), activation)
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
    said = "activation '{}' is not relu, relu6 or none ('')"  # no f-string in TorchScript
    raise ValueError(said.format(activation))


# ---- derivatives
#
# All six operations come from one form, <grad, op(x, weight)>, which is linear in grad, in x and in
# weight. The operation itself is its derivative by grad (slot 0), the gradients those by x and by
# weight (slots 1 and 2). So a derivative of one of them is another one in which one tensor is
# exchanged, for every order.

_PARTS = ("", "_input_grad", "_weight_grad")  # of a name, by slot
_PLACES = {
    name + part: (name, slot) for name in ("conv2d", "linear") for slot, part in enumerate(_PARTS)
}


def _product(name: str, *arguments: Any) -> Tensor:
    """An operation by the shortest way that leaves its derivatives to whoever asks for them."""
    if torch.compiler.is_compiling():
        return _registered(name, *arguments)
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return _Product.apply(name, *arguments)
    if _differentiated(*arguments[:4]):
        return _Backward.apply(name, *arguments)
    return _do(name, *arguments)


def _differentiated(*tensors: Tensor | None) -> bool:
    """Whether autograd, forward mode, or a transform of torch.func may ask for a derivative."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


class _Product(torch.autograd.Function):
    """One of the six operations, by name, with every kind of derivative.

    Takes the name, then the operation's own arguments with the backend. The tensor of a gradient's
    own slot, of which only the shape matters, has no derivative.
    """

    @staticmethod
    def forward(name: str, *arguments: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return getattr(torch.ops.xzoo, name)(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_forward(*_remember(ctx, *inputs))
        ctx.shape = output.shape

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        *tensors, neighbours = ctx.saved_tensors
        tensors[ctx.slot] = grad
        needed = ctx.needs_input_grad
        # One that holds several: of autograd's is_grads_batched, whose vmap is another one than
        # torch.func's.
        call = _registered if any(map(_is_batched, tensors)) else _product
        if call is _product and _is_scattered(grad):
            tensors[ctx.slot] = native.laid_out(grad)  # once for both gradients
        grads: list[Tensor | None] = [None] * 4
        for slot, place in _INPUTS[ctx.slot]:
            if needed[1 + place]:
                grads[place] = _derivative(ctx, slot, tensors, neighbours, call)
        if not ctx.slot and needed[4]:  # the bias
            grads[3] = grad.sum([0, *range(2, grad.dim())])
        return None, *grads, *[None] * len(ctx.rest)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Tensor:
        *tensors, neighbours = ctx.saved_tensors
        parts = []
        for slot, place in _INPUTS[ctx.slot]:
            if tangents[place] is not None:
                moved = [tangents[place] if i == slot else t for i, t in enumerate(tensors)]
                parts.append(_derivative(ctx, ctx.slot, moved, neighbours, _product))
        if not ctx.slot and tangents[3] is not None:  # the bias
            ones = [1] * (len(ctx.shape) - 2)
            parts.append(tangents[3].reshape(-1, *ones).expand(ctx.shape))
        return sum(parts[1:], parts[0])

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[Any], name: str, *arguments: Any) -> tuple[Tensor, int]:
        return _batched(functools.partial(_product, name), name, info, in_dims[1:], *arguments)


class _Backward(_Product):
    """The same for ordinary backward passes: torch inspects the signature of a Function that has a
    setup_context at each call, which takes 20 us."""

    @staticmethod
    def forward(ctx: Any, name: str, *arguments: Any) -> Tensor:  # type: ignore[override]
        _remember(ctx, name, *arguments)
        return _do(name, *arguments)

    setup_context = torch.autograd.Function.setup_context


def _remember(ctx: Any, name: str, *arguments: Any) -> tuple[Tensor | None, ...]:
    """Save what the derivatives of an operation need: its place in the form, and its tensors, which
    are returned."""
    ctx.operation, ctx.slot = _PLACES[name]
    if ctx.slot:
        tensors, ctx.rest = arguments[:4], arguments[4:]
    else:
        tensors, ctx.rest = (None, *arguments[:3]), arguments[4:]  # without the bias
    ctx.save_for_backward(*tensors)
    return tensors


# The slots that an operation has derivatives by, and their places among its arguments, by its own
# slot.
_INPUTS = (((1, 0), (2, 1)), ((0, 0), (2, 2)), ((0, 0), (1, 1)))


def _derivative(
    ctx: Any, slot: int, tensors: Sequence[Tensor | None], neighbours: Tensor, call: Callable
) -> Tensor:
    """The form's derivative by one slot, where grad, x and weight are `tensors`; `call` computes an
    operation."""
    if slot:
        return call(ctx.operation + _PARTS[slot], *tensors, neighbours, *ctx.rest)
    return call(ctx.operation, *tensors[1:], neighbours, None, *ctx.rest)


def _registered(name: str, first: Tensor, second: Tensor, *rest: Any) -> Tensor:
    """The operation as torch knows it, which is where autograd, a mode or a transform sees it."""
    return getattr(torch.ops.xzoo, name)(_unwrapped(first), _unwrapped(second), *rest)


def _is_batched(tensor: Tensor | None) -> bool:
    if tensor is None or torch.compiler.is_compiling():  # Dynamo cannot trace the question
        return False
    return torch._C._functorch.is_legacy_batchedtensor(tensor)


def _is_scattered(grad: Tensor) -> bool:
    """Whether a kernel would copy a gradient first: an expanded one, such as that of a sum."""
    if grad.layout is not torch.strided or grad.is_contiguous() or not grad.is_cpu:
        return False
    if type(grad) is not Tensor or torch.is_grad_enabled() or _is_watched():
        return False
    return not torch.compiler.is_compiling()


def _batched(
    call: Callable[..., Tensor], name: str, info: Any, in_dims: Sequence[Any], *arguments: Any
) -> tuple[Tensor, int]:
    """torch.vmap's rule, for the operation `call` of this name: its result, and the dimension that
    is mapped.

    Samples of several are samples of one; weights and graphs of several are done one after the
    other.
    """
    moved, mapped = list(arguments), set()
    for i, dim in enumerate(in_dims[:4]):  # the tensors
        if dim is not None:
            moved[i] = arguments[i].movedim(dim, 0)
            mapped.add(i)
    samples = {0, 1} if name.endswith("_input_grad") else {0}
    if mapped <= samples and not name.endswith("_weight_grad"):
        for i in samples - mapped:
            moved[i] = moved[i].expand(info.batch_size, *moved[i].shape)
        for i in samples:
            moved[i] = moved[i].flatten(0, 1)
        y = call(*moved)
        return y.unflatten(0, (info.batch_size, len(y) // info.batch_size)), 0
    each = []
    for k in range(info.batch_size):
        each.append(call(*(a[k] if i in mapped else a for i, a in enumerate(moved))))
    return torch.stack(each), 0


# ---- one call


def _do(name: str, *arguments: Any) -> Tensor:
    """A registered operation; its function itself where nothing looks on that has to see one
    operation.

    torch's dispatcher takes 7 us for an operation in Python, and some 40 while its caches are cold:
    a quarter of a small network's time at batch 1 (x_vgg16_c8, Zen 4).
    """
    plain = type(arguments[0]) is Tensor and type(arguments[1]) in (Tensor, Parameter)
    seen = not plain or _is_watched() or torch.autograd._profiler_enabled()
    if torch.compiler.is_compiling() or seen:
        return _registered(name, *arguments)
    return _FUNCTIONS[name](*arguments)


def is_observed(x: Any) -> bool:
    """Whether an operation on x is for more than its result and autograd's backward pass: x is a
    subclass or a proxy, or torch compiles, traces, counts, transforms, or derives forwards."""
    if type(x) is not Tensor or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    return _is_watched() or forward_ad._current_level >= 0


def _is_watched() -> bool:
    """By a mode (fake tensors, a FLOP counter) or a transform (vmap)."""
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    return transformed or is_in_torch_dispatch_mode()


# The registered operations. A gradient takes the tensor x or weight even where only its shape
# matters: that keeps one signature, and a fake tensor then knows the layout of the result.

# A fragment, because a notebook that imports xzoo again finds them registered: `_register` then
# leaves them.
_LIBRARY = torch.library.Library("xzoo", "FRAGMENT")
# Off inside the operations that torch.func runs.
_TRANSFORMS = torch._C.DispatchKey.FuncTorchDynamicLayerFrontMode
_TENSORS = {
    "": "Tensor x, Tensor weight, Tensor neighbours, Tensor? bias",
    "_input_grad": "Tensor grad, Tensor x, Tensor weight, Tensor neighbours",
    "_weight_grad": "Tensor grad, Tensor x, Tensor weight, Tensor neighbours",
}
_FUNCTIONS: dict[str, Callable[..., Tensor]] = {}  # what each one does
# What `auto` took, by the kind of tensors, and where this is BY_GRAPH, by the order of the graph's
# groups as well.
_CHOSEN: dict[tuple, str] = {}
BY_GRAPH = "by graph"
_GEOMETRY = {"conv2d": "SymInt[] stride, SymInt[] padding, SymInt[] dilation, ", "linear": ""}


def _register(operation: str, part: str) -> None:
    name = operation + part

    count = 4 + (3 if _GEOMETRY[operation] else 0)

    def door(
        first: Tensor, second: Tensor, third: Tensor, fourth: Any, *geometry: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x, weight and neighbours of what was given; RuntimeError where the tensors do not go
        together."""
        if part:
            x, weight, neighbours = second, third, fourth
            said = unfit(operation, x, weight, neighbours, None, first, *geometry)
        else:
            x, weight, neighbours = first, second, third
            said = unfit(operation, x, weight, neighbours, fourth, None)
        if said:
            raise RuntimeError(f"xzoo.ops.{name}: {said}")
        return x, weight, neighbours

    def chosen(x: Tensor, weight: Tensor, neighbours: Tensor, other: Any, geometry: Any) -> str:
        """The backend that `auto` takes, for tensors that go together; `other` is the bias, or a
        gradient's grad.

        Remembered for tensors of the same kind, which answers both questions in a third of the
        time.
        """
        key: tuple[Any, ...] | None = None
        if x.is_cpu and x.layout is weight.layout is torch.strided:
            kind = (name, geometry, native.loaded(), x.shape, x.dtype, x.is_contiguous())
            weights = weight.shape, weight.dtype, weight.is_cpu
            graph = neighbours.shape, neighbours.dtype, neighbours.is_cpu
            rest = other is not None and (other.shape, other.dtype, other.is_cpu)
            key = (kind, weights, graph, rest)
            known = _CHOSEN.get(key)
            if known == BY_GRAPH:
                key = (*key, group.order_of(neighbours, x.shape[1]))
                known = _CHOSEN.get(key)
            if known:
                return known
        if part:
            door(other, x, weight, neighbours, *geometry)
        else:
            door(x, weight, neighbours, other, *geometry)
        known = choose(name, x, weight, neighbours, *geometry)
        # The first call of all loads the kernels.
        if key is not None and native.loaded() is key[0][2]:
            if len(_CHOSEN) >= 4096:  # sizes that change with each call
                _CHOSEN.clear()
            looks = len(key) == 4 and grouped(name, x, weight, neighbours, *geometry)
            _CHOSEN[key] = BY_GRAPH if looks else known
        return known

    def run(*args: Any) -> Tensor:
        """What every call ends in; only `fake` stands in for it, where tensors have no numbers."""
        # Torch leaves out an activation that is the default.
        tensors, backend, activation = args[:count], args[count], args[count + 1 :]
        geometry = tensors[4:]
        if geometry and type(geometry[0]) is list:  # from torch's dispatcher
            geometry = tuple(map(tuple, geometry))
        if backend == "auto":
            x, weight, neighbours = tensors[1:4] if part else tensors[:3]
            other = tensors[0] if part else tensors[3]
            module = BACKENDS[chosen(x, weight, neighbours, other, geometry)]
        else:
            x, weight, neighbours = door(*tensors)
            module = known(backend)
            if said := module.missing(operation, x, weight, neighbours, *geometry):
                raise XzooError(f"backend {backend!r} {said}; use 'auto'")
        if not module.CHECKS_NEIGHBOURS and not x.is_meta:
            place = 3 if part else 2
            tensors = (*tensors[:place], checked(neighbours, x.shape[1]), *tensors[place + 1 :])
        function = getattr(module, name)
        if activation and activation[0] not in module.ACTIVATIONS:
            y = activate(function(*tensors), *activation)
        else:
            y = function(*tensors, *activation)
        like = weight if part == "_weight_grad" else x
        if y.is_contiguous() and like.is_contiguous():
            return y
        return y.contiguous(memory_format=_format(like))

    def fake(*args: Any) -> Tensor:
        x, weight, _ = door(*args[:count])
        like = weight if part == "_weight_grad" else x
        shape = like.shape if part else output_shape(x, weight, *args[4:count])
        return like.new_empty(shape).contiguous(memory_format=_format(like))

    def flops(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        """One multiply and one add for each weight and output position, in each of the three
        products."""
        y, weight = (args[0], args[2]) if part else (out_shape, args[1])
        return 2 * math.prod(weight) * y[0] * math.prod(y[2:])

    def derived(*args: Any) -> Tensor:
        """Where autograd meets the operation itself: in an exported program, in a compiled
        graph."""
        if not _differentiated(*args[:4]):
            with torch._C._AutoDispatchBelowAutograd():
                return getattr(torch.ops.xzoo, name)(*args)
        if args[count + 1 :] not in ((), ("",)):
            said = "with an activation has no derivative here; export the model before xzoo.deploy"
            raise RuntimeError(f"{name} {said}")
        if torch._C._dispatch_tls_is_dispatch_key_excluded(_TRANSFORMS):
            said = f"torch.func cannot transform torch.ops.xzoo.{name} itself"
            raise RuntimeError(f"{said}; use xzoo.ops.{operation}")
        return _Product.apply(name, *args[: count + 1])

    def mapped(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Tensor, int]:
        last = args[count + 1 :]
        call = getattr(torch.ops.xzoo, name)
        y, dim = _batched(call, name, info, in_dims[: count + 1], *args[: count + 1])
        return activate(y, *last) if last else y, dim

    _FUNCTIONS[name] = run
    if hasattr(torch.ops.xzoo, name):
        return
    last = "" if part else ', str activation=""'
    _LIBRARY.define(f"{name}({_TENSORS[part]}, {_GEOMETRY[operation]}str backend{last}) -> Tensor")
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    _LIBRARY.impl(name, derived, "Autograd")
    torch.library.register_fake(f"xzoo::{name}", fake, lib=_LIBRARY)
    torch.library.register_vmap(f"xzoo::{name}", mapped, lib=_LIBRARY)
    # torch's FLOP counter then reports what an X-layer needs, not what its dense fallback does.
    register_flop_formula(getattr(torch.ops.xzoo, name))(flops)


for _operation in _GEOMETRY:
    for _part in _TENSORS:
        _register(_operation, _part)


def _format(x: Tensor) -> torch.memory_format:
    if x.is_contiguous() or x.dim() != 4:
        return torch.contiguous_format
    last = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _unwrapped(x: Tensor) -> Tensor:
    """Without a subclass that only carries a name (torchvision's Image): registered operations take
    none."""
    if (
        type(x) in (Tensor, Parameter)
        or type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__
    ):
        return x
    return x.as_subclass(Tensor)


def _exports() -> bool:
    """Whether the call is recorded in a form that knows no operation of ours."""
    return torch.jit.is_tracing() or (
        torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export()
    )


def _autocast(
    x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The casts that torch.autocast does for F.conv2d and F.linear: all to its dtype, unless x is
    float64."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return x, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
