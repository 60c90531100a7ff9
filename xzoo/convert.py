"""Turning the layers of any model into X-layers, and back.

    report = xzoo.expand(model, compression=4)    # in place; print(report) says what was done
    xzoo.to_dense(model)                          # the same function in dense layers again

The models of the zoo are built by the same `swap` from their own tables of degrees.
"""

import ast
import fnmatch
import functools
import inspect
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import (
    ParametrizationList,
    is_parametrized,
    type_before_parametrizations,
)
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from . import graphs
from .errors import GraphError, ModelError
from .layers import X_LAYERS, ExpanderConv2d, ExpanderLinear, modules_of
from .ops import dense as dense_op

Patterns = str | Sequence[str] | None


@dataclass(frozen=True)
class ConvertedLayer:
    """What `expand` did with one layer; `degree` and `share` are None if it was kept."""

    name: str
    layer: str  # such as "conv 64 -> 128, 3x3"
    degree: int | None
    share: int | None
    weights_before: int
    weights_after: int
    reason: str


@dataclass(frozen=True)
class Report:
    """All layers and parameters of a model that hold weights, in its order; str() is a table."""

    rows: tuple[ConvertedLayer, ...]

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
        lines = []
        for row in self.rows:
            counts = f"{row.weights_before:>12,} -> {row.weights_after:>12,}"
            lines.append(f"{row.name:{wide}}  {row.layer:26} {counts}  {row.reason}")
        before, after = self.weights_before, self.weights_after
        lines.append(
            f"{len(self.replaced)} of {len(self.rows)} layers expanded: {before:,} -> {after:,} "
            f"weights, {before / max(after, 1):.2f} times fewer"
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

    Left as they are, with the reason in the report: the first convolution, the classifier (what
    timm calls so, else the last linear layer), layers of fewer than 8 inputs, grouped convolutions,
    subclasses of nn.Conv2d and nn.Linear, parametrized and pruned layers, weights used in two
    places, the matrices of adapters (LoRA), and layers whose weight another module reads by itself,
    as in F.linear(x, self.proj.weight). Other layers with weights (nn.Conv1d, nn.Conv3d, transposed
    convolutions, nn.MultiheadAttention's in_proj_weight) have no X-form; the report names them too.

    Args:
        compression: each output reads max(1, inputs // compression) of the inputs; from 1 on.
        share: consecutive outputs with the same inputs, in 1x1 convolutions and linear layers;
            where that would leave inputs read by fewer than two blocks, the largest smaller share
            that does not.
        spatial_share: the same for larger kernels.
        graph, seed: as in xzoo.graphs.sample; each layer's seed is a hash of `seed` and its name.
        only: name patterns such as "layer4.*"; nothing else is replaced, and the first convolution,
            the classifier and small layers are, if named.
        skip: name patterns that are left as they are.
        keep_weights: keep the weights of surviving connections, each output's scaled to the norm
            that it had, so that a trained model can be fine-tuned; else initial values are drawn
            anew.

    Raises: ModelError for a compression out of range and for patterns that fit no layer; GraphError
        for a share or a seed out of range and where a layer admits no such graph. The model is then
        as it was.
    """
    check_compression(compression)
    rows: list[ConvertedLayer] = []
    degrees: dict[str, int] = {}
    for name, layer, reason in _candidates(model, _patterns(only), _patterns(skip)):
        if not reason:
            assert isinstance(layer, nn.Conv2d | nn.Linear)
            n_in, _ = _sizes(layer)
            degree = degree_for(graph, n_in, compressed(n_in, compression))
            if degree == n_in:
                reason = "kept: every output would read every input"
            else:
                degrees[name] = degree
        weights = _weights(layer)
        rows.append(ConvertedLayer(name, _describe(layer), None, None, weights, weights, reason))
    new = swap(model, degrees, share, spatial_share, graph, seed, keep_weights=keep_weights)
    return Report(tuple(_done(row, new[row.name]) if row.name in new else row for row in rows))


def to_dense(model: nn.Module) -> nn.Module:
    """Replace every X-layer by a dense layer that computes the same, in place, and return the
    model.

    An X-layer given by itself has nothing to be replaced in: then the dense layer is returned.

    Raises: ModelError, before anything is replaced, for an X-layer whose weight or bias is computed
        (parametrized, pruned) and for subclasses of X-layers.
    """
    computed = computed_tensors(model)
    for name, layer in modules_of(model, X_LAYERS).items():
        if name in computed:
            raise ModelError(f"to_dense(): {_called(name, layer)}: {computed[name]}")
        if type(layer) not in X_LAYERS:
            raise ModelError(
                f"to_dense(): {_called(name, layer)} is a subclass that may compute something "
                f"else; put an {type(layer).__mro__[1].__name__} or a dense layer of your own in "
                "its place first"
            )
    if isinstance(model, ExpanderConv2d | ExpanderLinear):
        return dense_form(model)
    dense: dict[nn.Module, nn.Module] = {}  # a layer that is used in two places stays one layer
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if isinstance(layer, ExpanderConv2d | ExpanderLinear):
            if layer not in dense:
                dense[layer] = dense_form(layer)
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
    """Replace the named dense layers by X-layers of these degrees; all of them, or none if one has
    no such graph.
    """
    for name, value, least in (
        ("share", share, 1),
        ("spatial_share", spatial_share, 1),
        ("seed", seed, 0),
    ):
        if not is_integer(value, least):
            raise GraphError(f"{name}={value!r}: use an integer from {least} on")
    new = {}
    for name, degree in degrees.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        limit = spatial_share if layer.weight[0, 0].numel() > 1 else share
        effective = graphs.effective_share(*_sizes(layer), degree, limit)
        layer_seed = graphs.layer_seed(seed, name)
        try:
            new[name] = _x_layer(layer, degree, effective, graph, layer_seed, keep_weights)
        except GraphError as error:
            raise GraphError(f"layer {name}: {error}") from None
    for name, x_layer in new.items():
        x_layer.name = name
        model.set_submodule(name, x_layer)
    return new


def compressed(n_in: int, compression: int) -> int:
    """The degree for a compression: n_in // compression, but at least 1."""
    return max(1, n_in // compression)


def degree_for(graph: str, n_in: int, degree: int) -> int:
    """What a kind of graph can have: `group` and `shuffle` take the largest divisor of n_in up to
    `degree`.
    """
    return graphs.largest_divisor(n_in, degree) if graph in ("group", "shuffle") else degree


def is_integer(value: Any, least: int) -> bool:
    """Whether a value is an integer from `least` on; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def check_compression(compression: int) -> None:
    """Raise ModelError unless it is an integer from 1 on."""
    if not is_integer(compression, 1):
        raise ModelError(
            f"compression={compression!r}: use an integer from 1 (dense) on; an output reads "
            "inputs // compression"
        )


def _x_layer(
    old: nn.Conv2d | nn.Linear, degree: int, share: int, graph: str, seed: int, keep_weights: bool
) -> ExpanderConv2d | ExpanderLinear:
    new: ExpanderConv2d | ExpanderLinear
    options = {"degree": degree, "share": share, "graph": graph, "seed": seed, **_factory(old)}
    if isinstance(old, nn.Conv2d):
        new = ExpanderConv2d(old.in_channels, old.out_channels, **_geometry(old), **options)
    else:
        new = ExpanderLinear(*_sizes(old), **options)
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


def _factory(layer: Any) -> dict[str, Any]:
    weight = layer.weight
    return {"bias": layer.bias is not None, "device": weight.device, "dtype": weight.dtype}


def _norm_ratio(dense: Tensor, kept: Tensor) -> Tensor:
    """|all weights of an output| / |those it keeps|, [out, 1, ...]: for white inputs the variance
    stays the same.
    """
    before = dense.flatten(1).norm(dim=1)
    after = kept.flatten(1).norm(dim=1)
    ratio = torch.where(after > 0, before / after, torch.ones_like(after))
    return ratio.reshape(-1, *[1] * (kept.dim() - 1))


def dense_form(x_layer: ExpanderConv2d | ExpanderLinear, groups: int = 1) -> nn.Module:
    """A dense layer that computes the same, with the mode and the hooks; a deployed one's
    activation behind it. With `groups` a convolution of so many, which the graph has to be, in
    their order.
    """
    new: nn.Conv2d | nn.Linear
    n_in, n_out = _sizes(x_layer)
    if isinstance(x_layer, ExpanderConv2d):
        new = nn.Conv2d(n_in, n_out, groups=groups, **_geometry(x_layer), **_factory(x_layer))
    else:
        new = nn.Linear(n_in, n_out, **_factory(x_layer))
    with torch.no_grad():
        new.weight.copy_(x_layer.dense_weight() if groups == 1 else x_layer.weight)
        if x_layer.bias is not None and new.bias is not None:
            new.bias.copy_(x_layer.bias)
    _like(new, x_layer)
    if x_layer.activation:  # of a deployed model
        return nn.Sequential(new, {"relu": nn.ReLU, "relu6": nn.ReLU6}[x_layer.activation]())
    return new


_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def _like(new: nn.Module, old: nn.Module) -> None:
    """Give `new` the mode, the frozen parameters and the hooks of `old`."""
    new.train(old.training)
    for name, parameter in new.named_parameters():
        parameter.requires_grad_(old.get_parameter(name).requires_grad)
    # The very dictionaries, so that the handles of the hooks still remove them.
    for name in _HOOKS:
        setattr(new, name, getattr(old, name))


def computed_tensors(model: nn.Module) -> dict[str, str]:
    """Layers whose weight or bias is not a parameter but computed at each call, with the reason and
    the remedy.
    """
    reasons: dict[str, str] = {}
    for name, layer in model.named_modules():
        for tensor in ("weight", "bias"):
            remedy = _remedy(layer, tensor)
            if remedy and name not in reasons:
                computed = f"its {tensor} is computed at each call"
                reasons[name] = f"{computed}; {remedy} makes it a parameter again"
    return reasons


_REMOVE: dict[type, str] = {  # by the hook that computes a tensor
    BasePruningMethod: "prune.remove",
    SpectralNorm: "remove_spectral_norm",
    WeightNorm: "remove_weight_norm",
}


def _remedy(layer: nn.Module, tensor: str) -> str:
    """The call that makes a computed tensor a parameter again; "" where it is not computed."""
    if is_parametrized(layer, tensor):
        return f"torch.nn.utils.parametrize.remove_parametrizations(layer, {tensor!r})"
    if not isinstance(vars(layer).get(tensor), Tensor):
        return ""
    hooks = tuple(layer._forward_pre_hooks.values())
    for kind, remove in _REMOVE.items():
        if any(isinstance(hook, kind) for hook in hooks):
            return f"torch.nn.utils.{remove}(layer, {tensor!r})"
    return f"layer.register_parameter({tensor!r}, ...)"


def _called(name: str, layer: nn.Module) -> str:
    kind = type_before_parametrizations(layer).__name__
    return f"layer {name} ({kind})" if name else f"the {kind}"


def _candidates(
    model: nn.Module, only: tuple[str, ...], skip: tuple[str, ...]
) -> Iterable[tuple[str, nn.Module | Tensor, str]]:
    """Name, layer and the reason to leave it ("" for none) of all that holds weights: layers, and
    the parameters of other modules."""
    layers = modules_of(model, (nn.Conv2d, nn.Linear))
    if "" in layers:
        raise ModelError(
            f"expand() got a lone {type(model).__name__}, which cannot be replaced in place; build "
            "an ExpanderConv2d or ExpanderLinear instead, or wrap it in nn.Sequential"
        )
    for name, layer in layers.items():
        if isinstance(layer.weight, UninitializedParameter):
            raise ModelError(
                f"layer {name} is a {type(layer).__name__} without sizes yet: run a forward pass "
                "first"
            )
    for pattern in (*only, *skip):
        if not any(fits(name, (pattern,)) for name in layers):
            raise ModelError(
                f"pattern {pattern!r} fits no convolution or linear layer, such as "
                f"{', '.join([*layers][:3])}"
            )
    own = {name: layer for name, layer in layers.items() if not _in_adapter(model, name)}
    first = next((name for name, layer in own.items() if isinstance(layer, nn.Conv2d)), None)
    classifier = _classifier(model, own)
    uses = Counter(dict(model.named_parameters(remove_duplicate=False)).values())
    read = read_by_methods(model, ("weight",))
    computed = computed_tensors(model)
    for name, module in model.named_modules():
        if name not in layers:
            yield from _without_x_form(name, module)
            continue
        layer = layers[name]
        n_in, _ = _sizes(layer)
        if fits(name, skip):
            reason = "kept: skipped by name"
        elif only and not fits(name, only):
            reason = "kept: not among the names in only"
        elif name not in own:
            reason = "kept: a matrix of an adapter"
        elif not only and name == first:
            reason = "kept: the first convolution"
        elif not only and name in classifier:
            reason = "kept: the classifier"
        elif not only and n_in < 8:
            reason = f"kept: only {n_in} inputs"
        elif type_before_parametrizations(layer) not in (nn.Conv2d, nn.Linear):
            reason = f"kept: {type(layer).__name__} is a subclass that may compute something else"
        elif isinstance(layer, nn.Conv2d) and layer.groups != 1:
            reason = f"kept: a grouped convolution ({layer.groups} groups)"
        elif name in computed:
            reason = f"kept: its {computed[name].split()[1]} is computed (parametrized)"
        elif "weight" not in layer._parameters:
            reason = "kept: its weight is computed (parametrized)"
        elif type(layer.weight) is not nn.Parameter:
            reason = f"kept: its weight is a {type(layer.weight).__name__}"
        elif any(uses[parameter] > 1 for parameter in layer.parameters()):
            reason = "kept: its weight is used in two places"
        elif name in read:
            reason = f"kept: {read[name]} reads its weight itself"
        else:
            reason = ""
        yield name, layer, reason


def _without_x_form(name: str, module: nn.Module) -> Iterable[tuple[str, nn.Module | Tensor, str]]:
    """What a module that is neither nn.Conv2d nor nn.Linear holds of weights, itself and not in
    modules of its own.
    """
    kind = type_before_parametrizations(module).__name__
    if isinstance(module, ParametrizationList):
        return  # counted with the layer whose weight it computes
    if isinstance(module, ExpanderConv2d | ExpanderLinear):
        yield name, module, "kept: an X-layer already"
    elif _remedy(module, "weight") or _has_weights(module._parameters.get("weight")):
        yield (
            name,
            module,
            f"kept: {'an' if kind[0] in 'AEIOU' else 'a'} {kind}; nn.Conv2d and nn.Linear alone "
            "have an X-form",
        )
    for parameter, value in module._parameters.items():
        if _has_weights(value) and not hasattr(module, "weight"):
            where = f"{name}.{parameter}".lstrip(".")
            yield (
                where,
                value,
                f"kept: {kind} holds it itself, not in a convolution or linear layer",
            )


def _has_weights(value: Any) -> TypeGuard[Tensor]:
    return (
        isinstance(value, Tensor)
        and not isinstance(value, UninitializedParameter)
        and value.dim() >= 2
    )


def _in_adapter(model: nn.Module, name: str) -> bool:
    """Whether a module belongs to an adapter: beside a `base_layer`, as peft builds it, or under a
    name lora_*.
    """
    if ".lora_" in f".{name}":
        return True
    parts = name.split(".")
    for depth in range(len(parts)):
        parent = model.get_submodule(".".join(parts[:depth]))
        if isinstance(parent._modules.get("base_layer"), nn.Module) and parts[depth] not in (
            "",
            "base_layer",
        ):
            return True
    return False


def _classifier(model: nn.Module, layers: Mapping[str, nn.Module]) -> set[str]:
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    linear = [name for name, layer in layers.items() if isinstance(layer, nn.Linear)]
    return layers.keys() & _patterns(names) or set(linear[-1:])


def read_by_methods(model: nn.Module, tensors: tuple[str, ...]) -> dict[str, str]:
    """Layers of which a module above them reads one of these tensors by itself, with the class of
    that module.

    It reads the source of the classes. These layers stay dense. A read under another name is missed
    and fails at the first forward pass, because a compact weight has another shape.
    """
    readers = {}
    for prefix, module in model.named_modules():
        for path in _tensors_read_by(type(module), tensors):  # type: ignore[arg-type]
            readers[f"{prefix}.{path}".lstrip(".")] = type(module).__name__
    return readers


_BUILDS = re.compile("_*(init|zero|reset|load|fix|extra_repr)")  # names of methods


@functools.cache
def _tensors_read_by(cls: Any, tensors: tuple[str, ...]) -> frozenset[str]:
    """Paths p for which a method of cls, other than those that build or initialise, uses
    self.p.weight (say).
    """
    paths: set[str] = set()
    for base in cls.__mro__:
        if base in (nn.Module, nn.Sequential, object):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):  # no source: nothing to be told
            continue
        for definition in tree.body:
            for method in getattr(definition, "body", ()):
                if isinstance(method, ast.FunctionDef) and not _BUILDS.match(method.name):
                    paths.update(_tensors_read_in(method, tensors))
    return frozenset(paths)


def _tensors_read_in(method: ast.FunctionDef, tensors: tuple[str, ...]) -> Iterable[str]:
    harmless = {"dtype", "device", "shape", "ndim", "requires_grad", "grad", "size", "numel"}
    about = {
        id(n.value) for n in ast.walk(method) if isinstance(n, ast.Attribute) and n.attr in harmless
    }
    for node in ast.walk(method):
        if isinstance(node, ast.Attribute) and node.attr in tensors and id(node) not in about:
            text = ast.unparse(node.value).replace("[", ".").replace("]", "")
            if text.startswith("self."):
                yield text.removeprefix("self.")


def _done(row: ConvertedLayer, x_layer: ExpanderConv2d | ExpanderLinear) -> ConvertedLayer:
    return replace(
        row,
        degree=x_layer.degree,
        share=x_layer.share,
        weights_after=x_layer.weight.numel(),
        reason=f"degree {x_layer.degree}, share {x_layer.share}",
    )


def _sizes(layer: Any) -> tuple[int, int]:
    """Inputs and outputs: channels of a convolution, features of a linear layer."""
    if hasattr(layer, "in_features"):
        return layer.in_features, layer.out_features
    return layer.in_channels, layer.out_channels


def _weights(held: Any) -> int:
    return held.numel() if isinstance(held, Tensor) else held.weight.numel()


def _describe(held: nn.Module | Tensor) -> str:
    if isinstance(held, Tensor):
        return f"parameter {_by(held.shape)}"
    kind = type_before_parametrizations(held).__name__
    if isinstance(held, nn.Linear):
        return "linear {} -> {}".format(*_sizes(held))
    if isinstance(held, nn.Conv2d):
        kind = "conv"
    if all(hasattr(held, name) for name in ("in_channels", "out_channels", "kernel_size")):
        return "{} {} -> {}, {}".format(kind, *_sizes(held), _by(held.kernel_size))
    return f"{kind} {_by(held.weight.shape)}"


def _by(sizes: Any) -> str:
    return "x".join(map(str, sizes))


def _patterns(given: Patterns) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given or ())


def fits(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of the patterns ("layer4.*") fits the whole name."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
