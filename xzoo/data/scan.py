"""The user's images, looked at once: what can be read, how large it is, what validates, as one
`ImageData`.

Every image is decoded before training, whatever the form of DATA: what is broken is left out by
name instead of failing in the third epoch, and what fits in memory is kept as pixels. Parts that
DATA does not separate are separated by a hash of the images' names. Identical files never lie on
both sides: they are held out together, and what validates in DATA is not trained on.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain, compress, starmap
from operator import not_
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track

from ..errors import DataError
from ..machine import cores
from ..names import encoded, rejoined
from .folders import same_letters, shorten
from .images import Pixels, grey_peak, grey_ranges, load_rgb, told_range, unwarned
from .sources import Item, Listing, list_images
from .walk import NO_IMAGE, LeftOut, ending

HELD_OUT = 0.2
# Kinds of reasons for which an image is left out, beside those of walk.py and folders.py.
UNREADABLE = "cannot be read"
BOTH = "identical to images that validate"
# Decoded pixels are kept up to here: 21,000 images of 128 x 128, or a thousand reduced photographs.
MEMORY = 1 << 30


@dataclass(frozen=True)
class Images:
    """Images of one part, as pixels in memory or as files that are decoded when asked for."""

    items: Sequence[Item]
    at_least: int | None = None
    ranges: Mapping[str, float] = field(default_factory=dict)  # of `images.grey_ranges`

    def __len__(self) -> int:
        return len(self.items)

    def image(self, index: int) -> Image.Image:
        """The image as RGB. Raises DataError that names it, if it is gone since it was scanned."""
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

    `mirror` says whether a mirror image is still of its class (not so for digits); `skipped` holds
    name and reason of what could not be read, `left_out` these and every other file that is not
    used, `remarks` what a reader decided, `facts` what else is to be told of the images;
    `in_memory`, whether pixels are kept; `side` is the median of the images' shorter sides, in
    pixels; `ranges`, the largest value of grey images with more than 8 bits, by kind
    (`images.grey_ranges`).
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
        """In a line: the images and classes, the files that are left out by reason, and what is odd
        about the rest.
        """
        count = len(self.train) + len(self.val)
        parts = [f"{count} images of {len(self.classes)} classes", *self.facts]
        reasons: dict[str, list[str]] = {}
        for left in self.left_out:
            reasons.setdefault(left.why, []).append(left.name)
        counts = [f"{len(names)} {why}{_shown(why, names)}" for why, names in reasons.items()]
        if counts:
            parts.append(f"left out: {', '.join(counts)}")
        return "; ".join(parts)

    def fingerprint(self) -> str:
        """Changes when an image is added, removed, renamed or moves to another class or part, or
        looks otherwise.
        """
        lines = [f"train:{i.label}:{i.name}" for i in self.train.items]
        lines += [f"val:{i.label}:{i.name}" for i in self.val.items]
        for kind, full in self.ranges.items():
            # As pixels were before there were ranges, it is as it was.
            if full not in ((1.0, 255.0, 65535.0) if kind == "float" else (65535.0,)):
                lines.append(f"range:{kind}:{full:g}")
        return hashlib.sha256(encoded("\n".join([*self.classes, *lines]))).hexdigest()[:16]


def _shown(why: str, names: Sequence[str]) -> str:
    """Which ones, where that is short and says something."""
    if why == NO_IMAGE:
        names = sorted(set(map(ending, names)))
    return f" ({shorten(names)})" if why in (UNREADABLE, NO_IMAGE) else ""


def read(data: str | Path, at_least: int | None = None, memory: int = MEMORY) -> ImageData:
    """Read DATA in any of the forms of sources.py.

    Args:
        at_least: larger images may be reduced to this many pixels a side (`load_rgb`).
        memory: bytes of decoded pixels to keep; beyond that images are decoded each time.
    Raises: DataError if it does not exist, is empty, has one class, holds too many broken images or
        none that can be read, or trains and validates on different classes.
    """
    listing = list_images(str(data))
    items = listing.items
    if not items:
        raise DataError(f"{data}: no images in it; put those of each class into a sub-folder")
    with unwarned():
        ranges = grey_ranges(
            _threaded(lambda item: grey_peak(item.source), items, "looking for deep images")
        )
        kept, skipped, sides = _decode(items, at_least, memory, ranges)
    _check_broken(str(data), items, kept, skipped)
    left_out = [LeftOut(name, UNREADABLE, detail) for name, detail in skipped]
    facts = list(starmap(told_range, ranges.items()))

    readable = list(map(bool, kept))
    used = list(filter(None, kept))
    same = identical(list(compress(items, readable)))
    first_val = sum(readable[: len(listing.train)])
    train, val = used[:first_val], used[first_val:]
    if listing.val is None:
        train, val = split_by_name(train, same=same)
        copies = len(same) - len(set(same))
        if copies:
            facts.append(f"{copies} of them are copies of others, and on the same side as those")
    else:
        judges = set(same[first_val:])
        judged = [n in judges for n in same[:first_val]]
        left_out += [LeftOut(item.name, BOTH, BOTH) for item in compress(train, judged)]
        train = list(compress(train, map(not_, judged)))
    classes_of = _classes_of(used, same)
    several = [item.name for item, n in zip(used, same, strict=True) if len(classes_of[n]) > 1]
    if several:
        listing.remarks.append(
            f"{len(several)} images are identical to one of another class: {shorten(several)}"
        )
    _check_classes(str(data), listing, train, val, sum(left.why == BOTH for left in left_out))
    return ImageData(
        classes=list(map(rejoined, listing.classes)),
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


def split_by_name(
    items: Sequence[Item], share: float = HELD_OUT, same: Sequence[int] | None = None
) -> tuple[list[Item], list[Item]]:
    """Split into train and val, class by class, by a hash of the names: the same split on every
    machine.

    Of each class `share` is held out, one image or more where it has two; one or more stay in
    train.

    Args:
        same: for each item the first one that is identical (`identical`). They count as one and are
            on the same side; those that are in two classes stay in train.
    """
    same = range(len(items)) if same is None else same
    labels = _classes_of(items, same)
    by_label: dict[int, list[int]] = {}
    hashes = [hashlib.sha256(encoded(item.name)).digest() for item in items]
    for place in sorted(range(len(items)), key=hashes.__getitem__):
        by_label.setdefault(items[place].label, []).append(same[place])
    held: set[int] = set()
    for firsts in by_label.values():
        different = list(dict.fromkeys(firsts))
        count = min(max(1, round(share * len(different))), len(different) - 1)
        held.update([first for first in different if len(labels[first]) == 1][:count])
    is_held = [first in held for first in same]
    return list(compress(items, map(not_, is_held))), list(compress(items, is_held))


def identical(items: Sequence[Item]) -> list[int]:
    """For each item the place of the first one whose file has the same bytes: its own, if no other
    has.

    Only files of the same size and the same end are read whole, which are few among photographs.
    """
    first = list(range(len(items)))
    groups = [list(first)]
    for look in (_size, _end, _digest):
        groups = list(chain.from_iterable(_alike(group, items, look) for group in groups))
    for group in groups:
        for place in group:
            first[place] = group[0]
    return first


def _alike(
    places: Sequence[int], items: Sequence[Item], look: Callable[[Item], Hashable]
) -> list[list[int]]:
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


def _classes_of(items: Sequence[Item], same: Sequence[int]) -> dict[int, set[int]]:
    """The classes of each first one of identical items."""
    labels: dict[int, set[int]] = {}
    for item, first in zip(items, same, strict=True):
        labels.setdefault(first, set()).add(item.label)
    return labels


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
        kept = [k and item for k, item in zip(kept, items, strict=True)]
    return kept, skipped, sides


def _threaded(look: Callable[[Item], Any], items: Sequence[Item], what: str) -> Iterator[Any]:
    console = Console(stderr=True)
    # Threads, because Pillow decodes without the interpreter's lock and pixels need not be sent
    # anywhere.
    with ThreadPoolExecutor(min(8, cores())) as pool:
        yield from track(
            pool.map(look, items),
            what,
            len(items),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )


def _check_broken(
    data: str,
    items: Sequence[Item],
    kept: Sequence[Item | None],
    skipped: Sequence[tuple[str, str]],
) -> None:
    """Few broken files are what any folder of photographs has; many mean that we misread the
    folder.

    Allowed is one in a hundred, and three in a smaller folder: a failed copy or a format that is
    not supported breaks more than that, and training on the rest would hide it.
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


def _check_classes(
    data: str, listing: Listing, train: list[Item], val: list[Item], both: int = 0
) -> None:
    classes, counts = listing.classes, Counter(item.label for item in train)
    lost = sorted({item.label for item in listing.items} - counts.keys())
    if lost:
        same = f" ({both} are identical to images that validate)" if both else ""
        raise DataError(
            f"{data}: no training image that can be read of "
            f"{shorten([classes[i] for i in lost])}{same}"
        )
    if len(classes) < 2 or len(counts) < 2:
        only = classes[next(iter(counts))] if counts else classes[0]
        raise DataError(
            f"{data}: one class only ({only}); two or more are needed, a sub-folder each"
        )
    if not val:
        raise DataError(
            f"{data}: one image in each class, not counting copies; two or more are needed, one of "
            "them to validate"
        )
