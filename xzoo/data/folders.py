"""A folder of images: what each file in it is for. Used as an image of a class and a part, or left
out, and why.

    a class     a sub-folder; all images in it count, at any depth
    a part      class folders in a folder with a usual name: train, Training, seg_train,
                val_images, test_set, ...; parts may lie deeper (archive/photos/train/CLASS,
                seg_train/seg_train/CLASS), or within each class (CLASS/train), or val and test
                beside the classes
    left out    what KEPT_BY_SYSTEMS and a leading dot name, what is not an image or not a file,
                images beside the class folders, parts that are not used, and a file that is
                reached twice, through a link

A folder called `train` may also be a class (a locomotive). So a name alone makes no part: it has to
hold class folders, and stand alone or beside another part. Where that leaves two readings, the
folder is refused and both are named.

Not here: whether a file can be read, and which are identical (scan.py).
"""

import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter
from pathlib import Path

from ..errors import DataError
from .walk import (
    HIDDEN,
    NO_FILE,
    NO_IMAGE,
    TWICE,
    ImageFile,
    LeftOut,
    Place,
    as_walked,
    each_once,
    ending,
    gather,
    has_images,
    is_hidden,
    is_image,
    leads_back,
    listed,
    no_regular_file,
    walked,
)

# Kinds of reasons for which a file is left out, beside those of walk.py.
NO_CLASS = "in no class folder"
UNUSED = "in folders that are not used"

FLAT = "images lie in it directly; put those of each class into a sub-folder"

# usual names of what validates, the first that is there
VAL_NAMES = ("val", "validation", "valid", "test")
_PARTS = {
    "train": ("train", "training", "trainval"),
    "val": ("val", "valid", "validation", "validate", "dev", "eval", "evaluation"),
    "test": ("test", "testing", "holdout", "heldout"),
}
_KINDS = {word: kind for kind, words in _PARTS.items() for word in words}
# Repeated, and so that a text can be read in one way only: the time to refuse one grows
# exponentially with two.
_BESIDE = (
    "(?:seg|segmented|data|set|split|part|images?|imgs?|pictures?|photos?|pics?|cropped|final"
    "|[0-9])*"
)
_PART = re.compile(f"{_BESIDE}({'|'.join(sorted(_KINDS, key=len, reverse=True))}){_BESIDE}")


_base, _name = attrgetter("base"), attrgetter("name")


@dataclass
class Layout:
    """What a folder holds: images as (name, label, file) in the order of names, and everything
    else.
    """

    classes: list[str]
    train: list[tuple[str, int, Path]]
    val: list[tuple[str, int, Path]] | None = None
    left_out: list[LeftOut] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    @property
    def images(self) -> list[tuple[str, int, Path]]:
        return [*self.train, *(self.val or [])]


def part_of(name: str) -> str | None:
    """Which part a name stands for (train, val or test), in any case and with any separators; None
    for others.
    """
    found = _PART.fullmatch(re.sub(r"[\W_]+", "", name.lower()))
    return _KINDS[found[1]] if found else None


def rank(name: str, kind: str | None = None) -> tuple[bool, int, str]:
    """Order of what may validate: val, validation, valid, other names of that kind; then test, and
    others of its.
    """
    lower = name.lower()
    place = VAL_NAMES.index(lower) if lower in VAL_NAMES else len(VAL_NAMES)
    return (kind or part_of(name)) == "test", place, name


def shorten(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def check_same_classes(data: str, train: Iterable[str], val: Iterable[str]) -> None:
    missing, extra = sorted(set(train) - set(val)), sorted(set(val) - set(train))
    if missing and set(map(_letters, missing)) == set(map(_letters, extra)):
        raise DataError(
            f"{data}: train has {missing[0]!a} where val has {extra[0]!a}: the same letters in "
            "two forms of Unicode; rename the folders of one of them"
        )
    if missing or extra:
        raise DataError(
            f"{data}: train and val must have the same classes; "
            f"only in train: {shorten(missing) or 'none'}; only in val: {shorten(extra) or 'none'}"
        )


def same_letters(classes: Iterable[str]) -> list[str]:
    """A remark on each set of classes whose names are the same letters, as macOS and other systems
    spell them.
    """
    remarks = []
    for names in _alike(classes, _letters):
        remarks.append(
            f"the classes {' and '.join(map(ascii, names))} are the same letters in two forms of "
            "Unicode; if they are one class, put their images into one folder"
        )
    return remarks


def _letters(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _alike(names: Iterable[str], key: Callable[[str], str]) -> list[list[str]]:
    """The names of which `key` gives the same, in groups of two or more."""
    groups: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        groups.setdefault(key(name), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


# ---- reading a folder


Classes = dict[str, list[Place]]  # the folders of each class
Parts = tuple[Classes, Classes | None]  # to train on and to validate on


def folders_with_images(root: Path) -> list[str]:
    top = Place(root, "", os.path.realpath(root))
    return _bases(_Reader(top).subs(top))


def read_folder(root: Path) -> Layout:
    """Which file of a folder is an image of which class and part, and why every other one is not.

    Raises: DataError if it has no class folders, or can be read in two ways.
    """
    top = Place(root, "", os.path.realpath(root))
    reader = _Reader(top)
    train, val = reader.arranged(top)
    layout = Layout(list(train), [])
    layout.train = reader.labelled(layout, train)
    if val is not None:
        layout.val = reader.labelled(layout, {name: val[name] for name in train})
    layout.remarks = reader.remarks
    _drop_empty(layout)
    reader.account(layout)
    return layout


class _Reader:
    """What is decided about the folders of DATA, kept until all files are accounted for."""

    def __init__(self, top: Place) -> None:
        self.top = top
        self.remarks: list[str] = []
        self.unused: dict[str, str] = {}  # name of a folder -> why it is not used
        self.kinds: dict[str, str] = {}  # name of a folder -> the part that its name stands for

    # ---- what there is

    def subs(self, place: Place) -> list[Place]:
        """Its folders with images, in text order."""
        found = [folder for folder in self.folders(place) if has_images(folder, self.top.real)]
        self.kinds |= kinds_of(found)
        return found

    def folders(self, place: Place) -> list[Place]:
        links = [link for link in listed(place).links if not leads_back(link, self.top.real)]
        return sorted(listed(place).folders + links, key=_base)

    def names(self, place: Place) -> set[str]:
        return set(_bases(self.subs(place)))

    def of_kind(self, places: Sequence[Place], *kinds: str | None) -> list[Place]:
        return [place for place in places if self.kinds.get(place.name) in kinds]

    def leave(self, place: Place, reason: str) -> None:
        """Leave a folder out, and say so."""
        self.unused[place.name] = reason
        self.remarks.append(reason)

    # ---- parts

    def arranged(self, place: Place) -> Parts:
        """The class folders of training and validation below a folder; None where it has no part to
        validate.
        """
        subs = self.subs(place)
        if not subs:
            if listed(place).images:
                raise DataError(f"{place.path}: {FLAT}")
            return {}, None
        trains, others = self.of_kind(subs, "train"), self.of_kind(subs, None)
        judges = self.of_kind(subs, "val", "test")
        if trains:
            if self.are_parts(place, trains, judges, others):
                return self.parts(place, trains, judges)
            self.remarks.append(
                f"{trains[0].shown} is read as a class, beside {shorten(_bases(others))}"
            )
            return self.classes(place, subs), None
        if others:
            # Images to validate on have labels, so that a flat val/ is none of those parts; a flat
            # test/ may be one.
            beside = shorten(_bases(others))
            for judge in self.of_kind(judges, "val"):
                if not self.subs(judge):
                    self.remarks.append(f"{judge.shown} is read as a class, beside {beside}")
                    judges.remove(judge)
            others = [sub for sub in subs if sub not in judges]
        if judges and others:
            return self.classes_and_judges(place, others, judges)
        if len(subs) == 1 and not listed(subs[0]).images:
            self.remarks.append(f"{subs[0].shown} is read, the only folder with images in it")
            return self.arranged(subs[0])
        if judges:
            raise DataError(
                f"{place.path}: {_and(judges)}, and no train part; call the one to train on train/"
            )
        return self.deeper(place, subs)

    def are_parts(
        self, place: Place, trains: list[Place], judges: list[Place], others: list[Place]
    ) -> bool:
        """Whether what is called train is a part. Raises: DataError where it may be a part or a
        class.
        """
        nested = list(filter(self.subs, trains))
        if not nested and (judges or not others):
            raise DataError(f"{place.path}, {_and(trains + judges)}: {FLAT}")
        if judges or not others:
            return True
        if not nested or all(listed(train).images for train in trains):
            return False
        # Parts of one data set have the same classes, and classes of another have not.
        if all(self.names(other) & self.names(nested[0]) for other in others):
            return True
        raise DataError(
            f"{place.path}: {nested[0].shown} may be a part, or a class as "
            f"{shorten(_bases(others))}; "
            f"to train on it alone give {nested[0].path}, to make it a class give it another name"
        )

    def parts(self, place: Place, trains: list[Place], judges: list[Place]) -> Parts:
        """Folders of parts: one to train on, the first of the others that has class folders to
        validate.
        """
        usable = list(filter(self.subs, trains))
        usable = [train for train in usable if train.base.lower() == "train"] or usable
        if len(usable) > 1:
            raise DataError(
                f"{place.path}: {_and(usable)} may each be the training part; give "
                f"{usable[0].path}, or take one away"
            )
        folder = self.unwrapped(usable[0], set())
        train = self.classes(folder, self.subs(folder))
        val = self.validating(judges, set(train))
        rest = []
        for other in self.folders(place):
            if other in [usable[0], *judges]:
                continue
            if part_of(other.base) in ("val", "test"):
                self.leave(other, f"{other.shown} is not used: it has no class folders with images")
            else:
                self.unused[other.name] = f"beside {usable[0].shown}, and not used"
                rest.append(other.base)
        if rest:
            self.remarks.append(
                f"beside {usable[0].shown}, these folders are not used: {shorten(rest)}"
            )
        return train, val

    def validating(self, judges: list[Place], classes: set[str]) -> Classes | None:
        """The part that validates: val, validation or valid, another name of that kind, or else
        test.
        """
        chosen: Place | None = None
        for judge in sorted(judges, key=lambda judge: rank(judge.base, self.kinds[judge.name])):
            folder = self.unwrapped(judge, classes)
            if chosen is not None:
                self.leave(judge, f"{judge.shown} is not used, since {chosen.shown} validates")
            elif not self.subs(folder):
                self.leave(judge, f"{judge.shown} is not used: it has no class folders with images")
            else:
                check_same_classes(str(self.top.path), classes, self.names(folder))
                chosen = judge
                validates = {sub.base: [sub] for sub in self.subs(folder)}
                if self.kinds[judge.name] == "test":
                    self.remarks.append(
                        f"{judge.shown} validates, since there is no part called val"
                    )
        return validates if chosen is not None else None

    def unwrapped(self, part: Place, classes: set[str]) -> Place:
        """seg_train/seg_train/CLASS: the inner one. `classes`: names that are not wrappers."""
        subs = self.subs(part)
        while len(subs) == 1 and not listed(subs[0]).images and subs[0].base not in classes:
            part, subs = subs[0], self.subs(subs[0])
        return part

    def classes_and_judges(self, place: Place, others: list[Place], judges: list[Place]) -> Parts:
        """CLASS/ and test/CLASS beside each other. Raises: DataError if test/ may be a class
        itself.
        """
        names = set(_bases(others))
        for judge in judges:
            if not self.names(self.unwrapped(judge, names)) & names:
                raise DataError(
                    f"{place.path}: {judge.shown} may be a part, or a class as "
                    f"{shorten(sorted(names))}; take it away, or to make it a class give it "
                    "another name"
                )
        return self.classes(place, others, judges), self.validating(judges, names)

    def deeper(self, place: Place, subs: list[Place]) -> Parts:
        """No part here: is each folder a class, or do folders have parts?"""
        parts = {}
        split = []
        flat = True
        for sub in subs:
            parts[sub.base] = self.of_kind(self.subs(sub), "train", "val", "test")
            if 0 < len(self.of_kind(parts[sub.base], "train")) < len(parts[sub.base]):
                split.append(sub)
            flat = flat and not any(map(self.subs, parts[sub.base]))
        if not split:
            return self.classes(place, subs), None
        if len(split) == len(subs) > 1 and flat:
            return self.parts_of_classes(subs, parts)
        if len(split) > 1:
            raise DataError(
                f"{place.path}: {_and(split)} have parts; give one of them, such as {split[0].path}"
            )
        subs.remove(split[0])
        for other in subs:
            self.unused[other.name] = f"beside {split[0].shown}, which has the parts, and not used"
        self.remarks.append(
            f"{split[0].shown} is read; not used beside it: {shorten(_bases(subs))}"
        )
        return self.arranged(split[0])

    def parts_of_classes(self, subs: list[Place], parts: dict[str, list[Place]]) -> Parts:
        """CLASS/train and CLASS/val."""
        train, val, test = (
            {name: self.of_kind(places, kind) for name, places in parts.items()}
            for kind in ("train", "val", "test")
        )
        judges, name = (val, "val") if any(val.values()) else (test, "test")
        check_same_classes(str(self.top.path), train, filter(judges.get, judges))
        self.remarks.append(
            f"each class has parts: its train part is trained on, its {name} part validates"
        )
        used = list(chain(*train.values(), *judges.values()))
        rest = []
        for place in chain.from_iterable(map(self.folders, subs)):
            if place not in used:
                rest.append(place.shown)
                self.unused[place.name] = f"{place.shown} is not used, since {name} validates"
        if rest:
            self.remarks.append(f"not used: {shorten(rest)}")
        return train, judges

    # ---- classes

    def classes(self, place: Place, subs: list[Place], parts: Sequence[Place] = ()) -> Classes:
        """Each of these folders as a class; and told what a user may not have meant. `parts`: what
        else is used.
        """
        empty = [folder.base for folder in self.folders(place) if folder not in [*subs, *parts]]
        if empty:
            self.remarks.append(f"no class, since there is no image in it: {shorten(empty)}")
        alike = list(map(" and ".join, _alike(_bases(subs), str.lower)))
        if alike:
            self.remarks.append(
                f"two classes, though only upper case tells them apart: {shorten(alike)}"
            )
        inside = [inner.name for inner in chain.from_iterable(map(self.subs, subs))]
        judges = [name for name in inside if self.kinds.get(name) in ("val", "test")]
        if judges:
            self.remarks.append(
                f"read as images of the class, though called as a part: {shorten(judges)}"
            )
        if inside:
            self.remarks.append(f"sub-folders are of the class that they lie in: {shorten(inside)}")
        return {sub.base: [sub] for sub in subs}

    def labelled(self, layout: Layout, classes: Classes) -> list[tuple[str, int, Path]]:
        """The images of a part, each file once; what lies beside them in the class folders is left
        out.
        """
        images: list[ImageFile] = []
        labels: dict[str, int] = {}
        for label, places in enumerate(classes.values()):
            for place in places:
                found, left_out = gather(place, self.top.real)
                images += found
                labels |= dict.fromkeys(map(_name, found), label)
                layout.left_out += left_out
        kept, again = each_once(images, self.top.real)
        layout.left_out += again
        return [(image.name, labels[image.name], image.path) for image in kept]

    # ---- everything else

    def account(self, layout: Layout) -> None:
        """Give every file that has no reason yet its own."""
        known = {name for name, _, _ in layout.images}
        known.update(map(_name, layout.left_out))
        # A link to a folder that was followed is known by what is in it.
        known.update(*map(_above, known))
        layout.left_out += map(self.reason, sorted(set(walked(self.top.path)) - known))
        layout.left_out.sort(key=lambda left: (left.why, as_walked(left.name)))

    def reason(self, name: str) -> LeftOut:
        path = self.top.path / name
        if any(map(is_hidden, name.split("/"))):
            return LeftOut(name, HIDDEN, "hidden, or kept by a system")
        unused = next(filter(None, map(self.unused.get, [name, *_above(name)])), None)
        if path.is_dir():
            if not path.is_symlink():
                return LeftOut(name, UNUSED, "cannot be listed")
            real = os.path.realpath(path)
            if leads_back(Place(path, name, real), self.top.real):
                return LeftOut(name, TWICE, f"a link back to {real}, which holds it")
            return LeftOut(name, UNUSED, unused or "a link to a folder without images")
        odd = no_regular_file(path)
        if odd:
            return LeftOut(name, NO_FILE, odd)
        if not is_image(path):
            return LeftOut(name, NO_IMAGE, f"no image by its ending {ending(name)}")
        if unused:
            return LeftOut(name, UNUSED, unused)
        return LeftOut(name, NO_CLASS, "beside the class folders, in none of them")


def _drop_empty(layout: Layout) -> None:
    """A class whose files all belong to another one, through links, is none."""
    there = sorted({label for _, label, _ in layout.images})
    names = [layout.classes[label] for label in there]
    lost = [name for name in layout.classes if name not in names]
    if lost:
        layout.remarks.append(
            f"no class, since all its files are another's, through links: {shorten(lost)}"
        )
    layout.classes = names
    for part in (layout.train, layout.val or []):
        part[:] = [(name, there.index(label), path) for name, label, path in part]


def _above(name: str) -> list[str]:
    """Names of the folders that a file lies in, the nearest first."""
    return [parent.as_posix() for parent in Path(name).parents][:-1]


def _and(places: Sequence[Place]) -> str:
    return " and ".join(map(attrgetter("shown"), places))


def _bases(places: Iterable[Place]) -> list[str]:
    return list(map(_base, places))


def kinds_of(places: Sequence[Place]) -> dict[str, str]:
    """Of folders beside each other, the part that each name stands for; those that stand for none
    are not in it.

    They may have more in common, as chest_xray_train and chest_xray_test have: then the word that
    differs tells.
    """
    found: dict[str, str] = {}
    alike: dict[tuple[str, ...], dict[str, str]] = {}
    for place in places:
        words = re.split(r"[\W_]+", place.base.lower())
        parts = list(filter(_KINDS.get, words))
        if kind := part_of(place.base):
            found[place.name] = kind
        elif len(parts) == 1:
            rest = tuple(word for word in words if word != parts[0])
            alike.setdefault(rest, {})[place.name] = _KINDS[parts[0]]
    groups = [group for group in alike.values() if {"train"} < set(group.values())]
    if len(groups) > 1:
        train, val = list(groups[0])[:2]
        raise DataError(
            f"{places[0].path.parent}: {train}/ and {val}/ may be parts of a class; make "
            "train/CLASS and val/CLASS of them, or to make them classes give them other names"
        )
    return found | groups[0] if groups else found
