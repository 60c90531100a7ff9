"""`xzoo fit`: train by a recipe with Lightning's Trainer, in a run folder.

A recipe is YAML for `Classifier`, a data module and the Trainer, under LightningCLI's names,
composed by name or in a file (recipes.py). Later files and flags win, key by key. The same command
continues a run that was interrupted, and shows the result of one that is finished. What is reported
is in outcome.py.
"""

import datetime
import shlex
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..data.module import DataModule
from ..data.order import steps_of_epoch
from ..datasets import DATASETS
from ..errors import XzooError
from ..files import check_file, write_text
from ..machine import own_threads
from ..names import say, shown, to_yaml
from ..results import record
from ..results.record import Result
from ..results.runs import COLUMNS, Row, append, read
from .callbacks import EMA
from .outcome import commit, facts, finish
from .parse import PLACES, RecipeCLI, is_first, launched
from .run import CONFIG, Run, locked_run_folder, log_every, quiet, refuse_other, train
from .task import Classifier


def fit(arguments: Sequence[str]) -> Result | None:
    """Train by a recipe; returns the result, on the first process alone.

    Args:
        arguments: of the command line: RECIPE --config MORE --data.root FOLDER --out RUN --key
            value ...
    Raises: XzooError for what cannot be run or is another run's folder; KeyboardInterrupt after
    Ctrl-C.
    """
    console = Console(stderr=True)
    with quiet(), own_threads():
        cli = RecipeCLI(arguments)
        _refuse_what_does_not_resume(cli.config.trainer)
        if cli.config.trainer.fast_dev_run:
            trainer, task, data = cli.build(**launched())
            train(trainer, task, data, None)
            say(
                console,
                f"{cli.name}: {trainer.global_step} steps and a validation went well; nothing is "
                "kept",
            )
            return None
        folder, config = cli.run_folder, cli.plain()
        if is_first():
            trust = ["--trust"] if cli.config.trust else []
            refuse_other(
                folder,
                config,
                "xzoo fit",
                free=PLACES,
                parse=lambda file: RecipeCLI(["--config", str(file), *trust]).plain(),
            )
            # a table that cannot take the result is reported before the training
            if cli.config.results:
                check_file(cli.config.results, "--results")
                if Path(cli.config.results).exists():
                    read(cli.config.results)
        if (folder / record.RESULT).exists():
            result = record.read(folder)
            if is_first():
                say(console, f"{folder} is finished; choose another --out to train again")
                _show(result, console)
            return result
        with locked_run_folder(folder) if is_first() else nullcontext():
            return _train(cli, Run(folder), config, console)


def _train(cli: RecipeCLI, run: Run, config: dict[str, Any], console: Console) -> Result | None:
    if run.resumes:
        # All weights come from the checkpoint: no network is needed for others.
        cli.config.model.pretrained = False
    average = EMA(cli.config.ema) if cli.config.ema else None
    trainer, task, data = cli.build(**launched(), **run.trainer_arguments(console, average))
    data.prepare_data()
    data.setup("fit")  # missing data are reported before anything is written
    task.check(trainer, data)
    # what cannot teach is reported now; the fit makes its own, since EMA would copy this one
    task.make_teacher(data)
    if cli.config.results:
        _check_row(cli, data, _facts(cli, trainer, task, data))
    steps = steps_of_epoch(trainer, data)
    _check_validation(cli.config.trainer, steps)
    trainer.log_every_n_steps = log_every(  # type: ignore[attr-defined]
        steps,
        trainer.log_every_n_steps,  # type: ignore[attr-defined]
    )
    if is_first():
        if not run.resumes:
            head = f"# {cli.name}; recipe {cli.sha}. The same command continues the run.\n"
            write_text(run.folder / CONFIG, head + to_yaml(config))
        going_on = f", going on after {run.done} steps" if run.resumes else ""
        say(
            console,
            f"{cli.name}: {cli.config.model.name} on {data.dataset or 'images of your own'}, "
            f"{steps} steps an epoch; everything goes to {run.folder}{going_on}",
        )
    run.fit(trainer, task, data)
    if not trainer.is_global_zero:
        return None
    known = _facts(cli, trainer, task, data)
    made = {"recipe": cli.name, "recipe_sha": cli.sha, "seed": task.hparams["seed"]}
    result, _, _ = finish(run, trainer, task, data, known, {"fit": made}, cli.name, console)
    if cli.config.results:
        # Before result.json: what fails here is tried again by the same command.
        append(cli.config.results, Row(**{name: result.facts[name] for name in COLUMNS}))
    record.write(result)
    _show(result, console)
    return result


def _facts(
    cli: RecipeCLI, trainer: pl.Trainer, task: Classifier, data: DataModule
) -> dict[str, Any]:
    return facts(trainer, task, data, shlex.join([cli.name, *cli.overrides]), cli.sha)


def _check_row(cli: RecipeCLI, data: DataModule, known: dict[str, Any]) -> None:
    """Raise XzooError for a run that the table of results cannot take."""
    lacks = None
    if not data.dataset:
        lacks = "its images are none of " + ", ".join(DATASETS)
    elif commit() is None:
        lacks = "no commit: not a checkout"
    if lacks:
        raise XzooError(
            f"results={cli.config.results}: the table cannot take this run ({lacks}); leave it out"
        )
    Row(**known | {"top1": 50.0, "epoch_reported": 1, "wall_s": 0.0, "date": "2000-01-01"})


def _check_validation(trainer: Any, steps: int) -> None:
    """Raise XzooError for an interval between validations that is longer than an epoch."""
    every = trainer.val_check_interval
    by_epochs = trainer.check_val_every_n_epoch is not None
    if by_epochs and isinstance(every, int) and every > steps:
        raise XzooError(
            f"trainer.val_check_interval={every}: an epoch has {steps} steps; use as many or "
            "fewer, or check_val_every_n_epoch=null to count over epochs"
        )


# What a run cannot keep its promises with: flag, whether a value of it is meant, and what to do
# instead.
_PRECISIONS = ("None", "32", "32-true", "16", "16-mixed", "bf16", "bf16-mixed")
_REFUSED: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "precision",
        lambda value: str(value) not in _PRECISIONS,
        "weights, images and their average are float32; use bf16-mixed, 16-mixed or 32-true",
    ),
    ("overfit_batches", bool, "it takes the recipe's own order away; use limit_train_batches"),
    ("barebones", bool, "a run is nothing without its checkpoints and figures; leave it out"),
    (
        "enable_checkpointing",
        lambda value: value is False,
        "a run is resumed from its checkpoints; leave it out",
    ),
    ("num_sanity_val_steps", bool, "a resumed run has none; try the recipe with fast_dev_run"),
    ("enable_progress_bar", lambda value: value is not None, "xzoo fit has its own; leave it out"),
    (
        "enable_model_summary",
        lambda value: value is not None,
        "`xzoo inspect` shows a model; leave it out",
    ),
    (
        "use_distributed_sampler",
        lambda value: value is False,
        "the data modules always shard themselves; leave it out",
    ),
    (
        "val_check_interval",
        lambda value: not isinstance(value, int | float | None),
        "by the clock, no two runs validate at the same steps; give a number of steps, or a share "
        "of an epoch",
    ),
)


def _refuse_what_does_not_resume(trainer: Any) -> None:
    for flag, meant, instead in _REFUSED:
        value = getattr(trainer, flag)
        if meant(value):
            raise XzooError(f"trainer.{flag}={value}: {instead}")
    if trainer.max_time is not None or trainer.max_steps not in (-1, None):
        raise XzooError(
            "max_steps and max_time do not resume where they were; use --trainer.max_epochs alone"
        )
    if not trainer.fast_dev_run and (trainer.max_epochs is None or trainer.max_epochs < 1):
        raise XzooError(
            f"trainer.max_epochs={trainer.max_epochs}: a recipe says how many epochs, 1 or more"
        )


def _show(result: Result, console: Console) -> None:
    table = Table(box=None, pad_edge=False, show_header=False)
    known, time = result.facts, datetime.timedelta(seconds=round(result.seconds))
    rows = {
        "model": (
            f"{known['model']}, {known['weights'] / 1e6:.2f} M weights, "
            f"{known['macs'] / 1e6:,.0f} M MACs"
        ),
        "recipe": f"{known['recipe']} ({known['recipe_sha']})",
        "top-1": str(result),
        "top-5": "-" if result.top5 is None else f"{result.top5:.2f} %",
        "loss": f"{result.loss:.4f}",
        "epochs": f"{result.epochs} in {time}",
        "on": f"{known['device']}, {known['precision']}",
    }
    for name, value in rows.items():
        table.add_row(name, Text(shown(value, console.encoding)))
    console.print(table, highlight=False)
