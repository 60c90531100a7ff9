"""A model as a folder in timm's Hub format: config.json and model.safetensors.

`timm.create_model("local-dir:FOLDER", pretrained=True)` loads it after `import xzoo`, and so does
the Hub once it is uploaded. What timm has no place for (how the graph was drawn, what it was
trained on) is in a block "xzoo" beside timm's own keys, which timm passes over.

`export` makes of a run the folder that is published, with what else a reader of it wants to know:

    README.md             the card (card.py)
    recipe.yaml           what the run was asked for, without places of a machine
    metrics.json          what it came to, and counts
    curves.png            its training
    spectrum.png          its graphs
    logits.safetensors    outputs for `golden_input`, which another machine has to reproduce
"""

import copy
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import yaml
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.models import save_for_hf
from torch import Tensor, nn

from .. import files
from ..drawing import draw_layers
from ..errors import ModelError, XzooError, first_line
from ..models import create_model
from ..names import cut, encoded, shown, to_yaml
from ..profile import profile
from ..results import record
from ..theory import graphs_of, spectrum
from ..weights import CONFIG, WEIGHTS, check_fingerprint, fingerprint
from . import card

RECIPE, METRICS, GOLDEN = "recipe.yaml", card.METRICS, "logits.safetensors"
CURVES, SPECTRUM = "curves.png", "spectrum.png"
GREY = "grey_range"  # of the block: largest values of grey images with more than 8 bits, by kind
HALF_MOVES = 0.02  # points that float16 may cost or bring
EXPORTED = {CONFIG, WEIGHTS, card.CARD, RECIPE, METRICS, CURVES, SPECTRUM, GOLDEN}

_DRAWN_BY = ("graph", "share", "spatial_share", "seed", "compression")
# of a recipe, where they are texts
_PLACES = ("root", "data", "out", "results", "default_root_dir", "workers")


def save(
    model: nn.Module,
    folder: Path | str,
    label_names: Sequence[str],
    data_config: Mapping[str, Any] | None = None,
    block: Mapping[str, Any] | None = None,
) -> None:
    """Write the folder, all at once: it is made beside its place and moved there.

    Args:
        model: built by a registered name (timm.create_model), so that it can be rebuilt from its
            arguments.
        label_names: a name for each class, in the order of the outputs.
        data_config: how images are prepared for it, as of `timm.data.resolve_model_data_config`.
        block: what else to remember; JSON values.
    Raises: ModelError if there is not one name for each class; XzooError if it cannot be written.
    """
    folder, net = Path(folder), cast(Any, model)
    if len(label_names) != net.num_classes:
        raise ModelError(f"{len(label_names)} label names for a model of {net.num_classes} classes")
    # How X-layers are drawn: whatever of it is in the arguments that rebuild the model.
    drawn = {name: value for name, value in net._model_args.items() if name in _DRAWN_BY}
    config = {"label_names": list(label_names), "xzoo": drawn | dict(block or {})}
    # safetensors refuses what is not contiguous, as everything is in a channels_last model.
    plain = copy.deepcopy(model).cpu().to(memory_format=torch.contiguous_format)
    with files.atomic_folder(folder) as draft:
        save_for_hf(
            plain,
            str(draft),
            model_config=config,
            safe_serialization=True,
            data_config=dict(data_config) if data_config else None,
        )
        written = json.loads((draft / CONFIG).read_text(encoding="utf-8"))
        # transformers' wrapper passes num_classes itself, and Python refuses it twice; timm reads
        # the top level.
        written.get("model_args", {}).pop("num_classes", None)
        (draft / CONFIG).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


def load(folder: Path | str) -> nn.Module:
    """The model of a folder, in eval mode, with its weights; every one of them must be there and
    fit.

    Its label names and the preparation of images are in its `pretrained_cfg`, the range of grey
    images with more than 8 bits in its `grey_range` (of `train.images.grey_ranges`). Raises:
    ModelError that names the folder and what does not fit.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ModelError(f"{folder} is not a model folder: {name} is missing")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        architecture = config["architecture"]
        model: Any = create_model(f"local-dir:{folder}", pretrained=False)
        weights = load_file(folder / WEIGHTS)
    except XzooError:
        raise
    except (
        OSError,
        KeyError,
        TypeError,
        AttributeError,
        ValueError,
        RuntimeError,
        SafetensorError,
    ) as error:
        raise ModelError(
            f"{folder} is not a model folder that can be read: {first_line(error)}"
        ) from error
    check_fingerprint(config, weights, str(folder / WEIGHTS))
    _load_all(model, weights, f"{folder / WEIGHTS} does not hold the weights of {architecture}")
    names = model.pretrained_cfg.get("label_names")
    if names is not None and len(names) != model.num_classes:
        raise ModelError(
            f"{folder / CONFIG}: {len(names)} label names for {model.num_classes} classes"
        )
    # Not in pretrained_cfg: timm refuses keys of others there, and writes that of a model when it
    # is saved.
    block = config.get("xzoo") or {}
    # Runs of before there were ranges read all integers as 16-bit.
    before = {"16-bit": 65535.0, "32-bit": 65535.0} if block.keys() & {"finetune", "fit"} else {}
    model.grey_range = dict(block.get(GREY, before))
    return model.eval()


def load_any(model: str) -> nn.Module:
    """A model with its weights: from a run folder, a model folder, or by name."""
    if not model.strip():
        raise ModelError(
            f"{model!r} is not a model; give a run folder, a model folder, or the name of a model"
        )
    path = Path(model.removeprefix("local-dir:")).expanduser()
    if path.is_dir():
        if (path / CONFIG).is_file():
            return load(path)
        if (path / "model" / CONFIG).is_file():
            return load(path / "model")
        if (path / "config.yaml").is_file():
            raise ModelError(
                f"{path} is a run that is not finished; the command that began it goes on with it"
            )
        raise ModelError(
            f"{path} is neither a run nor a model folder: it has no model/config.json and no "
            "config.json"
        )
    if path.is_file():
        raise ModelError(f"{model} is a file; give the folder that it is in")
    if model.startswith("local-dir:") or (
        ":" not in model and ("/" in model or model.startswith("."))
    ):
        raise ModelError(f"{model}: there is no such folder")
    try:
        return create_model(model, pretrained=True)
    except XzooError:
        raise
    except (OSError, RuntimeError) as error:  # no weights in timm's list, or no way to get them
        raise ModelError(
            f"no weights for {model}: {first_line(error)}; give a run folder, or a model that has "
            "weights"
        ) from error


def label_names(model: nn.Module) -> list[str]:
    """A name for each output: those saved with the model, ImageNet's where it has 1,000 classes,
    else numbers.
    """
    config, count = cast(Any, model).pretrained_cfg, cast(Any, model).num_classes
    names, described = config.get("label_names"), config.get("label_descriptions") or {}
    if isinstance(names, dict):  # where ids have gaps
        names = [names.get(str(i), names.get(i, str(i))) for i in range(count)]
    if names is not None:
        return [str(described.get(name, name)) for name in names]
    subset = infer_imagenet_subset(model)
    if subset is not None:
        return list(map(ImageNetInfo(subset).index_to_description, range(count)))
    return list(map(str, range(count)))


def export(
    run: Path | str,
    to: Path | str,
    repo: str | None = None,
    timed: bool = True,
    half: Callable[[Path], float] | None = None,
) -> Path:
    """Write a finished run as a folder to publish; returns it. A folder that was exported before is
    replaced.

    Args:
        repo: the Hub repository that the card is for; by default that of the zoo with this folder's
            name.
        timed: measure the latency, too; all the rest is the same every time.
        half: store weights in float16 (norms and biases stay in float32); it gives the top-1
            accuracy of the file, in per cent, on the images that the run was judged on, which may
            move by HALF_MOVES.
    Raises: XzooError for a run that is not finished, a place that holds anything else, or a full
    disk.
    """
    run, to = Path(run), Path(to)
    for name in (f"model/{CONFIG}", f"model/{WEIGHTS}", "config.yaml", record.RESULT):
        if not (run / name).is_file():
            raise XzooError(
                f"{run} is not a finished run: {name} is missing; repeat the command that started "
                "it"
            )
    if to.exists() and not (to.is_dir() and ({f.name for f in to.iterdir()} <= EXPORTED)):
        raise XzooError(f"{to} holds something else than an exported model; choose another folder")
    from ..lettering import spared  # matplotlib takes half a second to import

    files.check_folder(to)
    model: Any = load(run / "model")
    result = dict(record.read(run).facts)
    try:
        recipe = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        config = json.loads((run / "model" / CONFIG).read_text(encoding="utf-8"))
    except (ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise XzooError(f"{run} is not a run that can be read: {first_line(error)}") from error
    with files.atomic_folder(to) as draft:
        state = {key: _narrow(key, t, half is not None) for key, t in model.state_dict().items()}
        (draft / WEIGHTS).write_bytes(to_bytes(state))
        if half is not None:
            model.load_state_dict(state)  # what follows is of what is stored
            before, result["top1"] = result["top1"], half(draft / WEIGHTS)
            if abs(result["top1"] - before) > HALF_MOVES:
                raise XzooError(
                    f"float16 moves the accuracy from {before:.2f} to {result['top1']:.2f} %, more "
                    f"than {HALF_MOVES} points; export in float32"
                )
        made = {key: result[key] for key in ("recipe", "recipe_sha", "commit") if result.get(key)}
        config["xzoo"] = {**config.get("xzoo", {}), **made, "fingerprint": fingerprint(state)}
        architecture, _, tag = to.name.partition(".")
        # That of the weights that a fine-tuning began with is not its own.
        config["pretrained_cfg"]["tag"] = tag if architecture == config["architecture"] else ""
        # timm writes the architecture's, which is the code's
        config["pretrained_cfg"]["license"] = card.LICENSE
        _write(draft / CONFIG, json.dumps(config, indent=2) + "\n")
        _write(draft / RECIPE, to_yaml(_placeless(recipe)))
        metrics = card.metrics(model, config, result, timed) | {
            "bytes": (draft / WEIGHTS).stat().st_size
        }
        if (run / CURVES).is_file():  # a run whose curves could not be drawn is finished, too
            shutil.copyfile(run / CURVES, draft / CURVES)
        drawn = {name: spectrum(graph) for name, graph in graphs_of(model).items()}
        if drawn:
            # Second singular values over what the best graphs of these sizes come near, least and
            # largest.
            parts = [found.second / found.bound for found in drawn.values()]
            metrics["sigma_2"] = [round(min(parts), 3), round(max(parts), 3)]
            with spared(to / SPECTRUM, Console(stderr=True)):
                draw_layers(drawn, cut(shown(to.name), 80)).savefig(
                    draft / SPECTRUM, dpi=110, pil_kwargs={"optimize": True}
                )
        _write(draft / METRICS, json.dumps(metrics, indent=2) + "\n")
        (draft / GOLDEN).write_bytes(to_bytes({"logits": golden_logits(model)}))
        _write(draft / card.CARD, card.text(draft, repo, to))
    return to


def check(folder: Path | str) -> None:
    """Raise ModelError unless an exported folder is whole: it loads, and its outputs, counts and
    card are its own.
    """
    folder = Path(folder)
    model: Any = load(folder)
    place = folder / card.CARD
    written = place.read_text(encoding="utf-8") if place.is_file() else ""
    # Pictures that could not be drawn are not in the card.
    parts = EXPORTED - {name for name in (SPECTRUM, CURVES) if f"]({name})" not in written}
    missing = sorted(parts - set(os.listdir(folder)))
    if missing:
        raise ModelError(f"{folder} has no {missing[0]}; `xzoo export RUN {folder}` writes it")
    wanted, found = load_file(folder / GOLDEN)["logits"], golden_logits(model)
    # On another machine sums are taken in another order.
    if wanted.shape != found.shape or float((wanted - found).abs().max()) > 1e-4 * max(
        1.0, float(wanted.abs().max())
    ):
        raise ModelError(f"{folder}: its outputs are not those of {GOLDEN}")
    metrics, counts = json.loads((folder / METRICS).read_text(encoding="utf-8")), profile(model)
    for name in ("weights", "params", "macs"):
        count = getattr(counts, name)
        if metrics[name] != count:
            raise ModelError(
                f"{folder / METRICS}: {name} is {metrics[name]} there, and {count} in the model"
            )
    if metrics["bytes"] != (folder / WEIGHTS).stat().st_size:
        raise ModelError(
            f"{folder / METRICS}: bytes is {metrics['bytes']}, and not the size of {WEIGHTS}"
        )
    if metrics | card.runs_and_rivals(metrics) != metrics or written != card.text(folder):
        raise ModelError(f"{place} is stale; `xzoo card {folder}` writes it anew")


def golden_input(size: Sequence[int], count: int = 4) -> Tensor:
    """[count, *size] in [-1, 1): 8 x 8 squares whose colours are PCG64's raw words, the same on
    every machine.
    """
    words = np.asarray(np.random.PCG64(0).random_raw(count * size[0] * 64), dtype=np.uint64)
    colours = torch.from_numpy((words >> np.uint64(56)).astype(np.float32) / 128 - 1)
    return nn.functional.interpolate(
        colours.view(count, size[0], 8, 8), (size[1], size[2]), mode="nearest"
    )


@torch.no_grad()
def golden_logits(model: nn.Module) -> Tensor:
    net = cast(Any, model)
    return net.eval()(golden_input(net.pretrained_cfg["input_size"])).float().contiguous()


def _narrow(key: str, value: Tensor, half: bool) -> Tensor:
    """A graph in the smallest integers that hold it, weights perhaps in float16; layers widen them
    when they load.
    """
    if key.rpartition(".")[2] == "neighbours":
        kinds = {torch.uint8: 2**8, torch.int16: 2**15, torch.int32: 2**31}
        value = value.to(next(kind for kind, limit in kinds.items() if int(value.max()) < limit))
    elif half and value.is_floating_point() and value.dim() > 1:
        value = value.half()
    return value.contiguous()


def _placeless(recipe: Any) -> Any:
    """Without where data and results were on the machine of the run."""
    if not isinstance(recipe, dict):
        return recipe
    kept = {}
    for key, value in recipe.items():
        if key not in _PLACES or not (value is None or isinstance(value, str | int)):
            kept[key] = _placeless(value)
    return kept


def _write(path: Path, text: str) -> None:
    path.write_bytes(encoded(text))


def _load_all(model: nn.Module, weights: Mapping[str, torch.Tensor], what: str) -> None:
    """Strictly, since timm drops a head of another size in silence."""
    own = model.state_dict()
    for missing, there in (
        (own.keys() - weights.keys(), "missing"),
        (weights.keys() - own.keys(), "unknown"),
    ):
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
