"""The data module of the user's images: timm's transforms, in an order that is a function of (seed, epoch).

A loader starts where the restored run stands. That position is read when the loader is built: Lightning
creates its iterator, which already fetches, before it calls `set_epoch` (its issue 21938), so a sampler that
waits for the call replays the first epoch after a resume.
"""

import functools
import logging
import random
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from rich.console import Console
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from ..errors import XzooError
from ..machine import cores
from ..names import say
from .order import AUGMENT, EvalOrder, Resumable, TrainOrder, key, standing
from .sources import ImageData, Images, read

Transform = Callable[[Any], Tensor]


@contextmanager
def drawn_from(seed: int) -> Iterator[None]:
    """Within this block the global generators start at `seed`; afterwards they are where they were.

    Transforms of torchvision and timm know no other source of randomness. In a worker the generators are nobody
    else's and stay where the block leaves them: putting them back takes three times as long as seeding them.
    """
    shared = get_worker_info() is None
    states = (random.getstate(), np.random.get_state(), torch.get_rng_state()) if shared else None
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would visit every device: 100 times slower
    try:
        yield
    finally:
        if states:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])


class Views(Dataset[tuple[Tensor, int]]):
    """What the model sees of an image in an epoch; indexed by (epoch, index).

    Args:
        seed: of the augmentation, or None for a transform that draws nothing.
    """

    def __init__(self, images: Images, transform: Transform, seed: int | None) -> None:
        self.images, self.transform, self.seed = images, transform, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = place
        image, label = self.images.image(index), self.images.items[index].label
        if self.seed is None:
            return self.transform(image), label
        with drawn_from(key(self.seed, epoch, AUGMENT, index)):
            return self.transform(image), label


SHARED = Path("/dev/shm")  # where torch's workers leave their batches, on Linux
PREFETCHED = 2  # batches that a worker is ahead: torch's own number


class Loader(Resumable, DataLoader[Any]):
    """A DataLoader over `Views` whose order (its batch sampler) knows where the run stands.

    Where the machine's shared memory is too small for the workers' batches (64 MB in a container), they come through
    pipes, which is slower, and a line says so.

    Args:
        collate: makes a batch of (image, label) pairs; in the workers, or here where they use pipes.
        batch_bytes: of the images of one batch.
    Raises: XzooError while iterating, where a worker is ended by the system or cannot be started.
    """

    def __init__(
        self,
        views: Dataset[Any],
        order: TrainOrder | EvalOrder,
        workers: int,
        collate: Callable[[list[Any]], Any] | None = None,
        batch_bytes: int = 0,
    ) -> None:
        self._by_pipe = workers > 0 and _too_small(batch_bytes * (PREFETCHED * workers + 2))
        self._collate = collate or default_collate
        super().__init__(
            views,
            batch_sampler=order,
            num_workers=workers,
            collate_fn=_arrays if self._by_pipe else self._collate,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
            # Its own: a DataLoader draws the workers' base seed when iteration begins, else from the global stream.
            generator=torch.Generator(),
        )

    def __iter__(self) -> Any:
        return self._watched() if self.num_workers else super().__iter__()

    def _watched(self) -> Iterator[Any]:
        try:
            for batch in super().__iter__():
                yield self._collate([(torch.from_numpy(x), y) for x, y in batch]) if self._by_pipe else batch
        except XzooError:
            raise
        except (RuntimeError, OSError, MemoryError) as error:
            lines = str(error).splitlines() or [type(error).__name__]
            if not re.search(_MACHINE, str(error)) and not isinstance(error, MemoryError):
                raise
            raise XzooError(
                f"workers={self.num_workers}: a process that loads images ended or could not begin ({lines[-1]}); "
                "memory, shared memory or processes are short here: use fewer workers, or 0, or smaller batches"
            ) from error


# What torch and the system say where the machine has too little for a worker.
_MACHINE = (
    r"DataLoader worker \(pid.*(killed by signal|exited)|shared memory|unable to (write|open|mmap|resize|allocate)"
    r"|Cannot allocate memory|can't allocate memory|out of memory|MemoryError|Resource temporarily unavailable"
    r"|can't start new thread|Too many open files|received \d+ items of ancdata"
)


def _arrays(samples: list[tuple[Tensor, int]]) -> list[tuple[Any, int]]:
    """Images as numpy arrays, which go through a worker's pipe; torch collates in shared memory there."""
    return [(image.numpy(), label) for image, label in samples]


def _too_small(needed: int) -> bool:
    """Whether the machine's shared memory does not hold so many bytes more; says so once."""
    if not SHARED.is_dir():
        return False
    free = shutil.disk_usage(SHARED).free
    if free < needed:
        _say_once(
            f"{SHARED} has {free / 2**20:.0f} MB free and the workers' batches need {needed / 2**20:.0f} MB: they come "
            "through pipes, which is slower; give the container more (docker run --shm-size)"
        )
    return free < needed


@functools.cache
def _say_once(text: str) -> None:
    logging.getLogger(__name__).warning("xzoo: %s", text)


def batch_bytes(batch_size: int, input_size: tuple[int, int, int], kind: torch.dtype = torch.float32) -> int:
    """Of the images [batch_size, *input_size] of one type."""
    return batch_size * prod(input_size) * kind.itemsize


class ImageModule(pl.LightningDataModule):
    """Batches (images float32 [B, 3, H, W], labels int64 [B]) of an `ImageData`.

    Args:
        data_config: timm's description of the input (`timm.data.resolve_model_data_config`).
        batch_size: images in a step, over all devices.
        crop: smallest share of the area that a training crop shows.
        workers: processes that decode and transform; None decides. Without them images come from the
            training process itself, which is best where pixels are in memory and the CPU trains as well.
    """

    def __init__(
        self,
        data: ImageData,
        data_config: dict[str, Any],
        batch_size: int = 64,
        seed: int = 0,
        crop: float = 0.5,
        mirror: bool = True,
        workers: int | None = None,
    ) -> None:
        super().__init__()
        self.data, self.batch_size, self.seed = data, batch_size, seed
        self.input_size: tuple[int, int, int] = data_config["input_size"]
        self.mean, self.std = tuple(data_config["mean"]), tuple(data_config["std"])
        self.class_names = data.classes
        self.train_transform: Transform = create_transform(
            **data_config,
            is_training=True,
            scale=(crop, 1.0),
            ratio=(4 / 5, 5 / 4),
            hflip=0.5 if mirror else 0.0,
            color_jitter=0.1 if mirror else 0.0,
        )
        self.eval_transform: Transform = create_transform(**data_config, is_training=False)
        if workers is None:
            workers = 0 if data.in_memory and not torch.cuda.is_available() else min(8, cores())
        self.workers = workers

    def batches_per_epoch(self, world: int = 1) -> int:
        """Steps in an epoch, known before any loader exists."""
        return len(TrainOrder(len(self.data.train), self.batch_size, world=world))

    def train_dataloader(self) -> Loader:
        order = TrainOrder(len(self.data.train), self.batch_size, self.seed, *standing(self.trainer))
        return self._loader(Views(self.data.train, self.train_transform, self.seed), order)

    def val_dataloader(self) -> Loader:
        rank, world, *_ = standing(self.trainer)
        order = EvalOrder(len(self.data.val), self.batch_size, rank, world)
        return self._loader(Views(self.data.val, self.eval_transform, None), order)

    def _loader(self, views: Views, order: TrainOrder | EvalOrder) -> Loader:
        size = batch_bytes(self.batch_size, self.input_size)
        return Loader(views, order, self.workers, batch_bytes=size)


@rank_zero_only
def _tell(root: str, data: ImageData) -> None:
    console = Console(stderr=True)
    for text in (*data.remarks, data.account()):
        say(console, f"{root}: {text}")


class ImageFolder(ImageModule):
    """The images of DATA in any form that `xzoo finetune` reads (see sources.py), for a recipe of one's own.

    Its validation images, its own or a fifth held out by a hash of their names, are those that are tested too.

    Args:
        root: folder of class folders or of parquet files, data set on the Hub (org/name), or digits.
        img_size: pixels a side that the model sees.
        crop_pct: share of the shorter side that is seen in validation.
        interpolation: timm's name of the filter that resizes.
        mean, std: of the colours, in 0 to 1.
        batch_size, seed, crop, mirror, workers: as in ImageModule.
    Raises: DataError as `sources.read`, which runs here: a recipe's model needs the number of classes.
    """

    dataset, holdout = None, 0  # none of the table of results

    def __init__(
        self,
        root: str,
        img_size: int = 224,
        batch_size: int = 64,
        seed: int = 0,
        crop: float = 0.5,
        mirror: bool = True,
        crop_pct: float = 1.0,
        interpolation: str = "bicubic",
        mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN,
        std: tuple[float, float, float] = IMAGENET_DEFAULT_STD,
        workers: int | None = None,
    ) -> None:
        self.img_size, self.input_size, self.crop_pct = img_size, (3, img_size, img_size), crop_pct
        self.interpolation, self.mean, self.std = interpolation, tuple(mean), tuple(std)
        config = {name: getattr(self, name) for name in ("input_size", "crop_pct", "interpolation", "mean", "std")}
        data = read(root, at_least=2 * img_size)
        _tell(root, data)
        super().__init__(data, config, batch_size, seed, crop, mirror, workers)
        self.grey_range = dict(data.ranges)
        self.num_classes = len(data.classes)
        self.n_val = self.n_test = len(data.val)

    def test_dataloader(self) -> Loader:
        return self.val_dataloader()

    def predict_dataloader(self) -> Loader:
        return self.val_dataloader()
