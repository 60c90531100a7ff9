"""The zoo's architectures in timm's registry; importing this registers them.

A name fixes an architecture's compression and graph; every model also takes compression=, share=,
spatial_share=, graph= and seed=. compression=1 is the dense twin, graph="group" or "shuffle" a rival.
"""

import difflib
from typing import Any

import timm
from torch import nn

from ..errors import ModelError
from . import x_alexnet, x_densenet, x_mobilenet, x_resnet, x_timm, x_vgg

__all__ = ["create_model", "list_models"]

_FAMILIES = (x_vgg, x_alexnet, x_resnet, x_densenet, x_mobilenet)


def list_models(filter: str = "*", pretrained: bool = False) -> list[str]:
    """The names of the zoo that fit a pattern such as "x_res*", in natural order; with weights only, if asked."""
    names = timm.list_models(filter, pretrained=pretrained)
    return [name for name in names if name.startswith("x_")]


def create_model(name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """timm.create_model: a model of the zoo, or any other of timm's, by name.

    Args:
        name: "x_resnet50", with a tag of weights "x_vgg16_2.cifar10_q75", or "local-dir:FOLDER", "hf-hub:ORG/NAME".
        pretrained: load trained weights.
        **kwargs: num_classes, in_chans, features_only and whatever else the model takes; those of the zoo take
            compression, share, spatial_share, graph and seed.

    Raises: ModelError for a name that is unknown (with the nearest ones) or has no trained weights, and for
        arguments that the model does not take; GraphError where a layer admits no such graph.
    """
    architecture = name.split(".")[0]
    if ":" not in name:
        if not timm.is_model(architecture):
            near = difflib.get_close_matches(architecture, timm.list_models(), n=3)
            near = [n for n in near if n.startswith("x_")] or near
            hint = f"did you mean {', '.join(near)}?" if near else "xzoo.list_models() has the names"
            raise ModelError(f"unknown model {name!r}; {hint}")
        if pretrained and not timm.models.is_model_pretrained(name):
            raise ModelError(f"{name} has no trained weights yet; use pretrained=False")
    return timm.create_model(name, pretrained=pretrained, **kwargs)
