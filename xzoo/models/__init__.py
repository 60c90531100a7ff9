"""The zoo's architectures in timm's registry; importing this registers them.

A name fixes an architecture's compression and graph; every model also takes compression=, share=,
spatial_share=, graph= and seed=. compression=1 is the dense twin, graph="group" or "shuffle" a rival.
"""

import difflib
import re
import textwrap
from typing import Any

import timm
from torch import nn

from ..errors import ModelError
from . import x_alexnet, x_densenet, x_mobilenet, x_resnet, x_timm, x_vgg  # noqa: F401  # into the registry

__all__ = ["create_model", "list_models"]

_SOURCES = ("hf-hub", "local-dir")


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

    Raises: ModelError for a name or tag that is unknown (with the nearest ones) or has no trained weights, for
        arguments that the model does not take, and for a folder whose weights are not of the model that it
        names; GraphError where a layer admits no such graph.
    """
    _check_name(name)
    for argument, least in (("num_classes", 0), ("in_chans", 1)):
        value = kwargs.get(argument, least)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ModelError(f"{argument}={value!r}: use an integer from {least} on")
    given = {"pretrained_cfg", "pretrained_cfg_overlay"} & kwargs.keys()
    trained = name
    if name.partition(".")[0] == "x_timm":  # whose weights are those of the model that it expands
        trained = kwargs.get("base", x_timm.BASE)
        x_timm.check_base(trained)
        _check_name(trained)
    if pretrained and ":" not in name and not given and not timm.is_model_pretrained(trained):
        raise ModelError(f"{trained} has no trained weights yet; use pretrained=False")
    try:
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    except TypeError as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown and unknown[1] in kwargs:
            raise ModelError(f"{name} takes no argument {unknown[1]!r} (given: {kwargs[unknown[1]]!r})") from error
        raise
    except (FileNotFoundError, RuntimeError) as error:
        # A folder that is none, or whose weights are another model's; torch lists every key of those.
        if not name.startswith("local-dir:"):
            raise
        raise ModelError(f"{name}: {textwrap.shorten(str(error), 300)}") from error


def _check_name(name: str) -> None:
    """Raise ModelError, with the nearest names, unless timm would find this name and its tag."""
    source, colon, _ = name.partition(":")
    if colon:
        if source not in _SOURCES:
            raise ModelError(f"{name!r}: {source!r} is no source of models; use {' or '.join(_SOURCES)}")
        return
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        near = [n for n in near if n.startswith("x_")] or near
        hint = f"did you mean {', '.join(near)}?" if near else "xzoo.list_models() has the names"
        raise ModelError(f"unknown model {name!r}; {hint}")
    tags = [n.partition(".")[2] for n in timm.models.get_arch_pretrained_cfgs(architecture)]
    if tag and tag not in tags:
        raise ModelError(f"{architecture} has no tag {tag!r}; it has {', '.join(t for t in tags if t) or 'none'}")
