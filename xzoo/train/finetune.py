"""`xzoo finetune`: from a folder of images to a model folder, in one call that can be repeated.

The same call continues a run that was interrupted and returns the result of one that is finished. A
run never mixes two sets of options: another one needs another folder. What is reported is in
outcome.py; the weights of the best epoch are in checkpoints/best.ckpt.
"""

import hashlib
import os
import platform
import re
from dataclasses import asdict
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
from ..lettering import spared
from ..machine import device_named, own_threads
from ..names import encoded, escaped, say, shown, to_yaml
from ..results import record
from ..results.record import Result
from . import pictures
from .callbacks import EMA
from .outcome import facts, finish
from .plan import Options, Plan, plan, start
from .run import CONFIG, Run, locked_run_folder, log_every, quiet, refuse_other
from .task import Classifier

DEFAULT_MODEL = "x_resnet18"


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
        data: a folder with one sub-folder per class (or train/ and val/ of such), a folder of
            parquet files, a data set on the Hugging Face Hub (org/name), or digits.
        model: a name of `xzoo list` or of timm, or local-dir:FOLDER.
        epochs: passes over the images; by default as many as make 500 steps, from 20 to 100 (10 to
            60 if pretrained).
        minutes: training time; with epochs as well, whichever is used up first.
        freeze: train only the last layer; the rest, statistics of batch norm included, stays as it
            is.
        expand: make an X-Net of a dense model first: every expanded layer keeps 1/expand of its
            weights.
        pretrained: begin with pretrained weights; by default if there are some.
        lr: peak learning rate of AdamW; by default 2e-3 (1e-3 from weights of large images), times
            the square root of batch_size / 64.
        batch_size: images in a step; by default 8 to 64, the more images the more.
        img_size: pixels a side that the model sees; by default its own, or less for small images
            from scratch.
        mirror: also train on mirror images; by default yes, for digits no.
        seed: random seed of the order, the augmentation and the new weights.
        out: the run folder, outside the data; by default runs/DATA-MODEL.
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
    where = device_named(device)
    folder = Path(out).expanduser() if out else Path("runs") / _run_name(data, model, expand)

    refuse_within(folder, place)
    refuse_other(folder, asdict(options), "xzoo finetune", "options")
    if (folder / record.RESULT).exists():
        result = record.read(folder)
        say(console, f"{folder} is finished: {result}. Choose another --out to train again.")
        return result
    with locked_run_folder(folder), quiet(), own_threads():
        images = read(options.data, at_least=2 * (img_size or built.input_size))
        refuse_other(folder, {"images": images.fingerprint()}, "xzoo finetune", "data")
        recipe = plan(options, built, images)
        _tell(console, options, images, recipe, folder)
        return _train(Run(folder, recipe.minutes), options, images, recipe, workers, where, console)


def _train(
    run: Run,
    options: Options,
    images: ImageData,
    recipe: Plan,
    workers: int | None,
    device: torch.device,
    console: Console,
) -> Result:
    # A resumed run takes all weights from its checkpoint, and needs no network for others.
    arguments = recipe.classifier | ({"pretrained": False} if run.resumes else {})
    task = _build(arguments, options.model)
    # The new head says nothing at first. Some families start theirs so wide (MobileNet: 0.3 at ten
    # classes, a loss of 3.9) that the body spends its first epochs on undoing it.
    for parameter in task.head.parameters():
        nn.init.zeros_(parameter)
    config = resolve_model_data_config(task.net)
    config["input_size"] = (config["input_size"][0], recipe.img_size, recipe.img_size)
    data = ImageModule(
        images,
        config,
        batch_size=recipe.batch_size,
        seed=options.seed,
        crop=recipe.crop,
        mirror=recipe.mirror,
        workers=workers,
    )
    on_gpu = device.type == "cuda"
    trainer = pl.Trainer(
        accelerator="gpu" if on_gpu else device.type,
        devices=1,
        precision="bf16-mixed" if on_gpu and torch.cuda.is_bf16_supported() else "32-true",
        # Only epochs: a run with max_steps or max_time as well does not resume where it was.
        max_epochs=recipe.epochs or -1,
        log_every_n_steps=log_every(data.batches_per_epoch(), 10),
        **run.trainer_arguments(console, EMA()),
    )
    if run.resumes:
        say(console, f"going on after {run.done} steps, from {run.last}")
    else:
        _describe(run.folder, options, images, recipe, config)
    run.fit(trainer, task, data)
    known, name = facts(trainer, task, data), run.folder.name
    made = {"run": name, "train_images": len(images.train), "seed": options.seed}
    result, logits, labels = finish(
        run, trainer, task, data, known, {"finetune": made}, name, console
    )
    _draw(images, logits, labels, result, console)
    record.write(result)
    say(console, f"{result}; model: {run.folder / 'model'}")
    return result


def _describe(
    folder: Path, options: Options, images: ImageData, recipe: Plan, config: dict[str, Any]
) -> None:
    """Write what the run is, before it begins."""
    described = {
        "options": asdict(options),
        "recipe": asdict(recipe),
        "input": {k: list(v) if isinstance(v, tuple) else v for k, v in config.items()},
        "data": {
            "images": images.fingerprint(),
            "train": len(images.train),
            "val": len(images.val),
            "classes": images.classes,
        },
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "timm": timm.__version__,
        },
    }
    head = "# What this run was asked for, and what it came to. The same command resumes it.\n"
    write_text(folder / CONFIG, head + to_yaml(described))
    if images.left_out:
        rows = (f"{escaped(left.name)}\t{shown(left.detail)}\n" for left in images.left_out)
        write_text(folder / "skipped.txt", "".join(rows))


def _draw(
    images: ImageData, logits: Tensor, labels: Tensor, result: Result, console: Console
) -> None:
    """Which classes are mistaken for which, and some of the validation images."""
    classes, predicted = images.classes, logits.argmax(1)
    confusion, samples = result.run / "confusion.png", result.run / "samples.png"
    score = f"{result.run.name}: {result}"
    with spared(confusion, console):
        counts = np.zeros((len(classes), len(classes)), dtype=np.int64)
        np.add.at(counts, (labels.numpy(), predicted.numpy()), 1)
        pictures.confusion(counts, classes, confusion, score)
    with spared(samples, console):
        chosen = _shown(predicted, labels)
        pictures.samples(
            [images.val.image(i) for i in chosen],
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
        raise ModelError(
            f"no weights for {name}: {first_line(error)}; --pretrained false trains from scratch"
        ) from error


def _shown(predicted: Tensor, labels: Tensor, most: int = 24) -> list[int]:
    """Indices to show: up to half of them mistakes, then right ones spread over the set."""
    wrong = torch.nonzero(predicted != labels).flatten().tolist()
    right = torch.nonzero(predicted == labels).flatten().tolist()
    wrong = wrong[: max(most // 2, most - len(right))]
    room = most - len(wrong)
    return wrong + [right[i * len(right) // room] for i in range(min(room, len(right)))]


def _run_name(data: str, model: str, expand: int | None) -> str:
    if Path(data).exists():
        data = Path(data).expanduser().resolve().name
    name = f"{_of_folder(data)}-{_of_folder(model.split(':')[-1].strip('/'))}"
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
        f"validation images, {recipe.img_size} x {recipe.img_size} pixels; everything goes to "
        f"{run}",
    )
