"""A model as a folder in timm's Hub format: config.json and model.safetensors.

`timm.create_model("local-dir:FOLDER", pretrained=True)` loads it after `import xzoo`, and so does the Hub
once it is uploaded. What timm has no place for (how the graph was drawn, what it was trained on) is in a
block "xzoo" beside timm's own keys, which timm passes over.
"""

import copy
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import save_for_hf
from torch import nn

from ..errors import ModelError, XzooError
from ..models import create_model

CONFIG, WEIGHTS = "config.json", "model.safetensors"
EXPORTED = {CONFIG, WEIGHTS, "recipe.yaml", "metrics.json", "curves.png"}


def save(
    model: nn.Module,
    folder: Path | str,
    label_names: Sequence[str],
    data_config: Mapping[str, Any] | None = None,
    block: Mapping[str, Any] | None = None,
) -> None:
    """Write the folder, all at once: it is made beside its place and moved there.

    Args:
        model: built by a registered name (timm.create_model), so that it can be rebuilt from its arguments.
        label_names: a name for each class, in the order of the outputs.
        data_config: how images are prepared for it, as of `timm.data.resolve_model_data_config`.
        block: what else to remember; JSON values.
    Raises: ModelError if there is not one name for each class; XzooError if it cannot be written.
    """
    folder, net = Path(folder), cast(Any, model)
    if len(label_names) != net.num_classes:
        raise ModelError(f"{len(label_names)} label names for a model of {net.num_classes} classes")
    # How X-layers are drawn: whatever of it is in the arguments that rebuild the model.
    names = ("graph", "share", "spatial_share", "seed", "compression")
    drawn = {name: value for name, value in net._model_args.items() if name in names}
    config = {"label_names": list(label_names), "xzoo": drawn | dict(block or {})}
    # safetensors refuses what is not contiguous, as everything is in a channels_last model.
    plain = copy.deepcopy(model).cpu().to(memory_format=torch.contiguous_format)
    draft = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        save_for_hf(plain, str(draft), model_config=config, safe_serialization=True, data_config=_plain(data_config))
        written = json.loads((draft / CONFIG).read_text(encoding="utf-8"))
        # transformers' wrapper passes num_classes itself, and Python refuses it twice; timm reads the top level.
        written.get("model_args", {}).pop("num_classes", None)
        (draft / CONFIG).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
        _replace(draft, folder)
    except OSError as error:
        raise XzooError(f"cannot write {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def load(folder: Path | str) -> nn.Module:
    """The model of a folder, in eval mode, with its weights; every one of them must be there and fit.

    Its label names and the preparation of images are in its `pretrained_cfg`.
    Raises: ModelError that names the folder and what does not fit.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ModelError(f"{folder} is no model folder: it has no {name}")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        architecture = config["architecture"]
        model: Any = create_model(f"local-dir:{folder}", pretrained=False)
        weights = load_file(folder / WEIGHTS)
    except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        if isinstance(error, XzooError):
            raise
        raise ModelError(f"{folder} is no model folder that can be read: {_first_line(error)}") from error
    _load_all(model, weights, f"{folder / WEIGHTS} does not hold the weights of {architecture}")
    names = model.pretrained_cfg.get("label_names")
    if names is not None and len(names) != model.num_classes:
        raise ModelError(f"{folder / CONFIG}: {len(names)} label names for {model.num_classes} classes")
    return model.eval()


def export(run: Path | str, to: Path | str) -> Path:
    """Write a finished run as a folder to publish; returns it.

    model.safetensors and config.json as timm loads them, recipe.yaml (what the run was asked for, resolved),
    metrics.json (its result) and curves.png. A folder that was exported before is replaced.
    Raises: XzooError for a run that is not finished, a place that holds anything else, or a full disk.
    """
    run, to = Path(run), Path(to)
    files = {
        **{f"model/{name}": name for name in (CONFIG, WEIGHTS)},
        **{"config.yaml": "recipe.yaml", "result.json": "metrics.json", "curves.png": "curves.png"},
    }
    for name in files:
        if not (run / name).is_file():
            raise XzooError(f"{run} is no finished run: it has no {name}; the command that began it ends it")
    if to.exists() and not (to.is_dir() and ({f.name for f in to.iterdir()} <= EXPORTED)):
        raise XzooError(f"{to} holds something else than an exported model; choose another folder")
    draft = to.with_name(f".{to.name}.{os.getpid()}.part")
    try:
        draft.mkdir(parents=True)
        for name, new in files.items():
            shutil.copyfile(run / name, draft / new)
        _replace(draft, to)
    except OSError as error:
        raise XzooError(f"cannot write {to}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return to


def _load_all(model: nn.Module, weights: Mapping[str, torch.Tensor], what: str) -> None:
    """Strictly, since timm drops a head of another size in silence."""
    own = model.state_dict()
    for missing, there in ((own.keys() - weights.keys(), "missing"), (weights.keys() - own.keys(), "unknown")):
        if missing:
            raise ModelError(f"{what}: {sorted(missing)[0]} is {there} ({len(missing)} such keys)")
    for name, tensor in own.items():
        if tensor.shape != weights[name].shape:
            sizes = f"{list(weights[name].shape)} there and {list(tensor.shape)} in the model"
            raise ModelError(f"{what}: {name} is {sizes}")
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:  # a graph that is none, found by the layers
        raise ModelError(f"{what}: {' '.join(str(error).split())}") from error


def _replace(new: Path, place: Path) -> None:
    """Move a folder to where another may be; folders cannot be exchanged in one step on every system."""
    old = place.with_name(f".{place.name}.{os.getpid()}.old")
    if place.exists():
        place.rename(old)
    try:
        new.rename(place)
    except OSError:
        with suppress(OSError):
            old.rename(place)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _plain(config: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return dict(config) if config else None


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
