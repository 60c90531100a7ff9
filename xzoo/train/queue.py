"""`xzoo queue`: the runs that a file of shell commands asks for. Shows which are finished, and runs
the others, a few side by side.

A queue is Markdown (recipes/QUEUE.md): headings such as "## 3. Title", and below them ```bash
blocks in which every command is `xzoo fit ... --out RUN`. All state is in the run folders: what is
finished, how far a run is, and whether a process is at work in it. So a queue that was killed goes
on when it is started again.
"""

import functools
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from rich.console import Console

from ..datasets import DATASETS
from ..errors import XzooError
from ..files import check_folder
from ..machine import cores
from ..models import create_model
from ..names import say
from ..options import nearest
from ..profile import Profile, profile
from ..results.record import RESULT
from ..results.runs import read
from . import recipes
from .parse import RecipeCLI
from .run import AT_WORK, LAST, epochs_of, is_locked, quiet
from .task import network_arguments, sides

QUEUE = "QUEUE.md"
LOOK_EVERY = 0.5  # seconds
_BLOCK = re.compile(
    r"^## (?:(\d+)\. )?([^\n]*)$|^```bash\n(.*?)(?:^```|\Z)", re.MULTILINE | re.DOTALL
)
# Standard output is not the commands' alone; and no other program is found, since only `xzoo fit`
# may be asked for.
_PRINT_COMMANDS = 'exec 3>&1 1>&2; PATH=; xzoo() { printf "%s\\0" "$#" "$@" >&3; }; set -eu\n'
# Options that change no cost, each with its value.
_FREE = re.compile(r"--(?:\S*seed\S*|out|results)")


@dataclass(frozen=True)
class QueuedRun:
    """A command of a queue: its block's number, and the arguments of `xzoo fit`."""

    block: str
    arguments: tuple[str, ...]

    @property
    def out(self) -> Path:
        return Path(_option(self.arguments, "out") or "").expanduser()

    @property
    def log(self) -> Path:
        return self.out.with_name(f"{self.out.name}.log")

    @property
    def is_finished(self) -> bool:
        return (self.out / RESULT).exists()


# ---- what is asked for


def read_queue(path: Path | str, numbers: Sequence[str] = ()) -> list[QueuedRun]:
    """All runs of a queue file, in its order; of `numbers`, those of the blocks below headings of
    these numbers.

    Raises: XzooError for a file without blocks, an unknown number, a block that is not a list of
        `xzoo fit --out` or needs a variable that is not set, and two runs in one folder.
    """
    found = blocks(Path(path).read_text(encoding="utf-8"))
    if not found:
        raise XzooError(f"{path} is not a queue: it has no ```bash block")
    known = dict(found)
    for number in numbers:
        if number not in known:
            raise XzooError(f"{path} has no block {number}; {nearest(number, known)}")
    runs: dict[Path, QueuedRun] = {}
    for block, shell in found:
        if numbers and block not in numbers:
            continue
        try:
            for arguments in expand(shell, os.environ):
                run = QueuedRun(block, arguments)
                if runs.setdefault(run.out, run) != run:
                    raise XzooError(f"two runs have one folder, {run.out}; give each its own --out")
        except XzooError as error:
            raise XzooError(f"{path}, block {block}: {error}") from None
    return list(runs.values())


def blocks(text: str) -> list[tuple[str, str]]:
    """Of each ```bash block the number of the heading above it (or its words, where it has none),
    and the shell.
    """
    found, block = [], ""
    for match in _BLOCK.finditer(text):
        number, title, shell = match.groups()
        if shell is None:
            block = number or title
        else:
            found.append((block, shell))
    return found


def expand(shell: str, environment: Mapping[str, str]) -> list[tuple[str, ...]]:
    """The arguments of every `xzoo fit` in a block, found by bash with a function in the place of
    `xzoo`.

    Raises: XzooError for a variable that is not set, other commands, and a command without --out.
    """
    # -p: without what the user's bash reads at its start
    done = subprocess.run(
        ["bash", "-p", "-c", _PRINT_COMMANDS + shell],
        env={**environment, "LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )
    if complaint := os.fsdecode(done.stderr).strip():
        first = re.sub(r"^bash: (line \d+: )?", "", complaint.splitlines()[0])
        if unset := re.fullmatch(r"(\w+): unbound variable", first):
            raise XzooError(f"the variable {unset[1]} is not set; set it in the environment")
        raise XzooError(f"{first}; a block has `xzoo fit` alone, and what the shell itself can do")
    if done.returncode:
        raise XzooError(f"bash ends with {done.returncode}; a block has `xzoo fit` alone")
    fields = iter(os.fsdecode(done.stdout).split("\0")[:-1])
    commands = [tuple(islice(fields, int(count))) for count in fields]
    for command in commands:
        if command[:1] != ("fit",) or not _option(command, "out"):
            raise XzooError(f"`xzoo {shlex.join(command)}` is not an `xzoo fit` with an --out")
    return [command[1:] for command in commands]


def _option(arguments: Sequence[str], name: str) -> str | None:
    """The value that counts: the last one."""
    value = None
    for argument, after in zip_longest(arguments, arguments[1:]):
        key, equals, text = argument.partition("=")
        if key == f"--{name}":
            value = text if equals else after
    return value


# ---- what it costs


def train_macs(arguments: Sequence[str]) -> tuple[float, int]:
    """Multiply-accumulates of the training that a command asks for, and its epochs.

    Three times those of a forward pass, times images, times epochs. NaN where the number of images
    is not known.
    """
    costly, rest = [], iter(arguments)
    for argument in rest:
        flag, equals, _ = argument.partition("=")
        if not _FREE.fullmatch(flag):
            costly.append(argument)
        elif not equals:
            next(rest, None)  # its value
    return _train_macs(tuple(costly))


@functools.cache
def _train_macs(arguments: tuple[str, ...]) -> tuple[float, int]:
    with quiet():
        cli = RecipeCLI(arguments)
    part = DATASETS.get(getattr(cli.data_class, "key", ""))
    epochs = cli.config.trainer.max_epochs
    if part is None:
        return math.nan, epochs
    images = part.train - cli.config.data.init_args.holdout
    shown = sides(size_of(cli), cli.config.model.grow_sizes, cli.config.model.grow_until)
    macs = sum(share * counts(cli, side).macs for side, share in shown)
    return 3 * macs * images * epochs, epochs


def size_of(cli: RecipeCLI) -> int:
    """Side of a recipe's images, in pixels, on one of the known data sets."""
    return cli.config.data.init_args.img_size or cli.data_class.facts.sides[0]


def counts(cli: RecipeCLI, size: int) -> Profile:
    """Counts of a recipe's network, on one of the known data sets, for images of this size."""
    model, data = cli.config.model, cli.config.data.init_args
    classes = data.num_classes if "num_classes" in data else cli.data_class.facts.classes
    given = {"num_classes": classes} | network_arguments(model)
    return _counted(model.name, size, json.dumps(given))


@functools.cache
def _counted(model: str, size: int, given: str) -> Profile:
    return profile(create_model(model, device="meta", **json.loads(given)), (3, size, size))


def speed(runs: Sequence[QueuedRun]) -> float:
    """Training MACs in a second on one core: of the finished runs, or else of the rows of
    recipes/results.csv on CPUs.

    NaN where there are none.
    """
    finished: list[dict[str, Any]] = []
    for run in runs:
        if run.is_finished:
            finished.append(json.loads((run.out / RESULT).read_text(encoding="utf-8")))
    table = recipes.folder() / "results.csv"
    others = map(vars, read(table)) if table.exists() else ()
    for results in (finished, others):
        macs = seconds = 0.0
        for result in results:
            threads = re.fullmatch(r"(?:(\d+) x )?.*, (\d+) threads?", result["device"])
            if threads and result["train_macs"]:
                macs += result["train_macs"]
                seconds += result["wall_s"] * int(threads[1] or 1) * int(threads[2])
        if seconds:
            return macs / seconds
    return math.nan


def listed(runs: Sequence[QueuedRun]) -> list[tuple[QueuedRun, str, float]]:
    """Each run, its state in words, and the core-hours that are left of it.

    The hours are an estimate: MACs by the speed at which others went, and networks of few channels,
    depthwise layers or much memory traffic go at a fraction of it. Epochs count when they are
    through.
    """
    rows, measured = [], speed(runs)
    for run in runs:
        if run.is_finished:
            rows.append((run, "finished", 0.0))
            continue
        macs, epochs = train_macs(run.arguments)
        done = epochs_of(run.out / LAST) if (run.out / LAST).exists() else None
        state = "open" if done is None else f"{done} of {epochs} epochs"
        if is_locked(run.out):
            state = "running" if done is None else f"running, {state}"
        rows.append((run, state, macs * (1 - (done or 0) / epochs) / measured / 3600))
    return rows


# ---- running it


def run_queue(runs: Sequence[QueuedRun], jobs: int | None = None) -> None:
    """Start what is open, in its order, `jobs` at a time (by default two), and wait for all of it.

    Each run is a process at the lowest priority with its share of the cores as threads, and writes
    to RUN.log. Runs in which another process is at work count among the jobs, and are waited for.
    On Ctrl-C the processes are interrupted, as `xzoo fit` is by it, and waited for.

    Raises: XzooError that names the runs that failed, after all others; KeyboardInterrupt.
    """
    most = cores()
    jobs = min(2, most) if jobs is None else jobs
    if not 1 <= jobs <= most:
        raise XzooError(f"jobs={jobs}: from 1 to {most}, the cores here")
    for folder in {run.log.parent for run in runs}:
        check_folder(folder)
    console, threads = Console(stderr=True), max(1, most // jobs)
    working: dict[QueuedRun, subprocess.Popen[bytes]] = {}
    started: dict[QueuedRun, float] = {}  # by the clock, in seconds
    failed: list[QueuedRun] = []
    others: set[QueuedRun] = set()
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        while True:
            for run in [run for run, process in working.items() if process.poll() is not None]:
                log = run.log.read_text(encoding="utf-8", errors="replace").strip()
                last = log.rpartition("\n")[2].strip() or "its log is empty"
                code = working.pop(run).returncode
                if run.is_finished:
                    taken = timedelta(seconds=round(time.monotonic() - started[run]))
                    say(console, f"{run.out}: finished after {taken}")
                elif AT_WORK not in last:  # started by another queue at the same moment
                    failed.append(run)
                    say(console, f"{run.out}: failed with {code}: {last}")
            left = [run for run in runs if run not in failed and not run.is_finished]
            if not left and not working:
                break
            locked = {run for run in left if run not in working and is_locked(run.out)}
            for run in locked - others:
                say(console, f"{AT_WORK} {run.out}")
            others |= locked
            startable = [run for run in left if run not in working and run not in locked]
            for run in startable[: max(0, jobs - len(working) - len(locked))]:
                working[run], started[run] = _start(run, threads), time.monotonic()
                say(console, f"{run.out}: started, {threads} threads; see {run.log}")
            time.sleep(LOOK_EVERY)
    finally:
        signal.signal(signal.SIGTERM, before)
        for process in working.values():
            process.send_signal(signal.SIGINT)
        for process in working.values():
            process.wait()
    if failed:
        names = ", ".join(str(run.out) for run in failed)
        raise XzooError(f"{len(failed)} of {len(runs)} runs failed: {names}; their logs say why")


def _start(run: QueuedRun, threads: int) -> "subprocess.Popen[bytes]":
    """In a new session, so that the terminal's Ctrl-C comes once, from us."""
    run.log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with open(run.log, "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "xzoo", "fit", *run.arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_behind_others,
        )


def _behind_others() -> None:
    os.nice(19)
    # it is ignored in what a script starts in the background
    signal.signal(signal.SIGINT, signal.SIG_DFL)
