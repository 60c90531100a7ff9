"""Which image is seen when: pure functions of (seed, epoch, index), so that nothing random is
stored.

A run that is resumed, split over other processes or fed by other workers sees the same images in
the same order with the same augmentation, because everything is a hash of where it is and nothing a
generator's state. 32-bit words in int64 tensors, masked after each product: the same bits on every
device and release.

The streams below are part of the format: changing a number changes every result.
"""

from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Sampler

from ..errors import DataError, XzooError

# 1 to 9, and the table of all, stand in augment.py
ORDER, HELD_OUT, AUGMENT, STEP = 0, 10, 100, 101
_MASK = 0xFFFFFFFF


Word = TypeVar("Word", int, Tensor)


def mix(x: Word) -> Word:
    """Finalizer of a 32-bit hash (multiply and xor-shift, constants of Wellons' `lowbias32`)."""
    x = x & _MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def keys(seed: int, epoch: int, stream: int | Tensor, index: Tensor) -> Tensor:
    """A uniform 32-bit key for each index (int64, any shape), independent over seeds, epochs and
    streams.

    Several streams at once: an int64 tensor that broadcasts with `index`.
    """
    return mix(_place(seed, epoch, stream) + mix(index))


def key(seed: int, epoch: int, stream: int, index: int) -> int:
    """The key of one index, as a plain number below 2^32."""
    return mix(_place(seed, epoch, stream) + mix(index))


def _place(seed: int, epoch: int, stream: Any) -> Any:
    return mix(mix(mix(seed) ^ epoch) ^ stream)


def permutation(seed: int, epoch: int, n: int) -> Tensor:
    """The order of n images in an epoch: int64 [n]."""
    return keys(seed, epoch, ORDER, torch.arange(n)).argsort(stable=True)


def split_validation(labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Numbers of `count` images held out of training, and of the others, ascending; the same for
    every seed.

    Each class gives its share of them, within one image.

    Raises: DataError if a class would keep no image.
    """
    n, classes = len(labels), len(labels.unique())
    if not 0 <= count <= n - classes:
        raise DataError(
            f"holdout={count} of {n} training images of {classes} classes: use 0 to {n - classes}"
        )
    order = keys(0, 0, HELD_OUT, torch.arange(n)).argsort(stable=True)
    order = order[labels[order].argsort(stable=True)]  # by class, and within a class by key
    sizes = labels.bincount()
    rank = torch.arange(n) - (sizes.cumsum(0) - sizes)[labels[order]]
    # The place of an image within its class, as a share of it: the smallest are an equal share of
    # every class.
    place = (rank.double() + 0.5) / sizes[labels[order]]
    place[rank == sizes[labels[order]] - 1] = 1.0  # the last one of each class stays
    order = order[place.argsort(stable=True)]
    return order[:count].sort().values, order[count:].sort().values


class TrainOrder(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index); a batch sampler that shards itself.

    An epoch is cut into ceil(n / batch_size) batches whose sizes differ by one at most. So no image
    is left out, and no batch is much smaller than the others: a last batch of one image would stop
    batch norm (one value a channel where the map is 1x1) and weigh as much in the gradient as a
    full one.

    Under several processes each takes its part of every batch of the one permutation, so that what
    is seen in a step does not depend on how many they are.

    Args:
        n: number of images.
        batch_size: images in a step, over all ranks.
        done: batches that a resumed run has already seen since its beginning.
        limit: batches that are taken of each epoch, or the share of them (the Trainer's
            limit_train_batches).
        exact: every batch has batch_size images, the same number on each rank. The last few of each
            epoch's permutation, other images each time, are left out: a recipe's steps are then all
            alike.
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        done: int = 0,
        limit: int | float = 1.0,
        exact: bool = False,
    ) -> None:
        if batch_size < 2 * world:
            raise DataError(
                f"batch_size={batch_size}: batch norm needs two images or more on each of {world} "
                "devices"
            )
        if n < 2 * world:
            raise DataError(
                f"{n} training images for {world} devices: two or more are needed on each"
            )
        self.n, self.seed, self.rank, self.world = n, seed, rank, world
        if exact and (batch_size % world or batch_size > n):
            raise DataError(
                f"batch_size={batch_size} for {n} training images and {world} devices: it is the "
                "batch of all devices "
                f"together; use a multiple of {world} that is {n} or less"
            )
        self.batches = n // batch_size if exact else min(-(-n // batch_size), n // (2 * world))
        self.used = self.batches * batch_size if exact else n
        self.epoch, self.start = divmod(done, limited(self.batches, limit))

    def __len__(self) -> int:
        return self.batches

    @property
    def sampler(self) -> "TrainOrder":
        """Itself: Lightning looks here for `set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch at its first batch, unless it is the one that a resumed run is in."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = permutation(self.seed, self.epoch, self.n).tolist()
        for batch in range(self.start, self.batches):
            low, high = (self.used * b // self.batches for b in (batch, batch + 1))
            first, last = (low + (high - low) * r // self.world for r in (self.rank, self.rank + 1))
            yield [(self.epoch, i) for i in order[first:last]]


def limited(batches: int, limit: int | float) -> int:
    """Batches that Lightning takes of an epoch of `batches` under limit_train_batches: a number, or
    a share.

    Raises: XzooError where that is none.
    """
    taken = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    if taken < 1:
        raise XzooError(
            f"trainer.limit_train_batches={limit:g} leaves none of an epoch's {batches} steps; "
            f"use a number from 1, or a share of {1 / batches:.2g} or more"
        )
    return taken


def steps_of_epoch(trainer: Any, data: Any) -> int:
    """Batches that `trainer` takes of each epoch of the data module; known before any loader
    exists.
    """
    return limited(data.batches_per_epoch(trainer.world_size), trainer.limit_train_batches)


def run_position(trainer: Any) -> tuple[int, int, int, int | float]:
    """Where a Lightning trainer (or None) stands: rank, number of ranks, batches seen since the run
    began, and its limit on the batches of an epoch.
    """
    if trainer is None:
        return 0, 1, 0, 1.0
    # Not a public name of Lightning's, and the only place where the position after a resume stands,
    # also for a checkpoint written on the last batch of an epoch. test_finetune.py holds it.
    done = trainer.fit_loop.epoch_loop.batch_progress.total.processed
    return trainer.global_rank, trainer.world_size, done, trainer.limit_train_batches


class Resumable:
    """Tells Lightning that a loader starts where the restored run stands; else it warns of what
    does not happen.

    There is nothing to store: the place is the number of batches, which `run_position` reads.
    """

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing: see above."""


class EvalOrder(Sampler[list[tuple[int, int]]]):
    """Batches of (0, index) in order, each image on exactly one rank: nothing is padded or counted
    twice.
    """

    def __init__(self, n: int, batch_size: int, rank: int = 0, world: int = 1) -> None:
        if n < world:
            raise DataError(
                f"{n} validation images for {world} devices: one or more are needed on each"
            )
        self.indices, self.batch_size = range(rank, n, world), batch_size

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for low in range(0, len(self.indices), self.batch_size):
            yield [(0, i) for i in self.indices[low : low + self.batch_size]]
