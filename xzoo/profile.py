"""Counting the weights and multiply-accumulates that a model really has; and the name of what computes them."""

import copy
import platform
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .errors import ModelError
from .machine import cores as cores  # part of this module's names


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
    """Count weights, parameters and MACs of one image of `input_size` (C, H, W); the model is left as it is.

    Without input_size the size of the model's pretrained_cfg is taken. Runs on torch's meta device: nothing is
    computed. MACs are those of convolutions and matrix products with a weight; the products between
    activations (attention) are not counted. Tied parameters count once.

    Raises: ModelError where the model has no size of its own and none is given.
    """
    if input_size is None:
        input_size = (getattr(model, "pretrained_cfg", None) or {}).get("input_size")
        if input_size is None:
            raise ModelError("profile() of a model without pretrained_cfg: give input_size, such as (3, 224, 224)")
    shadow = copy.deepcopy(model).to("meta").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        shadow(torch.empty(1, *input_size, device="meta", dtype=_dtype(model)))
    flops = counter.get_flop_counts()
    root = type(shadow).__name__

    def macs(name: str) -> int:
        return sum(flops.get(name, {}).get(op, 0) for op in _PRODUCTS) // 2

    parameters = list(model.parameters())
    return Profile(
        weights=sum(p.numel() for p in parameters if p.dim() >= 2),
        params=sum(p.numel() for p in parameters),
        macs=macs("Global"),
        layers=tuple(
            _layer(name, module, macs(f"{root}.{name}"))
            for name, module in model.named_modules()
            if isinstance(getattr(module, "weight", None), torch.Tensor) and module.weight.dim() >= 2
        ),
    )


_PRODUCTS = (
    torch.ops.aten.convolution,
    torch.ops.aten.mm,
    torch.ops.aten.addmm,
    torch.ops.xzoo.conv2d,
    torch.ops.xzoo.linear,
)


def hardware(device: torch.device) -> str:
    """What computes: the GPU's name, or the CPU's with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"


def _layer(name: str, module: nn.Module, macs: int) -> Layer:
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    groups = getattr(module, "groups", 1)
    degree, share = getattr(module, "degree", None), getattr(module, "share", None)
    n_in = getattr(module, "in_channels", getattr(module, "in_features", weight.shape[1]))
    kernel = (weight.shape[2], weight.shape[3]) if weight.dim() == 4 else (1, 1)
    kind = type(module).__name__
    return Layer(name, kind, n_in, weight.shape[0], kernel, groups, degree, share, weight.numel(), macs)


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
