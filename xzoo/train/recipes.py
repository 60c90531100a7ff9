"""Finding recipes: YAML files for `xzoo fit`, each saying only what differs from the one that it names as its base.

    base: x_vgg16_2.yaml          # of the same folder; read first
    model: {compression: 1}       # the dense twin, under the same recipe

Not here: what the keys mean (fit.py, and the docstrings of what is built).
"""

import difflib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ..errors import XzooError
from ..files import reason

HARDWARE = "hardware"  # the folder of files that say where a recipe runs, not what it computes

TRUSTED = ("xzoo", "torch", "timm", "pytorch_lightning", "lightning")  # packages whose classes a recipe may name


def folder() -> Path:
    """The recipes of this installation: inside the wheel, or beside the package in a checkout."""
    package = Path(__file__).parents[1]
    return package / "recipes" if (package / "recipes").is_dir() else package.parent / "recipes"


def names() -> list[str]:
    """Of the installation's recipes, such as "cifar10/x_vgg16_2"; bases that train nothing are left out."""
    files = (path.relative_to(folder()).with_suffix("") for path in folder().rglob("*.yaml"))
    return sorted(path.as_posix() for path in files if not path.name.startswith("base"))


def find(name: str) -> Path:
    """The file of a recipe: a path, or a name ("cifar10/x_vgg16_2") among the installation's own.

    Raises: XzooError with the nearest names.
    """
    short = name.removeprefix("recipes/").removesuffix(".yaml")
    for path in (Path(name).expanduser(), folder() / f"{short}.yaml"):
        if path.is_file():
            return path
    near = difflib.get_close_matches(short, names(), n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "`xzoo recipes` lists them"
    raise XzooError(f"there is no recipe {name}; {hint}")


def title(path: Path) -> str:
    """The first comment line of a recipe: what it trains, on what."""
    first = path.read_text(encoding="utf-8").split("\n", 1)[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def chain(path: Path) -> list[Path]:
    """The recipe and its bases, in the order in which they are read: the recipe last.

    Raises: XzooError for a file that is no YAML mapping, a base that is missing, or a circle.
    """
    found = [path]
    while base := _content(found[0]).get("base"):
        first = found[0].parent / str(base)
        if not first.is_file():
            raise XzooError(f"{found[0]}: its base {base} is not beside it; copy it too (`xzoo recipes copy NAME`)")
        if first.resolve() in [path.resolve() for path in found]:
            raise XzooError(f"{found[0]}: its base {base} is based on it in turn")
        found.insert(0, first)
    return found


def check_trusted(path: Path) -> None:
    """Raise XzooError for a recipe that runs other code than xzoo's, torch's, timm's or Lightning's.

    A recipe that came with a model is data, but its parser imports whatever class or function it names.
    """
    content = _content(path)
    for section in ("data", "model", "trainer"):
        value = content.get(section)
        if isinstance(value, str) and re.search(r"[./\\]", value):  # a class, or a file that names one
            raise XzooError(f"{path}: {section} is {value!r}, not written out; add --trust if you trust that file")
        for key, text in _texts(value):
            dotted = re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", text) and text.partition(".")[0] not in TRUSTED
            if dotted and key != "root" and (section, key) != ("model", "name"):
                raise XzooError(f"{path}: {key} is {text!r}, code of others; add --trust if you trust that file")


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """All texts in nested dictionaries and lists, with the nearest key."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _texts(inner, str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner, key)


def copy(name: str, to: Path | str) -> list[Path]:
    """Copy a recipe and its bases into a folder, to be changed there; returns the new files.

    Raises: XzooError if there is no such recipe, a file of that name is there and differs, or it cannot be written.
    """
    files, to = chain(find(name)), Path(to)
    for file in files:
        there = to / file.name
        if there.exists() and (not there.is_file() or there.read_bytes() != file.read_bytes()):
            raise XzooError(f"{there} exists and is another file; choose another folder")
    try:
        to.mkdir(parents=True, exist_ok=True)
        return [Path(shutil.copyfile(file, to / file.name)) for file in files]
    except shutil.SameFileError:
        raise XzooError(f"{to} is where {name} stands; choose another folder") from None
    except OSError as error:
        raise XzooError(f"cannot copy to {to}: {reason(error)}") from error


def _content(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise XzooError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise XzooError(f"{path} is no recipe: it has no keys")
    return content
