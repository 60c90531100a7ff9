"""Does a trained network learn new images better than the same one from scratch, in the same time?

    python recipes/finetune.py DATA x_vgg16_2.cifar10_q75 recipes/finetune.csv

DATA is a folder of parquet files or of class folders, with a part to train on and one to judge on. Runs with and
without the trained weights take turns, with the same seed, image size and training time: on a few images a class,
drawn anew with each seed, then on all. A row a run; what is in the table already is left out, so that the same command
goes on where it was interrupted.
"""

import csv
import itertools
import tempfile
from pathlib import Path

import numpy as np
import torch
from jsonargparse import auto_cli
from timm.models import get_pretrained_cfg

from xzoo.data.sources import list_images
from xzoo.machine import hardware
from xzoo.train.finetune import finetune

COLUMNS = (
    "model",
    "pretrained",
    "data",
    "train_images",
    "seed",
    "minutes",
    "img_size",
    "top1",
    "n_val",
    "epochs",
    "on",
)


def compare(data: str, model: str, table: Path, minutes: float = 2.0, seeds: int = 3, each: int = 10) -> None:
    """Train with and without a network's weights on the same images, and note the accuracies.

    Args:
        data: folder of images.
        model: a name with a tag, as `xzoo list` has them.
        table: CSV file that rows are added to.
        minutes: of training in each run.
        seeds: runs of each kind.
        each: training images a class in the smaller comparison.
    """
    side = get_pretrained_cfg(model).input_size[1]
    for count, seed, pretrained in itertools.product((each, None), range(seeds), (True, False)):
        known = {"model": model, "pretrained": str(pretrained).lower(), "data": Path(data).name, "seed": str(seed)}
        with tempfile.TemporaryDirectory() as scratch:
            place = few(data, Path(scratch) / Path(data).name, count, seed)
            known["train_images"] = str(len(list_images(str(place)).train))
            if any(known.items() <= row.items() for row in rows(table)):
                continue
            options = {"minutes": minutes, "pretrained": pretrained, "seed": seed, "img_size": side}
            result = finetune(str(place), model, **options, out=f"{scratch}/run")  # type: ignore[arg-type]
        known |= {"minutes": f"{minutes:g}", "img_size": str(side), "top1": f"{100 * result.accuracy:.2f}"}
        known |= {"n_val": str(result.images), "epochs": str(result.epochs), "on": hardware(torch.device("cpu"))}
        add(table, known)


def few(data: str, to: Path, count: int | None, seed: int) -> Path:
    """A folder with `count` training images of each class of DATA and all that are judged on; DATA itself for None."""
    if count is None:
        return Path(data)
    listing = list_images(data)
    order = np.random.default_rng(seed).permutation(len(listing.train))
    chosen: dict[int, list[bytes]] = {label: [] for label in range(len(listing.classes))}
    for i in order:
        item = listing.train[i]
        if len(chosen[item.label]) < count:
            chosen[item.label].append(content(item.source))
    judged: dict[int, list[bytes]] = {label: [] for label in chosen}
    for item in listing.val or ():
        judged[item.label].append(content(item.source))
    for part, images in (("train", chosen), ("val", judged)):
        for label, files in images.items():
            folder = to / part / listing.classes[label]
            folder.mkdir(parents=True)
            for i, file in enumerate(files):
                (folder / f"{i:05d}.jpg").write_bytes(file)
    return to


def content(source: object) -> bytes:
    return source.read_bytes() if isinstance(source, Path) else bytes(source)  # type: ignore[call-overload, no-any-return]


def rows(table: Path) -> list[dict[str, str]]:
    if not table.exists():
        return []
    with open(table, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def add(table: Path, row: dict[str, str]) -> None:
    new = not table.exists()
    with open(table, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    auto_cli(compare)
