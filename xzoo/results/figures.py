"""Figures of `xzoo compare`: points of ours and published ones, in the forms of the paper's
figures.

Ours are filled (half, where they are of the JPEG form of a data set), with the interval of the mean
as a bar; published ones are hollow. Kinds of graphs have the colours and marks of `xzoo.drawing`.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..datasets import DATASETS
from ..drawing import COLOUR, INK, LABEL, MARKER
from .labels import Label, place
from .runs import DENSE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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

# The labels of one picture, and the points that they must not hide.
Labels = tuple[list[Label], list[tuple[float, float]]]


@dataclass(frozen=True)
class Point:
    """One place in the pictures: an arm of ours, or a published figure."""

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


def draw(points: Sequence[Point]) -> Iterator[tuple[str, "Figure"]]:
    """File name and figure of every picture that these points give."""
    for name in dict.fromkeys(map(exact, DATASETS)):
        of_data = [p for p in points if exact(p.dataset) == name]
        if any(p.weights or p.macs for p in of_data):
            yield f"accuracy_{name}", draw_accuracy(of_data)
        if panels := _rivals(of_data):
            yield f"rivals_{name}", draw_rivals(panels)
    deep = [p for p in points if p.dataset == "cifar100" and p.network.startswith(BC) and p.weights]
    if any(_curve(p) for p in deep):
        yield "wider_deeper", draw_wider_deeper(deep)


def exact(dataset: str) -> str:
    """The data set that published figures are of: CIFAR-10's JPEG form is drawn beside the exact
    one.
    """
    return dataset.removesuffix("_q75")


# ---- accuracy against weights and MACs


def draw_accuracy(points: Sequence[Point]) -> "Figure":
    """Top-1 of one data set (CIFAR-10 in both its forms) against weights, left, and MACs, right."""
    points = [p for p in points if p.weights or p.macs]
    figure = _figure(15, 7.6)
    columns = figure.subplots(1, 2, sharey=True)
    sizes = (("weights", "weights"), ("macs", "multiply-accumulates of one image"))
    for axes, (name, title) in zip(columns, sizes, strict=True):
        placed = [p for p in points if getattr(p, name)]
        for chain in _chains(placed, name):
            heights = [p.top1 for p in chain]
            colour = COLOURS[chain[-1].kind]
            axes.plot(
                [getattr(p, name) for p in chain],
                heights,
                color=colour,
                linewidth=1,
                alpha=0.45,
                zorder=1,
            )
        for point in placed:
            _mark(axes, getattr(point, name), point)
        _log_axis(axes, title)
    columns[0].set_ylabel("top-1 accuracy, %")
    figure.suptitle(_title(points), fontsize=13)
    _explain(figure, points)
    _kinds_legend(columns[1], points)
    for axes, (name, _) in zip(columns, sizes, strict=True):
        placed = [p for p in points if getattr(p, name)]
        labels = [
            Label(getattr(p, name), p.top1, text, _text_colour(p), size)
            for p, text, size in _texts(placed)
        ]
        place(axes, labels, [spot for p in placed for spot in _spots(getattr(p, name), p)])
    return figure


def _chains(points: Sequence[Point], name: str) -> list[list[Point]]:
    """One network's compressions of one kind, from its dense form on; what has a name of its own is
    no step of them.
    """
    chains: dict[Any, list[Point]] = defaultdict(list)
    dense: dict[Any, list[Point]] = defaultdict(list)
    for point in points:
        whose = (point.network, point.dataset, point.by, point.budget)
        if point.kind == DENSE:
            dense[whose].append(point)
        elif point.kind != "pruned":
            chains[whose, point.kind, point.shares, point.label].append(point)
    return [
        dense[whose][:1] + sorted(chain, key=lambda p: -getattr(p, name))
        for (whose, *_), chain in chains.items()
    ]


def _texts(points: Sequence[Point]) -> list[tuple[Point, str, float]]:
    """Texts and their sizes: a network is named where its largest form stands, a compression once
    for all kinds.
    """
    pure = all(p.network.startswith(BC) for p in points)
    said: set[Any] = set()
    texts = []
    # At one size the best kind is first, and says the compression for those below it.
    for point in sorted(points, key=lambda p: (-(p.weights or p.macs or 0), -p.top1)):
        whose = (point.network, point.dataset, point.by, point.budget)
        name = point.network.replace(BC, "" if pure else "BC ")
        foreign = point.by not in (AUTHORS, US, point.label)
        words = []
        if point.label:
            words = [point.label]
        elif whose not in said or foreign:
            words = [name]
        if point.kind != DENSE and point.compression and (whose, point.compression) not in said:
            words.append(f"c={point.compression}")
        if foreign:
            words.append(f"({point.by.split('/')[0]})")
        if not point.label:
            said |= {whose, (whose, point.compression)}
        if words:
            texts.append((point, " ".join(words), 7.0 if foreign else 8.5))
    return texts


def _title(points: Sequence[Point]) -> str:
    title = DATASETS[exact(points[0].dataset)].title
    if not any(p.ours for p in points):
        title += ": published figures; no run of ours yet"
    elif all(p.ours for p in points):
        title += ": our runs; nothing published beside them"
    placed = [p.network.startswith(BC) for p in points]
    if any(placed):
        name = "" if all(placed) else "BC "
        title += f"\n{name}40-24: DenseNet-BC of depth 40 and growth 24"
    return title


# ---- rivals


def _rivals(points: Sequence[Point]) -> dict[str, list[Point]]:
    """Title of a panel -> its points; a panel has two kinds of graph or more, and runs of one
    budget.
    """
    panels = {}
    for dataset, name in dict.fromkeys((p.dataset, p.network) for p in points):
        here = [p for p in points if (p.dataset, p.network) == (dataset, name)]
        here = [p for p in here if p.compression and (p.kind in RIVALS or p.kind == DENSE)]
        printed = [p for p in here if p.by == AUTHORS]
        title = f"{name} on {DATASETS[dataset].title}\n"
        for budget in dict.fromkeys(p.budget for p in here if p.ours):
            ours = [p for p in here if p.ours and p.budget == budget]
            if _kinds(ours) and max(len(_kinds(ours)), len(_kinds(printed))) > 1:
                panels[f"{title}{budget}, {_runs(ours)}"] = ours + printed
        if len(_kinds(printed)) > 1 and not any(panel.startswith(title) for panel in panels):
            panels[f"{title}published; no run of ours yet"] = printed
    return panels


def _kinds(points: Iterable[Point]) -> set[str]:
    return {p.kind for p in points} - {DENSE}


def draw_rivals(panels: dict[str, list[Point]]) -> "Figure":
    """Top-1 against compression for each kind of graph; the dense network as a level line."""
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = _figure(max(7.5, 5.8 * columns), 5.4 * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    labels = []
    for axes, (title, points) in zip(grid.flat, panels.items(), strict=False):
        labels.append((axes, *_draw_panel(axes, points)))
        axes.set_title(title, fontsize=11)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for row in grid:
        row[0].set_ylabel("top-1 accuracy, %")
    _explain(figure, [p for points in panels.values() for p in points])
    for axes, texts, marks in labels:
        place(axes, texts, marks)
    return figure


def _draw_panel(axes: "Axes", points: Sequence[Point]) -> Labels:
    curves: dict[Any, list[Point]] = defaultdict(list)
    for point in points:
        if point.kind != DENSE:
            curves[point.ours, point.kind, point.shares].append(point)
    labels: list[Label] = []
    marks: list[tuple[float, float]] = []
    for number, ((ours, kind, shares), curve) in enumerate(curves.items()):
        curve.sort(key=lambda p: p.compression or 0)
        # Side by side, or the bars of rivals that are equal would lie on one another.
        shift = 1 + 0.03 * (number - (len(curves) - 1) / 2) * (len(curves) > 2)
        places = [(p.compression or 0) * shift for p in curve]
        line = "-" if ours else "--"
        axes.plot(
            places,
            [p.top1 for p in curve],
            line,
            color=COLOURS[kind],
            linewidth=1.3,
            alpha=0.7,
            zorder=2,
        )
        for x, point in zip(places, curve, strict=True):
            _mark(axes, x, point)
            marks += _spots(x, point)
        several = len({key for key in curves if key[:2] == (ours, kind)}) > 1
        text = NAMES[kind] + (f", share {shares[0]} / {shares[1]}" if several else "")
        if ours != all(p.ours for p in points):
            text += " (ours)" if ours else " (published)"
        labels.append(Label(places[-1], curve[-1].top1, text, COLOURS[kind], 9.5))
    compressions = sorted({p.compression for p in points if p.compression and p.kind != DENSE})
    for point in points:
        if point.kind == DENSE:
            axes.axhline(
                point.top1,
                color=GREY,
                linewidth=1.2,
                linestyle="-" if point.ours else "--",
                zorder=1,
            )
            if point.low is not None and point.high is not None:
                axes.axhspan(point.low, point.high, color=GREY, alpha=0.15, linewidth=0, zorder=0)
            text = f"dense {point.top1:.2f}" + ("" if point.ours else " (published)")
            labels.append(Label(compressions[-1] * 1.2, point.top1, text, GREY, 9.5))
    axes.set_xscale("log", base=2)
    axes.set_xlim(
        compressions[0] / 1.2,
        compressions[-1] * (compressions[-1] / compressions[0]) ** 0.33 * 1.25,
    )
    axes.set_xticks(compressions, [str(c) for c in compressions])
    axes.minorticks_off()
    axes.set_xlabel("compression c: an output reads 1/c of the inputs")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.07 * (high - low))
    _tidy(axes)
    return labels, marks


# ---- wider and deeper

# Colour, mark and name by the end of the network's name; other networks are there for comparison if
# dense.
_CURVES = {
    " 40-200": ("#d55e00", "s", "wider: 40-200"),
    " 40-100": ("#e69f00", "D", "wider: 40-100"),
    " 70-60": ("#0072b2", "o", "deeper: 70-60"),
    " 58-60": ("#56b4e9", "^", "deeper: 58-60"),
}


def _curve(point: Point) -> str | None:
    return next((end for end in _CURVES if point.network.endswith(end)), None)


def draw_wider_deeper(points: Sequence[Point]) -> "Figure":
    """DenseNet-BC at all compressions: left with the counts that the slide prints, right with true
    ones, and ours.
    """
    figure = _figure(15, 7)
    left, right = figure.subplots(1, 2, sharey=True)
    authors = [p for p in points if p.by == AUTHORS]
    ours = [p for p in points if p.ours]
    labels = []
    for axes, shown, name, axis in (
        (
            left,
            [p for p in authors if p.printed and _curve(p)],
            "printed",
            "parameters, as the slide prints them",
        ),
        (right, [*authors, *ours], "weights", "weights, as counted"),
    ):
        labels.append((axes, *_draw_curves(axes, shown, name)))
        _log_axis(axes, axis)
    left.set_ylabel("top-1 accuracy on CIFAR-100, %")
    left.set_ylim(top=left.get_ylim()[1] + 0.3)
    left.set_title("with the slide's counts", fontsize=11)
    right.set_title(
        "with true counts, and dense networks of usual width" + (", and ours" if ours else ""),
        fontsize=11,
    )
    none = "" if ours else "; published figures, no run of ours yet"
    figure.suptitle(
        f"Wider or deeper? DenseNet-BC; 70-60 has depth 70 and growth 60{none}", fontsize=13
    )
    _explain(figure, [p for p in [*authors, *ours] if _curve(p) or p.kind == DENSE])
    for axes, texts, marks in labels:
        place(axes, texts, marks)
    return figure


def _draw_curves(axes: "Axes", points: Sequence[Point], name: str) -> Labels:
    curves: dict[Any, list[Point]] = defaultdict(list)
    labels: list[Label] = []
    marks = [spot for p in points for spot in _spots(getattr(p, name), p)]
    for point in points:
        if end := _curve(point):
            curves[end, point.ours, point.budget].append(point)
        elif point.kind == DENSE:
            _mark(axes, getattr(point, name), point)
            labels.append(
                Label(getattr(point, name), point.top1, point.network.removeprefix(BC), GREY, 8)
            )
    for (end, ours, _), curve in curves.items():
        colour, marker, title = _CURVES[end]
        curve.sort(key=lambda p: getattr(p, name))
        places = [getattr(p, name) for p in curve]
        line = "-" if ours else "--"
        axes.plot(places, [p.top1 for p in curve], line, color=colour, linewidth=1.2, zorder=1)
        for x, point in zip(places, curve, strict=True):
            _mark(axes, x, point, colour, marker)
            text = DENSE if point.kind == DENSE else f"c={point.compression}"
            labels.append(Label(x, point.top1, text, colour, 8))
        labels.append(
            Label(places[-1], curve[-1].top1, title + (" (ours)" if ours else ""), colour, 10.5)
        )
    return labels, marks


# ---- what the pictures have in common


def _figure(width: float, height: float) -> "Figure":
    from ..lettering import Picture

    return Picture(width, height)


def _mark(
    axes: "Axes", x: float, point: Point, colour: str | None = None, marker: str | None = None
) -> None:
    colour = colour or COLOURS[point.kind]
    if point.low is not None and point.high is not None:
        bar = [[point.top1 - point.low], [point.high - point.top1]]
        axes.errorbar(
            [x], [point.top1], bar, fmt="none", ecolor=colour, elinewidth=1.3, capsize=3, zorder=3
        )
    style = {"color": colour, "marker": marker or MARKERS[point.kind]} | _fill(point, colour)
    axes.plot([x], [point.top1], markeredgewidth=1.2, markersize=7, zorder=4, **style)


def _fill(point: Point, colour: str) -> dict[str, Any]:
    """White inside where it is published, so that no line runs through."""
    half = point.ours and point.dataset != exact(point.dataset)
    face = colour if point.ours else "white"
    return {
        "markerfacecolor": face,
        "markerfacecoloralt": "white",
        "fillstyle": "bottom" if half else "full",
    }


_PARTS = [i / 8 for i in range(9)]


def _spots(x: float, point: Point) -> list[tuple[float, float]]:
    """The point, and its bar from end to end."""
    if point.low is None or point.high is None:
        return [(x, point.top1)]
    return [
        (x, point.top1 + part * (end - point.top1))
        for end in (point.low, point.high)
        for part in _PARTS
    ]


def _log_axis(axes: "Axes", title: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
    axes.minorticks_off()
    low, high = axes.get_xlim()
    axes.set_xlim(low / 1.15, high * 1.3)
    axes.set_xlabel(title)
    _tidy(axes)


def _tidy(axes: "Axes") -> None:
    axes.grid(color="#e8e8e8", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _text_colour(point: Point) -> str:
    return GREY if point.kind in (DENSE, "pruned") else COLOURS[point.kind]


def _kinds_legend(axes: "Axes", points: Sequence[Point]) -> None:
    """Inside, at the lower right: a network that is large and bad would be no point at all."""
    from matplotlib.lines import Line2D

    kinds: dict[str, str] = {}
    for point in points:
        kinds.setdefault(NAMES[point.kind], point.kind)
    handles = [
        Line2D(
            [],
            [],
            marker=MARKERS[kind],
            color=COLOURS[kind],
            linestyle="none",
            markersize=7,
            label=name,
        )
        for name, kind in sorted(kinds.items())
    ]
    axes.legend(handles=handles, loc="lower right", frameon=False, fontsize=9.5)


def _explain(figure: "Figure", points: Sequence[Point]) -> None:
    """Below: what filled, half filled and hollow marks are."""
    from matplotlib.lines import Line2D

    handles = []
    groups: dict[Any, list[Point]] = defaultdict(list)
    for point in points:
        groups[point.ours, point.dataset].append(point)
    for (ours, dataset), group in sorted(groups.items(), key=lambda item: item[0], reverse=True):
        if ours:
            bars = "mean and 95 % interval" if max(p.n for p in group) > 1 else "no interval"
            text = f"ours: last epoch, {bars}, {_runs(group)}"
        else:
            protocols = Counter(p.protocol for p in group).most_common()
            text = f"published: {', '.join(f'{name} ({n})' for name, n in protocols)}"
        if len({p.dataset for p in points}) > 1:
            text = text.replace(":", f" on {DATASETS[dataset].title}:", 1)
        style = {"color": INK, "marker": "o", "linestyle": "none"} | _fill(group[0], INK)
        handles.append(Line2D([], [], markersize=7, label=text, **style))
    columns = 2 if figure.get_figwidth() > 11 else 1
    figure.legend(
        handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9.5
    )


def _runs(points: Iterable[Point]) -> str:
    runs = sorted(p.n for p in points)
    return f"n = {runs[0]}" + (f" to {runs[-1]}" if runs[-1] != runs[0] else "")


def count(value: float) -> str:
    """1,500,000 -> 1.5 M, in three digits."""
    for unit, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= 0.9995 * unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}"
