"""`xzoo validate`, `test` and `predict`: evaluate trained weights on a recipe's data."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor, nn

from ..data.module import DataModule
from ..errors import XzooError
from ..files import check_file, check_folder, write_text
from ..machine import own_threads
from ..names import say
from .parse import RecipeCLI, is_first, launched
from .run import LAST, quiet
from .task import Classifier

PREDICTIONS = "predictions.csv"


def evaluate(verb: str, arguments: Sequence[str]) -> dict[str, float] | None:
    """`validate` or `test`: loss, top 1 and top 5 (shares) of a run's weights, or of those that
    --ckpt_path names.

    Raises: XzooError where there are no weights: random ones are not evaluated.
    """
    with quiet(), own_threads():
        cli = RecipeCLI(arguments, verb)
        task, data, trainer = _with_weights(cli)
        figures = getattr(trainer, verb)(task, datamodule=data, verbose=False)[0]
    if not is_first():
        return None
    part, n = ("val", data.n_val) if verb == "validate" else ("test", data.n_test)
    limit, images = f"limit_{part}_batches", f"{n} images"
    if getattr(trainer, limit) != 1.0:
        images = f"some of {n} images ({limit})"
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_row("top-1", f"{100 * figures[f'{part}/acc1']:.2f} % of {images}")
    table.add_row("top-5", f"{100 * figures[f'{part}/acc5']:.2f} %")
    table.add_row("loss", f"{figures[f'{part}/loss']:.4f}")
    Console().print(table)
    return figures


def predict(arguments: Sequence[str]) -> Path:
    """Write the predicted class of each test image, with its probability, to predictions.csv in the
    run folder.

    Raises: XzooError where there are no weights, or for several devices.
    """
    with quiet(), own_threads():
        cli = RecipeCLI(arguments, "predict")
        path = cli.run_folder / PREDICTIONS
        check_folder(path.parent, "--out")
        if path.parent.is_dir():
            check_file(path, "--out")
        task, data, trainer = _with_weights(cli)
        if trainer.world_size > 1:
            raise XzooError(
                f"predict with {trainer.world_size} devices: one writes the table; use "
                "--trainer.devices 1"
            )
        batches: Any = trainer.predict(task, datamodule=data)
    logits, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    text, names = io.StringIO(), data.class_names
    table = csv.writer(text)
    table.writerow(("image", "label", "predicted", "probability"))
    for i, (label, chances) in enumerate(zip(labels, logits.softmax(1), strict=True)):
        probability, predicted = chances.max(0)
        table.writerow((i, names[label], names[predicted], f"{float(probability):.6f}"))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text.getvalue())
    say(Console(), f"{len(labels)} images in {path}")
    return path


def _with_weights(cli: RecipeCLI) -> tuple[Classifier, DataModule, pl.Trainer]:
    path = Path(cli.config.ckpt_path or cli.run_folder / LAST)
    from_file = cli.config.ckpt_path or path.exists()
    if from_file:
        cli.config.model.pretrained = False
    elif not cli.config.model.pretrained:
        raise XzooError(
            f"no weights to judge: {path} is not there; give --ckpt_path FILE, --out RUN or "
            "--model.pretrained true"
        )
    trainer, task, data = cli.build(**launched(), logger=False, enable_checkpointing=False)
    if from_file:
        load_weights(task, path)
    return task, data, trainer


def load_weights(task: Classifier, path: Path) -> None:
    """Weights of a checkpoint (averaged ones, where it has them) or of a safetensors file; every
    one has to fit.

    Only weights: what else a checkpoint says (rate, model) does not override the recipe and the
    flags. Raises: XzooError that names what does not fit.
    """
    try:
        if path.suffix == ".safetensors":
            task.net.load_state_dict(load_file(path))
        else:
            task.load_state_dict(
                torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
            )
    except Exception as error:  # a dozen of classes for a broken file
        first, *keys = str(error).splitlines() or [type(error).__name__]  # torch lists every key
        reason = f"{keys[0].strip()} ({len(keys)} such keys)" if keys else first
        raise XzooError(f"{path} does not hold the weights of this recipe: {reason}") from error


@torch.inference_mode()
def predict_all(model: nn.Module, data: DataModule, device: torch.device) -> tuple[Tensor, Tensor]:
    """Logits [N, classes] and labels [N] of all validation images, in order, on the CPU; in this
    process alone.
    """
    data.trainer = None
    batches = data.val_dataloader()
    parts = [(model(images.to(device)).float().cpu(), labels) for images, labels in batches]
    logits, labels = zip(*parts, strict=True)
    return torch.cat(logits), torch.cat(labels)


def top(logits: Tensor, labels: Tensor, k: int) -> float:
    """Share of the images whose label is among the k largest logits."""
    best = logits.topk(k, dim=1).indices
    return float((best == labels[:, None]).any(1).double().mean())
