"""Turning the layers of any model into X-layers, and back.

    report = xzoo.expand(model, compression=4)      # in place; print(report) says what was done and why
    xzoo.to_dense(model)                            # the same function in dense layers again

The models of the zoo are built by the same `swap` from their own tables of degrees.
"""

import ast
import fnmatch
import functools
import inspect
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import is_parametrized

from . import graphs
from .errors import GraphError, ModelError
from .layers import ExpanderConv2d, ExpanderLinear
from .ops import dense as dense_op

Patterns = str | Sequence[str] | None


@dataclass(frozen=True)
class Row:
    """What `expand` did with one layer; `degree` and `share` are None where it was left as it is."""

    name: str
    layer: str  # such as "conv 64 -> 128, 3x3"
    degree: int | None
    share: int | None
    weights_before: int
    weights_after: int
    reason: str


@dataclass(frozen=True)
class Report:
    """All convolutions and linear layers of a model, in its own order; str() is a table."""

    rows: tuple[Row, ...]

    @property
    def replaced(self) -> tuple[str, ...]:
        return tuple(row.name for row in self.rows if row.degree is not None)

    @property
    def weights_before(self) -> int:
        return sum(row.weights_before for row in self.rows)

    @property
    def weights_after(self) -> int:
        return sum(row.weights_after for row in self.rows)

    def __str__(self) -> str:
        wide = max((len(row.name) for row in self.rows), default=0)
        lines = [
            f"{row.name:{wide}}  {row.layer:26} {row.weights_before:>12,} -> {row.weights_after:>12,}  {row.reason}"
            for row in self.rows
        ]
        before, after = self.weights_before, max(self.weights_after, 1)
        lines.append(
            f"{len(self.replaced)} of {len(self.rows)} layers expanded: {before:,} -> {self.weights_after:,} weights, "
            f"{before / after:.2f} times fewer"
        )
        return "\n".join(lines)


def expand(
    model: nn.Module,
    compression: int = 4,
    share: int = 4,
    spatial_share: int = 1,
    graph: str = "biregular",
    seed: int = 0,
    *,
    only: Patterns = None,
    skip: Patterns = None,
    keep_weights: bool = True,
) -> Report:
    """Replace the convolutions and linear layers of a model by X-layers, in place.

    Left as they are, with the reason in the report: the first convolution, the classifier (what timm calls so,
    else the last linear layer), layers of fewer than 8 inputs, grouped convolutions, subclasses of nn.Conv2d and
    nn.Linear, parametrized layers, weights used in two places, and layers whose weight another module reads by
    itself, as in F.linear(x, self.proj.weight).

    Args:
        compression: each output reads max(1, inputs // compression) of the inputs; from 1 on.
        share: consecutive outputs with the same inputs, in 1x1 convolutions and linear layers; where that would
            leave inputs read by fewer than two blocks, the largest smaller share that does not.
        spatial_share: the same for larger kernels.
        graph, seed: as in xzoo.graphs.sample; each layer's seed is a hash of `seed` and its name.
        only: name patterns such as "layer4.*"; nothing else is replaced, and the first convolution, the
            classifier and small layers are, if named.
        skip: name patterns that are left as they are.
        keep_weights: keep the weights of surviving connections, each output's scaled to the norm that it had,
            so that a trained model can be fine-tuned; else initial values are drawn anew.

    Raises: ModelError for arguments out of range and patterns that fit no layer; GraphError where a layer
        admits no such graph. The model is then as it was.
    """
    check_compression(compression)
    rows: list[Row] = []
    degrees: dict[str, int] = {}
    for name, layer, reason in _candidates(model, _patterns(only), _patterns(skip)):
        n_in, _ = _sizes(layer)
        degree = degree_for(graph, n_in, max(1, n_in // compression))
        if not reason and degree == n_in:
            reason = "kept: every output would read every input"
        if not reason:
            degrees[name] = degree
        rows.append(Row(name, _describe(layer), None, None, layer.weight.numel(), layer.weight.numel(), reason))
    new = swap(model, degrees, share, spatial_share, graph, seed, keep_weights=keep_weights)
    return Report(tuple(_done(row, new[row.name]) if row.name in new else row for row in rows))


def to_dense(model: nn.Module) -> nn.Module:
    """Replace every X-layer by a dense layer that computes the same, in place, and return the model.

    An X-layer given by itself has nothing to be replaced in: then the dense layer is returned.
    """
    if isinstance(model, ExpanderConv2d | ExpanderLinear):
        return _dense_layer(model)
    dense: dict[nn.Module, nn.Module] = {}  # a layer that is used in two places stays one layer
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if isinstance(layer, ExpanderConv2d | ExpanderLinear):
            if layer not in dense:
                dense[layer] = _dense_layer(layer)
            model.set_submodule(name, dense[layer])
    return model


def swap(
    model: nn.Module,
    degrees: Mapping[str, int],
    share: int,
    spatial_share: int,
    graph: str,
    seed: int,
    *,
    keep_weights: bool,
) -> dict[str, ExpanderConv2d | ExpanderLinear]:
    """Replace the named dense layers by X-layers of these degrees; all of them, or none if one has no such graph."""
    for name, value, least in (("share", share, 1), ("spatial_share", spatial_share, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ModelError(f"{name}={value!r}: use an integer from {least} on")
    new = {}
    for name, degree in degrees.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        wanted = spatial_share if layer.weight[0, 0].numel() > 1 else share
        fits = graphs.effective_share(*_sizes(layer), degree, wanted)
        try:
            new[name] = _x_layer(layer, degree, fits, graph, graphs.layer_seed(seed, name), keep_weights)
        except GraphError as error:
            raise GraphError(f"layer {name}: {error}") from None
    for name, x_layer in new.items():
        x_layer.name = name
        model.set_submodule(name, x_layer)
    return new


def degree_for(graph: str, n_in: int, degree: int) -> int:
    """What a kind of graph can have: `group` and `shuffle` take the largest divisor of n_in up to `degree`."""
    return graphs.largest_divisor(n_in, degree) if graph in ("group", "shuffle") else degree


def check_compression(compression: int) -> None:
    """Raise ModelError unless it is an integer from 1 on."""
    if isinstance(compression, bool) or not isinstance(compression, int) or compression < 1:
        raise ModelError(
            f"compression={compression!r}: use an integer from 1 (dense) on; an output reads inputs // compression"
        )


def _x_layer(
    old: nn.Conv2d | nn.Linear, degree: int, share: int, graph: str, seed: int, keep_weights: bool
) -> ExpanderConv2d | ExpanderLinear:
    new: ExpanderConv2d | ExpanderLinear
    chosen: dict[str, Any] = {"degree": degree, "share": share, "graph": graph, "seed": seed}
    chosen |= {"bias": old.bias is not None, "device": old.weight.device, "dtype": old.weight.dtype}
    if isinstance(old, nn.Conv2d):
        new = ExpanderConv2d(old.in_channels, old.out_channels, **_geometry(old), **chosen)
    else:
        new = ExpanderLinear(old.in_features, old.out_features, **chosen)
    if keep_weights:
        with torch.no_grad():
            kept = dense_op.gather(old.weight, new.neighbours)
            new.weight.copy_(kept * _norm_ratio(old.weight, kept))
            if old.bias is not None and new.bias is not None:
                new.bias.copy_(old.bias)
    _like(new, old)
    return new


def _geometry(layer: nn.Conv2d | ExpanderConv2d) -> dict[str, Any]:
    names = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
    return {name: getattr(layer, name) for name in names}


def _norm_ratio(dense: Tensor, kept: Tensor) -> Tensor:
    """|all weights of an output| / |those it keeps|, [out, 1, ...]: for white inputs the variance stays the same."""
    before, after = (w.flatten(1).norm(dim=1) for w in (dense, kept))
    ratio = torch.where(after > 0, before / after, torch.ones_like(after))
    return ratio.reshape(-1, *[1] * (kept.dim() - 1))


def _dense_layer(x_layer: ExpanderConv2d | ExpanderLinear) -> nn.Module:
    new: nn.Conv2d | nn.Linear
    n_in, n_out = _sizes(x_layer)
    weight = x_layer.weight
    factory: dict[str, Any] = {"bias": x_layer.bias is not None, "device": weight.device, "dtype": weight.dtype}
    if isinstance(x_layer, ExpanderConv2d):
        new = nn.Conv2d(n_in, n_out, **_geometry(x_layer), **factory)
    else:
        new = nn.Linear(n_in, n_out, **factory)
    with torch.no_grad():
        new.weight.copy_(dense_op.scatter(weight, x_layer.neighbours, n_in))
        if x_layer.bias is not None and new.bias is not None:
            new.bias.copy_(x_layer.bias)
    _like(new, x_layer)
    if x_layer.activation:  # of a deployed model
        return nn.Sequential(new, {"relu": nn.ReLU, "relu6": nn.ReLU6}[x_layer.activation]())
    return new


_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook"),
)


def _like(new: nn.Module, old: nn.Module) -> None:
    """Give `new` the mode, the frozen parameters and the hooks of `old`."""
    new.train(old.training)
    for name, parameter in new.named_parameters():
        parameter.requires_grad_(old.get_parameter(name).requires_grad)
    # The very dictionaries, so that the handles of the hooks still remove them.
    for name in _HOOKS:
        setattr(new, name, getattr(old, name))


def _candidates(
    model: nn.Module, only: tuple[str, ...], skip: tuple[str, ...]
) -> Iterable[tuple[str, nn.Conv2d | nn.Linear, str]]:
    """Name, layer and the reason to leave it ("" for none) of all convolutions and linear layers."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    if "" in layers:
        raise ModelError(
            f"expand() got a lone {type(model).__name__}, which cannot be replaced in place; build an "
            "ExpanderConv2d or ExpanderLinear instead, or wrap it in nn.Sequential"
        )
    for name, layer in layers.items():
        if isinstance(layer.weight, UninitializedParameter):
            raise ModelError(f"layer {name} is a {type(layer).__name__} without sizes yet: run a forward pass first")
    for pattern in (*only, *skip):
        if not any(fits(name, (pattern,)) for name in layers):
            raise ModelError(
                f"pattern {pattern!r} fits no convolution or linear layer, such as {', '.join([*layers][:3])}"
            )
    first = next((name for name, layer in layers.items() if isinstance(layer, nn.Conv2d)), None)
    classifier = _classifier(model, layers)
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    read = _read_elsewhere(model)
    for name, layer in layers.items():
        n_in, _ = _sizes(layer)
        if fits(name, skip):
            reason = "kept: skipped by name"
        elif only and not fits(name, only):
            reason = "kept: not among the names in only"
        elif not only and name == first:
            reason = "kept: the first convolution"
        elif not only and name in classifier:
            reason = "kept: the classifier"
        elif not only and n_in < 8:
            reason = f"kept: only {n_in} inputs"
        elif type(layer) not in (nn.Conv2d, nn.Linear):
            reason = f"kept: {type(layer).__name__} is a subclass that may compute something else"
        elif isinstance(layer, nn.Conv2d) and layer.groups != 1:
            reason = f"kept: a grouped convolution ({layer.groups} groups)"
        elif is_parametrized(layer) or "weight" not in layer._parameters:
            reason = "kept: its weight is computed (parametrized)"
        elif any(uses[id(parameter)] > 1 for parameter in layer.parameters()):
            reason = "kept: its weight is used in two places"
        elif name in read:
            reason = f"kept: {read[name]} reads its weight itself"
        else:
            reason = ""
        yield name, layer, reason


def _classifier(model: nn.Module, layers: Mapping[str, nn.Module]) -> set[str]:
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    found = {name for name in ((names,) if isinstance(names, str) else names) if name in layers}
    linear = [name for name, layer in layers.items() if isinstance(layer, nn.Linear)]
    return found or set(linear[-1:])


def _read_elsewhere(model: nn.Module) -> dict[str, str]:
    """Layers whose weight a module above them reads by itself, with the class of that module.

    Told from the source of the classes: what is found is left dense. What hides behind another name is not
    found, and fails loudly at the first forward pass, because a compact weight has another shape.
    """
    found = {}
    for prefix, module in model.named_modules():
        for path in _weights_read_by(type(module)):  # type: ignore[arg-type]
            found[f"{prefix}.{path}".lstrip(".")] = type(module).__name__
    return found


@functools.cache
def _weights_read_by(cls: Any) -> frozenset[str]:
    """Paths p for which a method of cls, other than those that build or initialise, uses self.p.weight."""
    paths: set[str] = set()
    for base in cls.__mro__:
        if base in (nn.Module, nn.Sequential, object):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):  # no source: nothing to be told
            continue
        methods = [f for node in tree.body for f in getattr(node, "body", ()) if isinstance(f, ast.FunctionDef)]
        for method in methods:
            if not method.name.lstrip("_").startswith(("init", "reset", "load", "fix", "extra_repr")):
                paths.update(_weights_read_in(method))
    return frozenset(paths)


def _weights_read_in(method: ast.FunctionDef) -> Iterable[str]:
    harmless = {"dtype", "device", "shape", "ndim", "requires_grad", "grad", "size", "numel"}
    about = {id(n.value) for n in ast.walk(method) if isinstance(n, ast.Attribute) and n.attr in harmless}
    for node in ast.walk(method):
        if isinstance(node, ast.Attribute) and node.attr == "weight" and id(node) not in about:
            text = ast.unparse(node.value).replace("[", ".").replace("]", "")
            if text.startswith("self."):
                yield text.removeprefix("self.")


def _done(row: Row, x_layer: ExpanderConv2d | ExpanderLinear) -> Row:
    degree, share = x_layer.degree, x_layer.share
    reason = f"degree {degree}, share {share}"
    return Row(row.name, row.layer, degree, share, row.weights_before, x_layer.weight.numel(), reason)


def _sizes(layer: nn.Module) -> tuple[int, int]:
    """Inputs and outputs: channels of a convolution, features of a linear layer."""
    names = ("in_features", "out_features") if hasattr(layer, "in_features") else ("in_channels", "out_channels")
    return getattr(layer, names[0]), getattr(layer, names[1])


def _describe(layer: nn.Conv2d | nn.Linear) -> str:
    n_in, n_out = _sizes(layer)
    if isinstance(layer, nn.Linear):
        return f"linear {n_in} -> {n_out}"
    return f"conv {n_in} -> {n_out}, {layer.kernel_size[0]}x{layer.kernel_size[1]}"


def _patterns(given: Patterns) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given or ())


def fits(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of the patterns ("layer4.*") fits the whole name."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
