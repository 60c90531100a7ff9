"""What DATA holds, in every form that it may have, as one `Listing`; no image is decoded here.

    a folder    one sub-folder a class; or parts (train/ with val/ or test/, ...) of such
                sub-folders: folders.py
    parquet     a folder of parquet files in the Hub's image layout
    org/name    a data set on the Hugging Face Hub (needs the extra `data`)
    digits      scikit-learn's 1,797 handwritten digits, 8 x 8: real images that need no download

Not here: whether an image can be read, and which are identical (scan.py).
"""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, starmap
from pathlib import Path
from typing import Any

import numpy as np

from .. import network
from ..errors import DataError, first_line
from ..files import reason
from . import folders
from .folders import part_of, shorten
from .images import Pixels
from .walk import LeftOut, files_that_end_in

Row = tuple[str, Any, Any]  # of a table: name, image, label


@dataclass(frozen=True)
class Item:
    """One image before it is read: its name within DATA, its class, and where its bytes are."""

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

    @property
    def items(self) -> list[Item]:
        """The images of both parts."""
        return [*self.train, *(self.val or [])]


def check_name(data: str) -> None:
    """Raise DataError for an empty name, which as a path is the current folder."""
    if not data.strip():
        raise DataError(
            "the name of the data is empty; give a folder of images, a Hub data set (org/name) or "
            "digits"
        )


def list_images(data: str) -> Listing:
    """What DATA holds, in any of the forms above; no image is decoded. Raises: DataError if it has
    none of them.
    """
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
        raise DataError(
            f"{data} is a file; give a folder with one sub-folder a class, or of parquet files"
        )
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", data):
        return _hub(data)
    raise DataError(
        f"{data} does not exist; give a folder of images, a Hub data set (org/name) or digits"
    )


# ---- readers: digits, folders, parquet, Hub


def _digits() -> Listing:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)  # [1797, 8, 8], was 0 to 16
    pixels = np.repeat(pixels[..., None], 3, axis=3)
    items = []
    for i, (label, image) in enumerate(zip(digits.target, pixels, strict=True)):
        items.append(Item(f"{label}/{i:04d}", int(label), image))
    return Listing(list(map(str, range(10))), items, mirror=False)


def _folder_or_tables(root: Path) -> Listing:
    """Parquet files that hold images come first; others beside class folders are not the data."""
    tables, beside = files_that_end_in(root, ".parquet"), folders.folders_with_images(root)
    with_images = list(filter(_has_images, tables))
    if not tables or (beside and not with_images):
        return _folder(root)
    listing = _tables(root, with_images or tables)
    if beside and not any(isinstance(item.source, Path) for item in listing.items):
        listing.remarks.append(
            f"parquet files are read, and images in folders beside them are not: {shorten(beside)}"
        )
    strange = [table.name for table in tables if with_images and table not in with_images]
    if strange:
        listing.remarks.append(f"no images in {shorten(strange)}")
    return listing


def _has_images(table: Path) -> bool:
    """Whether a parquet file has a column of images; also of one that cannot be read, which fails
    later.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return "image" in map(_kind, pq.read_schema(table).types)
    except (pa.ArrowException, OSError):
        return True


def _folder(root: Path) -> Listing:
    layout = folders.read_folder(root)
    return Listing(
        layout.classes,
        list(starmap(Item, layout.train)),
        None if layout.val is None else list(starmap(Item, layout.val)),
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
            raise DataError(
                f"{root}: {split} is in {places[split]} and in {file.parent}; give one of them"
            )
        try:
            rows, names = _table(file)
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{file}: no parquet file that can be read ({first_line(error)})"
            ) from error
        if classes is not None and names != classes:
            raise DataError(f"{file}: its class names differ from those of {files[0].name}")
        classes = names
        parts.setdefault(split, []).extend(rows)
    return _from_rows(str(root), parts, classes)


def split_of(file: Path) -> str:
    """The part of the data that the name of a file, or else of its folder, tells; train if none
    does.
    """
    words = set(map(part_of, re.split(r"[\W_]+", file.stem))) - {None}
    kinds = (words.pop() if len(words) == 1 else None, part_of(file.parent.name))
    for name, kind in zip((file.stem, file.parent.name), kinds, strict=True):
        if found := re.match(r"(train|val|validation|valid|test)(?![a-z])", name.lower()):
            return found[1]
        if kind:
            return kind
    return "train"


def _table(file: Path) -> tuple[list[Row], list[str] | None]:
    """The rows (name, image, label) of one parquet file, and its class names where it has them."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as table:
        schema = table.schema_arrow
        kinds = dict(zip(schema.names, map(_kind, schema.types), strict=True))
        image, label = _columns(file.name, kinds)
        names = _class_names(schema.metadata, label)
        rows: list[Row] = []
        # A file may be one row group of gigabytes: read it in pieces.
        for batch in table.iter_batches(256, columns=[image, label]):
            columns = (batch.column(name).to_pylist() for name in (image, label))
            for x, y in zip(*columns, strict=True):
                rows.append((f"{file.name}:{len(rows)}", _bytes_of(x, file.parent), y))
    return rows, names


def _kind(type_: Any) -> str:
    import pyarrow as pa

    kinds = pa.types
    held = kinds.is_struct(type_) and type_.get_field_index("bytes") >= 0
    if held or kinds.is_binary(type_) or kinds.is_large_binary(type_):
        return "image"
    if kinds.is_integer(type_) or kinds.is_string(type_) or kinds.is_large_string(type_):
        return "label"
    return "other"


def _columns(where: str, kinds: dict[str, str]) -> tuple[str, str]:
    """Names of the image and the label column: those in use on the Hub first, else the only one of
    its kind.
    """
    chosen = []
    known = {
        "image": ("image", "img"),
        "label": ("label", "fine_label", "labels", "class", "target"),
    }
    for kind, usual in known.items():
        there = [name for name, its in kinds.items() if its == kind]
        pick = next(
            (name for name in usual if name in there), there[0] if len(there) == 1 else None
        )
        if pick is None:
            raise DataError(
                f"{where}: no {kind} column among {shorten(list(kinds))}; "
                f"expected {' or '.join(usual)}"
            )
        chosen.append(pick)
    return chosen[0], chosen[1]


def _class_names(metadata: dict[bytes, bytes] | None, label: str) -> list[str] | None:
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return list(map(str, features[label]["names"]))
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
            f"{name} is not a folder here; to read it as a data set of the Hugging Face Hub: pip "
            "install 'xzoo[data]'"
        ) from None
    with network.bounded() as contact:
        try:
            splits = datasets.load_dataset(name)
        except Exception as error:
            # network, permission, script and format errors of many libraries
            told = contact.failure or first_line(error)
            raise DataError(f"{name}: no folder here, and the Hub gave: {told}") from error
    parts: dict[str, list[Row]] = {}
    classes: list[str] | None = None
    for split, rows in splits.items():
        kinds = {}
        for column, feature in rows.features.items():
            kinds[column] = "other"
            if isinstance(feature, datasets.Image):
                kinds[column] = "image"
            elif isinstance(feature, datasets.ClassLabel) or getattr(feature, "dtype", "") in (
                "int64",
                "string",
            ):
                kinds[column] = "label"
        image, label = _columns(name, kinds)
        classes = getattr(rows.features[label], "names", None)
        rows = rows.cast_column(image, datasets.Image(decode=False))
        parts[split] = []
        for i, (x, y) in enumerate(zip(rows[image], rows[label], strict=True)):
            parts[split].append((f"{split}:{i}", _bytes_of(x, Path()), y))
    return _from_rows(name, parts, classes)


def _from_rows(data: str, parts: dict[str, list[Row]], classes: list[str] | None) -> Listing:
    """Rows with labels as numbers, or as text where the table has no class names."""
    trains = [split for split in parts if part_of(split) == "train"]
    if "train" not in parts:
        if len(trains) != 1 and len(parts) > 1:
            raise DataError(f"{data}: no train part among {shorten(sorted(parts))}")
        train = parts.pop(trains[0] if len(trains) == 1 else next(iter(parts)))
        parts["train"] = train
    # -1 marks an image whose label is kept secret, as in the test parts of contests.
    parts = {split: [r for r in rows if r[2] not in (None, -1)] for split, rows in parts.items()}
    labels = {row[2] for row in chain.from_iterable(parts.values())}
    values = sorted(labels) if classes is None else range(len(classes))
    classes = list(map(str, values)) if classes is None else classes
    index = {name: i for i, name in enumerate(classes)} | {v: i for i, v in enumerate(values)}
    if wrong := sorted(map(str, labels - index.keys())):
        raise DataError(
            f"{data}: labels {shorten(wrong)} are outside its {len(classes)} class names"
        )

    items = {split: [Item(n, index[y], x) for n, x, y in rows] for split, rows in parts.items()}
    judges = sorted(filter(_may_validate, items), key=folders.rank)
    val = next(filter(items.get, judges), None)
    remarks = [f"{s} is not used" for s in sorted(items) if s not in ("train", val)]
    return Listing(classes, items["train"], items[val] if val else None, remarks=remarks)


def _may_validate(split: str) -> bool:
    return part_of(split) in ("val", "test")
