"""ImageNet and data sets of its kind: too large for memory, decoded and transformed by workers.

    a folder      train/ and val/ with a folder for each class, whose text order gives the labels
    tar shards    train-000000.tar ... and val-...tar, WebDataset's: KEY.jpg with KEY.cls, a
                  number, beside it
    parquet       a folder in the Hub's image layout, or a data set on the Hub (org/name)

Each is made a table that is indexed by number, so that the order stays a function of (seed, epoch)
and a run resumes anywhere. Workers hand on uint8, a quarter of the bytes, and the device
normalises.

Not here: data sets that fit in memory (memory.py), images of unknown quality (scan.py looks at them
first).
"""

import hashlib
import os
import re
import tarfile
import zipfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, ClassVar, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import track
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from ..datasets import DATASETS
from ..errors import DataError, XzooError, first_line
from ..files import atomic
from ..home import home
from ..machine import cores
from .augment import colours_of, normalised
from .folders import VAL_NAMES, check_same_classes, shorten
from .images import load_rgb
from .loader import Loader, Views, batch_bytes
from .module import DataModule
from .order import EvalOrder, TrainOrder, run_position, split_validation
from .scan import Images
from .sources import Item, list_images, split_of
from .walk import SUFFIXES

FACTS = DATASETS["imagenet"]
MEMORY = 4 << 30  # bytes of parquet files up to which their images are kept, encoded


# ---- tables of images


@dataclass(frozen=True)
class Table(Sequence[Item]):
    """Names, labels and places of images in three arrays: a million Python objects would be copied
    to each worker.

    Args:
        names: of the files below `root`; of a member of a shard SHARD/MEMBER.
        spans: first byte and number of bytes of each member, int64 [N, 2]; None for files of their
            own.
    """

    root: Path
    names: NDArray[np.bytes_]
    labels: NDArray[np.int64]
    spans: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | Sequence[Item]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        name = os.fsdecode(self.names[index])
        return Item(name, int(self.labels[index]), self.root / name)

    def source(self, index: int) -> Path | bytes:
        """What `load_rgb` opens."""
        path = self.root / os.fsdecode(self.names[index])
        if self.spans is None:
            return path
        shard = next(place for place in path.parents if place.suffix == ".tar")
        start, size = self.spans[index]
        # Opened for each image: a descriptor kept over a fork would be shared by the workers.
        with open(shard, "rb") as file:
            file.seek(start)
            return file.read(size)


@dataclass(frozen=True)
class Stored(Images):
    """Images of a `Table`, of items that hold their bytes, or of rows of a Hub data set.

    An image that cannot be read is an error that names it: one that another takes the place of, as
    in timm's reader, changes the score without a word.
    """

    def image(self, index: int) -> Image.Image:
        try:
            return load_rgb(
                self.items.source(index)
                if isinstance(self.items, Table)
                else self.items[index].source
            )
        except (DataError, OSError) as error:
            raise DataError(
                f"{self.items[index].name} cannot be read ({error}); mend it, or remove it from "
                "the data"
            ) from error


class Rows(Sequence[Item]):
    """A split in the form of the library `datasets`: on disk, and indexed by number."""

    def __init__(self, split: str, rows: Any, image: str, label: str) -> None:
        self.split, self.rows, self.image, self.label = split, rows, image, label

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        row = self.rows[int(index)]
        return Item(f"{self.split}:{index}", int(row[self.label]), row[self.image]["bytes"])


@dataclass(frozen=True)
class Contents:
    """Class names, and for both parts the images and their labels."""

    classes: list[str]
    train: tuple[Stored, Tensor]
    val: tuple[Stored, Tensor]


def contents(root: str, num_classes: int) -> Contents:
    """Find the images of any of the forms above; none is decoded.

    Raises: DataError if there are none, a part is missing, or the classes are not `num_classes`.
    """
    path = Path(root).expanduser()
    if path.is_dir():
        tables = sorted(path.rglob("*.parquet"))
        shards = [f for f in sorted(path.rglob("*.tar")) if not f.name.startswith(".")]
        if tables:
            small = sum(f.stat().st_size for f in tables) <= MEMORY
            found = _in_memory(root) if small else _hub(root)
        else:
            found = _shards(path, shards, num_classes) if shards else _folders(path)
    elif path.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", root):
        raise DataError(
            f"{root} is not a folder; give one with train/ and val/, of tar shards or of parquet "
            f"files, or a data set of the Hub, where ImageNet-1k is {FACTS.hub} (its licence has "
            "to be accepted there)"
        )
    else:
        found = _hub(root)
    for part, (images, _) in (("train", found.train), ("val", found.val)):
        if not len(images):
            raise DataError(f"{root}: no images in its {part} part")
    if len(found.classes) != num_classes:
        raise DataError(
            f"{root} has {len(found.classes)} classes, and num_classes={num_classes} was asked for"
        )
    return found


def _folders(root: Path) -> Contents:
    names = [name for name in VAL_NAMES if (root / name).is_dir()]
    if not (root / "train").is_dir() or not names:
        raise DataError(f"{root}: no train/ and val/ in it, and no tar shards or parquet files")
    classes = _subfolders(root / "train")
    check_same_classes(str(root), classes, _subfolders(root / names[0]))
    return Contents(classes, _scan(root, "train", classes), _scan(root, names[0], classes))


def _subfolders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        found = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    if not found:
        raise DataError(
            f"{folder} has no class folders in it; put the images of each class into a folder of "
            "its own"
        )
    return found


def _scan(root: Path, part: str, classes: Sequence[str]) -> tuple[Stored, Tensor]:
    names: list[bytes] = []
    labels: list[int] = []
    for label, name in enumerate(_watched(classes, f"listing {part}")):
        with os.scandir(root / part / name) as entries:
            for file in sorted(filter(_is_image, map(attrgetter("name"), entries))):
                names.append(os.fsencode(f"{part}/{name}/{file}"))
                labels.append(label)
    return _stored(Table(root, np.array(names, np.bytes_), np.array(labels, np.int64)))


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith(".")


def _stored(table: Table) -> tuple[Stored, Tensor]:
    return Stored(table), torch.from_numpy(table.labels)


def _in_memory(root: str) -> Contents:
    listing = list_images(root)
    parts = [Stored(listing.train), Stored(listing.val or [])]
    train, val = ((images, torch.tensor(images.labels)) for images in parts)
    return Contents(listing.classes, train, val)


def _hub(root: str) -> Contents:
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{root}: to read parquet of this size, or from the Hub: pip install 'xzoo[data]'"
        ) from None
    try:
        splits = datasets.load_dataset(root)
    except Exception as error:  # network, permission and format errors of many libraries
        raise DataError(f"{root}: the library datasets gave: {first_line(error)}") from error
    val = next((name for name in VAL_NAMES if name in splits), None)
    if val is None or "train" not in splits:
        raise DataError(
            f"{root}: its parts are {shorten(sorted(splits))}; train and one of "
            f"{', '.join(VAL_NAMES)} are needed"
        )
    features = splits["train"].features
    image = next(
        (name for name, kind in features.items() if isinstance(kind, datasets.Image)), None
    )
    label = next(
        (name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)), None
    )
    if image is None or label is None:
        raise DataError(
            f"{root}: no column of images and one of class labels among {shorten(list(features))}"
        )
    parts = []
    for name in ("train", val):
        rows = splits[name].cast_column(image, datasets.Image(decode=False))
        parts.append((Stored(Rows(name, rows, image, label)), torch.tensor(rows[label])))
    return Contents(list(features[label].names), parts[0], parts[1])


# ---- shards


def _shards(root: Path, shards: Sequence[Path], num_classes: int) -> Contents:
    parts: dict[str, list[Path]] = {}
    for shard in shards:
        parts.setdefault(split_of(shard), []).append(shard)
    val = next((name for name in VAL_NAMES if name in parts), None)
    if "train" not in parts or val is None:
        raise DataError(
            f"{root}: its shards are of {shorten(sorted(parts))}; train-*.tar and val-*.tar are "
            "needed"
        )
    train, test = _indexed(root, parts["train"]), _indexed(root, parts[val])
    for _, labels in (train, test):
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
            raise DataError(
                f"{root}: labels {int(labels.min())} to {int(labels.max())}, and "
                f"num_classes={num_classes}"
            )
    return Contents([str(i) for i in range(num_classes)], train, test)


def _indexed(root: Path, shards: Sequence[Path]) -> tuple[Stored, Tensor]:
    """Where each image of the shards is; read once, then cached until a shard changes."""
    state = []
    for shard in shards:
        found = shard.stat()
        state.append((shard.relative_to(root).as_posix(), found.st_size, found.st_mtime_ns))
    digest = hashlib.sha256(repr((str(root.resolve()), state)).encode()).hexdigest()[:24]
    cached = home() / "shards" / f"{digest}.npz"
    with (
        suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile),
        open(cached, "rb") as file,
    ):
        kept = np.load(file)
        return _stored(Table(root, kept["names"], kept["labels"], kept["spans"]))
    names: list[bytes] = []
    labels: list[int] = []
    spans: list[tuple[int, int]] = []
    for shard in _watched(shards, "indexing shards"):
        for name, label, span in _members(shard):
            names.append(os.fsencode(f"{shard.relative_to(root).as_posix()}/{name}"))
            labels.append(label)
            spans.append(span)
    places = np.array(spans, np.int64).reshape(-1, 2)
    table = Table(root, np.array(names, np.bytes_), np.array(labels, np.int64), places)
    # a cache that cannot be written costs the time again, no more
    with suppress(OSError, XzooError):
        cached.parent.mkdir(parents=True, exist_ok=True)
        with atomic(cached) as draft, open(draft, "wb") as new:
            np.savez(new, names=table.names, labels=table.labels, spans=places)
    return _stored(table)


def _members(shard: Path) -> list[tuple[str, int, tuple[int, int]]]:
    """Name, label and span of each image; a sample is what shares a name up to its first dot."""
    images: dict[str, tuple[str, tuple[int, int]]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                folder, _, base = member.name.rpartition("/")
                key, _, ending = base.partition(".")
                key = f"{folder}/{key}"
                if member.isfile() and ending.lower() == "cls":
                    labels[key] = int(tar.extractfile(member).read())  # type: ignore[union-attr]
                elif (
                    member.isfile() and f".{ending.lower()}" in SUFFIXES and key.rpartition("/")[2]
                ):
                    images[key] = member.name, (member.offset_data, member.size)
    except (tarfile.TarError, OSError, ValueError) as error:
        raise DataError(
            f"{shard}: no tar shard that can be read ({error}); fetch it anew"
        ) from error
    if images.keys() != labels.keys():
        raise DataError(
            f"{shard}: {shorten(sorted(images.keys() ^ labels.keys()))} must have an image and a "
            ".cls file with its label, and has one of them"
        )
    for name, (start, size) in images.values():
        if start + size > shard.stat().st_size:
            raise DataError(f"{shard} ends within {name}; fetch it anew")
    return [(name, labels[key], span) for key, (name, span) in images.items()]


def _watched(things: Sequence[Any], what: str) -> Iterable[Any]:
    console = Console(stderr=True)
    return track(
        things, what, len(things), console=console, transient=True, disable=not console.is_terminal
    )


# ---- the data module


class Chosen(Dataset[Any]):
    """Some of the views, by number."""

    def __init__(self, views: Views, numbers: Tensor) -> None:
        self.views, self.numbers = views, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = place
        return self.views[epoch, int(self.numbers[index])]


def stacked(samples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    """A batch of images as they lie in memory, pixel by pixel: putting the colours apart is left to
    the device.

    In a worker it would take 87 of some 2,500 us for an image of 224 pixels (EPYC, 2026-11, torch
    2.14).
    """
    images, labels = default_collate([(x.permute(1, 2, 0), y) for x, y in samples])
    return images.permute(0, 3, 1, 2), labels


class ImageNet(DataModule):
    """Batches (images float32 [B, 3, img_size, img_size], labels int64 [B]) of ImageNet or a set in
    one of its forms.

    Args:
        root: a folder with train/ and val/ of class folders, of tar shards or of parquet files; or
            a data set on the Hugging Face Hub (needs the extra `data`).
        batch_size: images in a training step, over all devices; a multiple of their number. Each
            step has exactly as many: the last few images of each epoch's order are left out.
        eval_batch_size: images at a time on each device, where nothing is learnt.
        seed: of order and augmentation.
        holdout: training images to validate on instead of the val part, for tuning: the same ones
            for every seed, of each class its share. `test_dataloader` has the val part in any case.
        img_size: side of the images that the model sees, in pixels.
        scale: smallest and largest area of a training crop, as shares of the image's. This and the
            next seven as in `timm.data.create_transform`.
        ratio: smallest and largest width of the crop over its height.
        hflip: share of the training images that are mirrored.
        color_jitter: strength of random brightness, contrast and saturation; None for none.
        auto_augment: timm's text for it, such as rand-m9-mstd0.5 or 3a; None for none.
        re_prob: share of the training images of which a part is erased.
        re_mode: what erased pixels become: const, rand, pixel.
        re_count: parts that are erased at most.
        crop_pct: share of the shorter side that is seen in validation.
        interpolation: timm's name of the filter that resizes: bilinear, bicubic, random (in
            training).
        mean: of the colours, in 0 to 1.
        std: likewise.
        workers: processes that decode and transform, for each device; None: eight, or the number of
            cores if lower.
        channels_last: memory format of the images.
    Raises: DataError if the data are missing or of another shape, or an argument does not go with
        them; while training, if an image cannot be read.
    """

    key: ClassVar[str] = "imagenet"  # of xzoo.datasets, where it is that whole

    def __init__(
        self,
        root: str = FACTS.hub,
        num_classes: int = FACTS.classes,
        batch_size: int = 256,
        eval_batch_size: int = 256,
        seed: int = 0,
        holdout: int = 0,
        img_size: int = 224,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        hflip: float = 0.5,
        color_jitter: float | None = None,
        auto_augment: str | None = None,
        re_prob: float = 0.0,
        re_mode: str = "const",
        re_count: int = 1,
        crop_pct: float = 0.875,
        interpolation: str = "bicubic",
        mean: tuple[float, float, float] = FACTS.mean,
        std: tuple[float, float, float] = FACTS.std,
        workers: int | None = None,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self.root, self.num_classes, self.img_size = root, num_classes, img_size
        self.batch_size, self.eval_batch_size, self.seed, self.holdout = (
            batch_size,
            eval_batch_size,
            seed,
            holdout,
        )
        self.channels_last, self.crop_pct = channels_last, crop_pct
        self.mean, self.std = tuple(mean), tuple(std)
        self.workers = min(8, cores()) if workers is None else workers
        self._common: dict[str, Any] = {
            "input_size": (3, img_size, img_size),
            "interpolation": interpolation,
            "mean": self.mean,
            "std": self.std,
        }
        self._erasing: dict[str, Any] = {
            "re_prob": re_prob,
            "re_mode": re_mode,
            "re_count": re_count,
        }
        self._training: dict[str, Any] = {
            "scale": tuple(scale),
            "ratio": tuple(ratio),
            "hflip": hflip,
            "color_jitter": color_jitter,
            "auto_augment": auto_augment,
        }
        self._colours = colours_of(mean, std)
        self._contents: Contents | None = None
        self._held: Tensor | None = None  # numbers of training images; None: none, and all
        self._kept: Tensor | None = None
        if eval_batch_size < 1 or self.workers < 0:
            raise DataError(
                f"eval_batch_size={eval_batch_size}, workers={workers}: 1 or more, and 0 or more"
            )
        if not 0 < crop_pct <= 1:
            raise DataError(f"crop_pct={crop_pct:g}: a share of the side, above 0 and up to 1")
        try:
            self._transform(training=True)
        except (AssertionError, KeyError, ValueError, NotImplementedError, IndexError) as error:
            raise DataError(f"timm cannot make these transforms: {error!r}") from error

    @property
    def interpolation(self) -> str:
        return str(self._common["interpolation"])

    @property
    def class_names(self) -> list[str]:
        """Name of each label; its number where the data have no names."""
        return self._found().classes

    @property
    def dataset(self) -> str | None:
        """Its key in the table of results: ImageNet-1k whole, or None."""
        return self.key if (self.num_classes, self.n_test) == (FACTS.classes, FACTS.n) else None

    @property
    def n_val(self) -> int:
        return self.holdout or self.n_test

    @property
    def n_test(self) -> int:
        return len(self._found().val[0])

    def prepare_data(self) -> None:
        """Bring a data set of the Hub to this machine, once for all its processes."""
        if not Path(self.root).expanduser().exists():
            self._found()

    def setup(self, stage: str = "") -> None:
        """List the images."""
        self._found()

    def _found(self) -> Contents:
        if self._contents is None:
            self._contents = contents(self.root, self.num_classes)
            if self.holdout:
                self._held, self._kept = split_validation(self._contents.train[1], self.holdout)
        return self._contents

    def _transform(self, training: bool) -> Any:
        # Without a trainer nothing normalises later; and what is erased is drawn in normalised
        # colours.
        normalize = self.trainer is None or (training and self._erasing["re_prob"] > 0)
        own = self._training | self._erasing if training else {"crop_pct": self.crop_pct}
        return create_transform(is_training=training, normalize=normalize, **self._common, **own)

    # ---- loaders

    def train_order(
        self, rank: int = 0, world: int = 1, done: int = 0, limit: int | float = 1.0
    ) -> TrainOrder:
        n = len(self._found().train[0]) - self.holdout
        return TrainOrder(n, self.batch_size, self.seed, rank, world, done, limit, exact=True)

    def train_dataloader(self) -> Loader:
        images, _ = self._found().train
        views = Views(images, self._transform(training=True), self.seed)
        return self._loader(views, self._kept, self.train_order(*run_position(self.trainer)))

    def val_dataloader(self) -> Loader:
        images, _ = self._found().train if self.holdout else self._found().val
        return self._eval_loader(images, self._held)

    def test_dataloader(self) -> Loader:
        return self._eval_loader(self._found().val[0], None)

    def _eval_loader(self, images: Stored, numbers: Tensor | None) -> Loader:
        rank, world, *_ = run_position(self.trainer)
        views = Views(images, self._transform(training=False), None)
        n = len(views) if numbers is None else len(numbers)
        return self._loader(views, numbers, EvalOrder(n, self.eval_batch_size, rank, world))

    def _loader(
        self, views: Views, numbers: Tensor | None, order: TrainOrder | EvalOrder
    ) -> Loader:
        normalised_there = self.trainer is None or (
            views.seed is not None and self._erasing["re_prob"] > 0
        )
        kind = torch.float32 if normalised_there else torch.uint8
        images = self.batch_size if isinstance(order, TrainOrder) else self.eval_batch_size
        size = batch_bytes(images, self.input_size, kind)
        return Loader(
            views if numbers is None else Chosen(views, numbers), order, self.workers, stacked, size
        )

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        images, labels = batch
        # While they are bytes: a quarter of what moves afterwards.
        images = images.contiguous(
            memory_format=torch.channels_last if self.channels_last else torch.contiguous_format
        )
        if images.dtype == torch.uint8:
            self._colours = self._colours.to(images.device)
            images = normalised(images, self._colours)
        return images, labels
