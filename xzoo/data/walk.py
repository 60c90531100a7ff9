"""The files below a folder: which are images, which are left out and why, each once although links
lead to it again.

Left out is what KEPT_BY_SYSTEMS and a leading dot name, what is not an image or not a regular file,
and a file that is reached twice. Which image is of which class and part: folders.py.
"""

import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter
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
    images: list["ImageFile"] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    hidden: list[Path] = field(default_factory=list)  # folders


def _content(place: Place) -> Content:
    found = Content()
    with os.scandir(place.path) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            name, path = place.below(entry.name), Path(entry.path)
            link, mode = entry.is_symlink(), _mode(path)
            real = os.path.realpath(path) if link else os.path.join(place.real, entry.name)
            if is_hidden(entry.name):
                if entry.is_dir(follow_symlinks=False):
                    found.hidden.append(path)
                else:
                    found.left_out.append(LeftOut(name, HIDDEN, "hidden, or kept by a system"))
            elif stat.S_ISDIR(mode):
                (found.links if link else found.folders).append(Place(path, name, real))
            elif mode and not stat.S_ISREG(mode):
                found.left_out.append(LeftOut(name, NO_FILE, str(no_regular_file(path))))
            # A link to nothing is an image that cannot be read, if its name is an image's.
            elif not is_image(path):
                detail = f"no image by its ending {ending(entry.name)}"
                found.left_out.append(LeftOut(name, NO_IMAGE, detail))
            else:
                found.images.append(ImageFile(name, path, real))
    return found


def _mode(path: Path | str) -> int:
    """As of os.stat; 0 for what is not there, such as the end of a link that leads nowhere."""
    try:
        return os.stat(path).st_mode
    except OSError:
        return 0


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
    mode = _mode(path)
    if not mode or stat.S_ISREG(mode):
        return None
    kinds = {
        "p": "a named pipe",
        "s": "a socket",
        "d": "a folder",
        "c": "a device",
        "b": "a device",
    }
    return f"{kinds.get(stat.filemode(mode)[0], 'something else')}, and no regular file"


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
    again: list[Place] = []
    for place in _reached(top, root, again):
        images += listed(place).images
        left_out += listed(place).left_out
        for folder in listed(place).hidden:
            for file in walked(folder):
                name = f"{place.below(folder.name)}/{file}"
                left_out.append(LeftOut(name, HIDDEN, "hidden, or kept by a system"))
    for place in again:
        detail = f"a link to {place.real}, which is read already"
        left_out.append(LeftOut(place.name, TWICE, detail))
    return sorted(images, key=lambda image: as_walked(image.name)), left_out


def _reached(top: Place, root: str, again: list[Place]) -> Iterator[Place]:
    """Every folder from `top` down, through links as well, each once; `again` gets the links that
    lead to one of them once more, to DATA or above it.
    """
    seen: set[str] = set()
    # Links come last, so that what is reached twice is found under its own name first.
    folders, links = [top], list[Place]()
    while folders or links:
        place = folders.pop() if folders else links.pop(0)
        if place.real in seen or (place is not top and leads_back(place, root)):
            again.append(place)
            continue
        seen.add(place.real)
        yield place
        folders += listed(place).folders
        links += listed(place).links


def leads_back(link: Place, root: str) -> bool:
    """Whether a folder is DATA itself or holds it."""
    return Path(root).is_relative_to(link.real)


def listed(place: Place) -> Content:
    try:
        return place.content
    except OSError as error:
        told = f"{place.path} cannot be listed ({reason(error)})"
        raise DataError(f"{told}; make it readable, or move it out of the data") from error


def walked(folder: Path) -> list[str]:
    """Names of all files below a folder, and of links to folders and folders that cannot be listed
    as if files.
    """
    paths: list[str] = []
    for at, folders, files in os.walk(folder, onerror=lambda error: paths.append(error.filename)):
        links = [name for name in folders if os.path.islink(os.path.join(at, name))]
        paths.extend(os.path.join(at, name) for name in sorted(files + links))
    return [Path(path).relative_to(folder).as_posix() for path in paths]


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

    first: dict[str, str] = {}
    for image in sorted(images, key=lambda image: image.real != os.path.join(root, image.name)):
        first.setdefault(image.real, image.name)
    kept, again = [], []
    for image in images:
        if first[image.real] == image.name:
            kept.append(image)
        else:
            detail = f"the same file as {first[image.real]}"
            again.append(LeftOut(image.name, TWICE, detail))
    return kept, again


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
    read = map(attrgetter("real"), _reached(top, top.real, []))
    if not set(map(str, (above, *above.parents))).isdisjoint(read):
        raise DataError(
            f"{run} is in the data, {data}: a run would write among the images; choose another "
            "--out"
        )
    for made in ("model", "checkpoints"):
        if Path(top.real).is_relative_to(above / made):
            raise DataError(
                f"{data} is where the run {run} writes its {made}; choose another --out"
            )


def files_that_end_in(root: Path, ending: str) -> list[Path]:
    """Files at any depth that no system keeps for itself, in text order."""
    names = [name for name in walked(root) if name.lower().endswith(ending)]
    return sorted(
        root / name for name in names if not any(is_hidden(part) for part in name.split("/"))
    )


def has_images(top: Place, root: str) -> bool:
    """Whether there is an image at any depth, through links too."""
    return any(listed(place).images for place in _reached(top, root, []))
