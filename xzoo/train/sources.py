"""Reading the user's images: every form of DATA becomes one `ImageData`.

    a folder      one sub-folder a class; or train/ with val/, validation/ or test/ of such sub-folders
    parquet       a folder of parquet files in the Hub's image layout
    org/name      a data set on the Hugging Face Hub (needs the extra `data`)
    digits        scikit-learn's 1,797 handwritten digits, 8 x 8: real images that need no download

A reader only lists what is there (`Listing`). Then every image is decoded once, whatever the form: what is
broken is left out by name before training instead of failing in its third epoch, and what fits in memory
is kept as pixels. Parts that DATA does not separate are separated by a hash of the images' names.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track

from .. import network
from ..errors import DataError
from ..profile import cores
from .images import Pixels, load_rgb

# What people call images. Files of other kinds (notes, thumbnails' databases) are passed over in silence;
# one of these that cannot be read is reported. Pillow reads HEIC only with a plug-in: then it is reported.
SUFFIXES = frozenset(".jpg .jpeg .jpe .jfif .png .webp .bmp .gif .tif .tiff .ppm .pgm .pbm .avif .heic .heif".split())
VAL_NAMES = ("val", "validation", "valid", "test")  # the first that is there is used
HELD_OUT = 0.2
# Decoded pixels are kept up to here: 21,000 images of 128 x 128, or a thousand reduced photographs.
MEMORY = 1 << 30
Row = tuple[str, Any, Any]  # of a table: name, image, label


@dataclass(frozen=True)
class Item:
    """One image before it was looked at: its name within DATA, its class, and where its bytes are."""

    name: str
    label: int
    source: Path | bytes | Pixels


@dataclass
class Listing:
    """What a reader found. `val` is None where DATA has no such part."""

    classes: list[str]
    train: list[Item]
    val: list[Item] | None = None
    mirror: bool = True
    remarks: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Images:
    """Images of one part, as pixels in memory or as files that are decoded when asked for."""

    items: Sequence[Item]
    at_least: int | None = None

    def __len__(self) -> int:
        return len(self.items)

    def image(self, index: int) -> Image.Image:
        """The image as RGB. Raises DataError that names it, if it went away since it was scanned."""
        item = self.items[index]
        try:
            return load_rgb(item.source, self.at_least)
        except DataError as error:
            raise DataError(f"{item.name} could be read before and cannot now: {error}") from error

    @property
    def labels(self) -> list[int]:
        return [item.label for item in self.items]


@dataclass(frozen=True)
class ImageData:
    """The images of DATA, ready to train on.

    `mirror` says whether a mirror image is still of its class (not so for digits); `skipped` holds name and
    reason of what could not be read, `remarks` what a reader decided; `in_memory`, whether pixels are kept;
    `side` is the median of the images' shorter sides, in pixels.
    """

    classes: list[str]
    train: Images
    val: Images
    mirror: bool
    skipped: list[tuple[str, str]]
    remarks: list[str]
    in_memory: bool
    side: int

    def fingerprint(self) -> str:
        """Changes when an image is added, removed, renamed or moves to another class or part."""
        lines = [f"{part}:{i.label}:{i.name}" for part in ("train", "val") for i in getattr(self, part).items]
        return hashlib.sha256("\n".join([*self.classes, *lines]).encode()).hexdigest()[:16]


def read(data: str | Path, at_least: int | None = None, memory: int = MEMORY) -> ImageData:
    """Read DATA in any of the forms above.

    Args:
        at_least: larger images may be reduced to this many pixels a side (`load_rgb`).
        memory: bytes of decoded pixels to keep; beyond that images are decoded each time.
    Raises: DataError if it does not exist, is empty, has one class, holds too many broken images or none
        that can be read, or trains and validates on different classes.
    """
    listing = list_images(str(data))
    items = listing.train + (listing.val or [])
    if not items:
        raise DataError(f"{data}: no images in it; put those of each class into a sub-folder")
    kept, skipped, sides = _decode(items, at_least, memory)
    _check_broken(str(data), items, kept, skipped)

    train = [item for item in kept[: len(listing.train)] if item is not None]
    val = [item for item in kept[len(listing.train) :] if item is not None]
    if listing.val is None:
        train, val = hold_out(train)
    _check_classes(str(data), listing, train, val)
    return ImageData(
        classes=listing.classes,
        train=Images(train, at_least),
        val=Images(val, at_least),
        mirror=listing.mirror,
        skipped=skipped,
        remarks=listing.remarks,
        in_memory=isinstance(train[0].source, np.ndarray),
        side=int(np.median(sides)),
    )


def hold_out(items: Sequence[Item], share: float = HELD_OUT) -> tuple[list[Item], list[Item]]:
    """Split into train and val, class by class, by a hash of the names: the same split on every machine.

    Of each class `share` is held out, one image or more where it has two; one or more stay in train.
    """
    held: set[str] = set()
    for label in sorted({item.label for item in items}):
        names = sorted((i.name for i in items if i.label == label), key=_hash)
        held.update(names[: min(max(1, round(share * len(names))), len(names) - 1)])
    return [i for i in items if i.name not in held], [i for i in items if i.name in held]


def _hash(name: str) -> bytes:
    return hashlib.sha256(name.encode(errors="surrogateescape")).digest()


def list_images(data: str) -> Listing:
    """What DATA holds, in any of the forms above; no image is decoded. Raises: DataError if it has none of them."""
    path = Path(data).expanduser()
    if data == "digits" and not path.exists():
        return _digits()
    if path.is_dir():
        try:
            tables = sorted(f for f in path.rglob("*.parquet") if not f.name.startswith("."))
            return _tables(path, tables) if tables else _folder(path)
        except OSError as error:
            raise DataError(f"{data}: {error.strerror or error}") from error
    if path.exists():
        raise DataError(f"{data} is a file; give a folder with one sub-folder a class, or of parquet files")
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", data):
        return _hub(data)
    raise DataError(f"{data} does not exist; give a folder of images, a Hub data set (org/name) or digits")


# ---- readers: digits, folders, parquet, Hub


def _digits() -> Listing:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)  # [1797, 8, 8], was 0 to 16
    pixels = np.repeat(pixels[..., None], 3, axis=3)
    items = [
        Item(f"{label}/{i:04d}", int(label), image)
        for i, (label, image) in enumerate(zip(digits.target, pixels, strict=True))
    ]
    return Listing([str(digit) for digit in range(10)], items, mirror=False)


def _folder(root: Path) -> Listing:
    """Sub-folders as classes, in text order; dot-files (macOS' `._photo.jpg` among them) are no images."""
    parts = _subfolders(root)
    train = next((part for part in parts if part.name.lower() == "train"), None)
    if train is None or not _subfolders(train) or any(_is_image(f) for f in train.iterdir()):
        classes = [part for part in parts if image_files(part)]
        if not classes and any(_is_image(f) for f in root.iterdir()):
            raise DataError(f"{root}: images lie in it directly; put those of each class into a sub-folder")
        return Listing([c.name for c in classes], _labelled(root, classes))

    remarks = []
    train_classes = [part for part in _subfolders(train) if image_files(part)]
    listing = Listing([c.name for c in train_classes], _labelled(root, train_classes))
    by_name = {part.name.lower(): part for part in parts}
    for name in VAL_NAMES:
        if name not in by_name:
            continue
        val_classes = [part for part in _subfolders(by_name[name]) if image_files(part)]
        if not val_classes:
            remarks.append(f"{by_name[name].name}/ is not used: it has no class folders with images")
            continue
        check_same_classes(str(root), listing.classes, [c.name for c in val_classes])
        listing.val = _labelled(root, val_classes)
        break
    others = [p.name for p in parts if p.name.lower() not in ("train", *VAL_NAMES)]
    if others:
        remarks.append(f"beside train/, these folders are not used: {few(others)}")
    listing.remarks = remarks
    return listing


def _labelled(root: Path, classes: Sequence[Path]) -> list[Item]:
    return [
        Item(file.relative_to(root).as_posix(), label, file)
        for label, folder in enumerate(classes)
        for file in image_files(folder)
    ]


def _subfolders(folder: Path) -> list[Path]:
    return sorted((f for f in folder.iterdir() if f.is_dir() and not f.name.startswith(".")), key=lambda f: f.name)


def image_files(folder: Path) -> list[Path]:
    """Every image file at any depth, in text order."""
    found: list[Path] = []
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        found += [Path(place, f) for f in sorted(files) if _is_image(Path(f))]
    return found


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES and not file.name.startswith(".")


def _tables(root: Path, files: Sequence[Path]) -> Listing:
    import pyarrow as pa

    parts: dict[str, list[Row]] = {}
    classes: list[str] | None = None
    folders: dict[str, Path] = {}
    for file in files:
        split = split_of(file)
        if folders.setdefault(split, file.parent) != file.parent:
            raise DataError(f"{root}: {split} is in {folders[split]} and in {file.parent}; give one of them")
        try:
            rows, names = _table(file)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{file}: no parquet file that can be read ({str(error).splitlines()[0]})") from error
        if classes is not None and names != classes:
            raise DataError(f"{file}: its class names differ from those of {files[0].name}")
        classes = names
        parts.setdefault(split, []).extend(rows)
    return _from_rows(str(root), parts, classes)


def split_of(file: Path) -> str:
    """The part of the data that the name of a file, or else of its folder, begins with."""
    for name in (file.stem, file.parent.name):
        found = re.match(r"(train|val|validation|valid|test)(?![a-z])", name.lower())
        if found:
            return found[1]
    return "train"


def _table(file: Path) -> tuple[list[Row], list[str] | None]:
    """The rows (name, image, label) of one parquet file, and its class names where it has them."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as table:
        schema = table.schema_arrow
        image, label = _columns(file.name, {f.name: _kind(f.type) for f in schema})
        names = _class_names(schema.metadata, label)
        rows: list[Row] = []
        # A file may be one row group of gigabytes: read it in pieces.
        for batch in table.iter_batches(256, columns=[image, label]):
            pairs = zip(batch.column(image).to_pylist(), batch.column(label).to_pylist(), strict=True)
            rows += [(f"{file.name}:{len(rows) + i}", _bytes_of(x, file.parent), y) for i, (x, y) in enumerate(pairs)]
    return rows, names


def _kind(type_: Any) -> str:
    import pyarrow as pa

    if pa.types.is_struct(type_) and type_.get_field_index("bytes") >= 0:
        return "image"
    if pa.types.is_binary(type_) or pa.types.is_large_binary(type_):
        return "image"
    if pa.types.is_integer(type_) or pa.types.is_string(type_) or pa.types.is_large_string(type_):
        return "label"
    return "other"


def _columns(where: str, kinds: dict[str, str]) -> tuple[str, str]:
    """Names of the image and the label column: those in use on the Hub first, else the only one of its kind."""
    chosen = []
    known = {"image": ("image", "img"), "label": ("label", "fine_label", "labels", "class", "target")}
    for kind, usual in known.items():
        there = [name for name, its in kinds.items() if its == kind]
        pick = next((name for name in usual if name in there), there[0] if len(there) == 1 else None)
        if pick is None:
            raise DataError(f"{where}: no {kind} column among {few(list(kinds))}; expected {' or '.join(usual)}")
        chosen.append(pick)
    return chosen[0], chosen[1]


def _class_names(metadata: dict[bytes, bytes] | None, label: str) -> list[str] | None:
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return [str(name) for name in features[label]["names"]]
    except (KeyError, TypeError, ValueError):
        return None


def _bytes_of(image: Any, folder: Path) -> bytes | Path:
    """A row's image: its bytes, or where only a path is given, that file."""
    if isinstance(image, dict):
        content, path = image.get("bytes"), image.get("path")
        return content if content is not None else folder / (path or "")
    return image if image is not None else folder


def _hub(name: str) -> Listing:
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{name} is no folder here; to read it as a data set of the Hugging Face Hub: pip install 'xzoo[data]'"
        ) from None
    with network.bounded() as contact:
        try:
            splits = datasets.load_dataset(name)
        except Exception as error:  # network, permission, script and format errors of many libraries
            reason = contact.failure or (str(error).splitlines() or [type(error).__name__])[0]
            raise DataError(f"{name}: no folder here, and the Hub gave: {reason}") from error
    parts: dict[str, list[Row]] = {}
    classes: list[str] | None = None
    for split, rows in splits.items():
        kinds = {}
        for column, feature in rows.features.items():
            is_label = isinstance(feature, datasets.ClassLabel) or getattr(feature, "dtype", "") in ("int64", "string")
            kinds[column] = "image" if isinstance(feature, datasets.Image) else "label" if is_label else "other"
        image, label = _columns(name, kinds)
        classes = getattr(rows.features[label], "names", None)
        rows = rows.cast_column(image, datasets.Image(decode=False))
        pairs = zip(rows[image], rows[label], strict=True)
        parts[split] = [(f"{split}:{i}", _bytes_of(x, Path()), y) for i, (x, y) in enumerate(pairs)]
    return _from_rows(name, parts, classes)


def _from_rows(data: str, parts: dict[str, list[Row]], classes: list[str] | None) -> Listing:
    """Rows with labels as numbers, or as text where the table has no class names."""
    remarks = []
    if "train" not in parts:
        if len(parts) > 1:
            raise DataError(f"{data}: no train part among {few(sorted(parts))}")
        parts = {"train": next(iter(parts.values()))}
    # -1 marks an image whose label is kept secret, as in the test parts of contests.
    parts = {split: [r for r in rows if r[2] not in (None, -1)] for split, rows in parts.items()}
    labels = {row[2] for rows in parts.values() for row in rows}
    if classes is None:
        values = sorted(labels)
        classes, index = [str(v) for v in values], {v: i for i, v in enumerate(values)}
    else:
        index = {i: i for i in range(len(classes))} | {c: i for i, c in enumerate(classes)}
    wrong = sorted(str(label) for label in labels if label not in index)
    if wrong:
        raise DataError(f"{data}: labels {few(wrong)} are outside its {len(classes)} class names")

    items = {split: [Item(n, index[y], x) for n, x, y in rows] for split, rows in parts.items()}
    val = next((split for split in VAL_NAMES if items.get(split)), None)
    remarks += [f"{s} is not used" for s in sorted(items) if s not in ("train", val)]
    return Listing(classes, items["train"], items[val] if val else None, remarks=remarks)


# ---- decoding once, and what may be wrong


def _decode(
    items: Sequence[Item], at_least: int | None, memory: int
) -> tuple[list[Item | None], list[tuple[str, str]], list[int]]:
    """Decode every image; keep pixels as long as all of them fit. Broken ones become None.

    Returns: the items, names and reasons of the broken ones, shorter sides of the others.
    """
    room = memory

    def look(item: Item) -> tuple[int, int, Pixels | None] | str:
        try:
            pixels = np.asarray(load_rgb(item.source, at_least))
        except DataError as error:
            return str(error)
        return min(pixels.shape[:2]), pixels.nbytes, pixels if room >= 0 else None

    kept: list[Item | None] = []
    skipped: list[tuple[str, str]] = []
    sides: list[int] = []
    # Threads, because Pillow decodes without the interpreter's lock and pixels need not be sent anywhere.
    with ThreadPoolExecutor(min(8, cores())) as pool:
        for item, seen in zip(items, _watched(pool.map(look, items), len(items)), strict=True):
            if isinstance(seen, str):
                skipped.append((item.name, seen))
                kept.append(None)
                continue
            side, size, pixels = seen
            sides.append(side)
            room -= size
            kept.append(item if pixels is None or room < 0 else Item(item.name, item.label, pixels))
    if room < 0:
        kept = [None if k is None else item for k, item in zip(kept, items, strict=True)]
    return kept, skipped, sides


def _watched(results: Iterator[Any], total: int) -> Iterable[Any]:
    console = Console(stderr=True)
    return track(
        results, "looking at the images", total, console=console, transient=True, disable=not console.is_terminal
    )


def _check_broken(
    data: str, items: Sequence[Item], kept: Sequence[Item | None], skipped: Sequence[tuple[str, str]]
) -> None:
    """Few broken files are what any folder of photographs has; many mean that we misread the folder.

    Allowed is one in a hundred, and three in a smaller folder: a failed copy or a format that is not
    supported breaks more than that, and training on the rest would hide it.
    """
    if not skipped:
        return
    name, reason = skipped[0]
    if len(skipped) == len(items):
        raise DataError(f"{data}: none of its {len(items)} images can be read; the first: {name} ({reason})")
    allowed = max(3, len(items) // 100)
    if len(skipped) > allowed:
        raise DataError(
            f"{data}: {len(skipped)} of {len(items)} images cannot be read, more than {allowed}; "
            f"mend or remove them; the first: {name} ({reason})"
        )


def _check_classes(data: str, listing: Listing, train: list[Item], val: list[Item]) -> None:
    classes, counts = listing.classes, Counter(item.label for item in train)
    lost = sorted({item.label for item in listing.train + val} - counts.keys())
    if lost:
        raise DataError(f"{data}: no training image that can be read of {few([classes[i] for i in lost])}")
    if len(classes) < 2 or len(counts) < 2:
        only = classes[next(iter(counts))] if counts else classes[0]
        raise DataError(f"{data}: one class only ({only}); two or more are needed, a sub-folder each")
    if not val:
        raise DataError(f"{data}: one image in each class; two or more are needed, one of them to validate")


def check_same_classes(data: str, train: Sequence[str], val: Sequence[str]) -> None:
    if set(train) != set(val):
        missing, extra = sorted(set(train) - set(val)), sorted(set(val) - set(train))
        raise DataError(
            f"{data}: train and val must have the same classes; "
            f"only in train: {few(missing) or 'none'}; only in val: {few(extra) or 'none'}"
        )


def few(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
