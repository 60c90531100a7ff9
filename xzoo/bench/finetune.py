"""Does a trained network learn new images better than the same one from scratch, in the same time?

    xzoo bench --finetune DATA --model x_vgg16_2.cifar10 --csv recipes/finetune.csv

DATA is what `xzoo finetune` reads, with a part to train on and one to validate on. Runs with and
without the trained weights take turns, with the same seed, image size and training time: on a few
images per class, drawn anew with each seed, then on all. Each run adds a row to the table; a row
that is there is not measured again, so that the same command resumes.
"""

import csv
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from timm.models import get_pretrained_cfg

from ..data.images import Pixels
from ..data.sources import list_images
from ..errors import XzooError
from ..files import atomic, check_file
from ..machine import hardware
from ..train.finetune import finetune

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


def finetuning(
    data: str, model: str, table: Path | str, minutes: float = 2.0, seeds: int = 3, each: int = 10
) -> Iterator[dict[str, str]]:
    """Train with and without a network's weights on the same images; yields each new row of the
    table.

    Args:
        data: folder of images, or whatever else `xzoo finetune` reads, with a part to validate on.
        model: a name whose weights are known, as `xzoo list` has them.
        table: CSV file that rows are added to; made if absent.
        minutes: of training in each run.
        seeds: runs of each kind.
        each: training images per class in the smaller comparison.
    Raises: XzooError, before any training, for a model without weights, data without a validation
        part, numbers below one, or a table that cannot be written.
    """
    table = Path(table)
    check_file(table, "--csv")
    cfg = get_pretrained_cfg(model)
    if cfg is None or not cfg.has_weights:
        raise XzooError(
            f"model={model!r} has no trained weights; give the name of one that has, as x_vgg16_2"
        )
    if seeds < 1 or each < 1 or not minutes > 0:
        raise XzooError(
            f"seeds={seeds}, each={each}, minutes={minutes:g}: 1 or more, 1 or more, and over 0"
        )
    if not list_images(data).val:
        raise XzooError(
            f"{data} has no part to validate on; the runs have to be compared on the same images"
        )
    return _runs(
        data,
        model,
        table,
        cfg.input_size[1],
        itertools.product((each, None), range(seeds)),
        minutes,
    )


def _runs(
    data: str,
    model: str,
    table: Path,
    side: int,
    cases: Iterator[tuple[int | None, int]],
    minutes: float,
) -> Iterator[dict[str, str]]:
    for (count, seed), pretrained in itertools.product(cases, (True, False)):
        row = {
            "model": model,
            "pretrained": str(pretrained).lower(),
            "data": Path(data).name,
            "seed": str(seed),
        }
        with tempfile.TemporaryDirectory() as scratch:
            place = data
            if count is not None:
                place = str(Path(scratch) / Path(data).name)
                draw_few(data, Path(place), count, seed)
            row["train_images"] = str(len(list_images(place).train))
            known = rows(table)
            if any(row.items() <= old.items() for old in known):
                continue
            result = finetune(
                place,
                model,
                minutes=minutes,
                pretrained=pretrained,
                seed=seed,
                img_size=side,
                out=f"{scratch}/run",
            )
        row |= {
            "minutes": f"{minutes:g}",
            "img_size": str(side),
            "top1": f"{result.top1:.2f}",
        }
        row |= {
            "n_val": str(result.n_val),
            "epochs": str(result.epochs),
            "on": hardware(torch.device("cpu")),
        }
        _write(table, [*known, row])
        yield row


def draw_few(data: str, to: Path, count: int, seed: int) -> None:
    """Make a folder with `count` training images of each class of DATA, and all that it validates
    on.
    """
    listing = list_images(data)
    order = np.random.default_rng(seed).permutation(len(listing.train))
    train: dict[int, list[bytes]] = {label: [] for label in range(len(listing.classes))}
    for i in order:
        item = listing.train[i]
        if len(train[item.label]) < count:
            train[item.label].append(_content(item.source))
    val: dict[int, list[bytes]] = {label: [] for label in train}
    for item in listing.val or ():
        val[item.label].append(_content(item.source))
    for part, images in (("train", train), ("val", val)):
        for label, contents in images.items():
            folder = to / part / listing.classes[label]
            folder.mkdir(parents=True)
            for i, content in enumerate(contents):
                (folder / f"{i:05d}.jpg").write_bytes(content)


def _content(source: Path | bytes | Pixels) -> bytes:
    return source.read_bytes() if isinstance(source, Path) else bytes(source)


def rows(table: Path) -> list[dict[str, str]]:
    """What the table has so far."""
    if not table.exists():
        return []
    with open(table, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _write(table: Path, content: list[dict[str, str]]) -> None:
    with atomic(table) as draft, open(draft, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(content)
