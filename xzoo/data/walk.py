"""The files below a folder: which are images, which are left out and why, each once although links
lead to it again.

Left out is what KEPT_BY_SYSTEMS and a leading dot name, what is not an image or not a regular file,
and a file that is reached twice. Which image is of which class and part: folders.py.
"""

import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from ..errors import DataError
from ..files import reason

# What people call images. Pillow reads HEIC only with a plug-in: without it, it is reported.
SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .apng .webp .bmp .dib .gif .tif .tiff .ppm .pgm .pbm .pnm .pfm "
    ".avif .heic .heif "
    ".avifs .jp2 .j2k .j2c .jpc .jpf .jpx .tga .qoi .pcx .sgi .ras .dds .xbm .xpm .mpo".split()
)
# A file without any ending is one if it begins as one. Not so with an ending that is not known:
# camera files and unfinished downloads begin as images, too.
SIGNATURE = re.compile(rb"\xff\xd8\xff|\x89PNG\r\n|GIF8|II\*\0|MM\0\*|RIFF....WEBP", re.DOTALL)

# Copies of images, and their remains, that no user put there: archives, trash cans, thumbnailers,
# versions, disks (compared in lower case). Whatever begins with a dot is of the same kind:
# ._photo.jpg, .DS_Store, .Trash-1000, .thumbnails, .ipynb_checkpoints, .cache, .git. A class may
# well be called "trash" or "thumbnails": those are not here.
KEPT_BY_SYSTEMS = frozenset(
    {
        *("__macosx", "icon\r", "network trash folder", "temporary items"),  # macOS
        # Windows
        *(
            "$recycle.bin",
            "recycler",
            "recycled",
            "system volume information",
            "thumbs.db",
            "ehthumbs.db",
        ),
        *("desktop.ini", "found.000", "lost+found"),
        # network storage
        *("@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "@tmp"),
        *("__pycache__",),
    }
)

# Kinds of reasons, as the line of `xzoo finetune` counts them; more of them in folders.py and
# scan.py.
HIDDEN = "hidden or kept by a system"
NO_IMAGE = "not images"
NO_FILE = "no regular files"
TWICE = "reached twice through links"


@dataclass(frozen=True)
class LeftOut:
    """A file that is not used: its name below DATA, the kind of reason (plural, to be counted), and
    what exactly.
    """

    name: str
    why: str
    detail: str

    def __str__(self) -> str:
        return f"{self.name}\t{self.detail}"


# ---- the files of one folder


@dataclass(frozen=True)
class Place:
    """A folder as it was reached, with its name below DATA ("" for DATA itself) and where it really
    is.
    """

    path: Path
    name: str
    real: str

    @cached_property
    def content(self) -> "Content":
        return _content(self)

    @property
    def base(self) -> str:
        return self.path.name

    @property
    def shown(self) -> str:
        return f"{self.name}/"

    def below(self, name: str) -> str:
        return f"{self.name}/{name}" if self.name else name


@dataclass
class Content:
    """What lies directly in a folder, by name: folders, those reached by a link, images, and what
    is left out.
    """

    folders: list[Place] = field(default_factory=list)
    links: list[Place] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    linked: set[str] = field(default_factory=set)  # those of the images that are links
    left_out: list[LeftOut] = field(default_factory=list)
    hidden: list[Path] = field(default_factory=list)  # folders


def _content(place: Place) -> Content:
    found = Content()
    with os.scandir(place.path) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            name = place.below(entry.name)
            link = entry.is_symlink()
            if is_hidden(entry.name):
                if entry.is_dir(follow_symlinks=False):
                    found.hidden.append(Path(entry.path))
                else:
                    found.left_out.append(LeftOut(name, HIDDEN, "hidden, or kept by a system"))
            elif _is(entry, stat.S_ISDIR):
                path = Path(entry.path)
                real = os.path.realpath(path) if link else os.path.join(place.real, entry.name)
                (found.links if link else found.folders).append(Place(path, name, real))
            elif _is(entry, stat.S_ISREG) or (link and not os.path.exists(entry.path)):
                # A link to nothing is an image that cannot be read, if its name is an image's.
                if is_image(Path(entry.path)):
                    found.images.append(entry.name)
                    if link:
                        found.linked.add(entry.name)
                else:
                    found.left_out.append(
                        LeftOut(name, NO_IMAGE, f"no image by its ending {ending(entry.name)}")
                    )
            else:
                found.left_out.append(
                    LeftOut(name, NO_FILE, no_regular_file(entry.path) or "no regular file")
                )
    return found


def _is(entry: "os.DirEntry[str]", kind: object) -> bool:
    try:
        return entry.is_dir() if kind is stat.S_ISDIR else entry.is_file()
    except OSError:  # a link that leads to itself
        return False


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is left out unseen."""
    return name.startswith(".") or name.lower() in KEPT_BY_SYSTEMS


def is_image(file: Path) -> bool:
    """By its ending; without one, by its first bytes."""
    ending = file.suffix.lower()
    if ending:
        return ending in SUFFIXES
    try:
        with open(file, "rb") as opened:
            return SIGNATURE.match(opened.read(12)) is not None
    except OSError:
        return False


def no_regular_file(path: Path | str) -> str | None:
    """What a path is if it is there and no regular file: opening a named pipe waits for ever. None
    if it is one.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return None
    if stat.S_ISREG(mode):
        return None
    kinds = {
        "a named pipe": stat.S_ISFIFO,
        "a socket": stat.S_ISSOCK,
        "a folder": stat.S_ISDIR,
        "a device": lambda mode: stat.S_ISCHR(mode) or stat.S_ISBLK(mode),
    }
    kind = next((name for name, test in kinds.items() if test(mode)), "something else")
    return f"{kind}, and no regular file"


def ending(name: str) -> str:
    return Path(name).suffix.lower() or "(none)"


# ---- all files below a folder


@dataclass(frozen=True)
class ImageFile:
    """An image file: its name below DATA, its path, and where it really is."""

    name: str
    path: Path
    real: str


def gather(top: Place, root: str) -> tuple[list[ImageFile], list[LeftOut]]:
    """Every image at any depth, through links as well, in text order; and every other file with its
    reason.

    Args:
        root: the real path of DATA; a link to it, or to a folder above it, is not followed.
    Raises: DataError for a folder that cannot be listed: nobody knows how much of a class is in it.
    """
    images: list[ImageFile] = []
    left_out: list[LeftOut] = []
    seen: set[str] = set()
    # Links come last, so that what is reached twice is found under its own name first.
    folders, links = [top], list[Place]()
    while folders or links:
        place = folders.pop() if folders else links.pop(0)
        if place.real in seen or (place is not top and leads_back(place, root)):
            left_out.append(
                LeftOut(place.name, TWICE, f"a link to {place.real}, which is read already")
            )
            continue
        seen.add(place.real)
        content = listed(place)
        for name in content.images:
            path = place.path / name
            real = (
                os.path.realpath(path) if name in content.linked else os.path.join(place.real, name)
            )
            images.append(ImageFile(place.below(name), path, real))
        left_out += content.left_out
        for folder in content.hidden:
            left_out += below(
                folder, place.below(folder.name), HIDDEN, "hidden, or kept by a system"
            )
        folders += content.folders
        links += content.links
    return sorted(images, key=lambda image: as_walked(image.name)), left_out


def leads_back(link: Place, root: str) -> bool:
    """Whether a folder is DATA itself or holds it."""
    return Path(root).is_relative_to(link.real)


def listed(place: Place) -> Content:
    try:
        return place.content
    except OSError as error:
        told = f"{place.path} cannot be listed ({reason(error)})"
        raise DataError(f"{told}; make it readable, or move it out of the data") from error


def below(folder: Path, name: str, why: str, detail: str) -> list[LeftOut]:
    """Every file below a folder that is left out with all that is in it; links are not followed."""
    return [LeftOut(f"{name}/{file}", why, detail) for file in walked(folder)]


def walked(folder: Path) -> list[str]:
    """Names of all files below a folder, and of links to folders and folders that cannot be listed
    as if files.
    """
    names: list[str] = []
    closed: list[str] = []
    for at, folders, files in os.walk(
        folder, onerror=lambda error: closed.append(str(error.filename))
    ):
        start = Path(at).relative_to(folder).as_posix()
        links = [name for name in folders if os.path.islink(os.path.join(at, name))]
        names += [name if start == "." else f"{start}/{name}" for name in sorted(files + links)]
    return names + [Path(path).relative_to(folder).as_posix() for path in closed]


def as_walked(name: str) -> list[tuple[bool, str]]:
    """Sorts as os.walk goes: the files of a folder, then its folders. Fingerprints of runs hang on
    this order.
    """
    *folders, file = name.split("/")
    return [*((True, folder) for folder in folders), (False, file)]


def each_once(images: Sequence[ImageFile], root: str) -> tuple[list[ImageFile], list[LeftOut]]:
    """Without further names of the same file, which links give it; where it has a name of its own,
    that stays.
    """
    own = [image for image in images if image.real == os.path.join(root, image.name)]
    first: dict[str, str] = {}
    for image in [*own, *images]:
        first.setdefault(image.real, image.name)
    kept = [image for image in images if first[image.real] == image.name]
    again = [image for image in images if first[image.real] != image.name]
    return kept, [
        LeftOut(image.name, TWICE, f"the same file as {first[image.real]}") for image in again
    ]


def image_files(folder: Path) -> list[Path]:
    """Every image at any depth, in text order; also what is called one and is not a regular file.
    Raises: as `gather`.
    """
    real = os.path.realpath(folder)
    images, left_out = gather(Place(folder, "", real), real)
    odd = [
        folder / left.name for left in left_out if left.why == NO_FILE and is_image(Path(left.name))
    ]
    return [image.path for image in images] + odd


def refuse_within(run: Path, data: Path) -> None:
    """Raise DataError where a run would write among the images of a folder, or replace them."""
    if not os.path.isdir(data):
        return
    top = Place(data, "", os.path.realpath(data))
    above = Path(os.path.realpath(run))
    if not {str(folder) for folder in (above, *above.parents)}.isdisjoint(_all_real(top)):
        raise DataError(
            f"{run} is in the data, {data}: a run would write among the images; choose another "
            "--out"
        )
    for made in ("model", "checkpoints"):
        if Path(top.real).is_relative_to(above / made):
            raise DataError(
                f"{data} is where the run {run} writes its {made}; choose another --out"
            )


def _all_real(top: Place) -> set[str]:
    """Where the folder and all below it really are, through links as well."""
    seen: set[str] = set()
    waiting = [top]
    while waiting:
        place = waiting.pop()
        if place.real not in seen and (place is top or not leads_back(place, top.real)):
            seen.add(place.real)
            waiting += listed(place).folders + listed(place).links
    return seen


def files_that_end_in(root: Path, ending: str) -> list[Path]:
    """Files at any depth that no system keeps for itself, in text order."""
    names = [name for name in walked(root) if name.lower().endswith(ending)]
    return sorted(
        root / name for name in names if not any(is_hidden(part) for part in name.split("/"))
    )


def has_images(top: Place, root: str) -> bool:
    """Whether there is an image at any depth, through links too."""
    seen: set[str] = set()
    waiting = [top]
    while waiting:
        place = waiting.pop()
        if place.real in seen or leads_back(place, root):
            continue
        seen.add(place.real)
        content = listed(place)
        if content.images:
            return True
        waiting += content.folders + content.links
    return False
