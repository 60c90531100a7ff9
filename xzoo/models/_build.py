"""From a dense network of timm's form to an X-Net: what all families share."""

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg
from torch import nn

from ..convert import check_compression, degree_for, fits, swap
from ..layers import ExpanderConv2d, ExpanderLinear

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
        compression: inputs // degree in all of them, 1 for the dense twin; or a table that gives the layers that
            a pattern fits their degree.
        share, spatial_share, graph, seed: as in xzoo.expand.

    Raises: ModelError, GraphError as xzoo.expand.
    """
    if not isinstance(compression, Mapping):
        check_compression(compression)

    def construct(**arguments: Any) -> nn.Module:
        model = dense(**arguments)
        degrees = {}
        for name, layer in model.named_modules():
            if type(layer) in (nn.Conv2d, nn.Linear) and fits(name, expanded) and not fits(name, dense_too):
                n_in = layer.weight.shape[1]
                degree = _degree(name, n_in, compression, graph)
                if degree < n_in:
                    degrees[name] = degree
        new = swap(model, degrees, share, spatial_share, graph, seed, keep_weights=False)
        for x_layer in new.values():
            initialise(x_layer)
        # What timm needs to build it again from a folder; create_model adds its caller's arguments.
        arguments_of_graph = {"share": share, "spatial_share": spatial_share, "graph": graph, "seed": seed}
        if not isinstance(compression, Mapping):
            arguments_of_graph["compression"] = compression
        model._model_args = arguments_of_graph
        return model

    return build_model_with_cfg(construct, variant, pretrained, **kwargs)


def initialise(layer: ExpanderConv2d | ExpanderLinear) -> None:
    """Weights from N(0, 2 / fan-in), fan-in = degree * kh * kw (He et al. 2015, eq. 10); bias 0.

    The families' own rules come too early, and would read the compact shape wrongly: fan-out modes ignore the
    sparsity, and the variance of the outputs falls with the compression.
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
    """A row of default_cfgs for 32 px, with the authors' mean and standard deviation of CIFAR-10."""
    mean, std = (tuple(v / 255 for v in values) for values in ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7)))
    small = {"num_classes": 10, "input_size": (3, 32, 32), "crop_pct": 1.0, "mean": mean, "std": std}
    return cfg() | small | kwargs


def _degree(name: str, n_in: int, compression: int | Mapping[str, int], graph: str) -> int:
    if not isinstance(compression, Mapping):
        degree = max(1, n_in // compression)
    else:
        degree = next((min(d, n_in) for pattern, d in compression.items() if fits(name, (pattern,))), n_in)
    allowed = degree_for(graph, n_in, degree)
    if allowed != degree:
        _logger.warning("%s: degree %d of %d inputs becomes %d, which graph=%r needs", name, degree, n_in, allowed, graph)
    return allowed

