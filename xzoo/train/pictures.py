"""Pictures of a run: curves, confusion matrix, sample predictions. For people, so legible at 2 and
at 200 classes.

Drawn on matplotlib's Figure itself: pyplot would choose a window system and keep every figure
alive. A class whose name no font here can draw, or that looks like another one, has its number in
the pictures and its name in classes.txt.
"""

import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from ..files import atomic, write_text
from ..lettering import NUMBERED, Picture, class_labels
from ..names import cut, escaped, shown

BLUE, ORANGE, GREY = "#2b6cb0", "#dd6b20", "#718096"
RIGHT, WRONG = "#2f855a", "#c53030"
CLASSES = "classes.txt"


def curves(rows: Sequence[dict[str, float]], path: Path, title: str) -> None:
    """Loss and accuracy by epoch, from the rows of a metrics file."""
    figure = Picture(9, 3.6)
    loss, accuracy = figure.subplots(1, 2)
    epochs = {row["epoch"] for row in rows}
    # thin where there are several rows in an epoch
    width = 1.0 if len({row["step"] for row in rows}) > 2 * max(1, len(epochs)) else 1.6
    _line(loss, rows, "train/loss", "training (smoothed labels)", GREY, lw=width)
    _line(loss, rows, "val/loss", "validation", BLUE)
    _line(accuracy, rows, "val/acc1", "top 1", BLUE, scale=100)
    # with five classes or fewer it is always right
    if any(row.get("val/acc5", 1) < 1 for row in rows):
        _line(accuracy, rows, "val/acc5", "top 5", ORANGE, scale=100)
    loss.set(xlabel="epoch", ylabel="loss", ylim=(0, None))
    accuracy.set(xlabel="epoch", ylabel="validation accuracy, %")
    for axes in (loss, accuracy):
        axes.set_xlim(left=0)
        axes.grid(color="#e2e8f0", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.lines:
            axes.legend(frameon=False)
    figure.suptitle(_title(title, 110), fontsize=11)
    _write(figure, path)


def _line(
    axes: Axes,
    rows: Sequence[dict[str, float]],
    name: str,
    label: str,
    color: str,
    scale: float = 1.0,
    lw: float = 1.8,
) -> None:
    points = [(row["step"] + 1, scale * row[name]) for row in rows if name in row]
    if points:
        # A step's place on the axis of epochs: its share of the epoch that it belongs to.
        per_step = (max(row["epoch"] for row in rows) + 1) / (max(row["step"] for row in rows) + 1)
        steps, values = np.array(points).T
        marker = "o" if len(points) < 3 else None
        axes.plot(steps * per_step, values, color=color, label=label, linewidth=lw, marker=marker)


def confusion(counts: NDArray[np.int64], classes: Sequence[str], path: Path, title: str) -> None:
    """How often each true class (row) was called what (column), as a share of the row.

    Counts are written where there is room for them; beyond 60 classes only every few names are.
    """
    n = len(classes)
    size = float(np.clip(2.2 + 0.36 * n, 4.2, 16))
    font = float(np.clip(10 - n / 12, 4.5, 9.5))
    figure = Picture(size + 0.6, size)
    axes = figure.subplots()
    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if n <= 30:
        for row, column in zip(*np.nonzero(counts), strict=True):
            color = "white" if shares[row, column] > 0.5 else "#2d3748"
            text = axes.text(column, row, str(counts[row, column]), color=color, fontsize=font)
            text.set(ha="center", va="center")
    every, labels = max(1, -(-n // 60)), class_labels(classes, 22)
    ticks, names = range(0, n, every), labels[::every]
    too_wide = max(map(_width, names)) * len(names) > 9 * size
    axes.set_xticks(ticks, names, rotation=90 if too_wide else 0, fontsize=font)
    axes.set_yticks(ticks, names, fontsize=font)
    axes.set(xlabel="predicted", ylabel="true")
    axes.set_title(_title(title, int(9 * size)), fontsize=11)
    figure.colorbar(picture, ax=axes, shrink=0.7, label="share of the true class")
    _name(figure, labels, classes, path)
    _write(figure, path)


def samples(
    pictures: Sequence[Image.Image],
    true: Sequence[int],
    predicted: Sequence[int],
    confidence: Sequence[float],
    classes: Sequence[str],
    path: Path,
    title: str,
    columns: int = 6,
) -> None:
    """A sheet of images with what they were taken for, and in red what they are where that was
    wrong.

    Args:
        true, predicted: of each image, the place of its class in `classes`.
    """
    labels = class_labels(classes, 18)
    rows = -(-len(pictures) // columns)
    figure = Picture(1.75 * columns, 2.1 * rows + 0.4)
    for place, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        axes.set_axis_off()
        if place >= len(pictures):
            continue
        axes.imshow(_square(pictures[place]), interpolation="nearest")
        right = true[place] == predicted[place]
        text = f"{labels[predicted[place]]}  {100 * confidence[place]:.0f} %"
        if not right:
            text += f"\nis {labels[true[place]]}"
        axes.set_title(text, fontsize=8, color=RIGHT if right else WRONG, loc="center")
    figure.suptitle(_title(title, 12 * columns), fontsize=11)
    _name(figure, labels, classes, path)
    _write(figure, path)


def _square(image: Image.Image, side: int = 160) -> Image.Image:
    """On a white square, large images shrunk, small ones enlarged in whole pixels."""
    factor = side // max(image.size)
    if factor >= 1:
        image = image.resize(
            (image.width * factor, image.height * factor), Image.Resampling.NEAREST
        )
    else:
        image = image.copy()
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    paper = Image.new("RGB", (side, side), "white")
    paper.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return paper


def _title(text: str, most: int) -> str:
    """A run has its folder's name, which may be long: it is cut, and what follows it is not."""
    name, colon, rest = text.rpartition(": ")
    return cut(shown(name), max(20, most - len(rest))) + colon + shown(rest)


def _name(figure: Figure, labels: Sequence[str], classes: Sequence[str], path: Path) -> None:
    """Where the picture has numbers, write the names beside it and say so."""
    if not any(map(NUMBERED.match, labels)):
        return
    lines = [f"#{number}\t{escaped(name)}\n" for number, name in enumerate(classes, 1)]
    write_text(path.with_name(CLASSES), "".join(lines))
    figure.supxlabel(f"#1, #2, ...: numbers of classes, whose names are in {CLASSES}", fontsize=8)


def _width(text: str) -> int:
    """In columns of a terminal: letters of East Asia are as wide as two."""
    return sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def _write(figure: Figure, path: Path) -> None:
    with atomic(path) as draft:
        figure.savefig(draft, dpi=120, format="png")
