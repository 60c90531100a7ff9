"""`xzoo compare`: the paper's figures with our points and the published ones beside them, and all as one table.

    accuracy_DATA.png    top-1 against weights and against MACs; a line joins one network's compressions
    rivals_DATA.png      expander, group, shuffle and random against compression, a panel for each network
    wider_deeper.png     DenseNet-BC on CIFAR-100, with the counts that the slide prints and with the true ones
    results.md           every arm of ours and every published figure

Points of ours are filled: the mean of the runs, and its 95 % interval where there are several. Published ones are
hollow, most of them the best epoch on the test set of a single run. What has no point at all is not drawn.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..drawing import COLOUR, INK, LABEL, MARKER
from ..errors import XzooError
from . import results as tables
from .labels import Label, place
from .results import DATASETS, DENSE, Published, Summary
from .run import atomic, write_text
from .table import check_known

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GREY = "#666666"
COLOURS = COLOUR | {DENSE: GREY, "pruned": "#999999"}
MARKERS = MARKER | {"expander": "o", DENSE: "P", "pruned": "X"}
NAMES = LABEL | {"biregular": "expander", "expander": "expander", DENSE: "dense", "pruned": "other methods"}
RIVALS = ("biregular", "ramanujan", "expander", "random", "shuffle", "group")
AUTHORS = "X-Nets"


def compare(results: Path | str, out: Path | str, datasets: Sequence[str] = ()) -> list[Path]:
    """Draw and tabulate the results beside the published ones.

    Args:
        results: the table of runs, such as recipes/results.csv.
        out: folder for the pictures and results.md; made if absent, files of these names are replaced.
        datasets: only these, keys of xzoo.train.results.DATASETS; all of them by default.
    Returns: the files.
    Raises: XzooError for an unknown data set, a malformed table, or a folder that cannot be written.
    """
    for name in datasets:
        check_known("dataset", name, DATASETS)
    wanted = set(datasets or DATASETS)
    summaries = [s for s in tables.aggregate(tables.read(results)) if s.row.dataset in wanted]
    figures = [p for p in tables.published() if p.dataset in {_exact(name) for name in wanted}]
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise XzooError(f"cannot write to {out}: {error.strerror}") from error
    files = []
    for name, figure in _pictures([*_points(summaries), *map(_of_published, figures)]):
        files.append(out / f"{name}.png")
        with atomic(files[-1]) as draft:
            figure.savefig(draft, dpi=144, format="png")
    files.append(out / "results.md")
    write_text(files[-1], markdown(summaries, figures))
    return files


def network(model: str) -> str:
    """How a network of the zoo is called beside published ones: without its compression and its X."""
    for pattern, name in _NETWORKS:
        if found := re.fullmatch(pattern, model):
            return found.expand(name)
    return model


_NETWORKS = (
    (r"x_vgg(\d+)(_[12]|_c\d+)?", r"VGG-\1"),
    (r"x_alexnet_[12]", "AlexNet"),
    (r"x_resnet(\d+)(_c\d+)?", r"ResNet-\1"),
    (r"x_densenet(\d+)", r"DenseNet-\1"),
    (r"x_densenetbc_(\d+)_(\d+)", r"DenseNet-BC \1-\2"),
    (r"x_mobilenet(\d)(\d)\d_c\d+", r"MobileNet-\1.\2"),
)


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
    ours: bool
    low: float | None = None
    high: float | None = None
    n: int = 1
    by: str = AUTHORS
    shares: tuple[int | None, int | None] = (None, None)
    budget: str = ""  # what runs must have in common to be rivals
    printed: int | None = None  # parameters as published


def _points(summaries: Iterable[Summary]) -> Iterator[Point]:
    """Arms that are measured on the part that is reported; what was measured for tuning is in the table only."""
    for each in summaries:
        row = each.row
        if row.split != DATASETS[row.dataset].split:
            continue
        yield Point(
            dataset=row.dataset,
            network=network(row.model),
            kind=row.graph,
            compression=row.compression,
            label=row.model.replace("x_", "X-", 1) if row.compression is None else None,
            weights=row.weights,
            macs=row.macs,
            top1=each.mean,
            ours=True,
            low=each.low,
            high=each.high,
            n=each.n,
            by="xzoo",
            shares=(row.share, row.spatial_share),
            budget=f"{row.epochs} epochs at {row.img_size} px, batch {row.global_batch}",
        )


def _of_published(figure: Published) -> Point:
    return Point(
        dataset=figure.dataset,
        network=figure.network,
        kind=figure.graph,
        compression=figure.compression,
        label=figure.label,
        weights=figure.weights or figure.published_params,
        macs=figure.macs or figure.published_macs,
        top1=figure.top1,
        ours=False,
        by=figure.by,
        printed=figure.published_params,
    )


def _exact(dataset: str) -> str:
    """The data set that published figures are of: CIFAR-10's JPEG form is drawn beside the exact one."""
    return dataset.removesuffix("_q75")


def _pictures(points: Sequence[Point]) -> Iterator[tuple[str, "Figure"]]:
    for name in dict.fromkeys(map(_exact, DATASETS)):
        of_data = [p for p in points if _exact(p.dataset) == name]
        if any(p.weights or p.macs for p in of_data):
            yield f"accuracy_{name}", draw_accuracy(of_data)
        if panels := _rivals(of_data):
            yield f"rivals_{name}", draw_rivals(panels)
    deep = [p for p in points if p.dataset == "cifar100" and p.network.startswith("DenseNet-BC") and p.weights]
    if any(p.network.endswith(_WIDER + _DEEPER) for p in deep):
        yield "wider_deeper", draw_wider_deeper(deep)


# ---- accuracy against weights and MACs


def draw_accuracy(points: Sequence[Point]) -> "Figure":
    """Top-1 of one data set (CIFAR-10 in both its forms) against weights, left, and MACs, right."""
    figure = _figure(15, 7.6)
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, name, what in ((left, "weights", "weights"), (right, "macs", "multiply-accumulates of one image")):
        placed = [p for p in points if getattr(p, name)]
        for chain in _chains(placed, name):
            if len(chain) > 1:
                line = [(getattr(p, name), p.top1) for p in chain]
                axes.plot(*zip(*line, strict=True), color=COLOURS[chain[-1].kind], linewidth=1, alpha=0.45, zorder=1)
        for point in placed:
            _mark(axes, getattr(point, name), point)
        _log_axis(axes, what)
    left.set_ylabel("top-1 accuracy, %")
    _title(figure, points)
    _legend(figure, points)
    for axes, name in ((left, "weights"), (right, "macs")):
        placed = [p for p in points if getattr(p, name)]
        labels = [Label(getattr(p, name), p.top1, text, _text_colour(p)) for p, text in _texts(placed)]
        place(axes, labels, [(getattr(p, name), p.top1) for p in placed])
    return figure


def _chains(points: Sequence[Point], name: str) -> list[list[Point]]:
    """One network's compressions of one kind, from its dense form on."""
    chains: dict[Any, list[Point]] = defaultdict(list)
    dense: dict[Any, list[Point]] = defaultdict(list)
    for point in points:
        whose = (point.network, point.dataset, point.by, point.budget)
        if point.kind == DENSE:
            dense[whose].append(point)
        elif point.kind != "pruned":
            chains[whose, point.kind, point.shares].append(point)
    ordered = (sorted(chain, key=lambda p: -getattr(p, name)) for chain in chains.values())
    return [dense[p[0].network, p[0].dataset, p[0].by, p[0].budget][:1] + p for p in ordered]


def _texts(points: Sequence[Point]) -> list[tuple[Point, str]]:
    """A text for each point: the network where its largest form stands, at the others what differs."""
    short = all(p.network.startswith("DenseNet-BC ") for p in points)
    named: set[Any] = set()
    texts = []
    for point in sorted(points, key=lambda p: -(p.weights or p.macs or 0)):
        whose = (point.network, point.dataset, point.by)
        name = point.network.removeprefix("DenseNet-BC ") if short else point.network
        words = [point.label] if point.label else [name] if whose not in named else []
        named.add(whose)
        if point.kind != DENSE and point.compression:
            words.append(f"c={point.compression}")
        if point.by not in (AUTHORS, "xzoo", point.label):
            words.append(f"({point.by.split('/')[0]})")
        if point.ours and point.n > 1:
            words.append(f"n={point.n}")
        if words:
            texts.append((point, " ".join(words)))
    return texts


# ---- rivals


def _rivals(points: Sequence[Point]) -> dict[str, list[Point]]:
    """Title of a panel -> its points; a panel has two kinds of graph or more, and runs of one budget."""
    panels = {}
    for dataset, name in dict.fromkeys((p.dataset, p.network) for p in points):
        here = [p for p in points if (p.dataset, p.network) == (dataset, name)]
        here = [p for p in here if p.compression and (p.kind in RIVALS or p.kind == DENSE)]
        printed = [p for p in here if not p.ours and p.by == AUTHORS]
        for budget in dict.fromkeys(p.budget for p in here if p.ours):
            ours = [p for p in here if p.ours and p.budget == budget]
            if len(_kinds(ours)) > 1 or (_kinds(ours) and len(_kinds(printed)) > 1):
                panels[f"{name} on {DATASETS[dataset].title}\n{budget}"] = ours + printed
        title = f"{name} on {DATASETS[dataset].title}"
        if len(_kinds(printed)) > 1 and not any(panel.startswith(title + "\n") for panel in panels):
            panels[f"{title}\npublished; no run of ours yet"] = printed
    return panels


def _kinds(points: Iterable[Point]) -> set[str]:
    return {p.kind for p in points} - {DENSE}


def draw_rivals(panels: dict[str, list[Point]]) -> "Figure":
    """Top-1 against compression for each kind of graph; the dense network as a level line."""
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = _figure(max(7.5, 5.6 * columns), 5.2 * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    labels = []
    for axes, (title, points) in zip(grid.flat, panels.items(), strict=False):
        labels.append((axes, *_draw_panel(axes, points)))
        axes.set_title(title, fontsize=11)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for row in grid:
        row[0].set_ylabel("top-1 accuracy, %")
    every = [p for points in panels.values() for p in points]
    _legend(figure, every)
    for axes, texts, marks in labels:
        place(axes, texts, marks)
    return figure


def _draw_panel(axes: "Axes", points: Sequence[Point]) -> tuple[list[Label], list[tuple[float, float]]]:
    """Draw one panel; return its labels, and what they must not hide."""
    curves: dict[Any, list[Point]] = defaultdict(list)
    for point in points:
        if point.kind != DENSE:
            curves[point.ours, point.kind, point.shares].append(point)
    several = {kind for _, kind, _ in curves if len({k[2] for k in curves if k[0] and k[1] == kind}) > 1}
    compressions = sorted({p.compression for p in points if p.compression and p.kind != DENSE})
    axes.set_xscale("log", base=2)
    axes.set_xlim(compressions[0] / 1.25, compressions[-1] * 1.9)
    labels, marks = [], []
    for number, ((ours, kind, shares), curve) in enumerate(curves.items()):
        curve.sort(key=lambda p: p.compression or 0)
        # Side by side, or the error bars of equal rivals lie on one another.
        shift = 1 + 0.022 * (number - (len(curves) - 1) / 2) * (len(curves) > 2)
        places = [(p.compression or 0) * shift for p in curve]
        style: dict[str, Any] = {"linewidth": 1.5} if ours else {"linewidth": 1.1, "linestyle": "--"}
        axes.plot(places, [p.top1 for p in curve], color=COLOURS[kind], alpha=0.8, zorder=2, **style)
        for x, point in zip(places, curve, strict=True):
            _mark(axes, x, point, size=7.5)
            marks += [(x, y) for y in (point.top1, point.low, point.high) if y is not None]
        runs = sorted({p.n for p in curve})
        text = NAMES[kind] + (f", share {shares[0]} / {shares[1]}" if kind in several and ours else "")
        text += f"\nours, n={'-'.join(map(str, dict.fromkeys((runs[0], runs[-1]))))}" if ours else "\npublished"
        labels.append(Label(places[-1], curve[-1].top1, text, COLOURS[kind], 9))
    for point in points:
        if point.kind == DENSE:
            axes.axhline(point.top1, color=GREY, linewidth=1.2, linestyle="-" if point.ours else "--", zorder=1)
            if point.low is not None and point.high is not None:
                axes.axhspan(point.low, point.high, color=GREY, alpha=0.15, linewidth=0, zorder=0)
            text = f"dense {point.top1:.2f}, " + (f"ours, n={point.n}" if point.ours else "published")
            labels.append(Label(compressions[-1] * 1.25, point.top1, text, GREY, 9))
    axes.set_xticks(compressions, [str(c) for c in compressions], minor=False)
    axes.minorticks_off()
    axes.set_xlabel("compression c: each output reads 1/c of the inputs")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.06 * (high - low))
    _tidy(axes)
    return labels, marks


# ---- wider and deeper

_WIDER, _DEEPER = (" 40-100", " 40-200"), (" 58-60", " 70-60")
_CURVES = {
    " 40-200": ("#d55e00", "s", "wider: 40-200"),
    " 40-100": ("#e69f00", "D", "wider: 40-100"),
    " 70-60": ("#0072b2", "o", "deeper: 70-60"),
    " 58-60": ("#56b4e9", "^", "deeper: 58-60"),
    " dense": (GREY, "P", "dense: 40-24 to 40-60, 100-12, 100-24"),
}


def draw_wider_deeper(points: Sequence[Point]) -> "Figure":
    """DenseNet-BC (depth-growth) at all compressions: left as the slide prints it, right with true counts and ours."""
    figure = _figure(15, 6.6)
    left, right = figure.subplots(1, 2, sharey=True)
    printed = [p for p in points if not p.ours and p.by == AUTHORS]
    panels = (
        (left, "as the slide labels the networks", [p for p in printed if p.printed and _curve(p) != " dense"], True),
        (right, "as counted", [*printed, *(p for p in points if p.ours)], False),
    )
    labels: list[tuple[Axes, list[Label], list[tuple[float, float]]]] = []
    for axes, title, shown, as_printed in panels:
        place_of = (lambda p: p.printed) if as_printed else (lambda p: p.weights)
        labels.append((axes, *_draw_curves(axes, shown, place_of)))
        axes.set_title(title, fontsize=12)
        _log_axis(axes, "parameters, as printed" if as_printed else "weights")
    left.set_ylabel("top-1 accuracy on CIFAR-100, %")
    ours = any(p.ours for p in points)
    figure.suptitle(
        "Wider or deeper: DenseNet-BC, depth-growth" + ("" if ours else "; no run of ours yet"), fontsize=13
    )
    _explain(figure, points, [])
    for axes, texts, marks in labels:
        place(axes, texts, marks)
    return figure


def _curve(point: Point) -> str | None:
    """The curve of _CURVES that a point belongs to; the narrow networks' X forms have none."""
    own = next((end for end in _CURVES if point.network.endswith(end)), None)
    return own or (" dense" if point.kind == DENSE else None)


def _draw_curves(
    axes: "Axes", points: Sequence[Point], place_of: Callable[[Point], Any]
) -> tuple[list[Label], list[tuple[float, float]]]:
    curves: dict[Any, list[Point]] = defaultdict(list)
    for point in points:
        if end := _curve(point):
            curves[end, point.ours, point.shares if point.kind != DENSE else (None, None), point.budget].append(point)
    labels, marks = [], []
    for (end, ours, *_), curve in curves.items():
        colour, marker, name = _CURVES[end]
        curve.sort(key=place_of)
        dense = end == " dense"
        line = ":" if dense else "-" if ours else "--"
        axes.plot([place_of(p) for p in curve], [p.top1 for p in curve], line, color=colour, linewidth=1.2, zorder=1)
        for point in curve:
            _mark(axes, place_of(point), point, colour=colour, marker=marker)
            marks.append((place_of(point), point.top1))
            if not dense:
                text = DENSE if point.kind == DENSE else f"c={point.compression}"
                text += f" n={point.n}" if ours and point.n > 1 else ""
                labels.append(Label(place_of(point), point.top1, text, colour, 8))
        head = curve[len(curve) // 2] if dense else curve[-1]
        text = name + (" (ours)" if ours else "")
        labels.append(Label(place_of(head), head.top1, text, colour, 10.5))
    return labels, marks


# ---- what the pictures have in common


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure((width, height), layout="constrained")


def _mark(
    axes: "Axes", x: float, point: Point, size: float = 7, colour: str | None = None, marker: str | None = None
) -> None:
    """Filled if ours, half filled on the JPEG form of a data set, hollow if published; the interval as a bar."""
    colour = colour or COLOURS[point.kind]
    if point.low is not None and point.high is not None:
        bar = [[point.top1 - point.low], [point.high - point.top1]]
        axes.errorbar([x], [point.top1], bar, fmt="none", ecolor=colour, elinewidth=1.3, capsize=3, zorder=3)
    fill = "none" if not point.ours else "full" if _exact(point.dataset) == point.dataset else "bottom"
    style: dict[str, Any] = {"markerfacecoloralt": "white", "markeredgewidth": 1.2, "markersize": size, "zorder": 4}
    if fill == "none":  # white inside, so that lines do not run through it
        style |= {"markerfacecolor": "white"}
        fill = "full"
    axes.plot([x], [point.top1], marker or MARKERS[point.kind], color=colour, fillstyle=fill, **style)


def _log_axis(axes: "Axes", what: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _count(value)))
    axes.minorticks_off()
    low, high = axes.get_xlim()
    axes.set_xlim(low / 1.1, high * 1.25)
    axes.set_xlabel(what)
    _tidy(axes)


def _tidy(axes: "Axes") -> None:
    axes.grid(color="#e8e8e8", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _text_colour(point: Point) -> str:
    return GREY if point.kind in (DENSE, "pruned") else COLOURS[point.kind]


def _title(figure: "Figure", points: Sequence[Point]) -> None:
    title = DATASETS[_exact(points[0].dataset)].title
    if all(p.network.startswith("DenseNet-BC") for p in points if p.weights or p.macs):
        title += ", DenseNet-BC (depth-growth)"
    if not any(p.ours for p in points):
        title += ": published figures; no run of ours yet"
    elif all(p.ours for p in points):
        title += ": our runs; nothing published to compare with"
    figure.suptitle(title, fontsize=13)


def _legend(figure: "Figure", points: Sequence[Point]) -> None:
    from matplotlib.lines import Line2D

    kinds: dict[str, str] = {}
    for point in points:
        kinds.setdefault(NAMES[point.kind], point.kind)
    handles = [
        Line2D([], [], marker=MARKERS[kind], color=COLOURS[kind], linestyle="none", markersize=7, label=name)
        for name, kind in kinds.items()
    ]
    _explain(figure, points, handles)


def _explain(figure: "Figure", points: Sequence[Point], handles: list[Any]) -> None:
    """The legend below: kinds of graphs, and what filled, half filled and hollow marks are."""
    from matplotlib.lines import Line2D

    # Same text for same meaning: whose, on what, how many runs.
    fills: dict[str, tuple[Any, str]] = {}
    for point in points:
        half = point.dataset != _exact(point.dataset)
        where = f" on {DATASETS[point.dataset].title}" if len({p.dataset for p in points}) > 1 or half else ""
        if point.ours:
            runs = sorted({p.n for p in points if p.ours and p.dataset == point.dataset})
            span = "-".join(map(str, dict.fromkeys((runs[0], runs[-1]))))
            bars = "last epoch, mean and 95 % interval" if runs[-1] > 1 else "last epoch, single runs, no interval"
            fills[f"ours{where}: {bars} (n={span})"] = ("bottom" if half else "full", INK)
        else:
            fills[f"published{where}: mostly the best test epoch of one run"] = ("full", "white")
    handles += [
        Line2D(
            [], [], marker="o", color=INK, markerfacecolor=face, markerfacecoloralt="white", fillstyle=fill,
            linestyle="none", markersize=7, label=text,
        )
        for text, (fill, face) in fills.items()
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9.5)


def _count(value: float) -> str:
    """1500000 -> 1.5 M, in three digits."""
    for unit, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= 0.9995 * unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}"


# ---- the table

_HEAD = ("data set", "network", "graph", "c", "share", "weights", "MACs", "top-1, %", "runs", "epoch reported", "by")


def markdown(summaries: Sequence[Summary], figures: Sequence[Published]) -> str:
    """All arms and published figures as one Markdown table, by data set and network, ours first."""
    notes: dict[str, int] = {}
    lines = []
    order = list(DATASETS)
    names = dict.fromkeys([*(network(s.row.model) for s in summaries), *(p.network for p in figures)])
    for dataset in order:
        for name in names:
            ours = [s for s in summaries if (s.row.dataset, network(s.row.model)) == (dataset, name)]
            lines += [_our_line(s) for s in ours]
            lines += [_published_line(p, notes) for p in figures if (p.dataset, p.network) == (dataset, name)]
    runs = sum(s.n for s in summaries)
    head = [
        "# Results",
        "",
        f"Written by `xzoo compare` from {runs} run{'s' * (runs != 1)} of ours and {len(figures)} published figures. "
        "Top-1 accuracy; ours is mean ± standard deviation, [95 % interval of the mean]. Weights and MACs are "
        "counted, in brackets as published. c: each output reads 1/c of the inputs.",
        "" if runs else "\nThere is no run of ours yet.\n",
        f"| {' | '.join(_HEAD)} |",
        f"|{' --- |' * len(_HEAD)}",
    ]
    foot = ["", *(f"{number}. {note}" for note, number in notes.items())] if notes else []
    return "\n".join([*head, *lines, *foot]) + "\n"


def _our_line(summary: Summary) -> str:
    row, spread = summary.row, ""
    if summary.sd is not None:
        spread = f" ± {summary.sd:.2f} [{summary.low:.2f}, {summary.high:.2f}]"
    part = DATASETS[row.dataset]
    split = "" if row.split == part.split else f", part {row.split} of {row.n_val}"
    graphs = f", {summary.graphs} graph{'s' * (summary.graphs != 1)}" if row.graph != DENSE else ""
    last = "last" if row.epoch_reported == row.epochs else "epoch"
    share = "" if row.graph == DENSE else f"{row.share} / {row.spatial_share}"
    cells = (
        part.title + split,
        f"{network(row.model)} (`{row.model}`)",
        row.graph,
        "own degrees" if row.compression is None else str(row.compression),
        share,
        _count(row.weights),
        _count(row.macs),
        f"**{summary.mean:.2f}**{spread}",
        f"{summary.n}{graphs}",
        f"{last}, {row.epoch_reported} of {row.epochs}{', EMA' if row.ema else ''}",
        f"xzoo, {row.recipe} ({row.recipe_sha[:8]}), {row.precision}",
    )
    return f"| {' | '.join(map(_cell, cells))} |"


def _published_line(figure: Published, notes: dict[str, int]) -> str:
    note = f" <sup>{notes.setdefault(figure.note, len(notes) + 1)}</sup>" if figure.note else ""
    counts = [
        " ".join(filter(None, (_count(ours) if ours else "", f"({_count(theirs)})" if theirs else "")))
        for ours, theirs in ((figure.weights, figure.published_params), (figure.macs, figure.published_macs))
    ]
    error = f" (error {figure.value:.2f})" if figure.metric == "error" else ""
    last = "" if figure.last is None else f"; last {figure.last:.2f}"
    cells = (
        DATASETS[figure.dataset].title,
        figure.network + (f", {figure.label}" if figure.label else ""),
        figure.graph,
        "" if figure.compression is None else str(figure.compression),
        "",
        *counts,
        f"{figure.top1:.2f}{error}",
        "1",
        figure.protocol + last,
        f"{figure.by}, {figure.figure} [{figure.source}]{note}",
    )
    return f"| {' | '.join(map(_cell, cells))} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
