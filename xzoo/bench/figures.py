"""A figure, what it was measured on, and the file of figures.

A busy machine makes every time a matter of luck. So the forms that are compared take turns within
one run, a figure is the ratio of neighbours in that alternation, and what is told is the median of
the ratios with their quartiles. Where there is nothing to compare with, it is a rate, which means
something on its machine alone.
"""

import csv
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import TypeVar

import torch

from .. import files
from ..errors import XzooError
from ..files import atomic
from ..machine import cpuinfo, hardware
from ..ops.tune import Times

T = TypeVar("T")
MACS = 30e9  # in a second, of one thread: a first guess at how long something takes


@dataclass(frozen=True)
class Figure:
    """What was measured, again and again.

    Args:
        unit: "x", a ratio of what to against, or "images/s".
        values: of each pair or repetition, in order.
        bar: what the median may be at most, or with `at_least` has to be; None where none is set.
        part: of the benchmark: "model", "layer" and so on.
        ideal: how many times fewer multiplications; None where that is not the question.
        ours: what one call took or holds, with its unit.
        faults: minor page faults of one call of ours.
        note: what else has to be known, such as the backend that was chosen.
    """

    what: str
    against: str
    unit: str
    values: tuple[float, ...]
    bar: float | None = None
    at_least: bool = True
    part: str = "loop"
    ideal: float | None = None
    ours: str = ""
    faults: float | None = None
    note: str = ""

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """The median, between the values that a quarter lies below and above."""
        if len(self.values) == 1:
            return self.values * 3
        low, middle, high = quantiles(self.values, n=4, method="inclusive")
        return low, middle, high

    @property
    def met(self) -> bool | None:
        if self.bar is None:
            return None
        return self.quartiles[1] >= self.bar if self.at_least else self.quartiles[1] <= self.bar

    def row(self) -> dict[str, str]:
        """Of the file."""
        low, middle, high = (self._text(value) for value in self.quartiles)
        limit = ""
        if self.bar is not None:
            sign = ">=" if self.at_least else "<="
            limit = f"{sign} {self._text(self.bar)}"
        return {
            "part": self.part,
            "what": self.what,
            "against": self.against,
            "unit": self.unit,
            "quartile 1": low,
            "median": middle,
            "quartile 3": high,
            "n": str(len(self.values)),
            "ideal": "" if self.ideal is None else f"{self.ideal:.2f}",
            "of ideal": "" if self.ideal is None else f"{self.quartiles[1] / self.ideal:.2f}",
            "bar": limit,
            "met": {None: "", True: "yes", False: "no"}[self.met],
            "ours": self.ours,
            "faults": "" if self.faults is None else f"{self.faults:.0f}",
            "note": self.note,
        }

    def as_row(self) -> dict[str, str]:
        """What of the row is printed, in fewer columns."""
        row = self.row()
        unit = "" if self.unit == "x" else f" {self.unit}"
        return {
            "what": self.what,
            "against": self.against,
            "median": row["median"] + unit,
            "quartiles": f"{row['quartile 1']} - {row['quartile 3']}",
            **{
                key: row[key]
                for key in ("n", "ideal", "of ideal", "bar", "met", "ours", "faults", "note")
            },
        }

    def _text(self, value: float) -> str:
        return f"{value:.3f}" if self.unit == "x" else f"{value:.0f}"


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, ...]:
    """Of each value of `ours` to its neighbour in `theirs`; both in the order in which they took
    turns.
    """
    return tuple(a / b for a, b in zip(ours, theirs, strict=True))


def fastest(times: dict[str, Times]) -> str:
    """The name of the one that takes less time."""
    return min(times, key=lambda name: median(times[name].seconds))


def format_seconds(seconds: float) -> str:
    """In the unit that suits it."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    load = f", load {os.getloadavg()[0]:.1f} at the end" if hasattr(os, "getloadavg") else ""
    device = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    cpu, facts = f"{hardware(torch.device('cpu'))} of {os.cpu_count()} cores", cpuinfo()
    if "cpu family" in facts:  # a virtual machine may have one name for all that its maker sells
        cpu += f", family {facts['cpu family']} model {facts['model']}"
    return {
        "machine": f"{cpu}, {torch.backends.cpu.get_cpu_capability()}{device}{load}",
        "torch": str(torch.__version__),
    }


def check_file(path: Path, kinds: Sequence[str] = ()) -> None:
    """Raise XzooError if nothing can be written there, or its name ends in none of `kinds`.

    For before an hour of measuring rather than after it.
    """
    if kinds and path.suffix not in kinds:
        raise XzooError(
            f"cannot draw {path}: no picture is called {path.suffix}; use {' or '.join(kinds)}"
        )
    files.check_file(path)


def write_csv(figures: Iterable[Figure], path: Path) -> None:
    """A row a figure, with the machine's facts. Raises: XzooError if it cannot be written."""
    facts = machine()
    rows = [figure.row() | facts for figure in figures]
    with atomic(path) as draft, open(draft, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads of torch's within. Raises XzooError for less than one."""
    if count < 1:
        raise XzooError(f"threads={count}: 1 or more are needed")
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def with_progress(
    cases: Sequence[T], what: Callable[[T], str], work: Callable[[T], float]
) -> Iterator[T]:
    """The cases, each after a line on stderr that names it and tells how long all that are left
    will take.

    Args:
        work: multiply-accumulates of a case; how long those take is guessed at first and then
            known.
    """
    total, done, begun = sum(map(work, cases)), 0.0, time.perf_counter()
    inline = sys.stderr.isatty()
    for number, case in enumerate(cases, 1):
        pace = (
            (time.perf_counter() - begun) / done if done else 1 / (MACS * torch.get_num_threads())
        )
        left = (total - done) * pace
        time_left = f"{left:.0f} s" if left < 90 else f"{left / 60:.0f} min"
        line = f"{number} of {len(cases)}: {what(case)} (about {time_left} left)"
        print(
            f"\r\x1b[2K{line}" if inline else line,
            end="" if inline else "\n",
            file=sys.stderr,
            flush=True,
        )
        yield case
        done += work(case)
    if inline:
        print("\r\x1b[2K", end="", file=sys.stderr, flush=True)
