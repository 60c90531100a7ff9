"""The table of results: one row a run, appended when the run has ended and never edited; and
published figures.

    append(path, row)    under a lock, in one write, so that runs that end together lose nothing
    read(path)           every row checked; an error names the line and the column
    aggregate(rows)      runs that differ in nothing but their seeds: mean, sd, n, interval
    published()          what the paper, its logs and others report, with our own counts

Accuracies are in per cent, counts are those of `xzoo.profile`. Not here: pictures (compare.py).
"""

import datetime
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from ..datasets import DATASETS
from ..errors import XzooError
from ..graphs import KINDS
from . import table
from .table import check_known, check_types, refuse

DENSE = "dense"  # what stands for the kind of graph where there is none


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run, as its line in the table. Raises: XzooError for a value that cannot be, naming the
    column.
    """

    model: str
    recipe: str  # its name and overrides, as after `xzoo fit`; in old rows its file
    recipe_sha: str  # recipe_sha() of what that says
    dataset: str  # a key of DATASETS
    split: str  # the part of it that top1 is of
    n_val: int  # images in that part
    img_size: int
    crop_pct: float | None = None  # None: not cropped
    interpolation: str | None = None  # None: not resized
    graph: str  # a kind of xzoo.graphs, or "dense"
    compression: int | None = None  # None: a degree of its own in each layer
    share: int | None = None
    spatial_share: int | None = None
    graph_seed: int | None = None
    seed: int
    epochs: int
    global_batch: int
    top1: float
    top5: float | None = None
    ema: bool
    epoch_reported: int  # counted from 1
    params: int
    weights: int
    macs: int  # of one image, forwards
    train_macs: int | None = None  # of the whole run
    wall_s: float
    device: str
    precision: str
    torch: str
    xzoo: str
    commit: str
    date: str  # ISO 8601

    def __post_init__(self) -> None:
        check_types(self)
        check_known("dataset", self.dataset, DATASETS)
        check_known("graph", self.graph, (*KINDS, DENSE))
        self._check_counts()
        part, dense = DATASETS[self.dataset], self.graph == DENSE
        top1, top5, crop = self.top1, self.top5, self.crop_pct
        conditions = [
            # No run worth a row gets 1 of 100 right, and torchmetrics counts in fractions.
            ("top1", 1 < top1 <= 100, "per cent, over 1 (0.93 would be a fraction) and up to 100"),
            ("top5", top5 is None or top1 <= top5 <= 100, f"per cent, from top1={top1} to 100"),
            ("compression", not dense or self.compression == 1, f"1 where graph={DENSE}"),
            ("graph", dense or self.compression != 1, f"{DENSE} where compression=1"),
        ]
        for name in ("share", "spatial_share", "graph_seed"):
            allowed = f"{'empty' if dense else 'given'} where graph={self.graph}"
            conditions.append((name, (getattr(self, name) is None) == dense, allowed))
        conditions += [
            ("epoch_reported", self.epoch_reported <= self.epochs, f"up to epochs={self.epochs}"),
            ("weights", self.weights <= self.params, f"up to params={self.params}"),
            ("crop_pct", crop is None or 0 < crop <= 1, "a share, over 0 and up to 1"),
            (
                "n_val",
                self.split != part.split or self.n_val == part.n,
                f"{part.n} in the part {part.split!r} of {self.dataset}",
            ),
        ]
        for name, fits, allowed in conditions:
            refuse(name, getattr(self, name), not fits, allowed)
        try:
            datetime.datetime.fromisoformat(self.date)
        except ValueError:
            raise XzooError(
                f"column date: {self.date!r} is not a date; write 2026-08-01 or 2026-08-01T12:00:00"
            ) from None

    def _check_counts(self) -> None:
        sha, commit = r"[0-9a-f]{16}", r"[0-9a-f]{7,40}(-dirty)?"
        for name, pattern, allowed in (
            ("recipe_sha", sha, "16 hexadecimal digits, as recipe_sha() gives"),
            ("commit", commit, "7 to 40 hexadecimal digits, maybe -dirty"),
        ):
            value = getattr(self, name)
            refuse(name, value, re.fullmatch(pattern, value) is None, allowed)
        for name, (kind, _) in table.columns(Row).items():
            value, least = getattr(self, name), 0 if name in ("seed", "graph_seed", "wall_s") else 1
            counted = kind is int or name == "wall_s"
            refuse(name, value, counted and value is not None and value < least, f"{least} or more")

    @property
    def run(self) -> tuple[Any, ...]:
        """What no second run has; the graph beside the recipe, because one override makes a rival
        of it.
        """
        return attrgetter("recipe_sha", "seed", "graph_seed", "commit", *_OF_MODEL)(self)

    @property
    def arm(self) -> tuple[Any, ...]:
        """What runs have in common that differ in their seeds, and in where and when they ran."""
        return attrgetter(*_OF_ARM)(self)


_OF_MODEL = ("model", "dataset", "graph", "compression", "share", "spatial_share")
# Where, when and with what luck it ran.
_OF_RUN = {
    "recipe",
    "graph_seed",
    "seed",
    "top1",
    "top5",
    "train_macs",
    "wall_s",
    "device",
    "torch",
    "xzoo",
    "commit",
    "date",
}
COLUMNS = tuple(table.columns(Row))
_OF_ARM = [name for name in COLUMNS if name not in _OF_RUN]


@dataclass(frozen=True, kw_only=True)
class Published:
    """One figure of somebody else's. `published_*` and `value` are as printed, the other counts are
    ours.

    `model` is the zoo's network of the same counts, where there is one, built with `compression`
    and `graph`.
    """

    figure: str
    network: str  # as `network()` calls ours
    label: str | None = None  # the row's own name
    graph: str  # expander, group, dense, or pruned: other people's ways to make it small
    compression: int | None = None
    dataset: str
    metric: str  # accuracy or error, of the first guess, per cent
    value: float
    last: float | None = None  # the same in the last epoch that was logged
    protocol: str  # which epoch `value` is of
    published_params: int | None = None
    published_macs: int | None = None
    weights: int | None = None
    params: int | None = None
    macs: int | None = None
    model: str | None = None
    by: str
    source: str
    note: str | None = None

    def __post_init__(self) -> None:
        check_types(self)
        check_known("dataset", self.dataset, DATASETS)
        check_known("graph", self.graph, ("expander", "group", DENSE, "pruned"))
        check_known("metric", self.metric, ("accuracy", "error"))
        check_known("protocol", self.protocol, PROTOCOLS)

    @property
    def top1(self) -> float:
        return self.value if self.metric == "accuracy" else round(100 - self.value, 4)


PROTOCOLS = ("best test epoch", "last", "median of last 10 epochs", "not stated")


def published() -> list[Published]:
    """The published figures that ride with xzoo, in the order of the file."""
    return table.read(Path(__file__).with_name("published.csv"), Published)


def read(path: Path | str) -> list[Row]:
    """All rows, in the order in which they came.

    Raises: XzooError for a file that cannot be read or is no such table, and for the first row that
        is malformed or tells of a run for the second time, naming line and column.
    """
    return table.read(Path(path), Row, key=lambda row: row.run)


def append(path: Path | str, row: Row) -> bool:
    """Write the row after all others; make the table if there is none.

    What the file held is not touched: a write that fails half-way is taken back. Returns: False if
    the table has this very row already. Raises: XzooError if the table has another row of the same
    run (recipe_sha, seed, graph_seed, commit, and the model), is malformed, or cannot be written.
    """
    return table.append(Path(path), row, key=lambda row: row.run)


def recipe_sha(config: Mapping[str, Any]) -> str:
    """Sixteen hexadecimal digits that stand for what a recipe says: of the canonical JSON of its
    parsed YAML.

    Comments, order and layout do not count; neither do seeds (`seed`, `graph_seed`,
    `seed_everything`, anywhere), so that the runs of one recipe have one hash. Raises: XzooError
    for what is not plain data.
    """
    try:
        text = json.dumps(
            _unseeded(config),
            sort_keys=True,
            separators=(",", ":"),
            ensure_ascii=False,
            allow_nan=False,
        )
    except (TypeError, ValueError) as error:
        raise XzooError(
            f"a recipe is plain data, of dictionaries, lists, texts and numbers: {error}"
        ) from None
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Summary:
    """Runs of one arm. `sd`, `low` and `high` are None for a single run: it has no spread."""

    rows: tuple[Row, ...]  # one for each pair (seed, graph_seed)
    mean: float
    sd: float | None  # with n - 1
    low: float | None  # interval of the mean by Student's t
    high: float | None

    @property
    def n(self) -> int:
        return len(self.rows)

    @property
    def graphs(self) -> int:
        """How many graphs were drawn: with one, the interval says nothing of other graphs."""
        return len({row.graph_seed for row in self.rows})

    @property
    def row(self) -> Row:
        """One of the rows, for what they have in common."""
        return self.rows[-1]


def aggregate(rows: Sequence[Row], confidence: float = 0.95) -> list[Summary]:
    """Top-1 of runs that differ in nothing but their seeds, in the order in which their first row
    came.

    Of rows with both seeds the same (another commit, another machine) the last one counts, since it
    is not a new draw. The interval takes runs for independent.
    """
    from scipy.stats import t  # two seconds to import

    arms: dict[tuple[Any, ...], dict[tuple[int, int | None], Row]] = {}
    for row in rows:
        arms.setdefault(row.arm, {})[row.seed, row.graph_seed] = row
    summaries = []
    for arm in arms.values():
        values = np.array([row.top1 for row in arm.values()])
        mean, n = float(values.mean()), len(values)
        if n == 1:
            summaries.append(Summary(tuple(arm.values()), mean, None, None, None))
            continue
        sd = float(values.std(ddof=1))
        half = float(t.ppf((1 + confidence) / 2, n - 1)) * sd / math.sqrt(n)
        summaries.append(Summary(tuple(arm.values()), mean, sd, mean - half, mean + half))
    return summaries


def _unseeded(config: Any) -> Any:
    if isinstance(config, Mapping):
        # JSON has only texts for keys, and would make one of 1 and of "1".
        if odd := [key for key in config if not isinstance(key, str)]:
            raise TypeError(f"the key {odd[0]!r} is not text")
        return {
            k: _unseeded(v)
            for k, v in config.items()
            if k not in ("seed", "graph_seed", "seed_everything")
        }
    return [_unseeded(v) for v in config] if isinstance(config, list | tuple) else config
