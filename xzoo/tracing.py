"""Which module takes another one's result, found by torch.fx: one can then do the work of both."""

import inspect
import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

from timm.models._features_fx import get_notrace_modules
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .convert import read_by_methods
from .errors import first_line
from .layers import X_LAYERS
from .profile import copy_of

_logger = logging.getLogger(__name__)

LAYERS = (nn.Conv2d, nn.Linear, *X_LAYERS)
TENSORS = ("weight", "bias", "running_mean", "running_var")


def following(model: nn.Module, what: str, reads_matter: bool = False) -> Iterator[tuple[str, str]]:
    """Names of two modules, where only the second one gets the result of the first.

    Each is called once, has one name, and has parameters that only its own code reads. Modules
    between the two that do nothing are skipped.
    """
    tracer = _Tracer()
    # A copy, because code that stores what it computed would store fx's proxies (levit's biases);
    # tensors are shared.
    shadow = copy_of(model, lambda tensor: tensor)
    try:
        graph = tracer.trace(shadow, _defaults(shadow))
    except Exception as error:  # of whatever class the model's own code raises on a proxy
        _logger.warning(
            "nothing is %s: torch.fx cannot trace the model (%s)", what, first_line(error)
        )
        return
    modules = dict(model.named_modules(remove_duplicate=False))
    names = Counter(map(id, modules.values()))
    calls: Counter[int] = Counter()
    for node in graph.find_nodes(op="call_module"):
        calls[id(modules[str(node.target)])] += 1
    owners: Counter[int] = Counter()
    for part in model.modules():
        owners.update(map(id, part.parameters(recurse=False)))
    read = read_by_methods(model, TENSORS) if reads_matter else {}

    def alone(node: fx.Node) -> bool:
        part = modules[str(node.target)]
        if calls[id(part)] > 1 or names[id(part)] > 1 or str(node.target) in read:
            return False
        if reads_matter and not tracer.read.isdisjoint(map(id, _tensors_in(part))):
            return False
        return all(owners[id(p)] == 1 for p in part.parameters())

    def before(node: fx.Node) -> Any:
        if node.op == "call_module" and len(node.args) == 1 and not node.kwargs:
            return node.args[0]
        return None

    for node in graph.nodes:
        first = before(node)
        while isinstance(first, fx.Node) and first.op == "call_module" and len(first.users) == 1:
            part = modules[str(first.target)]
            if type(part) is not nn.Identity or not is_plain(part):
                if alone(first) and alone(node):
                    yield str(first.target), str(node.target)
                break
            first = before(first)


class _Tracer(fx.Tracer):
    """Goes into containers alone: layers, norms and what timm says cannot be traced are leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.read: set[int] = set()  # tensors that traced code asks a module for, by id

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        leaves = (*LAYERS, _BatchNorm, *get_notrace_modules())
        return isinstance(module, leaves) or super().is_leaf_module(module, name)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if isinstance(attr_val, Tensor):
            self.read.add(id(attr_val))
        return super().getattr(attr, attr_val, parameter_proxy_cache)


def _defaults(model: nn.Module) -> dict[str, Any] | None:
    """The arguments after the first of model(example): a proxy in their place would take the other
    branch.
    """
    plain = {}
    for parameter in list(inspect.signature(model.forward).parameters.values())[1:]:
        if type(parameter.default) in (type(None), bool, int, float, str):
            plain[parameter.name] = parameter.default
    return plain or None


def is_plain(part: nn.Module) -> bool:
    """Whether it computes what its class says, from tensors of its own: no hooks, no
    parametrization, no adapters.
    """
    if part._forward_hooks or part._forward_pre_hooks or (type(part) in LAYERS and part._modules):
        return False
    patched = any(vars(part).get(name) is not None for name in ("forward", *TENSORS))
    # not quantized, sharded, without sizes
    usual = set(map(type, _tensors_in(part))) <= {Tensor, nn.Parameter, type(None)}
    return usual and not patched and part._parameters.keys() <= {"weight", "bias"}


def _tensors_in(part: nn.Module) -> tuple[Tensor | None, ...]:
    return *part._parameters.values(), *part._buffers.values()
