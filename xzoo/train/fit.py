"""`xzoo fit`: a recipe on Lightning's Trainer, in a run folder of its own.

A recipe is YAML for `Classifier`, a data module and the Trainer, under LightningCLI's names,
composed by name or in a file (recipes.py). Later files and flags win, key by key. The same command
continues a run that was interrupted, and tells the result of one that is finished.

What is reported is the accuracy of what is saved: the averaged weights, where there is an average,
at the end of the last epoch, read back from the model folder. Not the best epoch, which is chosen
by the images that judge it.
"""

import datetime
import json
import shlex
import subprocess
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from timm.data import resolve_model_data_config
from torch import nn

from ..data.order import steps_of_epoch
from ..datasets import DATASETS
from ..errors import XzooError
from ..files import check_file, write_text
from ..hub import folder as model_folder
from ..lettering import spared
from ..machine import hardware, own_threads
from ..names import say, shown, to_yaml
from ..profile import profile
from ..results.runs import DENSE, Row, append, read
from . import pictures
from .callbacks import EMA, Clock, ProgressReport, checkpoints
from .evaluate import judged, top
from .parse import PLACES, RecipeCLI, is_first, launched
from .run import (
    CONFIG,
    LAST,
    METRICS,
    RESULT,
    AtomicCheckpointIO,
    MetricsFile,
    claimed,
    quiet,
    read_metrics,
    refuse_other,
    steps_of,
)
from .run import fit as run_fit
from .task import Classifier, sides


def fit(arguments: Sequence[str]) -> dict[str, Any] | None:
    """Train by a recipe; returns the result (as in result.json), on the first process alone.

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
            run_fit(trainer, task, data, None)
            say(
                console,
                f"{cli.name}: {trainer.global_step} steps and a validation went well; nothing is "
                "kept",
            )
            return None
        run, config = cli.run_folder, cli.plain()
        if is_first():
            trust = ["--trust"] if cli.config.trust else []
            refuse_other(run, config, "xzoo fit", None, PLACES, lambda path: _plain(path, trust))
            # a table that cannot take the result is told before the training
            if cli.config.results:
                check_file(cli.config.results, "--results")
                if Path(cli.config.results).exists():
                    read(cli.config.results)
        if (run / RESULT).exists():
            result = json.loads((run / RESULT).read_text(encoding="utf-8"))
            if is_first():
                say(console, f"{run} is finished; choose another --out to train again")
                _show(result, console)
            return result
        with claimed(run) if is_first() else nullcontext():
            return _train(cli, run, config, console)


def _plain(config: Path, more: Sequence[str]) -> dict[str, Any]:
    """A run folder's configuration as `xzoo fit` reads it now."""
    return RecipeCLI(["--config", str(config), *more]).plain()


def _train(
    cli: RecipeCLI, run: Path, config: dict[str, Any], console: Console
) -> dict[str, Any] | None:
    last = run / LAST
    resumes = last.exists()
    if resumes:
        # All weights come from the checkpoint: no network is needed for others.
        cli.config.model.pretrained = False
    done, clock = steps_of(last) if resumes else 0, Clock()
    trainer, task, data = cli.build(
        **launched(),
        default_root_dir=str(run),
        callbacks=[
            *([EMA(cli.config.ema)] if cli.config.ema else []),
            *(clock, ProgressReport(console)),
            *checkpoints(last.parent),
        ],
        plugins=[AtomicCheckpointIO()],
        logger=[MetricsFile(run / METRICS, done)],
    )
    data.prepare_data()
    data.setup("fit")  # missing data are told before anything is written
    task.check(trainer, data)
    # what cannot teach is told now; the fit makes its own, since EMA would copy this one
    task.make_teacher(data)
    if cli.config.results and not (data.dataset and _commit()):
        lacks = (
            "its images are none of " + ", ".join(DATASETS)
            if not data.dataset
            else "no commit: not a checkout"
        )
        raise XzooError(
            f"results={cli.config.results}: the table cannot take this run ({lacks}); leave it out"
        )
    if cli.config.results:
        _row(facts(cli, task, data, trainer))  # what it cannot take is told now
    steps = steps_of_epoch(trainer, data)
    every = cli.config.trainer.val_check_interval
    if (
        isinstance(every, int)
        and every > steps
        and cli.config.trainer.check_val_every_n_epoch is not None
    ):
        raise XzooError(
            f"trainer.val_check_interval={every}: an epoch has {steps} steps; use as many or "
            "fewer, "
            "or check_val_every_n_epoch=null to count over epochs"
        )
    trainer.log_every_n_steps = max(1, min(trainer.log_every_n_steps, steps // 3))  # type: ignore[attr-defined]
    if is_first():
        if not resumes:
            head = f"# {cli.name}; recipe {cli.sha}. The same command continues the run.\n"
            write_text(run / CONFIG, head + to_yaml(config))
        going_on = f", going on after {done} steps" if resumes else ""
        what = (
            f"{cli.config.model.name} on {data.dataset or 'images of your own'}, {steps} steps an "
            "epoch"
        )
        say(console, f"{cli.name}: {what}; everything goes to {run}{going_on}")
    run_fit(trainer, task, data, last if resumes else None)
    if not trainer.is_global_zero:
        return None
    result = _finish(cli, run, trainer, task, data, clock.seconds, console)
    _show(result, console)
    return result


def _finish(
    cli: RecipeCLI,
    run: Path,
    trainer: pl.Trainer,
    task: Classifier,
    data: Any,
    seconds: float,
    console: Console,
) -> dict[str, Any]:
    """Save the model, read it back, judge it, draw the curves; result.json comes last and ends the
    run.
    """
    checkpoint = torch.load(run / LAST, map_location="cpu", weights_only=True)
    task.load_state_dict(checkpoint["state_dict"])
    device = trainer.strategy.root_device
    made = {"recipe": cli.name, "recipe_sha": cli.sha, "seed": task.hparams["seed"]}
    block = {"fit": made, model_folder.GREY: getattr(data, "grey_range", {})}
    model_folder.save(
        task.net, run / "model", data.class_names, _data_config(task.net, data), block
    )
    logits, labels = judged(model_folder.load(run / "model").to(device), data, device)
    result = {
        **facts(cli, task, data, trainer),
        "top1": round(100 * top(logits, labels, 1), 4),
        "top5": round(100 * top(logits, labels, 5), 4) if logits.shape[1] > 5 else None,
        "loss": float(nn.functional.cross_entropy(logits, labels)),
        "epoch_reported": int(checkpoint["epoch"]) + 1,
        "wall_s": round(seconds, 1),
        "date": datetime.date.today().isoformat(),
    }
    score = f"{cli.name}: {result['top1']:.2f} % of {len(labels)} {result['split']} images"
    with spared(run / "curves.png", console):
        pictures.curves(read_metrics(run / METRICS), run / "curves.png", score)
    if cli.config.results:
        # Before result.json: what fails here is tried again by the same command.
        append(cli.config.results, _row(result))
    write_text(run / RESULT, json.dumps(result, indent=2) + "\n")
    return result


def _row(result: dict[str, Any]) -> Row:
    """The line of a result; where there is none yet, of a run that would be half right."""
    ended: dict[str, Any] = {
        "top1": 50.0,
        "top5": 50.0,
        "epoch_reported": 1,
        "wall_s": 0.0,
        "date": "2000-01-01",
    }
    return Row(**{key: value for key, value in (ended | result).items() if key != "loss"})


def facts(cli: RecipeCLI, task: Classifier, data: Any, trainer: pl.Trainer) -> dict[str, Any]:
    """The columns of results.csv that are known before the result."""
    net: Any = task.net
    counts = profile(net, data.input_size)
    drawn = getattr(net, "_model_args", {})
    compression = drawn.get("compression", 1)
    compression = compression if isinstance(compression, int) else None
    graph = {"graph": DENSE} if compression == 1 else {"graph": drawn["graph"]}
    names = ("share", "spatial_share", "seed")
    given = {name: None if compression == 1 else drawn[name] for name in names}
    part = data.dataset and DATASETS[data.dataset].split
    steps = steps_of_epoch(trainer, data) * (trainer.max_epochs or 0)
    return {
        "model": cli.config.model.name,
        "recipe": shlex.join([cli.name, *cli.overrides]),
        "recipe_sha": cli.sha,
        "dataset": data.dataset,
        "split": "holdout" if data.holdout else part or "val",
        "n_val": data.n_val,
        "img_size": data.img_size,
        "crop_pct": getattr(data, "crop_pct", None),
        "interpolation": data.interpolation,
        **graph,
        "compression": compression,
        "share": given["share"],
        "spatial_share": given["spatial_share"],
        "graph_seed": given["seed"],
        "seed": task.hparams["seed"],
        "epochs": trainer.max_epochs,
        "global_batch": data.batch_size * trainer.accumulate_grad_batches,
        "ema": bool(cli.config.ema),
        "params": counts.params,
        "weights": counts.weights,
        "macs": counts.macs,
        # one forwards, two backwards
        "train_macs": round(_macs_seen(net, task, data) * 3 * data.batch_size * steps),
        "device": f"{trainer.world_size} x " * (trainer.world_size > 1)
        + hardware(trainer.strategy.root_device),
        "precision": str(trainer.precision),
        "torch": str(torch.__version__),
        "xzoo": version("xzoo"),
        "commit": _commit(),
    }


def _macs_seen(net: nn.Module, task: Classifier, data: Any) -> Fraction:
    """Multiply-adds of one image forwards, as the mean over a training in which images may grow."""
    channels, _, full = data.input_size
    first, until = task.hparams["grow_sizes"], task.hparams["grow_until"]
    shown = sides(full, first, until)
    return sum(
        (Fraction(share) * profile(net, (channels, side, side)).macs for side, share in shown),
        Fraction(0),
    )


# ---- what a run stands in


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


def _data_config(net: nn.Module, data: Any) -> dict[str, Any]:
    """How timm has to prepare an image for this model: as this data set's validation does."""
    own = {"input_size": data.input_size, "mean": tuple(data.mean), "std": tuple(data.std)}
    own |= {
        "crop_pct": getattr(data, "crop_pct", 1.0),
        "interpolation": data.interpolation or "bilinear",
    }
    return resolve_model_data_config(net) | own


def _commit() -> str | None:
    """Of the checkout that this code is in, with -dirty where files were changed; None for an
    installed wheel.

    Rows that other runs have added to the table of results change nothing of what is computed.
    """
    home = Path(__file__).parents[2]
    if not (home / ".git").exists():
        return None
    others = ("--untracked-files=no", "--", ".", ":(exclude)recipes/results.csv")
    told = []
    for asked in (("rev-parse", "--short=12", "HEAD"), ("status", "--porcelain", *others)):
        try:
            done = subprocess.run(
                ["git", "-C", str(home), *asked], capture_output=True, text=True, check=False
            )
        except OSError:  # no git
            return None
        told.append(done.stdout.strip() if done.returncode == 0 else None)
    commit, changed = told
    return commit and commit + "-dirty" * (changed != "")


def _show(result: dict[str, Any], console: Console) -> None:
    table = Table(box=None, pad_edge=False, show_header=False)
    rows = {
        "model": (
            f"{result['model']}, {result['weights'] / 1e6:.2f} M weights, "
            f"{result['macs'] / 1e6:,.0f} M MACs"
        ),
        "recipe": f"{result['recipe']} ({result['recipe_sha']})",
        "top-1": f"{result['top1']:.2f} % of {result['n_val']:,} {result['split']} images",
        "top-5": f"{result['top5']:.2f} %" if result["top5"] is not None else "-",
        "loss": f"{result['loss']:.4f}",
        "epochs": (
            f"{result['epoch_reported']} in {datetime.timedelta(seconds=round(result['wall_s']))}"
        ),
        "on": f"{result['device']}, {result['precision']}",
    }
    for name, value in rows.items():
        table.add_row(name, Text(shown(value, console.encoding)))
    console.print(table, highlight=False)
