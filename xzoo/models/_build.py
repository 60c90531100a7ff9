"""From a dense network of timm's form to an X-Net: what all families share."""

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs
from torch import nn

from ..convert import check_compression, compressed, degree_for, fits, is_integer, swap
from ..datasets import DATASETS
from ..errors import ModelError
from ..layers import ExpanderConv2d, ExpanderLinear
from ..weights import find, timm_rows

_logger = logging.getLogger(__name__)


def build(
    dense: Callable[..., nn.Module],
    variant: str,
    pretrained: bool,
    *,
    expanded: tuple[str, ...],
    dense_too: tuple[str, ...] = (),
    compression: int | Mapping[str, int],
    share: int = 4,
    spatial_share: int = 1,
    graph: str = "biregular",
    seed: int = 0,
    **kwargs: Any,
) -> nn.Module:
    """Build `variant` through timm's builder, its layers swapped while it is constructed.

    That is before weights are loaded and before a feature wrapper gives the layers other names.

    Args:
        dense: makes the dense network from timm's arguments (num_classes, in_chans, device, ...).
        expanded, dense_too: name patterns of the layers that become X-layers, and of exceptions.
        compression: inputs // degree in all of them, 1 for the dense twin; or a table that gives
            the layers that a pattern fits their degree.
        share, spatial_share, graph, seed: as in xzoo.expand.

    Raises: ModelError, GraphError as xzoo.expand.
    """
    if not isinstance(compression, Mapping):
        check_compression(compression)

    def construct(**arguments: Any) -> nn.Module:
        model: Any = dense(**arguments)
        candidates = {}
        for name, layer in model.named_modules():
            chosen = fits(name, expanded) and not fits(name, dense_too)
            if chosen and type(layer) in (nn.Conv2d, nn.Linear):
                candidates[name] = layer.weight.shape[1]
        if isinstance(compression, Mapping):
            _check_table(compression, candidates)
        degrees: dict[str, int] = {}
        smaller: list[str] = []
        for name, n_in in candidates.items():
            asked = _degree(name, n_in, compression)
            degree = degree_for(graph, n_in, asked)
            if degree != asked:
                smaller.append(f"{name}: {degree} instead of {asked} of {n_in} inputs")
            if degree < n_in:
                degrees[name] = degree
        if smaller:
            _logger.warning(
                "%s: graph=%r needs degrees that divide the inputs, so %d of %d layers take the "
                "next smaller one; %s",
                variant,
                graph,
                len(smaller),
                len(candidates),
                smaller[0],
            )
        new = swap(model, degrees, share, spatial_share, graph, seed, keep_weights=False)
        for x_layer in new.values():
            initialise(x_layer)
        # What timm needs to build it again from a folder; create_model adds its caller's arguments.
        model._model_args = {
            "compression": dict(compression) if isinstance(compression, Mapping) else compression,
            "share": share,
            "spatial_share": spatial_share,
            "graph": graph,
            "seed": seed,
        }
        return model

    if pretrained and (tag := _first_tag(variant, kwargs)):
        kwargs["pretrained_cfg"] = tag
    return build_model_with_cfg(construct, variant, pretrained, **kwargs)


def _first_tag(variant: str, given: Mapping[str, Any]) -> str | None:
    """The tag whose weights a bare name means when weights are asked for, through timm's door as
    through xzoo's.

    None where the caller says which, or there are none.
    """
    overlay = given.get("pretrained_cfg_overlay") or {}
    if given.get("pretrained_cfg") or overlay.keys() & {"file", "url", "hf_hub_id", "state_dict"}:
        return None
    entry = find(variant)
    return entry.tag if entry else None


def initialise(layer: ExpanderConv2d | ExpanderLinear) -> None:
    """Weights from N(0, 2 / fan-in), fan-in = degree * kh * kw (He et al. 2015, eq. 10); bias 0.

    The families' own rules come too early, and would read the compact shape wrongly: fan-out modes
    ignore the sparsity, and the variance of the outputs falls with the compression.
    """
    nn.init.normal_(layer.weight, std=math.sqrt(2 / layer.weight[0].numel()))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def cfg(**kwargs: Any) -> dict[str, Any]:
    """A row of default_cfgs: timm's usual preprocessing for 224 px, with what differs."""
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "license": "apache-2.0",
    } | kwargs


def cfg_cifar(**kwargs: Any) -> dict[str, Any]:
    """A row of default_cfgs for 32 px, with the mean and standard deviation of CIFAR-10."""
    facts = DATASETS["cifar10"]
    small = {
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "crop_pct": 1.0,
        "mean": facts.mean,
        "std": facts.std,
    }
    return cfg() | small | kwargs


def rows(untrained: Mapping[str, Any]) -> Any:
    """timm's default_cfgs of a family: what weights.json has of its architectures, and these rows.

    An architecture's first tag is its default, unless it has other classes: a name means the same
    network with and without weights.

    Args:
        untrained: architecture -> its row without weights.
    """
    table: dict[str, Any] = {}
    first: dict[str, Any] = {}
    for name, row in timm_rows().items():
        architecture = name.partition(".")[0]
        if architecture in untrained:
            table[name] = row
            first.setdefault(architecture, row)
    for architecture, row in untrained.items():
        other = first.get(architecture, row)["num_classes"] != row["num_classes"]
        table[f"{architecture}.untrained{'*' * other}"] = row  # timm's sign for a default
    return generate_default_cfgs(table)


def _check_table(table: Mapping[str, int], layers: Mapping[str, int]) -> None:
    """Raise ModelError unless every row gives a degree to a layer that the architecture expands."""
    for pattern, degree in table.items():
        if not is_integer(degree, 1):
            raise ModelError(
                f"compression={{{pattern!r}: {degree!r}}}: a table gives degrees, integers from 1 "
                "on"
            )
        if not any(fits(name, (pattern,)) for name in layers):
            raise ModelError(
                f"compression={{{pattern!r}: ...}}: fits no layer that is expanded; they are "
                f"{', '.join(layers)}"
            )


def _degree(name: str, n_in: int, compression: int | Mapping[str, int]) -> int:
    if not isinstance(compression, Mapping):
        return compressed(n_in, compression)
    for pattern, degree in compression.items():
        if fits(name, (pattern,)):
            return min(degree, n_in)
    return n_in
