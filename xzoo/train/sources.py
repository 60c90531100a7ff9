"""Reading the user's images: every form of DATA becomes one `ImageData`.

    a folder      one sub-folder a class; or parts (train/ with val/ or test/, ...) of such sub-folders: folders.py
    parquet       a folder of parquet files in the Hub's image layout
    org/name      a data set on the Hugging Face Hub (needs the extra `data`)
    digits        scikit-learn's 1,797 handwritten digits, 8 x 8: real images that need no download

A reader only lists what is there (`Listing`). Then every image is decoded once, whatever the form: what is
broken is left out by name before training instead of failing in its third epoch, and what fits in memory
is kept as pixels. Parts that DATA does not separate are separated by a hash of the images' names. Identical
files never lie on both sides: they are held out together, and what validates in DATA is not trained on.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track

from .. import network
from ..errors import DataError, first_line
from ..files import reason
from ..machine import cores
from ..names import encoded, rejoined
from . import folders
from .folders import LeftOut, few, part_of, same_letters
from .images import Pixels, grey_peak, grey_ranges, load_rgb, told_range, unwarned

HELD_OUT = 0.2
# Kinds of reasons for which an image is left out, beside those of folders.py.
UNREADABLE = "cannot be read"
BOTH = "identical to images that validate"
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
    left_out: list[LeftOut] = field(default_factory=list)


@dataclass(frozen=True)
class Images:
    """Images of one part, as pixels in memory or as files that are decoded when asked for."""

    items: Sequence[Item]
    at_least: int | None = None
    ranges: Mapping[str, float] = field(default_factory=dict)  # of `images.grey_ranges`

    def __len__(self) -> int:
        return len(self.items)

    def image(self, index: int) -> Image.Image:
        """The image as RGB. Raises DataError that names it, if it went away since it was scanned."""
        item = self.items[index]
        try:
            return load_rgb(item.source, self.at_least, self.ranges)
        except DataError as error:
            raise DataError(f"{item.name} could be read before and cannot now: {error}") from error

    @property
    def labels(self) -> list[int]:
        return [item.label for item in self.items]


@dataclass(frozen=True)
class ImageData:
    """The images of DATA, ready to train on.

    `mirror` says whether a mirror image is still of its class (not so for digits); `skipped` holds name and
    reason of what could not be read, `left_out` these and every other file that is not used, `remarks` what a
    reader decided, `facts` what else is to be told of the images; `in_memory`, whether pixels are kept; `side` is
    the median of the images' shorter sides, in pixels; `ranges`, the largest value of grey images with more than 8
    bits, by kind (`images.grey_ranges`).
    """

    classes: list[str]
    train: Images
    val: Images
    mirror: bool
    skipped: list[tuple[str, str]]
    remarks: list[str]
    in_memory: bool
    side: int
    left_out: list[LeftOut] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)
    ranges: Mapping[str, float] = field(default_factory=dict)

    def account(self) -> str:
        """In a line: the images and classes, the files that are left out by reason, and what is odd about the rest."""
        parts = [f"{len(self.train) + len(self.val)} images of {len(self.classes)} classes", *self.facts]
        reasons: dict[str, list[LeftOut]] = {}
        for left in self.left_out:
            reasons.setdefault(left.why, []).append(left)
        counts = [f"{len(files)} {why}{_shown(why, files)}" for why, files in reasons.items()]
        return "; ".join([*parts, f"left out: {', '.join(counts)}"] if counts else parts)

    def fingerprint(self) -> str:
        """Changes when an image is added, removed, renamed or moves to another class or part, or looks otherwise."""
        lines = [f"{part}:{i.label}:{i.name}" for part in ("train", "val") for i in getattr(self, part).items]
        # As pixels were before there were ranges, it is as it was.
        lines += [f"range:{kind}:{full:g}" for kind, full in self.ranges.items() if not _usual(kind, full)]
        return hashlib.sha256(encoded("\n".join([*self.classes, *lines]))).hexdigest()[:16]


def _shown(why: str, files: Sequence[LeftOut]) -> str:
    """Which ones, where that is short and tells something."""
    if why == UNREADABLE:
        return f" ({few([left.name for left in files])})"
    if why == folders.NO_IMAGE:
        return f" ({few(sorted({folders.ending(left.name) for left in files}))})"
    return ""


def _usual(kind: str, full: float) -> bool:
    """Whether a range is one that was taken before folders had ranges."""
    return full in ((1.0, 255.0, 65535.0) if kind == "float" else (65535.0,))


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
    with unwarned():
        ranges = grey_ranges(_threaded(lambda item: grey_peak(item.source), items, "looking for deep images"))
        kept, skipped, sides = _decode(items, at_least, memory, ranges)
    _check_broken(str(data), items, kept, skipped)
    left_out = [LeftOut(name, UNREADABLE, detail) for name, detail in skipped]
    facts = [told_range(kind, full) for kind, full in ranges.items()]

    used = [item for item in kept if item is not None]
    same = identical([item for item, there in zip(items, kept, strict=True) if there is not None])
    first_val = sum(item is not None for item in kept[: len(listing.train)])
    train, val = used[:first_val], used[first_val:]
    if listing.val is None:
        train, val = hold_out(train, same=same)
        copies = len(same) - len(set(same))
        if copies:
            facts.append(f"{copies} of them are copies of others, and on the same side as those")
    else:
        judged = set(same[first_val:])
        left_out += [LeftOut(item.name, BOTH, BOTH) for item, n in zip(train, same, strict=False) if n in judged]
        train = [item for item, n in zip(train, same, strict=False) if n not in judged]
    several = _in_several_classes(used, same)
    if several:
        listing.remarks.append(f"{len(several)} images are identical to one of another class: {few(several)}")
    _check_classes(str(data), listing, train, val, sum(left.why == BOTH for left in left_out))
    return ImageData(
        classes=[rejoined(name) for name in listing.classes],
        train=Images(train, at_least, ranges),
        val=Images(val, at_least, ranges),
        mirror=listing.mirror,
        skipped=skipped,
        remarks=[*listing.remarks, *same_letters(listing.classes)],
        in_memory=isinstance(train[0].source, np.ndarray),
        side=int(np.median(sides)),
        left_out=left_out + listing.left_out,
        facts=facts,
        ranges=ranges,
    )


def hold_out(
    items: Sequence[Item], share: float = HELD_OUT, same: Sequence[int] | None = None
) -> tuple[list[Item], list[Item]]:
    """Split into train and val, class by class, by a hash of the names: the same split on every machine.

    Of each class `share` is held out, one image or more where it has two; one or more stay in train.

    Args:
        same: for each item the first one that is identical (`identical`). They count as one and are on the same
            side; those that are in two classes stay in train.
    """
    same = range(len(items)) if same is None else same
    labels: dict[int, set[int]] = {}
    by_label: dict[int, list[int]] = {}
    for place, item in enumerate(items):
        labels.setdefault(same[place], set()).add(item.label)
        by_label.setdefault(item.label, []).append(place)
    held: set[int] = set()
    for places in by_label.values():
        places.sort(key=lambda place: _hash(items[place].name))
        different = list(dict.fromkeys(same[place] for place in places))
        count = min(max(1, round(share * len(different))), len(different) - 1)
        held.update([first for first in different if len(labels[first]) == 1][:count])
    train = [item for item, first in zip(items, same, strict=True) if first not in held]
    return train, [item for item, first in zip(items, same, strict=True) if first in held]


def identical(items: Sequence[Item]) -> list[int]:
    """For each item the place of the first one whose file has the same bytes: its own, if no other has.

    Only files of the same size and the same end are read whole, which are few among photographs.
    """
    groups = [list(range(len(items)))]
    for look in (_size, _end, _digest):
        groups = [part for group in groups for part in _alike(group, items, look)]
    first = list(range(len(items)))
    for group in groups:
        for place in group:
            first[place] = group[0]
    return first


def _alike(places: Sequence[int], items: Sequence[Item], look: Callable[[Item], Hashable]) -> list[list[int]]:
    """Groups of two places or more whose items look the same."""
    found: dict[Hashable, list[int]] = {}
    for place in places:
        # A file that went away since it was read is like no other; training says that it is gone.
        with suppress(OSError):
            found.setdefault(look(items[place]), []).append(place)
    return [group for group in found.values() if len(group) > 1]


def _size(item: Item) -> Hashable:
    if isinstance(item.source, Path):
        return item.source.stat().st_size
    # Pixels are those of digits, which are all different.
    return len(item.source) if isinstance(item.source, bytes) else item.name


def _end(item: Item, most: int = 4096) -> Hashable:
    if not isinstance(item.source, Path):
        return bytes(item.source[-most:])
    with open(item.source, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - most))
        return file.read()


def _digest(item: Item) -> Hashable:
    if not isinstance(item.source, Path):
        return hashlib.sha256(bytes(item.source)).digest()
    with open(item.source, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _in_several_classes(items: Sequence[Item], same: Sequence[int]) -> list[str]:
    labels: dict[int, set[int]] = {}
    for item, first in zip(items, same, strict=True):
        labels.setdefault(first, set()).add(item.label)
    return [item.name for item, first in zip(items, same, strict=True) if len(labels[first]) > 1]


def _hash(name: str) -> bytes:
    return hashlib.sha256(encoded(name)).digest()


def check_name(data: str) -> None:
    """Raise DataError for an empty name, which as a path is the current folder."""
    if not data.strip():
        raise DataError("the name of the data is empty; give a folder of images, a Hub data set (org/name) or digits")


def list_images(data: str) -> Listing:
    """What DATA holds, in any of the forms above; no image is decoded. Raises: DataError if it has none of them."""
    check_name(data)
    path = Path(data).expanduser()
    if data == "digits" and not os.path.exists(path):
        return _digits()
    if os.path.isdir(path):
        try:
            return _folder_or_tables(path)
        except OSError as error:
            raise DataError(f"{data}: {reason(error)}") from error
    if os.path.exists(path):  # which is also False for a name that is too long
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


def _folder_or_tables(root: Path) -> Listing:
    """Parquet files that hold images come first; others beside class folders are something else's."""
    tables, beside = folders.files_that_end_in(root, ".parquet"), folders.folders_with_images(root)
    with_images = [table for table in tables if _has_images(table)]
    if not tables or (beside and not with_images):
        return _folder(root)
    listing = _tables(root, with_images or tables)
    rows = [*listing.train, *(listing.val or [])]
    if beside and not any(isinstance(row.source, Path) for row in rows):
        listing.remarks.append(f"parquet files are read, and images in folders beside them are not: {few(beside)}")
    strange = [table.name for table in tables if with_images and table not in with_images]
    if strange:
        listing.remarks.append(f"no images in {few(strange)}")
    return listing


def _has_images(table: Path) -> bool:
    """Whether a parquet file has a column of images; also where that cannot be told, so that it is."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return any(_kind(column.type) == "image" for column in pq.read_schema(table))
    except (pa.ArrowException, OSError):
        return True


def _folder(root: Path) -> Listing:
    layout = folders.read_folder(root)
    train, val = ([Item(*image) for image in part] for part in (layout.train, layout.val or []))
    return Listing(
        layout.classes,
        train,
        None if layout.val is None else val,
        remarks=layout.remarks,
        left_out=layout.left_out,
    )


def _tables(root: Path, files: Sequence[Path]) -> Listing:
    import pyarrow as pa

    parts: dict[str, list[Row]] = {}
    classes: list[str] | None = None
    places: dict[str, Path] = {}
    for file in files:
        split = split_of(file)
        if places.setdefault(split, file.parent) != file.parent:
            raise DataError(f"{root}: {split} is in {places[split]} and in {file.parent}; give one of them")
        try:
            rows, names = _table(file)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{file}: no parquet file that can be read ({first_line(error)})") from error
        if classes is not None and names != classes:
            raise DataError(f"{file}: its class names differ from those of {files[0].name}")
        classes = names
        parts.setdefault(split, []).extend(rows)
    return _from_rows(str(root), parts, classes)


def split_of(file: Path) -> str:
    """The part of the data that the name of a file, or else of its folder, tells; train if none does."""
    words = {part_of(word) for word in re.split(r"[\W_]+", file.stem)} - {None}
    kinds = (words.pop() if len(words) == 1 else None, part_of(file.parent.name))
    for name, kind in zip((file.stem, file.parent.name), kinds, strict=True):
        found = re.match(r"(train|val|validation|valid|test)(?![a-z])", name.lower())
        if found:
            return found[1]
        if kind:
            return kind
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
            told = contact.failure or first_line(error)
            raise DataError(f"{name}: no folder here, and the Hub gave: {told}") from error
    parts: dict[str, list[Row]] = {}
    classes: list[str] | None = None
    for split, rows in splits.items():
        kinds = {}
        for column, feature in rows.features.items():
            is_label = isinstance(feature, datasets.ClassLabel) or getattr(feature, "dtype", "") in ("int64", "string")
            kinds[column] = "label" if is_label else "other"
            if isinstance(feature, datasets.Image):
                kinds[column] = "image"
        image, label = _columns(name, kinds)
        classes = getattr(rows.features[label], "names", None)
        rows = rows.cast_column(image, datasets.Image(decode=False))
        pairs = zip(rows[image], rows[label], strict=True)
        parts[split] = [(f"{split}:{i}", _bytes_of(x, Path()), y) for i, (x, y) in enumerate(pairs)]
    return _from_rows(name, parts, classes)


def _from_rows(data: str, parts: dict[str, list[Row]], classes: list[str] | None) -> Listing:
    """Rows with labels as numbers, or as text where the table has no class names."""
    remarks = []
    trains = [split for split in parts if part_of(split) == "train"]
    if "train" not in parts and len(trains) == 1:
        parts["train"] = parts.pop(trains[0])
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
    judges = sorted((split for split in items if part_of(split) in ("val", "test")), key=folders.rank)
    val = next((split for split in judges if items[split]), None)
    remarks += [f"{s} is not used" for s in sorted(items) if s not in ("train", val)]
    return Listing(classes, items["train"], items[val] if val else None, remarks=remarks)


# ---- decoding once, and what may be wrong


def _decode(
    items: Sequence[Item], at_least: int | None, memory: int, ranges: Mapping[str, float]
) -> tuple[list[Item | None], list[tuple[str, str]], list[int]]:
    """Decode every image; keep pixels as long as all of them fit. Broken ones become None.

    Returns: the items, names and reasons of the broken ones, shorter sides of the others.
    """
    room = memory

    def look(item: Item) -> tuple[int, int, Pixels | None] | str:
        try:
            pixels = np.asarray(load_rgb(item.source, at_least, ranges))
        except DataError as error:
            return str(error)
        return min(pixels.shape[:2]), pixels.nbytes, pixels if room >= 0 else None

    kept: list[Item | None] = []
    skipped: list[tuple[str, str]] = []
    sides: list[int] = []
    for item, seen in zip(items, _threaded(look, items, "looking at the images"), strict=True):
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


def _threaded(look: Callable[[Item], Any], items: Sequence[Item], what: str) -> Iterator[Any]:
    console = Console(stderr=True)
    # Threads, because Pillow decodes without the interpreter's lock and pixels need not be sent anywhere.
    with ThreadPoolExecutor(min(8, cores())) as pool:
        seen = pool.map(look, items)
        yield from track(seen, what, len(items), console=console, transient=True, disable=not console.is_terminal)


def _check_broken(
    data: str, items: Sequence[Item], kept: Sequence[Item | None], skipped: Sequence[tuple[str, str]]
) -> None:
    """Few broken files are what any folder of photographs has; many mean that we misread the folder.

    Allowed is one in a hundred, and three in a smaller folder: a failed copy or a format that is not
    supported breaks more than that, and training on the rest would hide it.
    """
    if not skipped:
        return
    first = "{} ({})".format(*skipped[0])
    if len(skipped) == len(items):
        raise DataError(f"{data}: none of its {len(items)} images can be read; the first: {first}")
    allowed = max(3, len(items) // 100)
    if len(skipped) > allowed:
        raise DataError(
            f"{data}: {len(skipped)} of {len(items)} images cannot be read, more than {allowed}; "
            f"mend or remove them; the first: {first}"
        )


def _check_classes(data: str, listing: Listing, train: list[Item], val: list[Item], both: int = 0) -> None:
    classes, counts = listing.classes, Counter(item.label for item in train)
    lost = sorted({item.label for item in listing.train + val} - counts.keys())
    if lost:
        same = f" ({both} are identical to images that validate)" if both else ""
        raise DataError(f"{data}: no training image that can be read of {few([classes[i] for i in lost])}{same}")
    if len(classes) < 2 or len(counts) < 2:
        only = classes[next(iter(counts))] if counts else classes[0]
        raise DataError(f"{data}: one class only ({only}); two or more are needed, a sub-folder each")
    if not val:
        raise DataError(
            f"{data}: one image in each class, not counting copies; two or more are needed, one of them to validate"
        )
