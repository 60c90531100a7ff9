"""`xzoo classify`: classify images."""

import csv
import io
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console
from timm.data import create_transform, resolve_model_data_config
from torch import nn

from ..data.images import grey_peak, grey_ranges, load_rgb, told_range, unwarned
from ..data.walk import image_files
from ..errors import DataError
from ..files import write_text
from ..hub.folder import label_names, load_any
from ..machine import cores, device_named, own_threads
from ..names import say


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of an image with their probabilities, best first; or why it could not
    be read.
    """

    image: str
    classes: list[tuple[str, float]]
    error: str | None = None


def classify(
    model: str,
    images: Sequence[str | Path],
    top: int = 5,
    batch_size: int = 32,
    device: str = "auto",
) -> Iterator[Prediction]:
    """Classify images, one prediction at a time, in the order given and by name within folders.

    Args:
        model: a run folder of `xzoo finetune`, a model folder, or the name of a pretrained model.
        images: image files, and folders of them (at any depth). Grey images of more than 8 bits
            have the range that the model was trained with; where it has none for their kind, that
            of all of them, which is reported.
        top: how many classes to give.
        batch_size: images at a time.
        device: auto, cpu, cuda or mps.
    Raises: ModelError if there is no such model or it has no weights; DataError if there are no
        such images. An image that cannot be read raises nothing: it is a prediction with an error.
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
            rows = (
                net(torch.stack(pixels).to(where)).float().softmax(1).cpu()
                if pixels
                else torch.empty(0, 0)
            )
            best = iter(zip(*rows.topk(min(top, rows.shape[1]), dim=1), strict=True))
            for file, image in zip(part, seen, strict=True):
                if isinstance(image, str):
                    yield Prediction(str(file), [], image)
                else:
                    values, indices = next(best)
                    pairs = zip(indices.tolist(), values.tolist(), strict=True)
                    yield Prediction(str(file), [(names[i], value) for i, value in pairs])


def _ranges(net: nn.Module, files: Sequence[Path]) -> dict[str, float]:
    """The ranges of grey images with more than 8 bits: the model's, else what the files have, which
    is reported.
    """
    trained: dict[str, float] = getattr(net, "grey_range", {})
    with unwarned(), ThreadPoolExecutor() as pool:
        measured = grey_ranges(pool.map(grey_peak, files))
    console = Console(stderr=True)
    for kind in measured.keys() - trained.keys():
        say(
            console,
            f"{told_range(kind, measured[kind])}, as the largest of these images; the model has no "
            "range for them",
        )
    return measured | trained


def write_csv(predictions: Sequence[Prediction], path: Path | str, top: int = 5) -> None:
    """One row per image: its name, the likeliest classes with their probabilities, and the error if
    there was one.
    """
    columns = [
        "image",
        *(f"{name}{rank}" for rank in range(1, top + 1) for name in ("class", "p")),
        "error",
    ]
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
