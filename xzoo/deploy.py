"""A model for inference: batch norms folded into the layers before them, in the memory format that is faster here.

    fast = xzoo.deploy(model, torch.zeros(1, 3, 224, 224))

A norm whose statistics stand still is one multiplication and one addition for each channel, which the weights and the
bias of the layer before it can take on. torch.fx finds the pairs; the modules stay where they are, so that what else
a model can do (features, another head) works as before.

Not here: another number format, pruning, compilers (torch.compile takes a deployed model as any other).
"""

import copy
import logging
import time
from collections import Counter
from statistics import median
from typing import Any

import torch
from timm.layers import BatchNormAct2d
from timm.models._features_fx import get_notrace_modules
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from .errors import ModelError
from .layers import ExpanderConv2d, ExpanderLinear

_logger = logging.getLogger(__name__)

FOLDS_INTO = (nn.Conv2d, nn.Linear, ExpanderConv2d, ExpanderLinear)
PAIRS = 5  # of runs, one in each memory format


def deploy(model: nn.Module, example: Tensor) -> nn.Module:
    """A copy of the model for inference on inputs like the example, whose outputs differ by rounding alone.

    Args:
        example: float [B, C, H, W] on the model's device; its content does not matter, its size and batch do: they
            decide which memory format is measured to be faster.
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
    _logger.info("%d of %d norms folded; %s", folded, norms, _choose_format(fast, example))
    return fast


def fold(model: nn.Module) -> int:
    """Fold every batch norm of a model in eval mode that directly follows its layer, in place; returns how many.

    Those stay that follow something else (a sum, an activation: DenseNet's first in each layer), or a layer that is
    called, read or trained in more than one place. A model that torch.fx cannot trace stays as it is.
    """
    try:
        nodes = _Tracer().trace(model).nodes
    except Exception as error:  # of whatever class the model's own code raises on a proxy
        _logger.warning("nothing is folded: torch.fx cannot trace the model (%s)", str(error).splitlines()[0])
        return 0
    calls = Counter(node.target for node in nodes if node.op == "call_module")
    owners = Counter(id(p) for part in model.modules() for p in part.parameters(recurse=False))
    pairs = []
    for node in nodes:
        before = node.args[0] if node.op == "call_module" and node.args else None
        if isinstance(before, fx.Node) and before.op == "call_module" and len(before.users) == 1:
            names = str(before.target), str(node.target)
            layer, norm = (model.get_submodule(name) for name in names)
            once = all(calls[name] == 1 for name in names)
            alone = all(owners[id(p)] == 1 for part in (layer, norm) for p in part.parameters(recurse=False))
            if once and alone and _folds(layer, norm):
                pairs.append((layer, norm, names[1]))
    for layer, norm, name in pairs:
        _fold(layer, norm)
        model.set_submodule(
            name, nn.Sequential(norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else nn.Identity()
        )
    return len(pairs)


class _Tracer(fx.Tracer):
    """Goes into containers alone: layers, norms and what timm says cannot be traced are leaves."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        leaves = (*FOLDS_INTO, _BatchNorm, *get_notrace_modules())
        return isinstance(module, leaves) or super().is_leaf_module(module, name)


def _folds(layer: nn.Module, norm: nn.Module) -> bool:
    if not (isinstance(layer, FOLDS_INTO) and isinstance(norm, _BatchNorm)):
        return False
    watched = any(part._forward_hooks or part._forward_pre_hooks or is_parametrized(part) for part in (layer, norm))
    # Without statistics of its own it takes each batch's.
    return not watched and norm.running_mean is not None and len(norm.running_mean) == len(layer.weight)


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


def _choose_format(model: nn.Module, example: Tensor) -> str:
    """Put the model into the memory format in which it is faster; says which and by how much."""
    formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    if example.dim() != 4:
        return "contiguous"
    models = {name: copy.deepcopy(model).to(memory_format=form) for name, form in formats.items()}
    times: dict[str, list[float]] = {name: [] for name in formats}
    with torch.inference_mode():
        for _ in range(PAIRS + 1):
            for name, candidate in models.items():
                times[name].append(_seconds(candidate, example))
    spent = {name: median(each[1:]) for name, each in times.items()}  # the first run allocates and plans
    best = min(spent, key=spent.__getitem__)
    model.to(memory_format=formats[best])
    return f"{best}, {max(spent.values()) / spent[best]:.2f} times as fast as the other"


def _seconds(model: nn.Module, example: Tensor) -> float:
    start = time.perf_counter()
    model(example)
    if example.device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start
