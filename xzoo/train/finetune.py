"""`xzoo finetune`: from a folder of images to a model folder, in one call that can be repeated.

The same call continues a run that was interrupted and returns the result of one that is finished. A
run never mixes two sets of options: another one needs another folder.

What is reported is the validation accuracy of what is saved: the averaged weights (EMA) at the end
of the run, read back from the model folder. Not the best epoch, which is chosen by the images that
judge it; its weights are in checkpoints/best.ckpt.
"""

import hashlib
import json
import os
import platform
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import timm
import torch
from rich.console import Console
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from ..data.photos import ImageModule
from ..data.scan import ImageData, read
from ..data.sources import check_name
from ..data.walk import refuse_within
from ..errors import ModelError, XzooError, first_line
from ..files import write_text
from ..hub import folder as model_folder
from ..lettering import spared
from ..machine import device_named, own_threads
from ..names import encoded, escaped, say, shown, to_yaml
from . import pictures
from .callbacks import EMA, Clock, ProgressReport, checkpoints
from .evaluate import judged, top
from .plan import Options, Plan, plan, start, use_weights
from .run import (
    CONFIG,
    LAST,
    METRICS,
    RESULT,
    AtomicCheckpointIO,
    MetricsFile,
    claimed,
    fit,
    quiet,
    read_metrics,
    refuse_other,
    steps_of,
)
from .task import Classifier

DEFAULT_MODEL = "x_resnet18"


@dataclass(frozen=True)
class Result:
    """What a finished run came to; accuracies are shares of `images` validation images, top 1 and
    top 5.
    """

    run: str
    model: str
    accuracy: float
    accuracy5: float
    loss: float
    images: int
    epochs: int
    seconds: float

    def __str__(self) -> str:
        right = round(self.accuracy * self.images)
        return (
            f"validation accuracy {100 * self.accuracy:.2f} % ({right} of {self.images} images); "
            f"model: {self.model}"
        )


def finetune(
    data: str = "digits",
    model: str = DEFAULT_MODEL,
    epochs: int | None = None,
    minutes: float | None = None,
    freeze: bool = False,
    expand: int | None = None,
    pretrained: bool | None = None,
    lr: float | None = None,
    batch_size: int | None = None,
    img_size: int | None = None,
    mirror: bool | None = None,
    seed: int = 0,
    out: str | None = None,
    workers: int | None = None,
    device: str = "auto",
) -> Result:
    """Train a model to tell the classes of your images, and leave a folder that timm loads.

    Args:
        data: a folder with one sub-folder a class (or train/ and val/ of such), a folder of parquet
            files, a data set on the Hugging Face Hub (org/name), or digits.
        model: a name of `xzoo list` or of timm, or local-dir:FOLDER.
        epochs: how often each image is seen; by default 20 times (10 if pretrained), or 500 steps.
        minutes: training time; with epochs as well, whichever is used up first.
        freeze: train only the last layer; the rest, statistics of batch norm included, stays as it
            is.
        expand: make an X-Net of a dense model first: every expanded layer keeps 1/expand of its
            weights.
        pretrained: begin with pretrained weights; by default if there are some.
        lr: peak learning rate, of AdamW.
        batch_size: images in a step.
        img_size: pixels a side that the model sees; by default its own, or less for small images
            from scratch.
        mirror: also train on mirror images; by default yes, for digits no.
        seed: of the order, the augmentation and the new weights.
        out: the run folder, not in the data; by default runs/DATA-MODEL.
        workers: processes that load images; by default none if they fit in memory and the CPU
            trains.
        device: auto, cpu, cuda or mps.
    Raises: XzooError for what cannot be trained; KeyboardInterrupt after Ctrl-C (the same call
    resumes).
    """
    console = Console(stderr=True)
    check_name(data)
    place = Path(data).expanduser()
    options = Options(
        data=str(place.resolve()) if os.path.exists(place) else data,
        model=model,
        expand=expand,
        epochs=epochs,
        minutes=minutes,
        freeze=freeze,
        pretrained=pretrained,
        lr=lr,
        batch_size=batch_size,
        img_size=img_size,
        mirror=mirror,
        seed=seed,
    )
    options.check()
    if workers is not None and workers < 0:
        raise XzooError(f"workers={workers}: an integer from 0 on is needed")
    built = start(options)
    use_weights(options, built.has_weights)
    where = device_named(device)
    run = Path(out).expanduser() if out else Path("runs") / _run_name(data, model, expand)

    refuse_within(run, place)
    refuse_other(run, asdict(options), "xzoo finetune", "options")
    if (run / RESULT).exists():
        result = Result(**json.loads((run / RESULT).read_text(encoding="utf-8")))
        say(console, f"{run} is finished: {result}. Choose another --out to train again.")
        return result
    with claimed(run), quiet(), own_threads():
        images = read(options.data, at_least=2 * (img_size or built.input_size))
        refuse_other(run, {"images": images.fingerprint()}, "xzoo finetune", "data")
        recipe = plan(options, built, images)
        _tell(console, options, images, recipe, run)
        job = _Job(run, options, images, recipe, workers, where)
        job.train(console)
        result = job.finish(console)
        say(console, str(result))
        return result


class _Job:
    """One start of a run: what has been built for it, from data to trainer."""

    def __init__(
        self,
        run: Path,
        options: Options,
        images: ImageData,
        recipe: Plan,
        workers: int | None,
        device: torch.device,
    ) -> None:
        self.run, self.images, self.recipe = run, images, recipe
        self.last = run / LAST
        resumes = self.last.exists()
        # A resumed run takes all weights from its checkpoint, and needs no network for others.
        arguments = recipe.classifier | ({"pretrained": False} if resumes else {})
        self.task = _build(arguments, options.model)
        # The new head says nothing at first. Some families start theirs so wide (MobileNet: 0.3 at
        # ten classes, a loss of 3.9) that the body spends its first epochs on undoing it.
        for parameter in self.task.head.parameters():
            nn.init.zeros_(parameter)
        self.data_config = _data_config(self.task.net, recipe.img_size)
        self.module = ImageModule(
            images,
            self.data_config,
            batch_size=recipe.batch_size,
            seed=options.seed,
            crop=recipe.crop,
            mirror=recipe.mirror,
            workers=workers,
        )
        self.clock = Clock(recipe.minutes)
        self.device = device
        self.done = steps_of(self.last) if resumes else 0
        if not resumes:
            self._describe(options)

    def _describe(self, options: Options) -> None:
        """Write what the run is, before it begins."""
        config = {
            "options": asdict(options),
            "recipe": asdict(self.recipe),
            "input": {
                k: list(v) if isinstance(v, tuple) else v for k, v in self.data_config.items()
            },
            "data": {
                "images": self.images.fingerprint(),
                "train": len(self.images.train),
                "val": len(self.images.val),
                "classes": self.images.classes,
            },
            "versions": {
                "python": platform.python_version(),
                "torch": str(torch.__version__),
                "timm": timm.__version__,
            },
        }
        head = "# What this run was asked for, and what it came to. The same command resumes it.\n"
        write_text(self.run / CONFIG, head + to_yaml(config))
        if self.images.left_out:
            lines = [
                f"{escaped(left.name)}\t{shown(left.detail)}\n" for left in self.images.left_out
            ]
            write_text(self.run / "skipped.txt", "".join(lines))

    def train(self, console: Console) -> None:
        steps = self.module.batches_per_epoch()
        on_gpu = self.device.type == "cuda"
        trainer = pl.Trainer(
            accelerator="gpu" if on_gpu else self.device.type,
            devices=1,
            precision="bf16-mixed" if on_gpu and torch.cuda.is_bf16_supported() else "32-true",
            default_root_dir=str(self.run),
            enable_progress_bar=False,
            enable_model_summary=False,
            # Only epochs: a run with max_steps or max_time as well does not resume where it was.
            max_epochs=self.recipe.epochs or -1,
            callbacks=[EMA(), self.clock, ProgressReport(console), *checkpoints(self.last.parent)],
            logger=MetricsFile(self.run / METRICS, self.done),
            log_every_n_steps=max(1, min(10, steps // 3)),
            plugins=[AtomicCheckpointIO()],
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
        )
        if self.done:
            say(console, f"going on after {self.done} steps, from {self.last}")
        fit(trainer, self.task, self.module, self.last if self.done else None)

    def finish(self, console: Console) -> Result:
        """Save the model, read it back, judge it, draw the pictures; result.json comes last and
        ends the run.
        """
        checkpoint = torch.load(self.last, map_location="cpu", weights_only=True)
        self.task.load_state_dict(checkpoint["state_dict"])
        made = {
            "run": self.run.name,
            "train_images": len(self.images.train),
            "seed": self.task.hparams["seed"],
        }
        folder = self.run / "model"
        block = {"finetune": made, model_folder.GREY: dict(self.images.ranges)}
        model_folder.save(self.task.net, folder, self.images.classes, self.data_config, block)
        logits, labels = judged(model_folder.load(folder).to(self.device), self.module, self.device)
        result = Result(
            run=str(self.run),
            model=str(folder),
            accuracy=top(logits, labels, 1),
            accuracy5=top(logits, labels, min(5, logits.shape[1])),
            loss=float(nn.functional.cross_entropy(logits, labels)),
            images=len(labels),
            epochs=int(checkpoint["epoch"]) + 1,
            seconds=round(self.clock.seconds, 1),
        )
        self._draw(logits, labels, result, console)
        write_text(self.run / RESULT, json.dumps(asdict(result), indent=2) + "\n")
        return result

    def _draw(self, logits: Tensor, labels: Tensor, result: Result, console: Console) -> None:
        classes, predicted = self.images.classes, logits.argmax(1)
        curves, confusion, samples = (
            self.run / name for name in ("curves.png", "confusion.png", "samples.png")
        )
        score = (
            f"{self.run.name}: {100 * result.accuracy:.2f} % of {result.images} validation images"
        )
        with spared(curves, console):
            if (self.run / METRICS).exists():
                pictures.curves(read_metrics(self.run / METRICS), curves, score)
        with spared(confusion, console):
            counts = np.zeros((len(classes), len(classes)), dtype=np.int64)
            np.add.at(counts, (labels.numpy(), predicted.numpy()), 1)
            pictures.confusion(counts, classes, confusion, score)
        with spared(samples, console):
            chosen = _shown(predicted, labels)
            pictures.samples(
                [self.images.val.image(i) for i in chosen],
                labels[chosen].tolist(),
                predicted[chosen].tolist(),
                [float(logits[i].softmax(0).max()) for i in chosen],
                classes,
                samples,
                score + " (mistakes first)",
            )


def _build(arguments: dict[str, Any], name: str) -> Classifier:
    try:
        return Classifier(**arguments)
    except XzooError:
        raise
    except Exception as error:
        if not arguments["pretrained"]:
            raise
        # Network, cache and format: many libraries, many classes.
        reason = first_line(error)
        raise ModelError(
            f"no weights for {name}: {reason}; --pretrained false trains from scratch"
        ) from error


def _data_config(net: nn.Module, img_size: int) -> dict[str, Any]:
    config = resolve_model_data_config(net)
    return config | {"input_size": (config["input_size"][0], img_size, img_size)}


def _shown(predicted: Tensor, labels: Tensor, most: int = 24) -> list[int]:
    """Indices to show: up to half of them mistakes, then right ones spread over the set."""
    wrong = torch.nonzero(predicted != labels).flatten().tolist()
    right = torch.nonzero(predicted == labels).flatten().tolist()
    wrong = wrong[: max(most // 2, most - len(right))]
    room = most - len(wrong)
    return wrong + [right[i * len(right) // room] for i in range(min(room, len(right)))]


def _run_name(data: str, model: str, expand: int | None) -> str:
    parts = [
        Path(data).expanduser().resolve().name if Path(data).exists() else data,
        model.split(":")[-1].strip("/"),
    ]
    name = "-".join(map(_of_folder, parts))
    return f"{name}-c{expand}" if expand else name


def _of_folder(part: str) -> str:
    """Letters, digits, dots and underscores alone; by a hash where none is left, or more than a
    file system takes.
    """
    name = re.sub(r"[^\w.]+", "_", part).strip("_")
    if name.strip(".") and len(encoded(name)) <= 110:
        return name
    return f"{name.strip('.')[:20]}_{hashlib.sha256(encoded(part)).hexdigest()[:8]}".strip("_")


def _tell(console: Console, options: Options, images: ImageData, recipe: Plan, run: Path) -> None:
    """What is about to happen, before the first epoch."""
    for remark in images.remarks:
        say(console, f"{options.data}: {remark}")
    listed = f"; see {run}/skipped.txt" if images.left_out else ""
    say(console, f"{options.data}: {images.account()}{listed}")
    if not recipe.classifier["pretrained"]:
        reason = "no pretrained weights" if options.pretrained is None else "as asked"
        say(console, f"{options.model}: {reason}, training from scratch")
        if options.freeze:
            say(
                console,
                "freeze without pretrained weights trains the last layer on random features",
            )
    say(
        console,
        f"{len(images.classes)} classes, {len(images.train)} training and {len(images.val)} "
        "validation images, "
        f"{recipe.img_size} x {recipe.img_size} pixels; everything goes to {run}",
    )
