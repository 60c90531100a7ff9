"""Whole models: an X-Net beside its dense twin, its masked form and its rival of group
convolutions.

Every form is given what the others are: for inference xzoo.deploy (norms folded, the faster memory
format), for a training step (forward, cross-entropy, backward, SGD with momentum) xzoo.fuse and the
faster memory format. The dense twin is also measured as torch alone trains it.
"""

import copy
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..convert import dense_form, to_dense
from ..deploy import deploy
from ..errors import XzooError
from ..layers import ExpanderConv2d, ExpanderLinear
from ..models import create_model
from ..norms import fuse
from ..ops import dense as definition
from ..ops import native
from ..ops.tune import alternate
from ..profile import profile
from .figures import Figure, fastest, format_seconds, ratios, with_progress


class Bars(NamedTuple):
    """Times faster than the dense twin that a model has to be, with vectors of 16 floats; NARROW of
    it with 8."""

    inference: float
    training: float
    training_in_torch: float | None = None  # than the dense twin as torch alone trains it


BARS: dict[str, Bars | None] = {
    "x_vgg16": Bars(2.3, 1.9),
    "x_vgg16_2": None,
    "x_vgg16_c8": Bars(4.0, 3.0, 4.5),
    "x_vgg16_c16": Bars(6.0, 4.0, 6.0),
    "x_resnet18 compression=8": Bars(2.8, 2.0),
    "x_resnet50_c4": Bars(1.7, 1.35, 1.8),
    "x_resnet50": Bars(1.2, 1.05),
    "x_mobilenet050_c8": Bars(1.2, 1.1, 1.4),
    "x_densenetbc_40_48": Bars(1.2, 1.1),
}
NARROW = 0.8
IN_TORCH = "dense in torch"
MEMORY = ("x_vgg16", 15)  # times less than its dense twin: parameters, gradients, momentum
# two of inference and one of training, by the images
BATCHES = {"small": (1, 64, 128), "large": (1, 16, 16)}
SMALL = 64  # pixels up to which images are small
SGD: dict[str, Any] = {"lr": 1e-4, "momentum": 0.9}  # too slow a rate to move a time
SETUP = 100e9  # multiply-accumulates that would take as long as building the forms does
CHOOSE = 1  # rounds to find the faster memory format; the difference is large or does not matter


class ModelCase(NamedTuple):
    model: str
    batch: int
    training: bool

    def __str__(self) -> str:
        return (
            f"{self.model}, {'training step' if self.training else 'inference'}, batch {self.batch}"
        )


def models(
    selected: Sequence[str] = (),
    pairs: int = 5,
    batch_size: int | None = None,
    compiled: bool = False,
) -> Iterator[Figure]:
    """Measure models against their dense twins and rivals, in inference and in a training step, and
    their memory.

    Args:
        selected: names, such as "x_resnet50", with options of the model if need be: "x_resnet18
            compression=8"; empty for the default set.
        pairs: how often each form is measured.
        batch_size: of everything; None for 1 and 64 in inference and 128 in training, at 224 pixels
            1, 16 and 16.
        compiled: give the dense twins torch.compile as well, and take it where it is faster.
    Raises: XzooError for values that measure nothing; ModelError for unknown models and options.
    """
    for name, value in (("pairs", pairs), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise XzooError(f"{name}={value}: 1 or more are needed")
    names = list(selected or BARS)
    for name in names:
        _macs(name)
    return _models(names, pairs, batch_size, compiled)


def _models(
    names: Sequence[str], pairs: int, batch_size: int | None, compiled: bool
) -> Iterator[Figure]:
    for name in names:
        batch = batch_size or BATCHES[_kind(name)][2]
        for what, against in _memories(name, batch).items():
            bar = MEMORY[1] if name == MEMORY[0] and what == STATE else None
            mine, theirs = against
            held = f"{mine / 1e6:.1f} MB"
            yield Figure(
                f"{name}, {what}", "dense", "x", (theirs / mine,), bar, part="memory", ours=held
            )
    cases = []
    for name in names:
        one, many, training = (batch_size,) * 3 if batch_size else BATCHES[_kind(name)]
        cases += [ModelCase(name, batch, False) for batch in dict.fromkeys((one, many))] + [
            ModelCase(name, training, True)
        ]
    for case in with_progress(cases, str, lambda case: _work(case, pairs)):
        yield from _measure(case, pairs, compiled)


def _measure(case: ModelCase, pairs: int, compiled: bool) -> Iterator[Figure]:
    ours, dense = _macs(case.model)
    with _choosing_quietly():
        forms, masks = _forms(case.model)
        images, labels = _batch(forms["ours"], case.batch)
        if case.training:
            _mask(forms["masked"], masks)
            calls, note = _training_steps(forms, images, labels, compiled)
        else:
            calls, note = _inferences(forms, masks, images, compiled)
        del forms, masks
    with torch.set_grad_enabled(case.training):
        times = alternate(calls, pairs)
    spent = times.pop("ours")
    bars = _bars(case)
    for against, theirs in times.items():
        yield Figure(
            str(case),
            against,
            "x",
            ratios(theirs.seconds, spent.seconds),
            bars.get(against),
            part="model",
            ideal=dense / ours if against in ("dense", IN_TORCH) else None,
            ours=format_seconds(median(spent.seconds)),
            faults=spent.faults,
            note=note,
        )


def _bars(case: ModelCase) -> dict[str, float]:
    """What has to be reached, by the form that ours is measured against; none at other batches."""
    bars, batches = BARS.get(case.model), BATCHES[_kind(case.model)]
    part = {16: 1.0, 8: NARROW}.get(native.lanes()) if native.available() else None
    asked = batches[2:] if case.training else batches[:2]
    if bars is None or part is None or case.batch not in asked:
        return {}
    if not case.training:
        return {"dense": bars.inference * part}
    found = {"dense": bars.training * part}
    if bars.training_in_torch is not None:
        found[IN_TORCH] = bars.training_in_torch * part
    return found


# ---- the forms


def _forms(name: str) -> tuple[dict[str, nn.Module], dict[str, Tensor]]:
    """The models that are compared, and by name of the layer the masks that "masked" has to be
    given yet.
    """
    ours = _create(name)
    masked = to_dense(copy.deepcopy(ours))
    masks = {}
    for key, layer in ours.named_modules():
        if isinstance(layer, ExpanderConv2d | ExpanderLinear):
            ones = torch.ones_like(layer.weight)
            masks[key] = definition.scatter(ones, layer.neighbours, layer._n_in).detach()
    forms = {
        "ours": ours,
        "dense": _create(name, compression=1),
        "masked": masked,
        "group": _with_torchs_groups(_create(name, graph="group")),
    }
    return forms, masks


def _with_torchs_groups(model: nn.Module) -> nn.Module:
    """A model of group graphs with torch's own group convolutions, in place; its linear layers
    stay, torch has none.
    """
    for name, layer in list(model.named_modules()):
        if isinstance(layer, ExpanderConv2d):
            model.set_submodule(name, dense_form(layer, layer.in_channels // layer.degree))
    return model


class _Masked(nn.Module):
    """The authors' form: a dense weight that is multiplied by a mask of zeros and ones in every
    forward pass.
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


def _mask(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    for name, mask in masks.items():
        parametrize.register_parametrization(model.get_submodule(name), "weight", _Masked(mask))


def _inferences(
    forms: Mapping[str, nn.Module], masks: Mapping[str, Tensor], images: Tensor, compiled: bool
) -> tuple[dict[str, Callable[[], Any]], str]:
    calls: dict[str, Callable[[], Any]] = {}
    formats = {}
    for name, model in forms.items():
        fast = deploy(model, images)
        if name == "masked":  # only now: a norm does not fold into a weight that is computed
            _mask(fast, masks)
        last = any(p.dim() == 4 and not p.is_contiguous() for p in fast.parameters())
        formats[name] = "channels_last" if last else "contiguous"
        calls[name] = partial(fast, images)
        if name == "dense" and compiled:
            squeezed = torch.compile(fast)
            both: dict[str, Callable[[], Any]] = {
                "eager": calls[name],
                "compiled": partial(squeezed, images),
            }
            with torch.no_grad():
                best = fastest(alternate(both, CHOOSE))
            calls[name], formats[name] = both[best], f"{formats[name]} {best}"
    return calls, f"{formats['ours']}, dense {formats['dense']}"


def _training_steps(
    forms: Mapping[str, nn.Module], images: Tensor, labels: Tensor, compiled: bool
) -> tuple[dict[str, Callable[[], Any]], str]:
    """A step of each form with fused norms, and of the dense twin without."""
    calls, formats = {}, {}
    for name, model in forms.items():
        steps = _by_format(fuse(copy.deepcopy(model)), images, labels)
        if name == "dense":
            plain = _by_format(model, images, labels)
            if compiled:
                plain |= _by_format(model, images, labels, compiled)
            formats[IN_TORCH] = fastest(alternate(plain, CHOOSE))
            calls[IN_TORCH] = plain[formats[IN_TORCH]]
            steps = {f"{key} fused": step for key, step in steps.items()}
            steps[formats[IN_TORCH]] = calls[IN_TORCH]
        formats[name] = fastest(alternate(steps, CHOOSE))
        calls[name] = steps[formats[name]]
    twins = f"dense {formats['dense']}, in torch {formats[IN_TORCH]}"
    return calls, f"{formats['ours']}, {twins}"


def _by_format(
    model: nn.Module, images: Tensor, labels: Tensor, compiled: bool = False
) -> dict[str, Callable[[], None]]:
    """A training step of a copy of the model in each memory format."""
    steps = {}
    for form in (torch.contiguous_format, torch.channels_last):
        key = str(form).rpartition(".")[2].removesuffix("_format")
        own = copy.deepcopy(model).train().to(memory_format=form)
        called: Callable[..., Any] = own
        if compiled:
            key, called = f"{key} compiled", torch.compile(own)
        steps[key] = _step(own, called, images.to(memory_format=form), labels)
    return steps


def _step(
    model: nn.Module, called: Callable[..., Any], images: Tensor, labels: Tensor
) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), **SGD)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(called(images), labels).backward()
        optimizer.step()

    return step


# ---- memory

STATE = "parameters + gradients + momentum"


class Memory(NamedTuple):
    """Bytes that a model holds in training; `graph` is the neighbours of its X-layers."""

    parameters: int
    gradients: int
    optimizer: int
    graph: int
    activations: int

    @property
    def state(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.graph


def memory(model: nn.Module, images: Tensor, labels: Tensor) -> Memory:
    """What is held between the forward and the backward pass of a step of SGD with momentum, after
    the first step.

    The model is trained by two steps; on the meta device nothing is computed. An activation is what
    autograd keeps, each storage once, parameters and buffers apart.
    """
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        # held, so that no other storage gets its address
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    F.cross_entropy(model(images), labels).backward()
    optimizer.step()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = F.cross_entropy(model(images), labels)
    parameters = list(model.parameters())
    states = [
        t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)
    ]
    activations = sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in own)
    del loss
    return Memory(
        _bytes(parameters),
        _bytes([p.grad for p in parameters if p.grad is not None]),
        _bytes(states),
        _bytes([t for name, t in model.named_buffers() if name.rpartition(".")[2] == "neighbours"]),
        activations,
    )


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _memories(name: str, batch: int) -> dict[str, tuple[int, int]]:
    """Bytes of ours and of the dense twin's, in training."""
    found = []
    for arguments in ({}, {"compression": 1}):
        model = _create(name, device="meta", **arguments).train()
        images, labels = _batch(model, batch)
        found.append(memory(model, images.to("meta"), labels.to("meta")))
    mine, theirs = found
    return {
        STATE: (mine.state, theirs.state),
        f"all memory in training, batch {batch}": (
            mine.state + mine.activations,
            theirs.state + theirs.activations,
        ),
    }


# ---- small matters


def _create(name: str, **arguments: Any) -> nn.Module:
    architecture, *options = name.split()
    for option in options:
        if not (found := re.fullmatch(r"(compression|share|spatial_share|seed)=(\d+)", option)):
            raise XzooError(
                f"option {option!r} of {architecture}: give compression, share, spatial_share or "
                "seed=NUMBER"
            )
        arguments = {found[1]: int(found[2])} | arguments
    return create_model(architecture, **arguments)


@cache
def _macs(name: str) -> tuple[int, int]:
    """Multiply-accumulates of ours and of the dense twin's for one image."""
    ours, dense = (
        profile(_create(name, device="meta", **kwargs)).macs for kwargs in ({}, {"compression": 1})
    )
    return ours, dense


@cache
def _kind(name: str) -> str:
    model: Any = _create(name, device="meta")
    return "small" if model.pretrained_cfg["input_size"][-1] <= SMALL else "large"


def _work(case: ModelCase, pairs: int) -> float:
    """Forms and rounds, in multiply-accumulates of the dense twin's; a training step is three
    forward passes.
    """
    rounds = 5 * (pairs + 2) + (13 * (2 + CHOOSE) if case.training else 4 * 13)
    return SETUP + rounds * _macs(case.model)[1] * case.batch * (3 if case.training else 1) * 0.8


def _batch(model: Any, size: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    images = torch.randn(size, *model.pretrained_cfg["input_size"], generator=random)
    return images, torch.randint(model.num_classes, (size,), generator=random)


@contextmanager
def _choosing_quietly() -> Iterator[None]:
    """Without the degrees that a rival of groups takes instead of its own."""
    logger = logging.getLogger("xzoo.models")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
