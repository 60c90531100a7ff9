"""A copy of a model for inference: layers take over what follows them, in the faster memory format.

    fast = xzoo.deploy(model, torch.zeros(1, 3, 224, 224))

A norm whose statistics stand still is one multiplication and one addition for each channel, which
the weights and the bias of the layer before it can take on. A relu after an X-layer is done when
its result is stored. torch.fx finds the pairs; the modules stay where they are, so that what else a
model can do (features, another head) works as before. Then the clock decides: the memory format of
the model, and for each X-layer whether it or its dense form computes; a graph of groups has a
grouped convolution of torch's for that.

Only classes whose arithmetic is known are touched, and only where nothing else reads their tensors.
What a trace cannot tell (a method that reads a weight, a list that holds a layer a second time) the
outputs do: after each step they are compared with the model's own, and a change that shows beyond
rounding is taken back.

Not here: another number format, pruning, compilers (torch.compile takes a deployed model as any
other).
"""

import contextlib
import copy
import dataclasses
import functools
import itertools
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .convert import computed_tensors, dense_form, read_by_methods
from .errors import ModelError
from .layers import X_LAYERS, ExpanderConv2d, ExpanderLinear, modules_of
from .norms import unfuse
from .ops import group
from .profile import copy_of, refuse_unsized, unwrapped
from .tracing import TENSORS, following, is_plain

_logger = logging.getLogger(__name__)

# By exact type: a subclass may compute something else (StdConv2d, a norm that clamps). Beside each
# kind of layer the norms that scale its channels, and the dimensions of what passes between them. A
# norm of [B, T, C] scales T.
_CONV_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, BatchNormAct2d)
_LINEAR_NORMS = (nn.BatchNorm1d, nn.SyncBatchNorm)
FOLDS_INTO: dict[type, tuple[tuple[type, ...], int]] = {
    nn.Conv2d: (_CONV_NORMS, 4),
    ExpanderConv2d: (_CONV_NORMS, 4),
    nn.Linear: (_LINEAR_NORMS, 2),
    ExpanderLinear: (_LINEAR_NORMS, 2),
}
ACTIVATIONS: dict[type, str] = {nn.ReLU: "relu", nn.ReLU6: "relu6"}
# in each form that is measured; the fastest counts, because other work on a machine only adds
RUNS = 7
CLEARLY = 1.1  # times as fast: the clock is not that exact, and a dense layer needs more memory
SLIGHTLY = 1.02  # of a grouped convolution, which needs no more
# of the largest output, in float64: far below the rounding of float32, far above that of float64
EXACT = 1e-5

Undo = Callable[[], None]
Change = Callable[[nn.Module], Undo]  # done to a model in place


def deploy(model: nn.Module, example: Tensor) -> nn.Module:
    """A copy of the model for inference on inputs like the example, whose outputs differ by
    rounding alone.

    The copy is compared with the model on the example and on noise of its size, also in float64
    where the model runs in it. A change that makes a difference is undone and logged as a
    warning; a model whose outputs cannot be compared, because they hold no tensors or differ from
    call to call, stays as it is.

    Args:
        model: called as model(example). Of a compiled or data-parallel model the module within is
            taken.
        example: float [B, C, H, W] on the model's device; its content does not matter, its size and
            batch do: what is measured to be faster is so for them.
    Returns: the copy, in eval mode and without gradients. What was done is logged ("xzoo.deploy",
    INFO). Raises: ModelError if the model does not run on the example, has layers without sizes, or
    cannot be copied.
    """
    model = unwrapped(model)
    refuse_unsized(model)
    fast = unfuse(copy_of(model, _own)).eval().requires_grad_(False)
    proof = Proof(fast, example)
    if not proof.trials:
        _logger.warning(
            "nothing is changed: the model's outputs hold no tensors, or differ from call to call"
        )
        return fast
    for name, remedy in computed_tensors(model).items():
        _logger.warning("layer %s stays as it is: %s", name, remedy)
    norms = len(modules_of(model, _BatchNorm))
    folded = _fold_norms(proof)
    with _same_random_numbers(example):
        fused, (said, form) = _fuse_activations(proof), _choose_format(proof, example)
        _logger.info("%d of %d norms folded, %d activations fused; %s", folded, norms, fused, said)
        _logger.info(
            "%d of %d X-layers are faster dense or grouped by torch",
            *_choose_layers(proof, example, form),
        )
    return fast


class Proof:
    """The outputs of a model before any change; `holds` says whether it still computes them.

    `models` are the model and, where it runs in float64, a copy of it: both are changed alike. In
    float64 a mistake shows beside no rounding; in the model's own type also those of kernels do.
    """

    def __init__(self, model: nn.Module, example: Tensor):
        self.models = [model]
        self.trials: list[tuple[nn.Module, Tensor, list[Tensor], list[float]]] = []
        self.dims = _dims(model, example)
        noise = _noise(model, example)
        for x in [example] if noise is example else [example, noise]:
            outputs = _outputs(model, x)
            self.trials.append((model, x, outputs, list(map(_rounding, outputs))))
        self._add_float64(noise)
        # A model with a memory or dice of its own, or without a tensor in its result, proves
        # nothing.
        if not any(outputs for _, _, outputs, _ in self.trials) or not self.holds():
            self.trials = []

    def _add_float64(self, x: Tensor) -> None:
        model, _, outputs, allowed = self.trials[-1]
        exact_x = x.double() if x.is_floating_point() else x
        try:
            exact = copy_of(model, _own).double()
            expected = _outputs(exact, exact_x)
        except Exception:
            # of whatever class: a fixed type in the model's code, a device without float64
            return
        if x.dtype == torch.float64 or _shapes(outputs) != _shapes(expected):
            return
        for i, (y, z) in enumerate(zip(outputs, expected, strict=True)):
            allowed[i] = max(allowed[i], 4 * _apart(y, z))
        self.models.append(exact)
        self.trials.append((exact, exact_x, expected, [EXACT * _largest(y) for y in expected]))

    def holds(self) -> bool:
        return all(itertools.starmap(self._same, self.trials))

    def _same(
        self, model: nn.Module, x: Tensor, expected: list[Tensor], allowed: list[float]
    ) -> bool:
        try:
            outputs = _outputs(model, x)
        except Exception:  # of whatever class: a change took away what the model's code reads
            return False
        if _shapes(outputs) != _shapes(expected):
            return False
        for y, z, atol in zip(outputs, expected, allowed, strict=True):
            if y.dtype != z.dtype:
                return False
            if y.dtype.is_floating_point or y.is_complex():
                if not torch.isclose(y, z, rtol=0, atol=atol, equal_nan=True).all():
                    return False
            elif model is not self.models[0] and not torch.equal(y, z):
                # else a rank may change by rounding
                return False
        return True


def _change(proof: Proof, changes: Mapping[str, Change], done: str) -> list[str]:
    """Make these changes, except those that show in an output. Returns the names of those made."""
    undo: list[Undo] = []
    for change in changes.values():
        undo += map(change, proof.models)
    if not changes or (proof.trials and proof.holds()):
        return list(changes)
    for step in reversed(undo):
        step()
    if len(changes) == 1:
        _logger.warning("%s is not %s: the model's outputs would change", *changes, done)
        return []
    made = []
    for name, change in changes.items():
        made += _change(proof, {name: change}, done)
    return made


def _fold_norms(proof: Proof) -> int:
    """Fold every batch norm of a model in eval mode that directly follows its layer, in place;
    returns how many.

    A norm stays where it follows something else (a sum, an activation: DenseNet's first norm in
    each layer), or a layer that is called, read or trained in more than one place. A model that
    torch.fx cannot trace stays as it is.
    """
    model = proof.models[0]
    changes: dict[str, Change] = {}
    for layer, norm in following(model, "folded", reads_matter=True):
        dims = proof.dims.get(norm, 0)
        if _folds(model.get_submodule(layer), model.get_submodule(norm), dims):
            changes[norm] = functools.partial(_fold, layer, norm)
    return len(_change(proof, changes, "folded into the layer before it"))


def _fuse_activations(proof: Proof) -> int:
    """Let every X-layer do the relu or relu6 module that directly follows it, in place; returns how
    many do.
    """
    model = proof.models[0]
    changes: dict[str, Change] = {}
    for layer, act in following(model, "fused"):
        parts = model.get_submodule(layer), model.get_submodule(act)
        if (
            type(parts[0]) in X_LAYERS
            and type(parts[1]) in ACTIVATIONS
            and all(map(is_plain, parts))
        ):
            changes[act] = functools.partial(_fuse, layer, act)
    return len(_change(proof, changes, "done by the layer before it"))


def _folds(layer: nn.Module, norm: nn.Module, dims: int) -> bool:
    norms, its_dims = FOLDS_INTO.get(type(layer), ((), 0))
    if type(norm) not in norms or dims != its_dims or not (is_plain(layer) and is_plain(norm)):
        return False
    # Without statistics of its own, or in training mode, it takes each batch's.
    mean: Any = norm.running_mean
    known = mean is not None and norm.running_var is not None and not norm.training
    weight: Any = layer.weight
    return (
        known
        and len(mean) == len(weight)
        and weight.is_floating_point()
        and not getattr(layer, "activation", "")
    )


@torch.no_grad()
def _fold(layer_name: str, norm_name: str, model: nn.Module) -> Undo:
    """weight * s and (bias - mean) * s + beta, s = gamma / sqrt(var + eps); in float64, so that it
    is rounded once.
    """
    layer: Any = model.get_submodule(layer_name)
    norm: Any = model.get_submodule(norm_name)
    before = layer.weight, layer.bias
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
    rest = nn.Sequential(norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else nn.Identity()
    model.set_submodule(norm_name, rest.eval())

    def undo() -> None:
        layer.weight, layer.bias = before
        model.set_submodule(norm_name, norm)

    return undo


def _fuse(layer_name: str, act_name: str, model: nn.Module) -> Undo:
    layer: Any = model.get_submodule(layer_name)
    act = model.get_submodule(act_name)
    layer.activation = ACTIVATIONS[type(act)]
    model.set_submodule(act_name, nn.Identity())

    def undo() -> None:
        layer.activation = ""
        model.set_submodule(act_name, act)

    return undo


def _own(tensor: Tensor) -> Tensor:
    """A copy; of a weight that a hook computed from others, its value now (copy.deepcopy refuses
    those).
    """
    return copy.deepcopy(tensor) if tensor.is_leaf else tensor.detach().clone()


def _noise(model: nn.Module, example: Tensor) -> Tensor:
    """Noise like the example, which may be all zero and hide every mistake; the example where noise
    is not an input.
    """
    if not example.is_floating_point():
        return example
    draw = torch.randn(example.shape, generator=torch.Generator().manual_seed(0))
    noise = draw.to(example)
    try:
        outputs = _outputs(model, noise)
    except Exception:  # of whatever class the model's own checks raise
        return example
    return noise if all(y.isfinite().all() for y in outputs) else example


def _dims(model: nn.Module, example: Tensor) -> dict[str, int]:
    """The dimensions of what each batch norm gets, 0 where they differ from call to call; the first
    run of all.
    """
    dims: dict[str, int] = {}

    def note(name: str, part: nn.Module, args: tuple[Any, ...]) -> None:
        now = args[0].dim() if args else 0
        dims[name] = now if dims.get(name, now) == now else 0

    with contextlib.ExitStack() as hooks:
        for name, part in modules_of(model, _BatchNorm).items():
            hooks.enter_context(part.register_forward_pre_hook(functools.partial(note, name)))
        try:
            _outputs(model, example)
        except Exception as error:
            raise ModelError(
                f"the model does not run on an example of {list(example.shape)}: {error}"
            ) from error
    return dims


def _outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Copies of all tensors in what the model gives for x, with the same random numbers at each
    call.
    """
    with torch.no_grad(), _same_random_numbers(x):
        return [y.detach().clone() for y in _tensors(model(x.clone()))]


@contextlib.contextmanager
def _same_random_numbers(x: Tensor) -> Iterator[None]:
    """The caller's generators, here and on x's device, are afterwards where they were."""
    with torch.random.fork_rng([x.device] if x.is_cuda else []):
        torch.default_generator.manual_seed(0)
        if x.is_cuda:
            torch.cuda.manual_seed(0)
        yield


def _shapes(outputs: list[Tensor]) -> list[torch.Size]:
    return [y.shape for y in outputs]


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output if output.layout == torch.strided else output.to_dense()
        return
    if isinstance(output, Mapping):
        output = list(output.values())
    elif dataclasses.is_dataclass(output):
        output = [getattr(output, field.name) for field in dataclasses.fields(output)]
    if isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)


def _rounding(y: Tensor) -> float:
    """Half of the digits of its type, of the largest output: what the rounding of a deep network
    stays below.
    """
    if not (y.is_floating_point() or y.is_complex()):
        return 0.0
    return math.sqrt(torch.finfo(y.dtype).eps) * _largest(y)


def _largest(y: Tensor) -> float:
    finite = y[y.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _apart(y: Tensor, exact: Tensor) -> float:
    return _largest(y.to(exact.dtype) - exact) if y.is_floating_point() else 0.0


def _choose_format(proof: Proof, example: Tensor) -> tuple[str, torch.memory_format]:
    """Put the model into the memory format in which it is faster; by how much in words, and the
    format.
    """
    formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    if example.dim() != 4:
        return "contiguous", torch.contiguous_format
    model = proof.models[0]
    models = {name: _in_format(copy.deepcopy(model), form) for name, form in formats.items()}
    spent = dict.fromkeys(formats, math.inf)
    with torch.inference_mode():
        for _ in range(RUNS):
            for name, candidate in models.items():
                spent[name] = min(spent[name], _seconds(candidate, example))
    best = min(spent, key=spent.__getitem__)
    del models
    form = formats[best]
    if not _change(proof, {f"the format {best}": functools.partial(_format, form)}, "taken"):
        return "in the memory format that it had", torch.contiguous_format
    ratio = max(spent.values()) / spent[best]
    return f"{best}, {ratio:.2f} times as fast as the other", form


def _format(form: torch.memory_format, model: nn.Module) -> Undo:
    before = [(tensor, tensor.data) for tensor in (*model.parameters(), *model.buffers())]
    _in_format(model, form)

    def undo() -> None:
        for tensor, data in before:
            tensor.data = data

    return undo


def _in_format(model: nn.Module, form: torch.memory_format) -> nn.Module:
    """The dense layers' weights, and so the activations, in this format. A kernel reads an
    X-layer's as one row.
    """
    model.to(memory_format=form)
    for part in model.modules():
        if isinstance(part, ExpanderConv2d):
            for parameter in part.parameters():
                parameter.data = parameter.data.contiguous()
    return model


def _choose_layers(proof: Proof, example: Tensor, form: torch.memory_format) -> tuple[int, int]:
    """Put the dense layer in the place of each X-layer that it clearly beats there; how many, of
    how many.
    """
    model = proof.models[0]
    uses = Counter(dict(model.named_modules(remove_duplicate=False)).values())
    read = read_by_methods(model, TENSORS)
    ours = modules_of(model, X_LAYERS)
    names = []
    for name, part in ours.items():
        if type(part) in X_LAYERS and is_plain(part) and uses[part] == 1 and name not in read:
            names.append(name)
    if not names:
        return 0, len(ours)
    dense = copy.deepcopy(model)
    for name in names:
        _dense(form, name, dense)
    # Within runs of whole models: a layer that is called again and again finds its weights in the
    # cache.
    least = dict.fromkeys(names, math.inf)
    least_dense = least.copy()
    with torch.inference_mode():
        for _ in range(RUNS):
            for candidate, best in ((model, least), (dense, least_dense)):
                for name, seconds in _seconds_of(candidate, names, example).items():
                    best[name] = min(best[name], seconds)
    changes: dict[str, Change] = {}
    for name in names:
        faster = CLEARLY if _groups(ours[name]) == 1 else SLIGHTLY
        if least_dense[name] * faster < least[name]:
            changes[name] = functools.partial(_dense, form, name)
    return len(_change(proof, changes, "replaced by its dense form")), len(ours)


def _dense(form: torch.memory_format, name: str, model: nn.Module) -> Undo:
    layer: Any = model.get_submodule(name)
    model.set_submodule(name, _in_format(dense_form(layer, _groups(layer)), form))
    return functools.partial(model.set_submodule, name, layer)


def _groups(layer: ExpanderConv2d | ExpanderLinear) -> int:
    """How many groups the convolution of torch's has that a layer is; 1 where its graph is another
    one."""
    if not isinstance(layer, ExpanderConv2d) or layer.neighbours.is_meta:
        return 1
    found = group.parts(layer.neighbours, layer.in_channels)
    return 1 if found is None or found.order is not None else found.groups


def _seconds_of(model: nn.Module, names: list[str], example: Tensor) -> dict[str, float]:
    """Seconds that each of these modules takes in one run of the model, in its last call."""
    spent: dict[str, float] = {}

    def start(name: str, *_: Any) -> None:
        spent[name] = -_now(example)

    def stop(name: str, *_: Any) -> None:
        spent[name] += _now(example)

    with contextlib.ExitStack() as hooks:
        for name in names:
            part = model.get_submodule(name)
            hooks.enter_context(part.register_forward_pre_hook(functools.partial(start, name)))
            hooks.enter_context(part.register_forward_hook(functools.partial(stop, name)))
        model(example)
    return spent


def _seconds(model: nn.Module, example: Tensor) -> float:
    start = _now(example)
    model(example)
    return _now(example) - start


def _now(example: Tensor) -> float:
    if example.device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()
