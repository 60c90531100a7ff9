"""The run folder: one process at work in it, files that are never seen half-written, metrics that
survive.

Everything that a run leaves is here, so that the folder alone is enough to resume, explain and
publish it:

    config.yaml    what was asked for; the same again continues the run, anything else is refused
    checkpoints/   last.ckpt and best.ckpt
    metrics.csv    a row for each step that logged something
    model/         the trained model, as timm loads it
    result.json    written last, which ends the run

A run survives kill -9 for three reasons: last.ckpt is written every three minutes and after each
epoch (callbacks.py); files are replaced atomically (files.py); the order of images and all random
numbers are functions of seed and step (data/order.py, task.py).
"""

import csv
import logging
import signal
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import yaml
from filelock import FileLock, Timeout
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.utilities.exceptions import SIGTERMException
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from rich.console import Console

from ..data.module import DataModule
from ..errors import XzooError
from ..files import atomic, reason
from .callbacks import EMA, Clock, ProgressReport, checkpoints

LOCK, CONFIG, METRICS = ".lock", "config.yaml", "metrics.csv"
LAST = Path("checkpoints") / "last.ckpt"
AT_WORK = "another process is at work in"
# Of every Trainer: xzoo reports by itself, and the data modules shard by themselves.
TRAINER = {
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,
}


class Run:
    """One start of a run: where it resumes, and what the Trainer needs so that it can.

    Args:
        folder: the run folder.
        minutes: training time, over all starts, after which the run ends; None for no limit.
    Raises: XzooError if the checkpoint to resume from cannot be read.
    """

    def __init__(self, folder: Path, minutes: float | None = None) -> None:
        self.folder, self.last, self.clock = folder, folder / LAST, Clock(minutes)
        self.resumes = self.last.exists()
        self.done = _of_checkpoint(self.last, "global_step") if self.resumes else 0

    def trainer_arguments(self, console: Console, ema: EMA | None = None) -> dict[str, Any]:
        """The Trainer's arguments that every run has; a recipe's callbacks come after these."""
        callbacks = [self.clock, ProgressReport(console), *checkpoints(self.last.parent)]
        return TRAINER | {
            "default_root_dir": str(self.folder),
            "callbacks": callbacks if ema is None else [ema, *callbacks],
            "plugins": [AtomicCheckpointIO()],
            "logger": [MetricsFile(self.folder / METRICS, self.done)],
        }

    def fit(self, trainer: pl.Trainer, task: pl.LightningModule, data: DataModule) -> None:
        """Train, from the last checkpoint if there is one."""
        train(trainer, task, data, self.last if self.resumes else None)


def log_every(steps: int, at_most: int) -> int:
    """Steps between two rows of metrics: at least three rows in an epoch of `steps`."""
    return max(1, min(at_most, steps // 3))


@contextmanager
def locked_run_folder(folder: Path) -> Iterator[None]:
    """Lock the folder for this process; make it first, and remove it if it is still empty at the
    end.

    Raises: XzooError if it cannot be made or written to, or another process is at work in it. The
    lock is the operating system's, so that a killed process leaves none behind.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        lock.acquire(timeout=0)
    except Timeout:
        raise XzooError(f"{AT_WORK} {folder}; wait for it, or choose another with --out") from None
    except OSError as error:
        raise XzooError(
            f"cannot write to the run folder {folder}: {reason(error)}; choose another with --out"
        ) from None
    try:
        yield
    finally:
        if [f.name for f in folder.iterdir()] == [LOCK]:
            with suppress(OSError):
                (folder / LOCK).unlink()
                for path in made:
                    path.rmdir()
        lock.release()


def is_locked(folder: Path) -> bool:
    """Whether a process is at work in the folder; looking leaves no trace, and makes no folder."""
    if not (folder / LOCK).exists():
        return False
    try:
        with FileLock(folder / LOCK, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # it was removed meanwhile, or is not ours to open
        return False


def refuse_other(
    run: Path,
    asked: Mapping[str, Any],
    of: str,
    section: str | None = None,
    free: Collection[str] = (),
    parse: Callable[[Path], Any] | None = None,
) -> None:
    """Refuse to go on in a folder whose run was asked for something else.

    Args:
        asked: what has to be in its config.yaml, under `section` where there is one.
        of: the command, to say whose folder was expected.
        free: dotted keys that may differ.
        parse: reads config.yaml with defaults for what it does not say, options that are newer than
            the run.
    Raises: XzooError that names each difference.
    """
    if not (run / CONFIG).is_file():
        return
    try:
        there = yaml.safe_load((run / CONFIG).read_text(encoding="utf-8"))
        if parse is not None and set(asked) & set(there):
            there = parse(run / CONFIG)
        there = there[section] if section else there
        strange = not set(asked) & set(there)
        differing = list(_differences(dict(asked), {key: there.get(key) for key in asked}, free))
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, OSError):
        strange, differing = True, []
    if strange:
        raise XzooError(f"{run / CONFIG} is not of a run of {of}; choose another --out")
    if differing:
        raise XzooError(
            f"{run} holds another run: {'; '.join(differing)}; choose another folder with --out"
        )


def _differences(here: Any, there: Any, free: Collection[str], place: str = "") -> Iterator[str]:
    if place in free:
        return
    if isinstance(here, dict) and isinstance(there, dict):
        for key in dict.fromkeys([*here, *there]):
            name = f"{place}.{key}" if place else key
            yield from _differences(here.get(key), there.get(key), free, name)
    elif here != there:
        yield f"{place} is {there!r} there and {here!r} here"


def epochs_of(checkpoint: Path) -> int:
    """Completed epochs of a checkpoint; XzooError if it cannot be read."""
    return _of_checkpoint(checkpoint, "loops", "fit_loop", "epoch_progress", "total", "processed")


def _of_checkpoint(checkpoint: Path, *keys: str) -> int:
    try:
        content = torch.load(checkpoint, map_location="meta", weights_only=True)
        for key in keys:
            content = content[key]
        return int(content)
    except Exception as error:  # torch.load raises a dozen of classes for a broken file
        raise XzooError(
            f"{checkpoint} cannot be read ({type(error).__name__}); remove it to begin again"
        ) from error


def train(
    trainer: pl.Trainer, task: pl.LightningModule, data: pl.LightningDataModule, last: Path | None
) -> None:
    """trainer.fit, from a checkpoint where there is one, whose interruptions look like
    interruptions.

    Raises: KeyboardInterrupt after Ctrl-C, with the handler of before; SystemExit(143) after
    SIGTERM.
    """
    before = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit(task, datamodule=data, ckpt_path=str(last) if last else None, weights_only=True)
    except SIGTERMException:
        raise SystemExit(143) from None  # Lightning would exit with 0, as if the run were finished
    except SystemExit:
        if not trainer.interrupted:
            raise
        signal.signal(signal.SIGINT, before)  # Lightning turns it off and exits
        raise KeyboardInterrupt from None


@contextmanager
def quiet() -> Iterator[None]:
    """Without Lightning's messages on hardware, its products, and loaders that are as intended."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        expected = (
            "does not have many workers|LeafSpec|in eval mode at the start|exists and is not empty"
        )
        warnings.filterwarnings("ignore", message=f"(?s).*({expected})")
        # Those of single files, which do not name them.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        try:
            for logger in loggers:
                logger.setLevel(logging.WARNING)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints through `atomic`: Lightning stages them in the machine's temporary folder."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as draft:
            torch.save(checkpoint, draft)


class MetricsFile(Logger):
    """One CSV table, a row for each step that logged something; a resumed run goes on writing to
    it.

    Lightning's CSVLogger deletes the file that it finds.

    Args:
        done: steps of the checkpoint that the run starts from; rows of later steps are dropped,
            since those steps come again.
    """

    def __init__(self, path: Path | str, done: int = 0) -> None:
        super().__init__()
        self.path = Path(path)
        self.rows: dict[int, dict[str, Any]] = {}
        if self.path.exists():
            for row in read_metrics(self.path):
                if row["step"] < done:
                    integers = {name: int(row[name]) for name in row.keys() & {"step", "epoch"}}
                    self.rows[integers["step"]] = row | integers

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.setdefault(step or 0, {"step": step or 0}).update(metrics)

    @rank_zero_only
    def save(self) -> None:
        """Write the table, all of it: it has a few hundred short rows, and new columns may have
        come.
        """
        columns = dict.fromkeys(["step", "epoch", *chain.from_iterable(self.rows.values())])
        with atomic(self.path) as draft, open(draft, "w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(columns))
            table.writeheader()
            table.writerows(self.rows[step] for step in sorted(self.rows))

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self.rows:
            self.save()

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: they are in config.yaml."""

    @property
    def name(self) -> str:
        return self.path.parent.name

    @property
    def version(self) -> str:
        return ""


def read_metrics(path: Path | str) -> list[dict[str, float]]:
    """The rows of a metrics file, without the values that a row does not have."""
    with open(path, newline="", encoding="utf-8") as file:
        return [
            {k: float(v) for k, v in row.items() if v not in ("", None)}
            for row in csv.DictReader(file)
        ]
