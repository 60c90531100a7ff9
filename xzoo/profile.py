"""Counting the weights and multiply-accumulates that a model really has; and the name of what
computes them.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import ParametrizationList, type_before_parametrizations
from torch.utils.flop_counter import FlopCounterMode

from . import ops  # noqa: F401  (it registers torch.ops.xzoo)
from .errors import ModelError, first_line


@dataclass(frozen=True)
class Layer:
    """One convolution or linear layer; `degree` and `share` are None where it is dense."""

    name: str
    kind: str  # the class: Conv2d, Linear, ExpanderConv2d, ExpanderLinear
    n_in: int
    n_out: int
    kernel: tuple[int, int]
    groups: int
    degree: int | None
    share: int | None
    weights: int
    macs: int


@dataclass(frozen=True)
class Profile:
    """Counts of a model for one image; `layers` in the model's own order."""

    weights: int  # parameters of two or more dimensions
    params: int  # all parameters
    macs: int  # multiply-accumulates of convolutions and linear layers
    layers: tuple[Layer, ...]


def profile(model: nn.Module, input_size: tuple[int, int, int] | None = None) -> Profile:
    """Count weights, parameters and MACs of one image of `input_size` (C, H, W); the model is left
    as it is.

    Without input_size the size of the model's pretrained_cfg is taken. Runs on torch's meta device:
    nothing is computed, and no tensor is copied. MACs are those of convolutions and matrix products
    with a weight; the products between activations (attention) are not counted, nor those that
    compute a weight (parametrizations). Tied parameters count once; of a parametrized weight the
    tensors that it is computed from count as parameters.

    Raises: ModelError where the model has no size of its own and none is given, where layers have
        no sizes yet, and where the model does not run on the meta device with this size.
    """
    model = unwrapped(model)
    refuse_unsized(model)
    if input_size is None:
        input_size = (getattr(model, "pretrained_cfg", None) or {}).get("input_size")
        if input_size is None:
            raise ModelError(
                "profile() of a model without pretrained_cfg: give input_size, such as (3, 224, "
                "224)"
            )
    shadow = copy_of(model, _without_memory).eval()
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            shadow(torch.empty(1, *input_size, device="meta", dtype=_dtype(model)))
    except Exception as error:  # of whatever class the model's code raises
        raise ModelError(
            f"profile() cannot run {type(model).__name__} on torch's meta device with an image of "
            f"{list(input_size)}: "
            f"{first_line(error)}"
        ) from error
    flops = counter.get_flop_counts()
    root = type(shadow).__name__
    modules = dict(shadow.named_modules())
    computed = [name for name, part in modules.items() if isinstance(part, ParametrizationList)]

    def products(name: str) -> int:
        return sum(flops.get(name, {}).get(op, 0) for op in _PRODUCTS) // 2

    def macs(name: str) -> int:
        count = products(f"{root}.{name}" if name else "Global")
        for part in computed:
            if part.startswith(f"{name}." if name else ""):
                count -= products(f"{root}.{part}")
        return count

    layers = []
    for name, module in modules.items():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() >= 2:
            layers.append(_layer(name, module, weight, macs(name)))
    parameters = list(model.parameters())
    return Profile(
        weights=sum(p.numel() for p in parameters if p.dim() >= 2),
        params=sum(p.numel() for p in parameters),
        macs=macs(""),
        layers=tuple(layers),
    )


_PRODUCTS = (
    torch.ops.aten.convolution,
    torch.ops.aten.mm,
    torch.ops.aten.addmm,
    torch.ops.xzoo.conv2d,
    torch.ops.xzoo.linear,
)


def refuse_unsized(model: nn.Module) -> None:
    """Raise ModelError for a lazy layer that has not yet seen an input."""
    for name, layer in model.named_modules():
        if any(isinstance(p, UninitializedParameter) for p in layer._parameters.values()):
            raise ModelError(
                f"layer {name} is a {type(layer).__name__} without sizes yet: run a forward pass "
                "first"
            )


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside torch.compile's wrapper and those of data-parallel training."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def copy_of(model: nn.Module, tensor: Callable[[Tensor], Tensor]) -> nn.Module:
    """A deep copy that holds tensor(t) for each tensor t of the model's modules; ModelError if it
    cannot be made.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for held in chain.from_iterable(
            (module._parameters.values(), module._buffers.values(), vars(module).values())
        ):
            if isinstance(held, Tensor) and id(held) not in memo:
                memo[id(held)] = tensor(held)
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:  # of whatever class an attribute of the model raises
        raise ModelError(f"{type(model).__name__} cannot be copied: {first_line(error)}") from error


def _layer(name: str, module: nn.Module, weight: Tensor, macs: int) -> Layer:
    groups = getattr(module, "groups", 1)
    degree, share = getattr(module, "degree", None), getattr(module, "share", None)
    n_in = getattr(module, "in_channels", getattr(module, "in_features", weight.shape[1]))
    n_out = getattr(module, "out_channels", getattr(module, "out_features", weight.shape[0]))
    kernel = (weight.shape[2], weight.shape[3]) if weight.dim() == 4 else (1, 1)
    kind = type_before_parametrizations(module).__name__
    return Layer(name, kind, n_in, n_out, kernel, groups, degree, share, weight.numel(), macs)


def _without_memory(tensor: Tensor) -> Tensor:
    """Its size and type on the meta device. Without gradients: torch's counter hooks those that
    pass between modules, and a parameter given to a module (cait's class token) has none to hook.
    """
    empty = torch.empty_like(tensor, device="meta", requires_grad=False)
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
