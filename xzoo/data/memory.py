"""The small data sets, whole in memory: decoded once, kept as uint8 on the device, augmented there
by batches.

A loader yields only where it stands (epoch and image numbers); gathering, augmentation and
normalisation happen after Lightning has moved those numbers to the device. One core does this for
tens of thousands of images a second, so there are no workers, nothing to pin, and many small models
can share a GPU.

Not here: what is done to a batch (augment.py), reading files (sources.py), ImageNet (imagenet.py).
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

from ..datasets import DATASETS, DataSet
from ..errors import DataError
from ..machine import cores
from .augment import Augment, colours_of, normalised, upscaled
from .images import load_rgb
from .module import DataModule
from .order import EvalOrder, Resumable, TrainOrder, run_position, split_validation
from .sources import Item, Listing, list_images

CHUNK = 256  # images that a thread decodes at a time
SAMPLE = 0.1  # the largest share of a data set's images that is a sample of it, and no damaged copy


class Places(NamedTuple):
    """A batch before there are any images: the part of the data, the epoch, and the images' numbers
    [B].
    """

    part: str
    epoch: int
    numbers: Tensor


class PlaceLoader(Resumable):
    """Yields the batches of an order, as `Places` or as what `make` makes of them.

    Not a DataLoader: Lightning leaves it as it is, and it is free.
    """

    def __init__(
        self, part: str, order: TrainOrder | EvalOrder, make: Callable[[Places], Any] | None = None
    ) -> None:
        self.part, self.order, self.make = part, order, make
        # Where Lightning looks for `set_epoch`.
        self.sampler, self.batch_sampler = order, None

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.order:
            epochs, numbers = zip(*batch, strict=True)
            places = Places(self.part, epochs[0], torch.tensor(numbers))
            yield self.make(places) if self.make else places


class InMemory(DataModule):
    """Batches (images float32 [B, 3, img_size, img_size], labels int64 [B]) of a data set that fits
    in memory.

    With a Trainer the images are made on its device; without one the loaders yield the same batches
    on the CPU. Use `CIFAR10`, `CIFAR100` or `TinyImageNet`: they say what the data set is.

    Args:
        root: folder of parquet files in the Hub's image layout, or of train/ and val/ (or test/)
            class folders, or a data set on the Hugging Face Hub (org/name; needs the extra `data`).
            None: the usual one there.
        batch_size: images in a training step, over all devices; a multiple of their number. Each
            step has exactly as many: the last few images of each epoch's order are left out.
        eval_batch_size: images at a time on each device, where nothing is learnt.
        seed: of order and augmentation.
        holdout: training images to validate on instead of the data set's own test part, for tuning:
            the same ones for every seed, of each class its share. `test_dataloader` has the own
            test part in any case.
        img_size: side of the images that the model sees, in pixels; None for the data set's own.
            Larger: scaled up on the device, bilinear. Smaller: reduced once, by the mean of the
            area.
        crop: "shift" by a few pixels, filled by reflection; or "resized": a box of any place and
            size, as torchvision's RandomResizedCrop, straight to img_size.
        shift: pixels of the data, at most, in each direction.
        scale: smallest and largest area of the box, as shares of the image's.
        ratio: smallest and largest width of the box over its height.
        flip: "random"; "alternating": every image mirrored in every other epoch; "none".
        cutout: side of a square of the mean colour, in pixels of img_size; 0 for none.
        mean: of the colours, in 0 to 1; None for that of the data set.
        std: likewise.
        channels_last: memory format of the images.
    Raises: DataError if the data are missing, broken or of another shape, lack images that the data
        set has, or an argument does not go with them. A sample, up to a tenth of the images, is
        read; its `dataset` is None.
    """

    key: ClassVar[str]  # of xzoo.datasets
    facts: ClassVar[DataSet]
    has_sample = True

    def __init__(
        self,
        root: str | None = None,
        batch_size: int = 128,
        eval_batch_size: int = 500,
        seed: int = 0,
        holdout: int = 0,
        img_size: int | None = None,
        crop: Literal["shift", "resized"] = "shift",
        shift: int = 4,
        scale: tuple[float, float] = (0.25, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: Literal["random", "alternating", "none"] = "random",
        cutout: int = 0,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self.sides = self.facts.sides
        self.root, self.batch_size, self.eval_batch_size = (
            root or self.facts.hub,
            batch_size,
            eval_batch_size,
        )
        self.seed, self.holdout, self.channels_last = seed, holdout, channels_last
        self.num_classes, self.img_size = self.facts.classes, img_size or self.sides[0]
        self.mean, self.std = tuple(mean or self.facts.mean), tuple(std or self.facts.std)
        if eval_batch_size < 1:
            raise DataError(f"eval_batch_size={eval_batch_size}: one image or more")
        self._knobs: dict[str, Any] = {
            "crop": crop,
            "shift": shift,
            "scale": tuple(scale),
            "ratio": tuple(ratio),
            "flip": flip,
            "cutout": cutout,
        }
        # mistakes now, not in the fit
        Augment(min(self.sides[0], self.img_size), self.img_size, **self._knobs)
        self._names: list[str] = []
        self._whole, self._side = False, 0  # of the files
        self._parts: dict[str, tuple[Tensor, Tensor]] = {}
        self._moved: dict[tuple[str, torch.device], tuple[Tensor, Tensor, Tensor]] = {}

    @property
    def class_names(self) -> list[str]:
        """Of each label; reads the data if that has not happened."""
        self.setup()
        return self._names

    @property
    def dataset(self) -> str | None:
        """Its key in the table of results; None where this is a sample of it."""
        self.setup()
        return self.key if self._whole else None

    @property
    def n_val(self) -> int:
        self.setup()
        return len(self._parts["val"][1])

    @property
    def n_test(self) -> int:
        self.setup()
        return len(self._parts["test"][1])

    @property
    def interpolation(self) -> str | None:
        """How the images come to img_size, in timm's words; None if they have it."""
        self.setup()
        if self.img_size == self._side:
            return None
        return "bilinear" if self.img_size > self._side else "box"

    # ---- reading

    def prepare_data(self) -> None:
        """Bring a data set of the Hub to this machine, once for all its processes."""
        if not self._parts and not Path(self.root).expanduser().exists():
            self._list()

    def setup(self, stage: str = "") -> None:
        """Decode every image, if that has not happened."""
        if self._parts:
            return
        listing = self._list()
        self._names = listing.classes
        self._whole, self._side = self._is_whole(listing), _pixels(listing.train[0]).shape[0]
        images, labels = self._decoded(listing.train)
        held, kept = split_validation(labels, self.holdout)
        test = self._decoded(listing.val or [])
        self._parts = {
            "train": (images[kept], labels[kept]) if self.holdout else (images, labels),
            "val": (images[held], labels[held]) if self.holdout else test,
            "test": test,
        }
        self._augment = Augment(images.shape[-1], self.img_size, **self._knobs)

    def _list(self) -> Listing:
        try:
            listing = list_images(self.root)
        except DataError as error:
            if Path(self.root).expanduser().exists():
                raise
            raise DataError(f"{error}. {self._where()}") from error
        name = type(self).__name__
        if not listing.train or not listing.val:
            raise DataError(
                f"{self.root}: no test part with images beside a train part; {name} needs both"
            )
        if len(listing.classes) != self.facts.classes:
            raise DataError(
                f"{self.root} has {len(listing.classes)} classes, {name} has {self.facts.classes}: "
                "another data set?"
            )
        lossy = next(filter(_is_jpeg, listing.items), None) if self.facts.lossless else None
        if lossy:
            raise DataError(
                f"{self.root}: {lossy.name} is a JPEG file, and {name} means the exact pixels; "
                f"give them ({self.facts.hub} on the Hub has them), or read these by --data "
                "ImageFolder"
            )
        return listing

    def _is_whole(self, listing: Listing) -> bool:
        """Whether these are all images of the data set; DataError where some are missing, and it is
        no sample.
        """
        part, found = DATASETS.get(self.key), (len(listing.train), len(listing.val or []))
        if part is None:
            return False
        if found == (part.train, part.n):
            return True
        if sum(found) > SAMPLE * (part.train + part.n):
            raise DataError(
                f"{self.root}: {found[0]:,} training and {found[1]:,} test images, {part.title} "
                f"has {part.train:,} "
                f"and {part.n:,}; fetch the data anew, or read these by --data ImageFolder"
            )
        return False

    def _where(self) -> str:
        return (
            f"{type(self).__name__} is {self.facts.hub} on the Hub: give the folder of its parquet "
            "files as root, "
            "or leave root out to download it. Not every mirror has every set, and CIFAR-100 is "
            "the rarest"
        )

    def _decoded(self, items: Sequence[Item]) -> tuple[Tensor, Tensor]:
        """uint8 [N, 3, S, S] and labels [N], S being the side in memory."""
        side = _pixels(items[0]).shape[0]
        if side not in self.sides:
            raise DataError(
                f"{self.root}: {items[0].name} has {side} pixels a side, {type(self).__name__} has "
                f"{' or '.join(map(str, self.sides))}: another data set?"
            )
        images = torch.empty(len(items), 3, side, side, dtype=torch.uint8)

        def fill(start: int) -> None:
            for i, item in enumerate(items[start : start + CHUNK], start):
                pixels = _pixels(item)
                if pixels.shape[:2] != (side, side):
                    height, width = pixels.shape[:2]
                    raise DataError(
                        f"{self.root}: {item.name} is {width} x {height} pixels, others are {side} "
                        f"x {side}"
                    )
                images[i] = torch.from_numpy(pixels).permute(2, 0, 1)

        starts, console = range(0, len(items), CHUNK), Console(stderr=True)
        # Threads, because Pillow decodes without the interpreter's lock.
        with ThreadPoolExecutor(min(8, cores())) as pool:
            done = pool.map(fill, starts)
            what = f"decoding {len(items):,} images"
            for _ in track(
                done,
                what,
                len(starts),
                console=console,
                transient=True,
                disable=not console.is_terminal,
            ):
                pass
        if self.img_size < side:
            images = _reduced(images, self.img_size)
        return images, torch.tensor([item.label for item in items])

    # ---- loaders

    def train_order(
        self, rank: int = 0, world: int = 1, done: int = 0, limit: int | float = 1.0
    ) -> TrainOrder:
        self.setup()
        return TrainOrder(
            len(self._parts["train"][1]),
            self.batch_size,
            self.seed,
            rank,
            world,
            done,
            limit,
            exact=True,
        )

    def train_dataloader(self) -> PlaceLoader:
        return self._loader("train", self.train_order(*run_position(self.trainer)))

    def val_dataloader(self) -> PlaceLoader:
        return self._eval_loader("val")

    def test_dataloader(self) -> PlaceLoader:
        return self._eval_loader("test")

    def _eval_loader(self, part: str) -> PlaceLoader:
        self.setup()
        rank, world, *_ = run_position(self.trainer)
        return self._loader(
            part, EvalOrder(len(self._parts[part][1]), self.eval_batch_size, rank, world)
        )

    def _loader(self, part: str, order: TrainOrder | EvalOrder) -> PlaceLoader:
        return PlaceLoader(part, order, None if self.trainer else self.batch)

    # ---- batches

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self.batch(batch) if isinstance(batch, Places) else batch

    @torch.no_grad()
    def batch(self, places: Places) -> tuple[Tensor, Tensor]:
        """The images and labels of a batch, on the device of its numbers."""
        images, labels, colours = self._on(places.part, places.numbers.device)
        chosen = images[places.numbers]
        if places.part == "train":
            x = self._augment(chosen, places.numbers, self.seed, places.epoch, colours)
        else:
            x = upscaled(normalised(chosen, colours), self.img_size)
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        return x, labels[places.numbers]

    def sample(self, count: int) -> Tensor:
        self.setup()
        images, _, colours = self._on("train", torch.device("cpu"))
        chosen = images[:: max(1, len(images) // count)][:count]
        return upscaled(normalised(chosen, colours), self.img_size)

    def _on(self, part: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Images, labels and colours on a device, moved there once."""
        if (part, device) not in self._moved:
            tensors = (*self._parts[part], colours_of(self.mean, self.std))
            images, labels, colours = (t.to(device) for t in tensors)
            self._moved[part, device] = images, labels, colours
        return self._moved[part, device]


class CIFAR10(InMemory):
    """CIFAR-10 (Krizhevsky 2009): 50,000 training and 10,000 test images, 32 x 32 pixels, 10
    classes.

    In files without loss, such as PNG; copies of JPEG are refused, because their pixels are others.
    """

    key, facts = "cifar10", DATASETS["cifar10"]


class CIFAR100(InMemory):
    """CIFAR-100 (Krizhevsky 2009): 50,000 training and 10,000 test images, 32 x 32 pixels, 100
    (fine) classes.

    In files without loss, as CIFAR-10.
    """

    key, facts = "cifar100", DATASETS["cifar100"]


class TinyImageNet(InMemory):
    """Tiny-ImageNet-200: 100,000 training and 10,000 validation images, 64 x 64 pixels, 200
    classes.

    Its copies at 32 x 32 pixels are read too; img_size=32 shows them as they are.
    """

    key, facts = "tiny_imagenet", DATASETS["tiny_imagenet"]


def _pixels(item: Item) -> NDArray[np.uint8]:
    """[H, W, 3]; one image that cannot be read stops it, since a benchmark with a hole is another
    benchmark.
    """
    try:
        # A copy: torch warns of arrays that it could write to and must not.
        return np.array(load_rgb(item.source))
    except DataError as error:
        raise DataError(
            f"{item.name} cannot be read ({error}); mend the data, or fetch them anew"
        ) from error


def _is_jpeg(item: Item) -> bool:
    start = item.source[:2] if isinstance(item.source, bytes) else b""
    if isinstance(item.source, Path):
        with open(item.source, "rb") as file:
            start = file.read(2)
    return start == b"\xff\xd8"


def _reduced(images: Tensor, side: int) -> Tensor:
    """uint8 [N, 3, S, S] -> [N, 3, side, side]: the mean of the pixels that each covers."""
    parts = [F.interpolate(part.float(), (side, side), mode="area") for part in images.split(CHUNK)]
    return torch.cat([part.round_().byte() for part in parts])
