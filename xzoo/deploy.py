"""A model for inference: what follows a layer taken over by it, in the memory format that is faster here.

    fast = xzoo.deploy(model, torch.zeros(1, 3, 224, 224))

A norm whose statistics stand still is one multiplication and one addition for each channel, which the weights and the
bias of the layer before it can take on. A relu after an X-layer is done when its result is stored. torch.fx finds the
pairs; the modules stay where they are, so that what else a model can do (features, another head) works as before.
Then the clock decides: the memory format of the model, and for each X-layer whether it or its dense form computes.

Not here: another number format, pruning, compilers (torch.compile takes a deployed model as any other).
"""

import copy
import functools
import logging
import math
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from timm.layers import BatchNormAct2d
from timm.models._features_fx import get_notrace_modules
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from .convert import to_dense
from .errors import ModelError
from .layers import ExpanderConv2d, ExpanderLinear

_logger = logging.getLogger(__name__)

FOLDS_INTO = (nn.Conv2d, nn.Linear, ExpanderConv2d, ExpanderLinear)
ACTIVATIONS: dict[type, str] = {nn.ReLU: "relu", nn.ReLU6: "relu6"}
RUNS = 7  # in each form that is measured; the fastest counts, because other work on a machine only adds
CLEARLY = 1.1  # times as fast: the clock is not that exact, and a dense layer needs more memory


def deploy(model: nn.Module, example: Tensor) -> nn.Module:
    """A copy of the model for inference on inputs like the example, whose outputs differ by rounding alone.

    Args:
        example: float [B, C, H, W] on the model's device; its content does not matter, its size and batch do: what
            is measured to be faster is so for them.
    Returns: the copy, in eval mode and without gradients. What was done is logged ("xzoo.deploy", INFO).
    Raises: ModelError if the model does not run on the example.
    """
    fast = copy.deepcopy(model).eval().requires_grad_(False)
    with torch.inference_mode():
        try:
            fast(example)
        except Exception as error:
            raise ModelError(f"the model does not run on an example of {list(example.shape)}: {error}") from error
    folded, norms = fold(fast), sum(isinstance(part, _BatchNorm) for part in model.modules())
    fused, (said, form) = fuse(fast), _choose_format(fast, example)
    _logger.info("%d of %d norms folded, %d activations fused; %s", folded, norms, fused, said)
    _logger.info("%d of %d X-layers are faster dense", *_choose_layers(fast, example, form))
    return fast


def fold(model: nn.Module) -> int:
    """Fold every batch norm of a model in eval mode that directly follows its layer, in place; returns how many.

    Those stay that follow something else (a sum, an activation: DenseNet's first in each layer), or a layer that is
    called, read or trained in more than one place. A model that torch.fx cannot trace stays as it is.
    """
    pairs = [(layer, norm, name) for layer, norm, name in _pairs(model, "folded") if _folds(layer, norm)]
    for layer, norm, name in pairs:
        _fold(layer, norm)
        model.set_submodule(
            name, nn.Sequential(norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else nn.Identity()
        )
    return len(pairs)


def fuse(model: nn.Module) -> int:
    """Let every X-layer do the relu or relu6 module that directly follows it, in place; returns how many do."""
    pairs = [
        (layer, act, name)
        for layer, act, name in _pairs(model, "fused")
        if isinstance(layer, ExpanderConv2d | ExpanderLinear) and type(act) in ACTIVATIONS and not _watched(layer, act)
    ]
    for layer, act, name in pairs:
        layer.activation = ACTIVATIONS[type(act)]
        model.set_submodule(name, nn.Identity())
    return len(pairs)


def _pairs(model: nn.Module, what: str) -> Iterator[tuple[Any, Any, str]]:
    """Two modules, and the name of the second, which alone gets the first one's result; each called once, and with
    parameters of its own. Modules between them that do nothing count as absent."""
    try:
        nodes = _Tracer().trace(model).nodes
    except Exception as error:  # of whatever class the model's own code raises on a proxy
        _logger.warning("nothing is %s: torch.fx cannot trace the model (%s)", what, str(error).splitlines()[0])
        return
    modules = dict(model.named_modules(remove_duplicate=False))
    calls = Counter(id(modules[str(node.target)]) for node in nodes if node.op == "call_module")
    owners = Counter(id(p) for part in model.modules() for p in part.parameters(recurse=False))

    def alone(node: fx.Node) -> bool:
        part = modules[str(node.target)]
        return calls[id(part)] == 1 and all(owners[id(p)] == 1 for p in part.parameters(recurse=False))

    def before(node: fx.Node) -> Any:
        return node.args[0] if node.op == "call_module" and node.args else None

    for node in nodes:
        first = before(node)
        while isinstance(first, fx.Node) and first.op == "call_module" and len(first.users) == 1:
            part = modules[str(first.target)]
            if type(part) is not nn.Identity or _watched(part):
                if alone(first) and alone(node):
                    yield part, modules[str(node.target)], str(node.target)
                break
            first = before(first)


class _Tracer(fx.Tracer):
    """Goes into containers alone: layers, norms and what timm says cannot be traced are leaves."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        leaves = (*FOLDS_INTO, _BatchNorm, *get_notrace_modules())
        return isinstance(module, leaves) or super().is_leaf_module(module, name)


def _folds(layer: nn.Module, norm: nn.Module) -> bool:
    if not (isinstance(layer, FOLDS_INTO) and isinstance(norm, _BatchNorm)):
        return False
    # Without statistics of its own it takes each batch's.
    known = norm.running_mean is not None and len(norm.running_mean) == len(layer.weight)
    return known and not getattr(layer, "activation", "") and not _watched(layer, norm)


def _watched(*parts: nn.Module) -> bool:
    return any(part._forward_hooks or part._forward_pre_hooks or is_parametrized(part) for part in parts)


@torch.no_grad()
def _fold(layer: Any, norm: Any) -> None:
    """weight * s and (bias - mean) * s + beta, s = gamma / sqrt(var + eps); in float64, so that it is rounded once."""
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    bias = -norm.running_mean.double() * scale
    if layer.bias is not None:
        bias = bias + layer.bias.double() * scale
    if norm.bias is not None:
        bias = bias + norm.bias.double()
    weight = layer.weight.double() * scale.view(-1, *[1] * (layer.weight.dim() - 1))
    layer.bias = nn.Parameter(bias.to(layer.weight.dtype), requires_grad=False)
    layer.weight = nn.Parameter(weight.to(layer.weight.dtype), requires_grad=False)


def _choose_format(model: nn.Module, example: Tensor) -> tuple[str, torch.memory_format]:
    """Put the model into the memory format in which it is faster; by how much in words, and the format."""
    formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    if example.dim() != 4:
        return "contiguous", torch.contiguous_format
    models = {name: _in_format(copy.deepcopy(model), form) for name, form in formats.items()}
    spent = dict.fromkeys(formats, math.inf)
    with torch.inference_mode():
        for _ in range(RUNS):
            for name, candidate in models.items():
                spent[name] = min(spent[name], _seconds(candidate, example))
    best = min(spent, key=spent.__getitem__)
    _in_format(model, formats[best])
    return f"{best}, {max(spent.values()) / spent[best]:.2f} times as fast as the other", formats[best]


def _in_format(model: nn.Module, form: torch.memory_format) -> nn.Module:
    """The dense layers' weights, and so the activations, in this format. A kernel reads an X-layer's as one row."""
    model.to(memory_format=form)
    for part in model.modules():
        if isinstance(part, ExpanderConv2d):
            part.weight.data = part.weight.data.contiguous()
    return model


def _choose_layers(model: nn.Module, example: Tensor, form: torch.memory_format) -> tuple[int, int]:
    """Put the dense layer in the place of each X-layer that it clearly beats there; how many, of how many."""
    names = [name for name, part in model.named_modules() if isinstance(part, ExpanderConv2d | ExpanderLinear)]
    if not names:
        return 0, 0
    dense = _in_format(to_dense(copy.deepcopy(model)), form)
    # Within runs of whole models: a layer that is called again and again finds its weights in the cache.
    ours, theirs = (dict.fromkeys(names, math.inf) for _ in range(2))
    with torch.inference_mode():
        for _ in range(RUNS):
            for candidate, least in ((model, ours), (dense, theirs)):
                for name, seconds in _seconds_of(candidate, names, example).items():
                    least[name] = min(least[name], seconds)
    slower = [name for name in names if theirs[name] * CLEARLY < ours[name]]
    for name in slower:
        model.set_submodule(name, dense.get_submodule(name))
    return len(slower), len(names)


def _seconds_of(model: nn.Module, names: list[str], example: Tensor) -> dict[str, float]:
    """The time that each of these modules takes in one run of the model (in the last call of it)."""
    spent: dict[str, float] = {}

    def start(name: str, *_: Any) -> None:
        spent[name] = -_now(example)

    def stop(name: str, *_: Any) -> None:
        spent[name] += _now(example)

    hooks = []
    for name in names:
        part = model.get_submodule(name)
        hooks += [part.register_forward_pre_hook(functools.partial(start, name))]
        hooks += [part.register_forward_hook(functools.partial(stop, name))]
    model(example)
    for hook in hooks:
        hook.remove()
    return spent


def _seconds(model: nn.Module, example: Tensor) -> float:
    start = _now(example)
    model(example)
    return _now(example) - start


def _now(example: Tensor) -> float:
    if example.device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()
