"""The picture of a benchmark: how many times as fast as dense, against how many times fewer
multiplications.
"""

import math
import re
from collections.abc import Iterable, Sequence
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from ..errors import XzooError
from ..files import atomic
from ..lettering import Picture
from .figures import Figure, check_file

PICTURES = (".png", ".svg", ".pdf")
# What is drawn alike: label, a pattern that is in a figure's name (the first that is counts),
# colour, marker.
KINDS = {
    "model": (
        ("inference, batch 1", r"inference, batch 1$", "#0072b2", "o"),
        ("inference, large batch", r"inference", "#009e73", "s"),
        ("training step", r"training step", "#d55e00", "^"),
    ),
    "layer": (
        ("3x3", r"forward, 3x3", "#0072b2", "o"),
        ("1x1, share 1 or 2", r"forward, 1x1.* s[12]$", "#e69f00", "v"),
        ("1x1, share 4 or 8", r"forward, 1x1", "#009e73", "s"),
        ("linear", r"forward, linear", "#cc79a7", "D"),
        ("input gradient", r"input grad", "#d55e00", "^"),
        ("weight gradient", r"weight grad", "#777777", "x"),
    ),
}
# how far to the right of a kind's points the next kind's are
APART = {"model": 1.012, "layer": 1.03}
TICKS = (0.1, 0.2, 0.5, 1, 2, 4, 8, 16, 32, 64, 128)
NAME_APART = 0.04  # parts of the picture's width between names of models
TITLE = {"model": "whole models", "layer": "single layers"}


def draw(figures: Iterable[Figure], path: Path) -> None:
    """Write a picture of the ratios of models and layers to dense ones, with quartiles and the
    ideal line.

    Raises: XzooError where there is no such figure, or the file cannot be written.
    """
    check_file(path, PICTURES)
    parts: dict[str, list[Figure]] = {part: [] for part in KINDS}
    for figure in figures:
        if figure.part in parts and figure.ideal is not None:
            parts[figure.part].append(figure)
    parts = dict(filter(itemgetter(1), parts.items()))
    if not parts:
        raise XzooError("nothing to draw: no model or layer was measured against its dense form")
    picture = Picture(6.6 * len(parts), 6.2)
    for axes, part in zip(picture.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
        _panel(axes, part, parts[part])
    with atomic(path) as draft:
        picture.savefig(draft, dpi=110, format=path.suffix[1:])


def _panel(axes: Axes, part: str, figures: Sequence[Figure]) -> None:
    ideals = [figure.ideal or 1.0 for figure in figures]
    reached = list(chain.from_iterable(figure.quartiles for figure in figures))
    left, right = min(1.5, *ideals) / 1.12, max(3.0, *ideals) * 1.15
    bottom, top = min(0.8, *reached) / 1.1, max(right, *reached) * 1.05
    axes.plot(
        [left, right],
        [left, right],
        color="#222222",
        linewidth=1.3,
        label="ideal: as the multiplications fall",
    )
    axes.axhline(1, color="#222222", linewidth=1.3, linestyle=":", label="dense")
    kinds = KINDS[part]
    for place, (label, _, colour, marker) in enumerate(kinds):
        mine = [figure for figure in figures if _kind(kinds, figure.what) == place]
        if mine:
            # Each kind a little to the right of that before, as many have one ideal.
            apart = APART[part] ** (place - (len(kinds) - 1) / 2)
            x = [(figure.ideal or 1.0) * apart for figure in mine]
            low, middle, high = zip(*(figure.quartiles for figure in mine), strict=True)
            spread = np.abs(np.array([low, high]) - middle)
            style: dict[str, Any] = {"color": colour, "markersize": 6, "elinewidth": 1}
            axes.errorbar(x, middle, spread, label=label, fmt=marker, alpha=0.85, **style)
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(bottom, top))
    for axis, ends in ((axes.xaxis, (left, right)), (axes.yaxis, (bottom, top))):
        ticks = [tick for tick in TICKS if ends[0] <= tick <= ends[1]]
        axis.set_ticks(ticks, list(map("{:g}x".format, ticks)))
        axis.set_minor_locator(NullLocator())
    axes.set_xlabel("multiplications fall")
    axes.set_ylabel(f"times as fast as dense: {TITLE[part]}")
    axes.grid(alpha=0.25)
    axes.legend(loc="upper left", fontsize=8.5, framealpha=1, edgecolor="none")
    if part == "model":
        places = {figure.what.partition(",")[0]: figure.ideal or 1.0 for figure in figures}
        _names(axes, places, left, right)


def _names(axes: Axes, places: dict[str, float], left: float, right: float) -> None:
    """The models' names above the picture, apart from each other, each with a line to its place on
    the axis.
    """
    width, shown = math.log(right / left), -1.0
    for name, ideal in sorted(places.items(), key=lambda item: item[1]):
        shown = max(math.log(ideal / left) / width, shown + NAME_APART)
        axes.axvline(ideal, color="#bbbbbb", linewidth=0.6, zorder=0)
        axes.annotate(
            name,
            (ideal, 1.0),
            xytext=(shown, 1.04),
            xycoords=("data", "axes fraction"),
            textcoords="axes fraction",
            arrowprops={
                "arrowstyle": "-",
                "color": "#bbbbbb",
                "linewidth": 0.6,
                "shrinkA": 0,
                "shrinkB": 0,
            },
            rotation=90,
            fontsize=8,
            ha="center",
            va="bottom",
        )


def _kind(kinds: Sequence[tuple[str, str, str, str]], what: str) -> int | None:
    for place, (_, pattern, *_) in enumerate(kinds):
        if re.search(pattern, what):
            return place
    return None
