"""`xzoo compare`: the paper's figures with our points and the published ones beside them, and all
as one table.

    accuracy_DATA.png    top-1 against weights and against MACs; a line joins one network's
                         compressions
    rivals_DATA.png      expander, group, shuffle and random against compression, a panel for each
                         network
    wider_deeper.png     DenseNet-BC on CIFAR-100, with the counts that the slide prints and with
                         the true ones
    results.md           every arm of ours and every published figure

Points of ours are filled: the mean of the runs, and its 95 % interval where there are several.
Published ones are hollow, most of them the best epoch on the test set of a single run. What has no
point at all is not drawn.
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from operator import attrgetter
from pathlib import Path

from rich.console import Console

from ..datasets import DATASETS
from ..errors import XzooError
from ..files import atomic, check_folder, reason, write_text
from ..lettering import spared
from ..names import code
from ..names import markdown as plain
from . import runs as tables
from .figures import AUTHORS, US, Point, count, draw, exact
from .runs import DENSE, Published, Summary


def compare(results: Path | str, out: Path | str, datasets: Sequence[str] = ()) -> list[Path]:
    """Draw and tabulate the results beside the published ones.

    Args:
        results: the table of runs, such as recipes/results.csv.
        out: folder for the pictures and results.md; made if absent, files of these names are
            replaced.
        datasets: only these, keys of xzoo.datasets.DATASETS; all of them by default.
    Returns: the files. Raises: XzooError for an unknown data set, a malformed table, or a folder
    that cannot be written.
    """
    for name in datasets:
        if name not in DATASETS:
            raise XzooError(f"datasets={name!r}: there are {', '.join(DATASETS)}")
    chosen = set(datasets or DATASETS)
    summaries = [s for s in tables.aggregate(tables.read(results)) if s.row.dataset in chosen]
    figures = [p for p in tables.published() if p.dataset in set(map(exact, chosen))]
    out = Path(out)
    check_folder(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise XzooError(f"cannot write to {out}: {reason(error)}") from error
    files = []
    write_text(out / "results.md", markdown(summaries, figures))
    with spared("a picture of the results", Console(stderr=True)):
        for name, figure in draw([*_points(summaries), *map(_of_published, figures)]):
            with atomic(out / f"{name}.png") as draft:
                figure.savefig(draft, dpi=144, format="png")
            files.append(out / f"{name}.png")
    return [*files, out / "results.md"]


def network(model: str) -> str:
    """The name of a network of the zoo beside published ones: without its compression and its X."""
    for pattern, name in _NETWORKS:
        if found := re.fullmatch(pattern, model):
            return found.expand(name)
    return model


_NETWORKS = (
    (r"x_vgg(\d+)(_[12]|_c\d+)?", r"VGG-\1"),
    (r"x_air(\d+)", r"Air-\1"),
    (r"x_alexnet_[12]", "AlexNet"),
    (r"x_resnet(\d+)(_c\d+)?", r"ResNet-\1"),
    (r"x_densenet(\d+)", r"DenseNet-\1"),
    (r"x_densenetbc_(\d+)_(\d+)", r"DenseNet-BC \1-\2"),
    (r"x_mobilenet(\d)(\d)\d_c\d+", r"MobileNet-\1.\2"),
)


def _points(summaries: Iterable[Summary]) -> Iterator[Point]:
    """Arms in their last epoch, on the part that is reported; what else was measured is in the
    table only.
    """
    for each in summaries:
        row = each.row
        if row.split != DATASETS[row.dataset].split or row.epoch_reported != row.epochs:
            continue
        yield Point(
            dataset=row.dataset,
            network=network(row.model),
            kind=row.graph,
            compression=row.compression,
            label=row.model if row.compression is None else None,
            weights=row.weights,
            macs=row.macs,
            top1=each.mean,
            low=each.low,
            high=each.high,
            n=each.n,
            by=US,
            protocol="last",
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
        by=figure.by,
        protocol=figure.protocol,
        printed=figure.published_params,
    )


# ---- the table

_HEAD = (
    "data set",
    "network",
    "graph",
    "c",
    "share",
    "weights",
    "MACs",
    "top-1, %",
    "runs",
    "epoch reported",
    "by",
)


def markdown(summaries: Sequence[Summary], figures: Sequence[Published]) -> str:
    """All arms and published figures as one Markdown table, by data set and network, ours first."""
    notes: dict[str, int] = {}
    arms: dict[tuple[str, str], list[str]] = {}
    for summary in summaries:
        key = (summary.row.dataset, network(summary.row.model))
        arms.setdefault(key, []).append(_our_line(summary))
    known = dict.fromkeys(name for _, name in arms)
    known |= dict.fromkeys(figure.network for figure in figures)
    printed: dict[tuple[str, str], list[Published]] = {}
    for figure in figures:
        printed.setdefault((figure.dataset, figure.network), []).append(figure)
    lines = []
    for key in itertools.product(DATASETS, known):
        lines += arms.get(key, [])
        # Notes are numbered in the order of the table.
        lines += [_published_line(figure, notes) for figure in printed.get(key, [])]
    runs = sum(map(attrgetter("n"), summaries))
    head = [
        "# Results",
        "",
        f"Written by `xzoo compare` from {runs} run{'s' * (runs != 1)} of ours and {len(figures)} "
        "published figures. "
        "Top-1 accuracy; ours is mean ± standard deviation, [95 % interval of the mean]. Weights "
        "and MACs are "
        "counted, in brackets as published. c: each output reads 1/c of the inputs. Sources of "
        "X-Nets: S slides, "
        "P poster, R README, L training logs.",
        "" if runs else "\nThere is no run of ours yet.\n",
        f"| {' | '.join(_HEAD)} |",
        f"|{' --- |' * len(_HEAD)}",
    ]
    foot = [f"{number}. {note}" for note, number in notes.items()]
    return "\n".join([*head, *lines, *([""] if foot else []), *foot]) + "\n"


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
        f"{plain(network(row.model))} ({code(row.model)})",
        row.graph,
        "own degrees" if row.compression is None else str(row.compression),
        share,
        count(row.weights),
        count(row.macs),
        f"**{summary.mean:.2f}**{spread}",
        f"{summary.n}{graphs}",
        f"{last}, {row.epoch_reported} of {row.epochs}{', EMA' if row.ema else ''}",
        f"xzoo, {plain(row.recipe)} ({row.recipe_sha[:8]}), {row.precision}",
    )
    return f"| {' | '.join(map(_cell, cells))} |"


def _published_line(figure: Published, notes: dict[str, int]) -> str:
    note = f" <sup>{notes.setdefault(figure.note, len(notes) + 1)}</sup>" if figure.note else ""
    counts = []
    for ours, theirs in (
        (figure.weights, figure.published_params),
        (figure.macs, figure.published_macs),
    ):
        texts = (count(ours) if ours else "", f"({count(theirs)})" if theirs else "")
        counts.append(" ".join(filter(None, texts)))
    error = f" (error {figure.value:.2f})" if figure.metric == "error" else ""
    source = "" if figure.source == figure.by else f" [{figure.source}]"
    last = "" if figure.last is None else f"; last {figure.last:.2f}"
    cells = (
        DATASETS[figure.dataset].title,
        figure.network + (f", {figure.label}" if figure.label else ""),
        figure.graph,
        "" if figure.compression is None else str(figure.compression),
        "",
        *counts,
        f"{figure.top1:.2f}{error}",
        "1" if figure.by == AUTHORS else "",
        figure.protocol + last,
        f"{figure.by}, {figure.figure}{source}{note}",
    )
    return f"| {' | '.join(map(_cell, cells))} |"


def _cell(text: str) -> str:
    return re.sub(r"(?<!\\)\|", r"\|", text)
