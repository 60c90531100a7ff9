"""`xzoo classify`: what a model takes images for."""

import csv
import io
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from rich.console import Console
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, resolve_model_data_config
from torch import nn

from ..errors import DataError, ModelError, XzooError, first_line
from ..files import write_text
from ..hub import folder as model_folder
from ..machine import cores, own_threads
from ..models import create_model
from ..names import say
from .folders import image_files
from .images import grey_peak, grey_ranges, load_rgb, told_range, unwarned


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of an image with their probabilities, best first; or why it could not be read."""

    image: str
    classes: list[tuple[str, float]]
    error: str | None = None


def classify(
    model: str, images: Sequence[str | Path], top: int = 5, batch_size: int = 32, device: str = "auto"
) -> Iterator[Prediction]:
    """Classify images, one prediction at a time, in the order given and by name within folders.

    Args:
        model: a run folder of `xzoo finetune`, a model folder, or the name of a pretrained model.
        images: image files, and folders of them (at any depth). Grey images of more than 8 bits have the range that
            the model was trained with; where it has none for their kind, that of all of them, which is told.
        top: how many classes to give.
        batch_size: images at a time.
        device: auto, cpu, cuda or mps.
    Raises: ModelError if there is no such model or it has no weights; DataError if there are no such images.
        An image that cannot be read raises nothing: it is a prediction with an error.
    """
    files = _files(images)
    net = load_any(model)
    where = device_named(device)
    net = net.to(where).eval()
    names = label_names(net)
    config = resolve_model_data_config(net)
    transform = create_transform(**config, is_training=False)
    at_least = 2 * min(config["input_size"][1:])

    ranges = _ranges(net, files)

    def look(file: Path) -> Image.Image | str:
        try:
            return load_rgb(file, at_least, ranges)
        except DataError as error:
            return str(error)

    with ThreadPoolExecutor(min(8, cores())) as pool, own_threads(), torch.inference_mode():
        for low in range(0, len(files), batch_size):
            part = files[low : low + batch_size]
            with unwarned():
                seen = list(pool.map(look, part))
            pixels = [transform(image) for image in seen if not isinstance(image, str)]
            rows = net(torch.stack(pixels).to(where)).float().softmax(1).cpu() if pixels else torch.empty(0, 0)
            best = iter(zip(*rows.topk(min(top, rows.shape[1]), dim=1), strict=True))
            for file, image in zip(part, seen, strict=True):
                if isinstance(image, str):
                    yield Prediction(str(file), [], image)
                else:
                    values, indices = next(best)
                    pairs = zip(indices.tolist(), values.tolist(), strict=True)
                    yield Prediction(str(file), [(names[i], value) for i, value in pairs])


def _ranges(net: nn.Module, files: Sequence[Path]) -> dict[str, float]:
    """The ranges of grey images with more than 8 bits: the model's own, else what the files have, and that is told."""
    own: dict[str, float] = getattr(net, "grey_range", {})
    with unwarned(), ThreadPoolExecutor() as pool:
        found = grey_ranges(pool.map(grey_peak, files))
    console = Console(stderr=True)
    for kind in found.keys() - own.keys():
        text = f"{told_range(kind, found[kind])}, as the largest of these images; the model has no range for them"
        say(console, text)
    return found | own


def load_any(model: str) -> nn.Module:
    """A model with its weights: from a run folder, a model folder, or by name."""
    if not model.strip():
        raise ModelError(f"{model!r} is no model; give a run folder, a model folder, or the name of a model")
    path = Path(model.removeprefix("local-dir:")).expanduser()
    if path.is_dir():
        if (path / model_folder.CONFIG).is_file():
            return model_folder.load(path)
        if (path / "model" / model_folder.CONFIG).is_file():
            return model_folder.load(path / "model")
        if (path / "config.yaml").is_file():
            raise ModelError(f"{path} is a run that is not finished; the command that began it goes on with it")
        raise ModelError(f"{path} is neither a run nor a model folder: it has no model/config.json and no config.json")
    if path.is_file():
        raise ModelError(f"{model} is a file; give the folder that it is in")
    if model.startswith("local-dir:") or (":" not in model and ("/" in model or model.startswith("."))):
        raise ModelError(f"{model}: there is no such folder")
    try:
        return create_model(model, pretrained=True)
    except XzooError:
        raise
    except (OSError, RuntimeError) as error:  # no weights in timm's list, or no way to get them
        reason = first_line(error)
        raise ModelError(f"no weights for {model}: {reason}; give a run folder, or a model that has weights") from error


def label_names(model: nn.Module) -> list[str]:
    """A name for each output: those saved with the model, ImageNet's where it has 1,000 classes, else numbers."""
    config, count = cast(Any, model).pretrained_cfg, cast(Any, model).num_classes
    names, described = config.get("label_names"), config.get("label_descriptions") or {}
    if isinstance(names, dict):  # where ids have gaps
        names = [names.get(str(i), names.get(i, str(i))) for i in range(count)]
    if names is not None:
        return [str(described.get(name, name)) for name in names]
    subset = infer_imagenet_subset(model)
    if subset is not None:
        info = ImageNetInfo(subset)
        return [info.index_to_description(i) for i in range(count)]
    return [str(i) for i in range(count)]


def write_csv(predictions: Sequence[Prediction], path: Path | str, top: int = 5) -> None:
    """One row an image: its name, class and probability of each place, and what went wrong if something did."""
    columns = ["image", *(f"{name}{place}" for place in range(1, top + 1) for name in ("class", "p")), "error"]
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(columns)
    for prediction in predictions:
        cells = [cell for name, p in prediction.classes for cell in (name, f"{p:.4f}")]
        cells += [""] * (2 * top - len(cells))
        table.writerow([prediction.image, *cells, prediction.error or ""])
    write_text(Path(path), text.getvalue())


def _files(images: Sequence[str | Path]) -> list[Path]:
    files: list[Path] = []
    for given in images:
        if not str(given).strip():
            raise DataError("the name of an image is empty; give images, or folders of images")
        path = Path(given).expanduser()
        if os.path.isdir(path):
            found = image_files(path)
            if not found:
                raise DataError(f"{path} holds no image")
            files += found
        elif os.path.exists(path):
            files.append(path)
        else:
            raise DataError(f"{path} does not exist; give images, or folders of images")
    if not files:
        raise DataError("no images given; give images, or folders of images")
    return files


def device_named(name: str) -> torch.device:
    """A device by name, "auto" being the first there is of cuda, mps and cpu. Raises: XzooError if there is none."""
    if name == "auto":
        name = "mps" if torch.backends.mps.is_available() else "cpu"
        if torch.cuda.is_available():
            name = "cuda"
    if name.split(":")[0] not in ("cuda", "mps", "cpu"):
        raise XzooError(f"device={name}: give auto, cpu, cuda or mps")
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise XzooError(f"device={name}: {first_line(error)}; try --device cpu") from error
    return torch.device(name)
