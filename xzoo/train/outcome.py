"""The end of a run: the model folder, its accuracy, the curves.

The accuracy is that of the saved weights: the average, where there is one, at the end of the last
epoch, read back from the model folder. It is not that of the best epoch, which would be chosen by
the images that it is evaluated on.
"""

import datetime
import subprocess
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from rich.console import Console
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from ..data.module import DataModule
from ..data.order import run_position, steps_of_epoch
from ..datasets import DATASETS
from ..hub import folder as model_folder
from ..lettering import spared
from ..machine import hardware
from ..profile import profile
from ..results.record import Result
from ..results.runs import DENSE
from . import pictures
from .callbacks import EMA
from .evaluate import predict_all, top
from .run import METRICS, Run, read_metrics
from .task import Classifier, sides


def facts(
    trainer: pl.Trainer,
    task: Classifier,
    data: DataModule,
    recipe: str | None = None,
    recipe_sha: str | None = None,
) -> dict[str, Any]:
    """The keys of result.json that are known before the result.

    Args:
        recipe: name and overrides, as after `xzoo fit`; None for a run without a recipe.
        recipe_sha: hash of what the recipe says.
    """
    net: Any = task.net
    counts = profile(net, data.input_size)
    arguments = getattr(net, "_model_args", {})
    compression = arguments.get("compression", 1)
    dense = compression == 1
    drawn: dict[str, Any] = {} if dense else arguments
    channels, _, full = data.input_size
    shown = sides(full, task.hparams["grow_sizes"], task.hparams["grow_until"])
    split = DATASETS[data.dataset].split if data.dataset else "val"
    epochs = None if trainer.max_epochs == -1 else trainer.max_epochs
    # Those that it took, or will take.
    batches = run_position(trainer)[2] or steps_of_epoch(trainer, data) * (epochs or 0)
    # One forward pass, and two backward.
    macs = [3 * Fraction(share) * profile(net, (channels, s, s)).macs for s, share in shown]
    devices = f"{trainer.world_size} x " if trainer.world_size > 1 else ""
    return {
        "model": task.hparams["name"],
        "recipe": recipe,
        "recipe_sha": recipe_sha,
        "dataset": data.dataset,
        "split": "holdout" if data.holdout else split,
        "n_val": data.n_val,
        "img_size": data.img_size,
        "crop_pct": data.crop_pct,
        "interpolation": data.interpolation,
        "graph": DENSE if dense else arguments["graph"],
        "compression": compression if isinstance(compression, int) else None,
        "share": drawn.get("share"),
        "spatial_share": drawn.get("spatial_share"),
        "graph_seed": drawn.get("seed"),
        "seed": task.hparams["seed"],
        "epochs": epochs,
        "global_batch": data.batch_size * trainer.accumulate_grad_batches,
        "ema": any(
            isinstance(callback, EMA)
            for callback in trainer.callbacks  # type: ignore[attr-defined]
        ),
        "params": counts.params,
        "weights": counts.weights,
        "macs": counts.macs,
        "train_macs": round(sum(macs) * data.batch_size * batches),
        "device": devices + hardware(trainer.strategy.root_device),
        "precision": str(trainer.precision),
        "torch": str(torch.__version__),
        "xzoo": version("xzoo"),
        "commit": commit(),
    }


def finish(
    run: Run,
    trainer: pl.Trainer,
    task: Classifier,
    data: DataModule,
    known: dict[str, Any],
    made_by: dict[str, Any],
    title: str,
    console: Console,
) -> tuple[Result, Tensor, Tensor]:
    """Save the model, read it back, evaluate it, draw the curves.

    Args:
        known: of `facts`.
        made_by: what the model folder remembers of its training; JSON values.
        title: of the picture.
    Returns: the result, which is not written yet, and the logits [N, classes] and labels [N] that
    it is of.
    """
    checkpoint = torch.load(run.last, map_location="cpu", weights_only=True)
    task.load_state_dict(checkpoint["state_dict"])
    block = made_by | {model_folder.GREY: dict(data.grey_range)}
    config = data_config(task.net, data)
    folder = run.folder / "model"
    model_folder.save(task.net, folder, data.class_names, config, block)
    device = trainer.strategy.root_device
    logits, labels = predict_all(model_folder.load(folder).to(device), data, device)
    outcome = {
        "wall_s": round(run.clock.seconds, 1),
        "top1": round(100 * top(logits, labels, 1), 4),
        "top5": round(100 * top(logits, labels, 5), 4) if logits.shape[1] > 5 else None,
        "loss": float(nn.functional.cross_entropy(logits, labels)),
        "epoch_reported": int(checkpoint["epoch"]) + 1,
        "date": datetime.date.today().isoformat(),
    }
    result, curves = Result(run.folder, known | outcome), run.folder / "curves.png"
    with spared(curves, console):
        pictures.curves(read_metrics(run.folder / METRICS), curves, f"{title}: {result}")
    return result, logits, labels


def data_config(net: nn.Module, data: DataModule) -> dict[str, Any]:
    """How timm has to prepare an image for this model: as the validation images are prepared."""
    return resolve_model_data_config(net) | {
        "input_size": data.input_size,
        "mean": tuple(data.mean),
        "std": tuple(data.std),
        "crop_pct": data.crop_pct or 1.0,
        "interpolation": data.interpolation or "bilinear",
    }


def commit() -> str | None:
    """The commit of the checkout that this code is in, with -dirty where files were changed; None
    for an installed wheel.

    Rows that other runs have added to the table of results do not count as changes.
    """
    home = Path(__file__).parents[2]
    if not (home / ".git").exists():
        return None
    head = _git(home, "rev-parse", "--short=12", "HEAD")
    others = ("--", ".", ":(exclude)recipes/results.csv")
    changed = _git(home, "status", "--porcelain", "--untracked-files=no", *others)
    if not head:
        return None
    return head if changed == "" else f"{head}-dirty"


def _git(home: Path, *command: str) -> str | None:
    """What git prints; None where it fails, or is not installed."""
    try:
        done = subprocess.run(
            ["git", "-C", str(home), *command], capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
