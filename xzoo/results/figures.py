"""Figures of `xzoo compare`: our points and published ones, in the forms of the paper's figures.

Ours are filled (half, where they are of the JPEG form of a data set), with the interval of the mean
as a bar; published ones are hollow. Kinds of graphs have the colours and marks of `xzoo.drawing`.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, repeat, starmap
from operator import attrgetter
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator

from ..datasets import DATASETS
from ..drawing import COLOUR, INK, LABEL, MARKER
from ..lettering import Picture
from .labels import Label, place
from .runs import DENSE

GREY = "#666666"
COLOURS = COLOUR | {DENSE: GREY, "pruned": "#999999"}
MARKERS = MARKER | {"expander": "o", DENSE: "P", "pruned": "X"}
NAMES = LABEL | {
    "biregular": "expander",
    "expander": "expander",
    DENSE: "dense",
    "pruned": "other methods",
}
RIVALS = ("biregular", "ramanujan", "expander", "random", "shuffle", "group")
AUTHORS = "X-Nets"  # whom published figures are by, where they are the paper's
US = "xzoo"
BC = "DenseNet-BC "

# Axes, their labels, and the points that the labels must not hide.
Labels = tuple[Axes, list[Label], list[tuple[float, float]]]


@dataclass(frozen=True)
class Point:
    """One point of the pictures: an arm of ours, or a published figure."""

    dataset: str
    network: str
    kind: str
    compression: int | None
    label: str | None  # a name of its own, where a compression does not say enough
    weights: int | None
    macs: int | None
    top1: float
    by: str
    protocol: str  # which epoch top1 is of
    low: float | None = None
    high: float | None = None
    n: int = 1
    shares: tuple[int | None, int | None] = (None, None)
    budget: str = ""  # what runs must have in common to be rivals
    printed: int | None = None  # parameters as published

    @property
    def ours(self) -> bool:
        return self.by == US


def draw(points: Sequence[Point]) -> Iterator[tuple[str, Figure]]:
    """File name and figure of every picture that these points give."""
    by_data = _grouped(points, lambda p: exact(p.dataset))
    for name in DATASETS:
        of_data = by_data[name]
        if any(p.weights or p.macs for p in of_data):
            yield f"accuracy_{name}", draw_accuracy(of_data)
        if panels := _rivals(of_data):
            yield f"rivals_{name}", draw_rivals(panels)
    deep = [p for p in by_data["cifar100"] if p.network.startswith(BC) and p.weights]
    if any(map(_is_on_curve, deep)):
        yield "wider_deeper", draw_wider_deeper(deep)


def exact(dataset: str) -> str:
    """The data set that published figures are of: CIFAR-10's JPEG form is drawn beside the exact
    one.
    """
    return dataset.removesuffix("_q75")


def _grouped(points: Iterable[Point], key: Callable[[Point], Any]) -> dict[Any, list[Point]]:
    """The points by what `key` gives of each, in the order in which they come."""
    groups: dict[Any, list[Point]] = defaultdict(list)
    for point in points:
        groups[key(point)].append(point)
    return groups


# ---- accuracy against weights and MACs


def draw_accuracy(points: Sequence[Point]) -> Figure:
    """Top-1 of one data set (CIFAR-10 in both its forms) against weights, left, and MACs, right."""
    points = [p for p in points if p.weights or p.macs]
    figure = Picture(15, 7.6)
    columns = figure.subplots(1, 2, sharey=True)
    sizes = (("weights", "weights"), ("macs", "multiply-accumulates of one image"))
    labels = []
    for axes, (name, title) in zip(columns, sizes, strict=True):
        labels.append(_draw_sizes(axes, points, name, title))
    columns[0].set_ylabel("top-1 accuracy, %")
    figure.suptitle(_title(points), fontsize=13)
    _kinds_legend(columns[1], points)
    return _explained(figure, points, labels)


def _draw_sizes(axes: Axes, points: Sequence[Point], name: str, title: str) -> Labels:
    size = attrgetter(name)
    points = list(filter(size, points))
    for steps in _chains(points, name):
        xs, heights = zip(*map(attrgetter(name, "top1"), steps), strict=True)
        axes.plot(xs, heights, color=COLOURS[steps[-1].kind], linewidth=1, alpha=0.45, zorder=1)
    marks = _mark(axes, map(size, points), points)
    labels = []
    for point, text, font_size in _texts(points):
        colour = GREY if point.kind in (DENSE, "pruned") else COLOURS[point.kind]
        labels.append(Label(size(point), point.top1, text, colour, font_size))
    _log_axis(axes, title)
    return axes, labels, marks


# What the compressions of one network have in common, its dense form included.
_arm = attrgetter("network", "dataset", "by", "budget")


def _chains(points: Sequence[Point], name: str) -> list[list[Point]]:
    """One network's compressions of one kind, from its dense form on; what has a name of its own is
    not a step of them.
    """
    dense = _grouped((p for p in points if p.kind == DENSE), _arm)
    sparse = _grouped(points, lambda p: (_arm(p), p.kind, p.shares, p.label))
    chains = []
    for (arm, kind, *_), steps in sparse.items():
        if kind not in (DENSE, "pruned"):
            chains.append(dense[arm][:1] + sorted(steps, key=attrgetter(name), reverse=True))
    return chains


def _texts(points: Sequence[Point]) -> Iterator[tuple[Point, str, float]]:
    """Texts and their sizes: a network is named at its largest form, a compression once for all
    kinds.
    """
    pure = all(p.network.startswith(BC) for p in points)
    said: set[Any] = set()
    # At one size the best kind is first, and says the compression for those below it.
    for point in sorted(points, key=lambda p: (-(p.weights or p.macs or 0), -p.top1)):
        arm = _arm(point)
        foreign = point.by not in (AUTHORS, US, point.label)
        words = [point.label] if point.label else []
        if not point.label and (arm not in said or foreign):
            words = [point.network.replace(BC, "" if pure else "BC ")]
        if point.kind != DENSE and point.compression and (arm, point.compression) not in said:
            words.append(f"c={point.compression}")
        if foreign:
            words.append(f"({point.by.split('/')[0]})")
        if not point.label:
            said |= {arm, (arm, point.compression)}
        if words:
            yield point, " ".join(words), 7.0 if foreign else 8.5


def _title(points: Sequence[Point]) -> str:
    title = DATASETS[exact(points[0].dataset)].title
    ours = {p.ours for p in points}
    if ours == {False}:
        title += ": published figures; no run of ours yet"
    elif ours == {True}:
        title += ": our runs; nothing published beside them"
    deep = {p.network.startswith(BC) for p in points}
    if True in deep:
        name = "BC " if False in deep else ""
        title += f"\n{name}40-24: DenseNet-BC of depth 40 and growth 24"
    return title


# ---- rivals


def _rivals(points: Sequence[Point]) -> dict[str, list[Point]]:
    """Title of a panel -> its points; a panel has two kinds of graph or more, and runs of one
    budget.
    """
    panels: dict[str, list[Point]] = {}
    for (dataset, name), of_network in _grouped(points, lambda p: (p.dataset, p.network)).items():
        rivals = [p for p in of_network if p.compression and p.kind in (*RIVALS, DENSE)]
        printed = [p for p in rivals if p.by == AUTHORS]
        title = f"{name} on {DATASETS[dataset].title}\n"
        known = len(panels)
        for budget, ours in _grouped((p for p in rivals if p.ours), attrgetter("budget")).items():
            if _kinds(ours) and max(len(_kinds(ours)), len(_kinds(printed))) > 1:
                panels[f"{title}{budget}, {_runs(ours)}"] = ours + printed
        if len(_kinds(printed)) > 1 and len(panels) == known:
            panels[f"{title}published; no run of ours yet"] = printed
    return panels


def _kinds(points: Iterable[Point]) -> set[str]:
    return {p.kind for p in points} - {DENSE}


def draw_rivals(panels: dict[str, list[Point]]) -> Figure:
    """Top-1 against compression for each kind of graph; the dense network as a level line."""
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Picture(max(7.5, 5.8 * columns), 5.4 * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    labels = []
    for axes, (title, points) in zip(grid.flat, panels.items(), strict=False):
        labels.append(_draw_panel(axes, points))
        axes.set_title(title, fontsize=11)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes in grid[:, 0]:
        axes.set_ylabel("top-1 accuracy, %")
    return _explained(figure, list(chain.from_iterable(panels.values())), labels)


def _draw_panel(axes: Axes, points: Sequence[Point]) -> Labels:
    sparse = [p for p in points if p.kind != DENSE]
    curves = _grouped(sparse, attrgetter("ours", "kind", "shares"))
    shares_of = Counter((ours, kind) for ours, kind, _ in curves)
    mixed = len({p.ours for p in points}) > 1
    labels, marks = [], []
    for number, ((ours, kind, shares), curve) in enumerate(curves.items()):
        curve.sort(key=attrgetter("compression"))
        # Side by side, or the bars of rivals that are equal would lie on one another.
        shift = 1 + 0.03 * (number - (len(curves) - 1) / 2) * (len(curves) > 2)
        xs = [(p.compression or 0) * shift for p in curve]
        marks += _draw_curve(axes, xs, curve, COLOURS[kind], alpha=0.7, linewidth=1.3, zorder=2)
        text = NAMES[kind]
        if shares_of[ours, kind] > 1:
            text += f", share {shares[0]} / {shares[1]}"
        if mixed:
            text += " (ours)" if ours else " (published)"
        labels.append(Label(xs[-1], curve[-1].top1, text, COLOURS[kind], 9.5))
    compressions = sorted({p.compression for p in sparse if p.compression})
    for point in points:
        if point.kind == DENSE:
            line = "-" if point.ours else "--"
            axes.axhline(point.top1, color=GREY, linewidth=1.2, linestyle=line, zorder=1)
            if point.low is not None and point.high is not None:
                axes.axhspan(point.low, point.high, color=GREY, alpha=0.15, linewidth=0, zorder=0)
            text = f"dense {point.top1:.2f}" + ("" if point.ours else " (published)")
            labels.append(Label(compressions[-1] * 1.2, point.top1, text, GREY, 9.5))
    axes.set_xscale("log", base=2)
    least, most = compressions[0], compressions[-1]
    axes.set_xlim(least / 1.2, most * (most / least) ** 0.33 * 1.25)
    axes.set_xticks(compressions, list(map(str, compressions)))
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.07 * (high - low))
    _tidy(axes, "compression c: an output reads 1/c of the inputs")
    return axes, labels, marks


# ---- wider and deeper

# Colour, mark and name of a curve by its network; other networks are there for comparison if dense.
_CURVES = {
    "40-200": ("#d55e00", "s", "wider: 40-200"),
    "40-100": ("#e69f00", "D", "wider: 40-100"),
    "70-60": ("#0072b2", "o", "deeper: 70-60"),
    "58-60": ("#56b4e9", "^", "deeper: 58-60"),
}


def _is_on_curve(point: Point) -> bool:
    return point.network.removeprefix(BC) in _CURVES


def draw_wider_deeper(points: Sequence[Point]) -> Figure:
    """DenseNet-BC at all compressions: left with the counts that the slide prints, right with true
    ones, and ours.
    """
    figure = Picture(15, 7)
    left, right = figure.subplots(1, 2, sharey=True)
    authors = [p for p in points if p.by == AUTHORS]
    ours = [p for p in points if p.ours]
    printed = [p for p in authors if p.printed and _is_on_curve(p)]
    labels = [
        _draw_curves(left, printed, "printed", "parameters, as the slide prints them"),
        _draw_curves(right, authors + ours, "weights", "weights, as counted"),
    ]
    left.set_ylabel("top-1 accuracy on CIFAR-100, %")
    left.set_ylim(top=left.get_ylim()[1] + 0.3)
    left.set_title("with the slide's counts", fontsize=11)
    also = ", and ours" if ours else ""
    right.set_title(f"with true counts, and dense networks of usual width{also}", fontsize=11)
    title = "Wider or deeper? DenseNet-BC; 70-60 has depth 70 and growth 60"
    none = "" if ours else "; published figures, no run of ours yet"
    figure.suptitle(title + none, fontsize=13)
    drawn = [p for p in authors + ours if _is_on_curve(p) or p.kind == DENSE]
    return _explained(figure, drawn, labels)


def _draw_curves(axes: Axes, points: Sequence[Point], name: str, title: str) -> Labels:
    size = attrgetter(name)
    others = [p for p in points if not _is_on_curve(p)]
    dense = [p for p in others if p.kind == DENSE]
    marks = _mark(axes, map(size, dense), dense)
    # Other networks are not drawn, but their places stay free of labels.
    marks += [(size(p), p.top1) for p in others if p.kind != DENSE]
    labels = [Label(size(p), p.top1, p.network.removeprefix(BC), GREY, 8) for p in dense]
    curves = _grouped(filter(_is_on_curve, points), attrgetter("network", "ours", "budget"))
    for (network, ours, _), curve in curves.items():
        colour, marker, text = _CURVES[network.removeprefix(BC)]
        curve.sort(key=size)
        xs = list(map(size, curve))
        marks += _draw_curve(axes, xs, curve, colour, marker, linewidth=1.2, zorder=1)
        for x, point in zip(xs, curve, strict=True):
            step = DENSE if point.kind == DENSE else f"c={point.compression}"
            labels.append(Label(x, point.top1, step, colour, 8))
        whose = " (ours)" if ours else ""
        labels.append(Label(xs[-1], curve[-1].top1, text + whose, colour, 10.5))
    _log_axis(axes, title)
    return axes, labels, marks


# ---- what the pictures have in common


def _draw_curve(
    axes: Axes,
    xs: Sequence[float],
    curve: Sequence[Point],
    colour: str,
    marker: str | None = None,
    **style: Any,
) -> list[tuple[float, float]]:
    """Points and the line through them, dashed where they are published; returns as `_mark`."""
    line = "-" if curve[0].ours else "--"
    axes.plot(xs, [p.top1 for p in curve], line, color=colour, **style)
    return _mark(axes, xs, curve, colour, marker)


def _mark(
    axes: Axes,
    xs: Iterable[float],
    points: Iterable[Point],
    colour: str | None = None,
    marker: str | None = None,
) -> list[tuple[float, float]]:
    """Draw points and their bars; returns what no text may hide: the points, and the bars from end
    to end.
    """
    marks: list[tuple[float, float]] = []
    for x, point in zip(xs, points, strict=True):
        ink = colour or COLOURS[point.kind]
        if point.low is None or point.high is None:
            marks.append((x, point.top1))
        else:
            bar = [[point.top1 - point.low], [point.high - point.top1]]
            axes.errorbar(
                [x], [point.top1], bar, fmt="none", ecolor=ink, elinewidth=1.3, capsize=3, zorder=3
            )
            marks += zip(repeat(x), np.linspace(point.low, point.high, 17))
        style = {"color": ink, "marker": marker or MARKERS[point.kind]} | _fill(point, ink)
        axes.plot([x], [point.top1], markeredgewidth=1.2, markersize=7, zorder=4, **style)
    return marks


def _fill(point: Point, colour: str) -> dict[str, Any]:
    """White inside where it is published, so that no line runs through."""
    half = point.ours and point.dataset != exact(point.dataset)
    return {
        "markerfacecolor": colour if point.ours else "white",
        "markerfacecoloralt": "white",
        "fillstyle": "bottom" if half else "full",
    }


def _log_axis(axes: Axes, title: str) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
    low, high = axes.get_xlim()
    axes.set_xlim(low / 1.15, high * 1.3)
    _tidy(axes, title)


def _tidy(axes: Axes, title: str) -> None:
    axes.minorticks_off()
    axes.set_xlabel(title)
    axes.grid(color="#e8e8e8", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _kinds_legend(axes: Axes, points: Sequence[Point]) -> None:
    """Inside, at the lower right: nothing is drawn there, where a network is large and bad."""
    kinds = {NAMES[p.kind]: p.kind for p in points}
    style: dict[str, Any] = {"linestyle": "none", "markersize": 7}
    for name, kind in sorted(kinds.items()):
        axes.plot([], [], label=name, marker=MARKERS[kind], color=COLOURS[kind], **style)
    axes.legend(loc="lower right", frameon=False, fontsize=9.5)


def _explained(figure: Figure, points: Sequence[Point], labels: Iterable[Labels]) -> Figure:
    """The figure with what filled, half filled and hollow marks are, below, and with its labels."""
    handles = []
    groups = _grouped(points, attrgetter("ours", "dataset"))
    several = len({dataset for _, dataset in groups}) > 1
    for ours, dataset in sorted(groups, reverse=True):
        group = groups[ours, dataset]
        on = f" on {DATASETS[dataset].title}" if several else ""
        if ours:
            runs = _runs(group)
            bars = "no interval" if runs == "n = 1" else "mean and 95 % interval"
            text = f"ours{on}: last epoch, {bars}, {runs}"
        else:
            protocols = Counter(p.protocol for p in group).most_common()
            text = f"published{on}: {', '.join(starmap('{} ({})'.format, protocols))}"
        style = {"color": INK, "marker": "o", "linestyle": "none"} | _fill(group[0], INK)
        handles.append(Line2D([], [], markersize=7, label=text, **style))
    columns = 2 if figure.get_figwidth() > 11 else 1
    figure.legend(
        handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9.5
    )
    for axes, texts, marks in labels:
        place(axes, texts, marks)
    return figure


def _runs(points: Iterable[Point]) -> str:
    runs = {p.n for p in points}
    return "n = " + " to ".join(map(str, sorted({min(runs), max(runs)})))


def count(value: float) -> str:
    """1,500,000 -> 1.5 M, in three digits."""
    for unit, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= 0.9995 * unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}"
