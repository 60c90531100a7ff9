"""Loading images one by one in worker processes, in an order that is a function of (seed, epoch).

A loader starts where the restored run stands. That position is read when the loader is built:
Lightning creates its iterator, which already fetches, before it calls `set_epoch` (its issue
21938), so a sampler that waits for the call replays the first epoch after a resume.
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
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from ..errors import XzooError
from .order import AUGMENT, EvalOrder, Resumable, TrainOrder, key
from .scan import Images

Transform = Callable[[Any], Tensor]


@contextmanager
def drawn_from(seed: int) -> Iterator[None]:
    """Within this block the global generators start at `seed`; afterwards they are where they were.

    Transforms of torchvision and timm know no other source of randomness. In a worker the
    generators are nobody else's and stay where the block leaves them: putting them back takes three
    times as long as seeding them.
    """
    shared = get_worker_info() is None
    states = (random.getstate(), np.random.get_state(), torch.get_rng_state()) if shared else None
    random.seed(seed)
    np.random.seed(seed)
    # torch.manual_seed would visit every device: 100 times slower
    torch.default_generator.manual_seed(seed)
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

    Where the machine's shared memory is too small for the workers' batches (64 MB in a container),
    they come through pipes, which is slower, and a line says so.

    Args:
        collate: makes a batch of (image, label) pairs; in the workers, or here where they use
            pipes.
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
            # Its own: a DataLoader draws the workers' base seed when iteration begins, else from
            # the global stream.
            generator=torch.Generator(),
        )

    def __iter__(self) -> Any:
        return self._watched() if self.num_workers else super().__iter__()

    def _watched(self) -> Iterator[Any]:
        try:
            for batch in super().__iter__():
                yield (
                    self._collate([(torch.from_numpy(x), y) for x, y in batch])
                    if self._by_pipe
                    else batch
                )
        except XzooError:
            raise
        except (RuntimeError, OSError, MemoryError) as error:
            lines = str(error).splitlines() or [type(error).__name__]
            if not re.search(_MACHINE, str(error)) and not isinstance(error, MemoryError):
                raise
            raise XzooError(
                f"workers={self.num_workers}: a process that loads images ended or could not begin "
                f"({lines[-1]}); "
                "memory, shared memory or processes are short here: use fewer workers, or 0, or "
                "smaller batches"
            ) from error


# What torch and the system say where the machine has too little for a worker.
_MACHINE = (
    r"DataLoader worker \(pid.*(killed by signal|exited)|shared memory|unable to "
    r"(write|open|mmap|resize|allocate)"
    r"|Cannot allocate memory|can't allocate memory|out of memory|MemoryError|Resource temporarily "
    r"unavailable"
    r"|can't start new thread|Too many open files|received \d+ items of ancdata"
)


def _arrays(samples: list[tuple[Tensor, int]]) -> list[tuple[Any, int]]:
    """Images as numpy arrays, which go through a worker's pipe; torch collates in shared memory
    there.
    """
    return [(image.numpy(), label) for image, label in samples]


def _too_small(needed: int) -> bool:
    """Whether the machine's shared memory does not hold so many bytes more; says so once."""
    if not SHARED.is_dir():
        return False
    free = shutil.disk_usage(SHARED).free
    if free < needed:
        _say_once(
            f"{SHARED} has {free / 2**20:.0f} MB free and the workers' batches need "
            f"{needed / 2**20:.0f} MB: they come "
            "through pipes, which is slower; give the container more (docker run --shm-size)"
        )
    return free < needed


@functools.cache
def _say_once(text: str) -> None:
    logging.getLogger(__name__).warning("xzoo: %s", text)


def batch_bytes(
    batch_size: int, input_size: tuple[int, int, int], kind: torch.dtype = torch.float32
) -> int:
    """Of the images [batch_size, *input_size] of one type."""
    return batch_size * prod(input_size) * kind.itemsize
