"""Models by name: those of the zoo, with verified weights, and all others of timm's.

An error says in one line what is wrong with a name, an argument or a file of weights.
"""

import copy
import difflib
import pickle
import re
import textwrap
import zipfile
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import constants
from safetensors import SafetensorError
from torch import nn

from .. import files, network, weights
from ..convert import is_integer
from ..errors import ModelError, XzooError
from . import x_timm

_SOURCES = ("hf-hub", "local-dir")


def list_models(filter: str = "*", pretrained: bool = False) -> list[str]:
    """The names of the zoo that fit a pattern such as "x_res*", in natural order; with weights
    only, if asked.
    """
    names = timm.list_models(filter, pretrained=pretrained)
    return [name for name in names if name.startswith("x_")]


def create_model(name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """timm.create_model: a model of the zoo, or any other of timm's, by name.

    Args:
        name: "x_resnet50", with a tag of weights "x_vgg16_2.cifar10", or "local-dir:FOLDER",
            "hf-hub:ORG/NAME".
        pretrained: load trained weights. Those of the zoo's own names are verified
            (xzoo/weights.py); what came of it is in `pretrained_cfg`: "file", and "hf_hub_id" with
            the commit. What "hf-hub:" names is not verified.
        **kwargs: num_classes, in_chans, features_only and whatever else the model takes; those of
            the zoo take compression, share, spatial_share, graph and seed. For weights, cache_dir
            and revision (a commit).

    Raises: ModelError for a name or tag that is unknown (with the nearest ones) or has no trained
        weights, for arguments that the model does not take, and for a folder whose weights are not
        of the model that it names; GraphError where a layer admits no such graph.
    """
    _check_name(name)
    for argument, least in (("num_classes", 0), ("in_chans", 1)):
        value = kwargs.get(argument, least)
        if value is not None and not is_integer(value, least):
            raise ModelError(f"{argument}={value!r}: use an integer from {least} on")
    given = {"pretrained_cfg", "pretrained_cfg_overlay"} & kwargs.keys()
    trained = name
    if name.partition(".")[0] == "x_timm":  # whose weights are those of the model that it expands
        trained = kwargs.get("base", x_timm.BASE)
        x_timm.check_base(trained)
        _check_name(trained)
    # which, without a tag, begins with its base's weights
    ours = ":" not in name and not given and name != "x_timm"
    entry = weights.find(name) if ours else None
    if entry is not None and pretrained:
        return _trained(entry, **kwargs)
    if "revision" in kwargs:
        raise ModelError(
            f"revision={kwargs['revision']!r}: {name}, pretrained={pretrained}, has no weights of "
            "xzoo's"
        )
    if pretrained and ":" not in name and not given and not timm.is_model_pretrained(trained):
        raise ModelError(f"{trained} has no trained weights yet; use pretrained=False")
    if pretrained and name.startswith("local-dir:"):
        folder = Path(name.partition(":")[2])
        if folder.is_dir() and not (folder / weights.WEIGHTS).is_file():
            raise ModelError(
                f"{folder} has no {weights.WEIGHTS}; weights of any other format are not loaded"
            )
    return _created(name, pretrained, **kwargs)


def _trained(
    entry: weights.Entry, revision: str | None = None, cache_dir: Any = None, **kwargs: Any
) -> nn.Module:
    """A model with the weights of a row of weights.json, with another head or input on request."""
    found = weights.fetch(entry, revision, cache_dir)
    arguments = {
        **found.config.get("model_args", {}),
        "num_classes": found.config["num_classes"],
        **kwargs,
    }
    cfg = {**found.config["pretrained_cfg"], "architecture": entry.architecture, "tag": entry.tag}
    for key in ("label_names", "label_descriptions"):
        if key in found.config:
            cfg[key] = found.config[key]
    _check_keys(entry, found, cfg, arguments)
    # timm takes away a head of another size and fits the first layer to other channels.
    overlay = {"state_dict": dict(found.state)}
    model: Any = _created(
        entry.architecture, True, pretrained_cfg=cfg, pretrained_cfg_overlay=overlay, **arguments
    )
    used = {"file": str(found.path)}
    if entry.repo is not None and entry.commit is not None:
        used |= {
            "hf_hub_id": f"{entry.repo}@{revision or entry.commit}",
            "hf_hub_filename": weights.WEIGHTS,
        }
    for module in model.modules():  # a wrapper for features has a model within
        if isinstance(getattr(module, "pretrained_cfg", None), dict):
            module.pretrained_cfg.pop("state_dict", None)
            module.pretrained_cfg |= used
    return model


def _check_keys(
    entry: weights.Entry, found: weights.Checkpoint, cfg: dict[str, Any], arguments: dict[str, Any]
) -> None:
    """Raise ModelError unless file and model have the same keys, those of the classifier apart.

    timm loads into a model with another head whatever there is, and leaves the rest as it was
    drawn.
    """
    complete = dict(arguments)  # without what selects features
    for key in ("features_only", "out_indices", "feature_cls", "device"):
        complete.pop(key, None)
    with torch.device("meta"):
        model = _created(entry.architecture, False, pretrained_cfg=copy.copy(cfg), **complete)
    keys = model.state_dict().keys()
    classifier = cfg.get("classifier") or ()
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    for odd, which in (
        (keys - found.state.keys(), "missing"),
        (found.state.keys() - keys, "unknown"),
    ):
        other = sorted(key for key in odd if key.rpartition(".")[0] not in heads)
        if other:
            raise ModelError(
                f"{found.path} is not of this model: {other[0]} is {which} ({len(other)} such keys)"
            )


def _created(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    file = _given_file(name, pretrained, kwargs)
    with network.bounded():
        try:
            return timm.create_model(name, pretrained=pretrained, **kwargs)
        except XzooError:
            raise
        except Exception as error:  # of many libraries, many classes
            message = _explained(error, name, pretrained, file, kwargs)
            if message is None:
                raise
            raise ModelError(message) from error


def _given_file(name: str, pretrained: bool, kwargs: dict[str, Any]) -> str | None:
    """The file of weights that the caller names. Raises: ModelError where there is none of that
    name.
    """
    overlay = kwargs.get("pretrained_cfg_overlay") or {}
    file, how = kwargs.get("checkpoint_path"), "checkpoint_path=FILE"
    if not file and pretrained and "state_dict" not in overlay:
        file, how = overlay.get("file"), "pretrained_cfg_overlay=dict(file=FILE)"
    if file and not Path(file).is_file():
        what = "is a folder, and no file" if Path(file).is_dir() else "does not exist"
        raise ModelError(
            f"{name}: the file of weights {file} {what}; give one that exists in {how}"
        )
    return str(file) if file else None


def _explained(
    error: Exception, name: str, pretrained: bool, file: str | None, kwargs: dict[str, Any]
) -> str | None:
    """What timm, torch or the Hub's client complains of, in one line that says what to do; None for
    a bug.
    """
    source, colon, place = name.partition(":")
    first = textwrap.shorten(str(error) or type(error).__name__, 300)
    if isinstance(error, TypeError):
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown and unknown[1] in kwargs:
            return f"{name} takes no argument {unknown[1]!r} (given: {kwargs[unknown[1]]!r})"
    if isinstance(error, RuntimeError) and "loading state_dict for" in str(error):
        return _misfit(str(error), name, file or "the file of weights", kwargs)
    unreadable = (SafetensorError, pickle.UnpicklingError, EOFError, zipfile.BadZipFile)
    torn = isinstance(error, unreadable) or (
        isinstance(error, RuntimeError) and re.search("PytorchStream|weights_only", first)
    )
    if file and (torn or isinstance(error, OSError | ValueError | KeyError | AssertionError)):
        return f"{name}: {file} cannot be read as weights ({type(error).__name__}: {first})"
    if source == "local-dir" and isinstance(error, FileNotFoundError):
        return f"{name}: {first}"
    if source == "local-dir" and not isinstance(error, MemoryError):
        return f"{place} is not a model folder that can be read: {type(error).__name__}: {first}"
    if not (pretrained or colon):
        return None
    cfg = None if colon else timm.get_pretrained_cfg(kwargs.get("base", name))
    address = place if colon else str((cfg and (cfg.hf_hub_id or cfg.url)) or name)
    repo, _, revision = address.partition("@")
    if message := weights.explained(error, repo, revision or None):
        return message
    cache = kwargs.get("cache_dir") or constants.HF_HUB_CACHE
    if torn:
        return (
            f"the copy of {address} in {cache} is damaged ({first}); remove it there and try again"
        )
    if isinstance(error, OSError) and error.errno is not None:
        return f"cannot keep {address} in {error.filename or cache}: {files.reason(error)}"
    if colon and isinstance(
        error, ValueError | KeyError | TypeError | AttributeError | AssertionError | RuntimeError
    ):
        return f"{name} is not a model that can be built: {type(error).__name__}: {first}"
    return None


def _misfit(page: str, name: str, file: str, kwargs: dict[str, Any]) -> str:
    """torch's page of keys in one line: what differs, and what to do about it."""
    lines = [line.strip() for line in page.splitlines()[1:]] or [page]
    sizes = re.findall(
        r"size mismatch for (\S+): .*?Size\((\[[\d, ]*\])\).*?Size\((\[[\d, ]*\])\)", page
    )
    missing, unknown = (
        re.findall(r'"([^"]+)"', "".join(re.findall(rf"{kind} key\(s\) in state_dict: (.*)", page)))
        for kind in ("Missing", "Unexpected")
    )
    found = []
    if sizes:
        key, there, here = sizes[0]
        found.append(f"{key} is {there} there and {here} in the model" + _more(sizes))
    if missing:
        found.append(f"{missing[0]} is missing there" + _more(missing))
    if unknown:
        found.append(f"{unknown[0]} is unknown to the model" + _more(unknown))
    same = "build the model with the arguments that the file was saved with"
    if kwargs.get("features_only") and kwargs.get("checkpoint_path"):
        same = (
            "with features_only give the file as pretrained=True, "
            "pretrained_cfg_overlay=dict(file=FILE)"
        )
    elif (
        sizes
        and not missing
        and not unknown
        and len(sizes) <= 2
        and not sizes[0][0].endswith("neighbours")
    ):
        classes = re.findall(r"\d+", sizes[0][1])[0]
        same = (
            f"build it with num_classes={classes}, or with pretrained=True, "
            f"pretrained_cfg_overlay=dict(file=FILE, num_classes={classes}), which makes a new head"
        )
    return (
        f"{file} does not fit {name}: {', '.join(found) or textwrap.shorten(lines[0], 200)}; {same}"
    )


def _more(keys: list[Any]) -> str:
    return f" ({len(keys)} such keys)" if len(keys) > 1 else ""


def _check_name(name: str) -> None:
    """Raise ModelError, with the nearest names, unless timm would find this name and its tag."""
    source, colon, _ = name.partition(":")
    if colon:
        if source not in _SOURCES:
            raise ModelError(
                f"{name!r}: {source!r} is not a source of models; use {' or '.join(_SOURCES)}"
            )
        return
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        near = [n for n in near if n.startswith("x_")] or near
        hint = f"did you mean {', '.join(near)}?" if near else "xzoo.list_models() has the names"
        raise ModelError(f"unknown model {name!r}; {hint}")
    tags = [n.partition(".")[2] for n in timm.models.get_arch_pretrained_cfgs(architecture)]
    if tag and tag not in tags:
        raise ModelError(
            f"{architecture} has no tag {tag!r}; it has {', '.join(t for t in tags if t) or 'none'}"
        )
