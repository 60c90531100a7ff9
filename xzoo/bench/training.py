"""What the training loop and the data paths cost, beside something that does the same.

Nothing is read or left: the images are drawn, and files lie in a temporary folder.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.callbacks import Callback
from rich.console import Console
from rich.progress import track
from timm.data import create_dataset, create_loader
from timm.optim import create_optimizer_v2
from torch import nn

from ..data.imagenet import ImageNet
from ..data.memory import CIFAR10, InMemory, PlaceLoader, TinyImageNet
from ..data.order import TrainOrder
from ..errors import XzooError
from ..models import create_model
from ..norms import fuse
from ..train.run import Run, log_every, quiet
from ..train.task import Classifier, rate
from .figures import Figure, ratios, threads

WARM = 2  # turns of both forms before the first that counts
# Steps in a turn. The CPU has done a step when it returns; a device is waited for at both ends of a
# turn, which a turn of one step would pay for in full.
TURN_CPU, TURN_DEVICE = 1, 20
# Of recipes/cifar10.yaml; the averaged weights are left out, as they are work and not the loop's.
OPTIMIZER: dict[str, Any] = {"optimizer": "sgd", "lr": 0.1, "weight_decay": 5e-4}
SCHEDULE: dict[str, Any] = {"schedule": "linear", "warmup": 0.2}
SMOOTHING = 0.1
LOG_EVERY = 50
IMAGES = {32: 6_400, 64: 3_200}  # of a repetition, by their side: about 0.1 s on one core
PHOTO, PHOTO_BATCH = (375, 500), 16  # height and width of most images of ImageNet
VIEW: dict[str, Any] = {
    "scale": (0.08, 1.0),
    "ratio": (3 / 4, 4 / 3),
    "hflip": 0.5,
    "color_jitter": None,
}


def loop(
    model: str = "x_vgg16_c16", batch_size: int = 128, pairs: int = 20, photos: int = 200
) -> Iterator[Figure]:
    """Measure the training loop, the augmentation in memory, and the loader of an image folder.

    Args:
        model: what is trained.
        batch_size: images in a training step.
        pairs: how often each thing is measured.
        photos: JPEG files that are drawn for the loader.
    Raises: XzooError for values that measure nothing; ModelError for an unknown model.
    """
    for name, value, least in (
        ("pairs", pairs, 1),
        ("batch_size", batch_size, 8),
        ("photos", photos, PHOTO_BATCH),
    ):
        if value < least:
            raise XzooError(f"{name}={value}: {least} or more are needed")
    create_model(model, device="meta")
    return _loop(model, batch_size, pairs, photos)


def _loop(model: str, batch_size: int, pairs: int, photos: int) -> Iterator[Figure]:
    yield lightning_loop(model, batch_size, pairs)
    for kind in (CIFAR10, TinyImageNet):
        yield augmentation(kind, batch_size, pairs)
    yield image_folder(photos, pairs)


# ---- Lightning's loop


def bare_loop(task: Classifier, data: InMemory, device: torch.device) -> Iterator[None]:
    """Plain PyTorch that does with the network of `task` what the Trainer does, a step a time."""
    net = fuse(task.net).to(device).train()
    loss_of = nn.CrossEntropyLoss(label_smoothing=SMOOTHING)
    optimizer = create_optimizer_v2(
        net, OPTIMIZER["optimizer"], OPTIMIZER["lr"], OPTIMIZER["weight_decay"]
    )
    steps = data.batches_per_epoch()
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rate(step / steps, **SCHEDULE)
    )
    order = TrainOrder(steps * data.batch_size, data.batch_size, data.seed, exact=True)
    for places in PlaceLoader("train", order):
        images, labels = data.batch(places._replace(numbers=places.numbers.to(device)))
        loss = loss_of(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        yield


class Turns(Callback):
    """Between turns of the Trainer's steps, as many of another loop; keeps the seconds of both.

    A turn of the Trainer's lasts from the start of a batch to that of another, so that all that
    happens between two steps is in it: callbacks, logging, fetching and augmenting the next batch.

    Args:
        length: steps in a turn.
    """

    def __init__(self, step: Callable[[], None], length: int, device: torch.device) -> None:
        self.step, self.length, self.device = step, length, device
        self.lightning: list[float] = []
        self.bare: list[float] = []
        self._since: float | None = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % self.length:
            return
        begun = self._now()
        if self._since is not None:
            self.lightning.append(begun - self._since)
        if trainer.is_last_batch:
            self.step()  # so that both have taken as many
            return
        for _ in range(self.length):
            self.step()
        self._since = self._now()
        self.bare.append(self._since - begun)

    def _now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()


def lightning_loop(model: str, batch_size: int, pairs: int) -> Figure:
    """Time of a step of the Trainer, as `xzoo fit` sets it up, over that of a bare loop."""
    ours, theirs = (
        Classifier(
            name=model,
            num_classes=CIFAR10.facts.classes,
            label_smoothing=SMOOTHING,
            **OPTIMIZER,
            **SCHEDULE,
        )
        for _ in range(2)
    )
    turns = alternated(ours, theirs, batch_size, pairs)
    what = f"Trainer's step of {model}, batch {batch_size}, {turns.device.type}"
    values = ratios(turns.lightning[WARM:], turns.bare[WARM:])
    return Figure(what, "bare PyTorch loop, same work", "x", values, 1.1, at_least=False)


def alternated(ours: Classifier, theirs: Classifier, batch_size: int, pairs: int) -> Turns:
    """Train `ours` by the Trainer and `theirs` by the bare loop, on the same random images and in
    turns.
    """
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = device or torch.device("cpu")
    turn = TURN_CPU if device.type == "cpu" else TURN_DEVICE
    steps = turn * (WARM + pairs) + 1  # the last one only ends the last turn
    with quiet(), TemporaryDirectory() as folder:
        data = drawn(CIFAR10, Path(folder), batch_size, steps * batch_size)
        other = bare_loop(theirs, data, device)
        turns = Turns(lambda: next(other), turn, device)
        run = Run(Path(folder))
        arguments = run.trainer_arguments(Console(stderr=True))
        arguments["callbacks"].insert(0, turns)
        trainer = pl.Trainer(
            max_epochs=1,
            devices=1,
            accelerator=device.type,
            log_every_n_steps=log_every(steps, LOG_EVERY),
            **arguments,
        )
        run.fit(trainer, ours, data)
    return turns


# ---- images in memory


def augmentation(kind: type[InMemory], batch_size: int, repetitions: int) -> Figure:
    """Images that one core augments in a second of its time."""
    side, values = kind.facts.sides[0], []
    with TemporaryDirectory() as folder, threads(1):
        data = drawn(kind, Path(folder), batch_size, max(batch_size, IMAGES[side]))
        loader: Any = data.train_dataloader()
        for epoch in _watched(1 + repetitions, f"augmentation, {side} px"):
            loader.sampler.set_epoch(epoch)
            begun = time.thread_time()  # not the clock's: what others do meanwhile is left out
            seen = sum(len(images) for images, _ in loader)
            values.append(seen / (time.thread_time() - begun))
    bar = 20_000 if side == 32 else None
    return Figure(
        f"augmentation in memory, {side} px, one core", "", "images/s", tuple(values[1:]), bar
    )


# ---- images in a folder


def image_folder(photos: int, pairs: int) -> Figure:
    """Images in a second of `ImageNet`'s training loader, over those of timm's, on the same files.

    Both end with batches of normalised float32 on the CPU: timm's workers make them, ours hand on
    bytes that this process normalises. By one thread, since the workers have the cores: with two on
    two busy cores, a batch of 2 ms waited 30 ms for the second (EPYC, 2026-11, torch 2.14).
    """
    seconds: tuple[list[float], list[float]] = [], []
    with TemporaryDirectory() as folder, quiet(), threads(1):
        draw_folder(Path(folder), photos, 2, 2, photo)
        data = ImageNet(folder, num_classes=2, batch_size=PHOTO_BATCH, **VIEW)
        # In a Trainer's hands the workers hand on bytes.
        data.trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
        ours: Any = data.train_dataloader()
        theirs = _timm_loader(folder, data)
        for epoch in _watched(1 + pairs, "image folder"):
            ours.batch_sampler.set_epoch(epoch)
            normalised = (data.on_after_batch_transfer(batch, 0) for batch in ours)
            for batches, taken in zip((normalised, theirs), seconds, strict=True):
                begun = time.perf_counter()
                seen = sum(len(images) for images, _ in batches)
                taken.append((time.perf_counter() - begun) / seen)
        del ours, theirs, normalised, batches  # and so their workers, before the files
    # The first pass starts the workers. A ratio of rates is that of the times upside down.
    values = ratios(seconds[1][1:], seconds[0][1:])
    return Figure(
        f"ImageNet's loader, folder of JPEG, {data.workers} workers",
        "timm's loader",
        "x",
        values,
        1.0,
    )


def _timm_loader(folder: str, data: ImageNet) -> Any:
    return create_loader(
        create_dataset("folder", root=folder, split="train", is_training=True),
        input_size=data.input_size,
        batch_size=data.batch_size,
        is_training=True,
        **VIEW,
        interpolation=data.interpolation,
        mean=data.mean,
        std=data.std,
        num_workers=data.workers,
        pin_memory=torch.cuda.is_available(),
        device=torch.device("cpu"),
        use_prefetcher=False,
    )


# ---- drawn images


def drawn(kind: type[InMemory], root: Path, batch_size: int, count: int) -> InMemory:
    """A data set of `kind` with random pixels: `count` training images, and one a class to validate
    on.
    """
    shape = (kind.facts.sides[0], kind.facts.sides[0], 3)

    def noise(draw: np.random.Generator) -> Image.Image:
        return Image.fromarray(draw.integers(0, 256, shape, np.uint8))

    draw_folder(root, count, kind.facts.classes, kind.facts.classes, noise, "png")
    # of any number of images
    own: type[InMemory] = type(f"Drawn{kind.__name__}", (kind,), {"key": "drawn"})
    data = own(str(root), batch_size=batch_size)
    data.setup()
    return data


def draw_folder(
    root: Path,
    train: int,
    val: int,
    classes: int,
    picture: Callable[[np.random.Generator], Image.Image],
    kind: str = "jpg",
) -> None:
    """As many image files in class folders below train/ and val/."""
    draw = np.random.default_rng(0)
    for part, count in (("train", train), ("val", val)):
        for i in range(count):
            place = root / part / f"class{i % classes:03d}"
            place.mkdir(parents=True, exist_ok=True)
            picture(draw).save(place / f"{i:06d}.{kind}", quality=90)


def photo(draw: np.random.Generator) -> Image.Image:
    """Noise of several sizes, the finer the fainter: a file of about 70 KB, as photographs of this
    size are.
    """
    height, width = PHOTO
    pixels = np.full((height, width, 3), 128.0)
    for cell, strength in ((96, 50), (24, 30), (6, 15), (2, 10), (1, 4)):
        noise = draw.integers(0, 256, (-(-height // cell), -(-width // cell), 3), np.uint8)
        layer = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
        pixels += strength / 64 * (np.asarray(layer, np.float64) - 128)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _watched(count: int, what: str) -> Iterable[int]:
    console = Console(stderr=True)
    return track(
        range(count), what, console=console, transient=True, disable=not console.is_terminal
    )
