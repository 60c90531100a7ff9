"""The zoo's architectures in timm's registry; importing this registers them.

A name fixes an architecture's compression and graph; every model also takes compression=, share=,
spatial_share=, graph= and seed=. compression=1 is the dense twin, graph="group" or "shuffle" a rival.
"""

import copy
import difflib
import re
import textwrap
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from .. import weights
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
        pretrained: load trained weights. Those of the zoo's own names are verified (xzoo/weights.py); what came of it
            is in `pretrained_cfg`: "file", and "hf_hub_id" with the commit. What "hf-hub:" names is not verified.
        **kwargs: num_classes, in_chans, features_only and whatever else the model takes; those of the zoo take
            compression, share, spatial_share, graph and seed. For weights, cache_dir and revision (a commit).

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
    ours = ":" not in name and not given and name != "x_timm"  # which, without a tag, begins with its base's weights
    entry = weights.find(name) if ours else None
    if entry is not None and pretrained:
        return _trained(entry, **kwargs)
    if "revision" in kwargs:
        raise ModelError(f"revision={kwargs['revision']!r}: {name}, pretrained={pretrained}, has no weights of xzoo's")
    if pretrained and ":" not in name and not given and not timm.is_model_pretrained(trained):
        raise ModelError(f"{trained} has no trained weights yet; use pretrained=False")
    if pretrained and name.startswith("local-dir:"):
        folder = Path(name.partition(":")[2])
        if folder.is_dir() and not (folder / weights.WEIGHTS).is_file():
            raise ModelError(f"{folder} has no {weights.WEIGHTS}; weights of any other format are not loaded")
    return _created(name, pretrained, **kwargs)


def _trained(entry: weights.Entry, revision: str | None = None, cache_dir: Any = None, **kwargs: Any) -> nn.Module:
    """A model with the weights of a row of weights.json, with another head or input if asked for."""
    found = weights.fetch(entry, revision, cache_dir)
    arguments = {**found.config.get("model_args", {}), "num_classes": found.config["num_classes"], **kwargs}
    cfg = {**found.config["pretrained_cfg"], "architecture": entry.architecture, "tag": entry.tag}
    cfg |= {key: found.config[key] for key in ("label_names", "label_descriptions") if key in found.config}
    _check_keys(entry, found, cfg, arguments)
    # timm takes away a head of another size and fits the first layer to other channels.
    overlay = {"state_dict": dict(found.state)}
    model: Any = _created(entry.architecture, True, pretrained_cfg=cfg, pretrained_cfg_overlay=overlay, **arguments)
    used = {"file": str(found.path)}
    if entry.repo is not None and entry.commit is not None:
        used |= {"hf_hub_id": f"{entry.repo}@{revision or entry.commit}", "hf_hub_filename": weights.WEIGHTS}
    for module in model.modules():  # a wrapper for features has a model within
        if isinstance(getattr(module, "pretrained_cfg", None), dict):
            module.pretrained_cfg.pop("state_dict", None)
            module.pretrained_cfg |= used
    return model


def _check_keys(entry: weights.Entry, found: weights.Found, cfg: dict[str, Any], arguments: dict[str, Any]) -> None:
    """Raise ModelError unless file and model have the same keys, those of the classifier apart.

    timm loads into a model with another head whatever there is, and leaves the rest as it was drawn.
    """
    whole = {k: v for k, v in arguments.items() if k not in ("features_only", "out_indices", "feature_cls", "device")}
    with torch.device("meta"):
        keys = _created(entry.architecture, False, pretrained_cfg=copy.copy(cfg), **whole).state_dict().keys()
    classifier = cfg.get("classifier") or ()
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    for odd, which in ((keys - found.state.keys(), "missing"), (found.state.keys() - keys, "unknown")):
        other = sorted(key for key in odd if key.rpartition(".")[0] not in heads)
        if other:
            raise ModelError(f"{found.path} is not of this model: {other[0]} is {which} ({len(other)} such keys)")


def _created(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    try:
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    except TypeError as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown and unknown[1] in kwargs:
            raise ModelError(f"{name} takes no argument {unknown[1]!r} (given: {kwargs[unknown[1]]!r})") from error
        raise
    except (FileNotFoundError, RuntimeError) as error:
        # A folder that is none, or whose weights are another model's; torch lists every key of those.
        if not (name.startswith("local-dir:") or "pretrained_cfg_overlay" in kwargs):
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
