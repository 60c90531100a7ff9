"""X-layers: a convolution and a linear layer that store only the weights they have.

Both take the arguments of their dense namesakes in nn, in the same order, and the graph by keyword:

    ExpanderConv2d(256, 512, kernel_size=3, padding=1, degree=32)
    ExpanderLinear(512, 512, degree=64, share=4, graph="ramanujan", seed=1)

A layer's function is its state dict: weights mean nothing on another graph, so `neighbours` is a
persistent buffer, is checked whenever it is loaded, and may never be absent beside `weight`.
Numbers that changed in place since (averaged by a loop over a state dict, say) are found out at the
next forward pass.
"""

import hashlib
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.parametrizations import _Orthogonal, _SpectralNorm, _WeightNorm
from torch.nn.utils.parametrize import type_before_parametrizations
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import handle_torch_function, has_torch_function

from . import graphs, ops
from .errors import GraphError, InputError, ModelError


class _Expander(nn.Module):
    """What both layers share: parameters, graph, initial values and the checks of a load."""

    weight: Tensor
    bias: Tensor | None
    neighbours: Tensor
    activation: str  # done to the result: xzoo.deploy sets it where it took over what follows
    # in the model that it was made for, to be told in errors; "" where nobody gave it one
    name: str

    # A seed is of any size, and TorchScript's integers have 64 bits with a sign.
    __jit_ignored_attributes__ = ["seed", "_seen"]  # noqa: RUF012

    def _set_graph(
        self,
        n_in: int,
        n_out: int,
        degree: int | None,
        alias: int | None,
        share: int,
        graph: str,
        seed: int,
    ) -> None:
        if (degree is None) == (alias is None):
            raise GraphError(
                f"degree={degree}, expandSize={alias}: give one of them, the number of inputs that "
                "each output reads"
            )
        self.degree: int = alias if degree is None else degree  # type: ignore[assignment]
        self.share, self.graph, self.seed, self.activation, self.name = share, graph, seed, "", ""
        graphs.check(graph, n_in, n_out, self.degree, share, seed)
        self._n_in, self._n_out = n_in, n_out

    def _store(
        self, kernel_size: tuple[int, ...], bias: bool, device: Any, dtype: torch.dtype | None
    ) -> None:
        self.weight = nn.Parameter(
            torch.empty(self._n_out, self.degree, *kernel_size, device=device, dtype=dtype)
        )
        self.bias = (
            nn.Parameter(torch.empty(self._n_out, device=device, dtype=dtype)) if bias else None
        )
        # A buffer, so that no optimizer moves it and no count of parameters includes it.
        shape = (self._n_out // self.share, self.degree)
        self.register_buffer("neighbours", torch.empty(shape, dtype=torch.int32, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the graph of (graph, seed) anew, and weight and bias as nn.Conv2d and nn.Linear
        would at this fan-in.

        Uniform between -b and b, b = 1 / sqrt(fan-in), fan-in = degree * kernel height * kernel
        width.
        """
        if self.neighbours.is_meta:  # nothing to fill, and drawing a large graph takes a second
            return
        rows = graphs.sample(
            self.graph, self._n_in, self._n_out, self.degree, self.share, self.seed
        )
        with torch.no_grad():
            self.neighbours.copy_(torch.from_numpy(rows))
        self._remember_graph()
        bound = 1 / math.sqrt(self.weight[0].numel())
        for parameter in self.parameters(recurse=False):
            nn.init.uniform_(parameter, -bound, bound)

    # What is known to be a graph: the tensor, torch's count of its changes, and a hash of what it
    # held then.
    _seen: tuple[Tensor, int, bytes] | None = None

    def _remember_graph(self) -> None:
        self._seen = (self.neighbours, _changes(self.neighbours), _digest(self.neighbours))

    @torch.jit.unused
    def _check_unchanged(self) -> None:
        """GraphError where `neighbours` holds other numbers than when it was drawn or loaded.

        Another tensor in its place (torch.func.functional_call, a move to a device) has to be a
        graph; the same tensor has to hold the same numbers. That costs a comparison of two
        integers, unless something changed. A compiled graph does not ask.
        """
        if torch.compiler.is_compiling():
            return
        neighbours, seen = self._buffers["neighbours"], self._seen
        assert neighbours is not None
        known = seen is not None and seen[0] is neighbours
        if seen is not None and known and seen[1] == _changes(neighbours) >= 0:
            return
        if neighbours.is_meta or _is_symbolic(neighbours):
            return
        try:
            if seen is not None and known:
                if _digest(neighbours) != seen[2]:
                    raise GraphError("its numbers were changed in place")
                self._seen = (neighbours, _changes(neighbours), seen[2])
                return
            self._check_graph(neighbours)
        except GraphError as error:
            raise GraphError(
                f"{self._title()}: neighbours: {error}. They are the layer's graph and not numbers "
                "to average or step: leave integers out of the loop, or load the graph anew with "
                "load_state_dict"
            ) from None
        self._remember_graph()

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        # The numbers themselves: writes through .data pass torch's count by, and what is saved is
        # the truth.
        if (
            self._seen is not None
            and self._seen[0] is self.neighbours
            and not self.neighbours.is_meta
        ):
            self._seen = (self.neighbours, -2, self._seen[2])
        self._check_unchanged()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _title(self) -> str:
        sizes = f"{type(self).__name__}({self._n_in}, {self._n_out})"
        return f"layer {self.name}, an {sizes}" if self.name else f"an {sizes}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_Expander":
        """Moves and casts (nn.Module's own): a tensor that was known to be a graph still is one."""
        self._check_unchanged()
        before = self.neighbours
        super()._apply(fn, recurse)
        if self.neighbours is not before and self._seen is not None and not self.neighbours.is_meta:
            digest = self._seen[2]
            self._remember_graph()
            if self._seen[2] != digest:  # to_empty: nobody knows what it holds
                self._seen = None
        return self

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors
    ):
        key = f"{prefix}neighbours"
        neighbours = state_dict.get(key)
        try:
            if neighbours is None and f"{prefix}weight" in state_dict:
                raise GraphError(
                    "missing, and the weights beside it mean nothing on another graph; use the "
                    "whole file"
                )
            if isinstance(neighbours, Tensor) and not neighbours.is_meta:
                if self._is_average_of_own_graph(neighbours):
                    neighbours = self.neighbours.clone()
                self._check_graph(neighbours)
                # A file may hold a narrower type, which assign=True would keep.
                state_dict[key] = neighbours.to(torch.int32)
        except GraphError as error:
            # collected: load_state_dict raises them in every mode, as it does wrong sizes
            errors.append(f"{key}: {error}")
        else:
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing, unexpected, errors
            )
            if neighbours is not None and not self.neighbours.is_meta:
                self._remember_graph()

    def _is_average_of_own_graph(self, neighbours: Tensor) -> bool:
        """Whether these floats are the layer's own graph but for rounding, as in an average of
        state dicts.

        Of another graph even a share of one in a thousand shows: indices differ by one or more.
        """
        own = self.neighbours
        if not neighbours.is_floating_point() or own.is_meta or neighbours.shape != own.shape:
            return False
        return torch.allclose(neighbours.double().cpu(), own.double().cpu(), rtol=1e-5, atol=1e-4)

    def _check_graph(self, neighbours: Tensor) -> None:
        if neighbours.shape != self.neighbours.shape:
            raise GraphError(
                f"has shape {list(neighbours.shape)}; this layer needs "
                f"{list(self.neighbours.shape)}: build it with the degree and share of the file"
            )
        if neighbours.is_floating_point():  # numpy knows no bfloat16
            raise GraphError(
                f"has dtype {neighbours.dtype}; a graph is integers, and a cast may have changed "
                "them"
            )
        graphs.validate(neighbours.numpy(force=True), self._n_in)

    def _graph_repr(self) -> str:
        text = f"degree={self.degree}, share={self.share}, graph={self.graph!r}, seed={self.seed}"
        return f"{text}, activation={self.activation!r}" if self.activation else text

    def dense_weight(self, weight: Tensor | None = None) -> Tensor:
        """The matrix of the layer, [out, in, ...], differentiable: its weights where there is an
        edge, else zero.

        A parametrization of `weight`, which cannot ask for the layer's, gives the compact one that
        it is computing: torch.linalg.matrix_norm(layer.dense_weight(weight).flatten(1), 2) is the
        spectral norm.
        """
        return ops.dense.scatter(
            self.weight if weight is None else weight, self.neighbours, self._n_in
        )

    # What torch computes a weight by takes the compact tensor for the layer's matrix. That is right
    # output by output (weight_norm, pruning), and wrong for what goes by the whole matrix: refused,
    # at once and at each later use.

    def register_forward_pre_hook(self, hook: Callable[..., Any], **options: Any) -> Any:
        # of the older kind, which hooks the layer when it has replaced the weight
        if _needs_the_matrix(hook):
            stored: Any = hook
            original = self._parameters.get(
                f"{stored.name}_orig", self._parameters.get(f"{stored.name}_v")
            )
            stored.remove(self)
            self.register_parameter(stored.name, original)
            raise ModelError(_matrix_wanted(type(stored).__name__))
        return super().register_forward_pre_hook(hook, **options)

    def __setattr__(self, name: str, value: Any) -> None:
        # of the newer kind: empty yet
        if name == "parametrizations" and type(value) is nn.ModuleDict:
            value = _Parametrizations(self)
        super().__setattr__(name, value)


class _Parametrizations(nn.ModuleDict):
    """Of an X-layer: refuses to compute its weight by what needs the whole matrix."""

    def __init__(self, layer: _Expander):
        super().__init__()
        self.__dict__["_layer"] = layer  # as no module of its own: the layer holds this one

    def __setitem__(self, name: str, module: nn.Module) -> None:
        super().__setitem__(name, module)
        if name != "weight":
            return
        for part in module.children():
            if _needs_the_matrix(part):
                self._restore(name, module)
                raise ModelError(_matrix_wanted(type(part).__name__))
        module.register_forward_pre_hook(_refuse_matrix)

    def _restore(self, name: str, module: Any) -> None:
        """Make the tensor the layer's parameter again: torch has replaced it before this call."""
        original = getattr(module, "original1", None)  # of weight_norm; 0 are its lengths
        # has overwritten it: what it computes is all that is left
        if isinstance(module[0], _Orthogonal):
            original = nn.Parameter(module().detach())
        elif original is None:
            original = module.original
        layer = self.__dict__["_layer"]
        delattr(type(layer), name)
        plain = type_before_parametrizations(layer)
        del self[name]
        if not self:
            del layer.parametrizations
            layer.__class__ = plain
        layer.register_parameter(name, original)


def _refuse_matrix(module: nn.Module, args: Any) -> None:
    for part in module.children():
        if _needs_the_matrix(part):  # appended to others
            raise ModelError(_matrix_wanted(type(part).__name__))


def _needs_the_matrix(part: Any) -> bool:
    # weight_norm goes by output (dim=0), or over all weights (None, stored as -1): zeros add
    # nothing to either.
    along_inputs = isinstance(part, WeightNorm | _WeightNorm) and part.dim not in (0, -1)
    return along_inputs or isinstance(part, SpectralNorm | _SpectralNorm | _Orthogonal)


def _matrix_wanted(kind: str) -> str:
    return (
        f"{kind.lstrip('_')} on an X-layer would go by its compact weight [out, degree], not by "
        "its matrix: use it on xzoo.to_dense(layer), or register a parametrization that goes by "
        "layer.dense_weight(weight)"
    )


@fx.has_side_effect  # or fx would remove the call, because nobody uses its result
def check_input(x: Tensor, dim: int, n_in: int, message: str) -> None:
    """Raise InputError unless x has n_in channels in dimension `dim`.

    `message` has two places for n_in. torch.fx records a call of this, and TorchScript compiles it.
    """
    if torch.jit.is_scripting():
        torch._assert(x.shape[dim] == n_in, message.format(n_in, n_in))
        return
    if has_torch_function((x,)) and not torch.compiler.is_dynamo_compiling():
        handle_torch_function(check_input, (x,), x, dim, n_in, message)
    elif x.shape[dim] != n_in:
        raise InputError(f"{message.format(n_in, n_in)} but {list(x.shape)}")


class ExpanderConv2d(_Expander):
    """2-D convolution in which each output channel reads `degree` input channels.

    Shape: x [B, C_in, H, W] -> [B, C_out, H', W'], sizes as nn.Conv2d's. Holds weight [C_out,
    degree, kh, kw], bias [C_out] or None, neighbours [C_out / share, degree] int32.

    Args:
        in_channels ... dtype: nn.Conv2d's own, but `groups` must be 1.
        degree: input channels that each output reads; `expandSize` is the authors' word for it.
        share: consecutive outputs that read the same inputs; divides out_channels. 1 is the paper's
            layer.
        graph: kind of graph, one of xzoo.graphs.KINDS.
        seed: of the graph. (Weights come from torch's generator, as everywhere in torch.)

    Raises: GraphError where no such graph exists; ModelError for other groups; what nn.Conv2d
    raises. Source: Prabhu et al., "Deep Expander Networks", ECCV 2018.
    """

    groups = 1  # asked for by code that inspects convolutions

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        degree: int | None = None,
        share: int = 1,
        graph: str = "biregular",
        seed: int = 0,
        expandSize: int | None = None,
    ):
        super().__init__()
        if groups != 1:
            raise ModelError(
                f"groups={groups}: a graph takes the place of groups; use groups=1, and for a "
                "group convolution graph='group' with "
                f"degree={max(1, in_channels // max(1, groups))}"
            )
        self._set_graph(in_channels, out_channels, degree, expandSize, share, graph, seed)
        # nn.Conv2d knows which arguments make sense and brings them into one form.
        dense = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            padding_mode=padding_mode,
            device="meta",
        )
        self.in_channels, self.out_channels = in_channels, out_channels
        # pairs, for all that their type says
        geometry: Any = (dense.kernel_size, dense.stride, dense.dilation)
        self.kernel_size, self.stride, self.dilation = geometry
        self.padding, self.padding_mode = dense.padding, padding_mode
        # Padding that the convolution itself cannot do goes before it.
        left, right, top, bottom = dense._reversed_padding_repeated_twice
        before = padding_mode != "zeros" or left != right or top != bottom
        self._pad = [left, right, top, bottom] if before else None
        self._pad_mode = "constant" if padding_mode == "zeros" else padding_mode
        self._conv_padding = (0, 0) if before else (top, left)
        self._store(dense.kernel_size, bias, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            self._check_unchanged()
        check_input(x, 1, self.in_channels, "ExpanderConv2d of {} inputs: x is not [B, {}, H, W]")
        if self._pad is not None:
            x = F.pad(x, self._pad, self._pad_mode)
        return ops.conv2d(
            x,
            self.weight,
            self.neighbours,
            self.bias,
            self.stride,
            self._conv_padding,
            self.dilation,
            self.activation,
        )

    def extra_repr(self) -> str:
        text = (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}"
        )
        if self.padding != (0, 0):
            text += f", padding={self.padding!r}"
        if self.dilation != (1, 1):
            text += f", dilation={self.dilation}"
        if self.padding_mode != "zeros":
            text += f", padding_mode={self.padding_mode!r}"
        return f"{text}, bias={self.bias is not None}, {self._graph_repr()}"


class ExpanderLinear(_Expander):
    """y = x W^T + b in which each output reads `degree` inputs.

    Shape: x [..., in] -> [..., out]. Holds weight [out, degree], bias [out] or None, neighbours
    [out / share, degree] int32. The arguments are nn.Linear's, then those of the graph as in
    ExpanderConv2d; so are the errors.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        degree: int | None = None,
        share: int = 1,
        graph: str = "biregular",
        seed: int = 0,
        expandSize: int | None = None,
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self._set_graph(in_features, out_features, degree, expandSize, share, graph, seed)
        self._store((), bias, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            self._check_unchanged()
        check_input(x, -1, self.in_features, "ExpanderLinear of {} inputs: x is not [..., {}]")
        return ops.linear(x, self.weight, self.neighbours, self.bias, self.activation)

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, "
            f"{self._graph_repr()}"
        )


X_LAYERS = (ExpanderConv2d, ExpanderLinear)


def modules_of(model: nn.Module, kinds: type | tuple[type, ...]) -> dict[str, Any]:
    """Qualified name -> module, of those of these kinds, in the order of `named_modules`."""
    return {name: part for name, part in model.named_modules() if isinstance(part, kinds)}


def _changes(tensor: Tensor) -> int:
    """How often torch has seen a tensor change in place; -1 where it does not count: made in
    inference mode.
    """
    return -1 if tensor.is_inference() else tensor._version


def _digest(neighbours: Tensor) -> bytes:
    return hashlib.sha256(neighbours.numpy(force=True).tobytes()).digest()


def _is_symbolic(tensor: Tensor) -> bool:
    """Whether a tensor has no numbers to look at: a fake one, or one that a transform holds several
    of.
    """
    return type(tensor) is not Tensor or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
