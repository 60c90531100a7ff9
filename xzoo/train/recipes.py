"""Recipes by composition: a name is a data set, a model and settings.

    cifar10/x_vgg16_2+group+air    recipes/cifar10.yaml, settings/group.yaml, settings/air.yaml

Later files win, key by key. A user's recipe is a YAML file that may name another as its base:

    base: cifar10/x_vgg16_2+air    # or a file beside it; read first
    trainer: {max_epochs: 30}

Not here: what the keys mean (fit.py, and the docstrings of what is built).
"""

import functools
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from ..errors import XzooError
from ..files import reason, write_text
from ..models import list_models
from ..names import to_yaml
from ..options import nearest, similar

HARDWARE = "hardware"  # the folder of files that say where a recipe runs, not what it computes

# Packages whose classes a recipe may name.
TRUSTED = ("xzoo", "torch", "timm", "pytorch_lightning", "lightning")


@dataclass(frozen=True)
class Part:
    """The file of a data set or of a setting. Patterns are those of `fnmatch`.

    Attributes:
        kind: what a setting sets, "graph" or "training"; a recipe has at most one of each kind.
        fits: what it is for: models for a data set, data set/model for a setting.
        excluded: exceptions from `fits`.
        always: what has this setting by default.
        content: in the keys of a recipe.
        where: more content for those that match a pattern, in this order.
        notes: the comment at its head.
    """

    name: str
    kind: str
    fits: tuple[str, ...]
    excluded: tuple[str, ...]
    always: tuple[str, ...]
    content: dict[str, Any]
    where: dict[str, dict[str, Any]]
    notes: str

    def fits_to(self, name: str) -> bool:
        return _matches(name, self.fits) and not _matches(name, self.excluded)

    def is_always_in(self, name: str) -> bool:
        return _matches(name, self.always)

    def of(self, name: str) -> dict[str, Any]:
        """The content for this name."""
        content = self.content
        for pattern, more in self.where.items():
            if fnmatchcase(name, pattern):
                content = merged(content, more)
        return content


@dataclass(frozen=True)
class Settings:
    """The content of a user's file, or (without a path) of all files that a name is composed of."""

    path: Path | None
    content: dict[str, Any]
    notes: str  # the comments at the head


@dataclass(frozen=True)
class Recipe:
    """What is trained and how.

    Attributes:
        name: such as "cifar10/x_vgg16_2+group+air"; the stem of a user's file.
        run: the name of its run folder. Old names keep the old ones, so that their runs continue.
        layers: later ones win, key by key; a file also has one for each base.
    """

    name: str
    run: str
    layers: tuple[Settings, ...]


def folder() -> Path:
    """The recipes of this installation: inside the wheel, or beside the package in a checkout."""
    package = Path(__file__).parents[1]
    return package / "recipes" if (package / "recipes").is_dir() else package.parent / "recipes"


# ---- the product


@functools.cache
def data_sets() -> dict[str, Part]:
    return _by_name(map(_part, sorted(folder().glob("*.yaml"))))


@functools.cache
def settings() -> dict[str, Part]:
    """By kind, and then by name: their order in the name of a recipe."""
    parts = map(_part, folder().glob("settings/*.yaml"))
    return _by_name(sorted(parts, key=lambda part: (part.kind, part.name)))


def _by_name(parts: Iterable[Part]) -> dict[str, Part]:
    return {part.name: part for part in parts}


@functools.cache
def plain_names() -> tuple[str, ...]:
    """Those without a setting, such as "cifar10/x_vgg16_2"."""
    found = []
    for name, part in data_sets().items():
        found += [f"{name}/{model}" for model in filter(part.fits_to, list_models("x_*"))]
    return tuple(found)


def settings_of(plain_name: str) -> list[Part]:
    """The settings that can be added to a name."""
    taken = {part.kind for part in settings().values() if part.is_always_in(plain_name)}
    return [part for part in _fitting(plain_name) if part.kind not in taken]


def _fitting(plain_name: str) -> list[Part]:
    return [part for part in settings().values() if part.fits_to(plain_name)]


@functools.cache
def names() -> tuple[str, ...]:
    """All names, such as "cifar10/x_vgg16_2+group+air"."""
    found: list[str] = []
    for name in plain_names():
        choices: dict[str, list[str]] = {}
        for part in settings_of(name):
            choices.setdefault(part.kind, [""]).append(f"+{part.name}")
        found += map("".join, itertools.product([name], *choices.values()))
    return tuple(found)


def compose(name: str) -> Recipe:
    """The recipe of a name, of today or from when it was a file ("cifar10/x_vgg16_2_short").

    Raises: XzooError with the nearest names.
    """
    short = _short(name)
    today = _today(short)
    plain_name, *asked = today.split("+")
    data_set, _, model = plain_name.partition("/")
    if plain_name not in plain_names():
        same = [known for known in plain_names() if known.startswith(f"{data_set}/")]
        raise XzooError(f"there is no recipe {name}; {hint(plain_name, same or plain_names())}")
    content = merged(data_sets()[data_set].of(model), {"model": {"name": model}})
    canonical, notes = plain_name, data_sets()[data_set].notes
    for part in _chosen(name, plain_name, asked):
        content = merged(content, part.of(plain_name))
        notes += f"\n{part.notes}"
        if not part.is_always_in(plain_name):
            canonical += f"+{part.name}"
    run = canonical if today == short else short
    return Recipe(canonical, run.replace("/", "-"), (Settings(None, content, notes),))


def _chosen(name: str, plain_name: str, asked: Sequence[str]) -> list[Part]:
    """The settings that are always there and those that were asked for, in their order."""
    fitting = _by_name(_fitting(plain_name))
    chosen = {part.kind: part for part in fitting.values() if part.is_always_in(plain_name)}
    for setting in asked:
        if setting not in settings():
            near = nearest(setting, fitting)
            raise XzooError(f"there is no recipe {name}: no setting is called {setting}; {near}")
        part = settings()[setting]
        other = chosen.setdefault(part.kind, part)
        if other is not part:
            raise XzooError(
                f"{name}: {other.name} and {setting} both set the {part.kind}; take one"
            )
        if setting not in fitting:
            raise XzooError(
                f"there is no recipe {name}: {setting} is not for {plain_name}; there are "
                f"{', '.join(fitting)}"
            )
    return [chosen[kind] for kind in sorted(chosen)]


def _today(short: str) -> str:
    """Today's name of an old one ("cifar10/x_vgg16_2_group_air"); any other as it is."""
    data_set, slash, rest = short.partition("/")
    known = "|".join(map(re.escape, settings()))
    while "+" not in short and (old := re.fullmatch(rf"(\w+)_({known})((?:\+\w+)*)", rest)):
        rest = f"{old[1]}+{old[2]}{old[3]}"
    # The dense twin of four MobileNets is one network, which had a name of its own.
    rest = re.sub(r"^x_mobilenet050(?=\+dense(\+|$))", "x_mobilenet050_c2", rest)
    return data_set + slash + rest


def _short(name: str) -> str:
    return name.removeprefix("recipes/").removesuffix(".yaml")


def hint(name: str, known: Sequence[str]) -> str:
    """What to say of a name that is not known: those like it, or where they are listed."""
    return similar(name, known, "`xzoo recipes` lists them")


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def merged(content: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Both, key by key, and `more` where they differ."""
    both = dict(content)
    for key, value in more.items():
        old = both.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            value = merged(old, value)
        both[key] = value
    return both


# ---- files


def find(name: str) -> Recipe:
    """A recipe by its name, or by the path of its file.

    Raises: XzooError with the nearest names; for a file that is not a YAML mapping, a base that is
        missing, or a circle of bases.
    """
    short = _short(name)
    ours = folder() / f"{short}.yaml"
    file = Path(name).expanduser()
    if not file.is_file():
        if not short.startswith(f"{HARDWARE}/"):
            return compose(name)
        if not ours.is_file():
            raise XzooError(f"there is no recipe {name}; {hint(short, hardware())}")
        file = ours
    return Recipe(file.stem, file.stem, _layers(file))


def hardware() -> list[str]:
    return sorted(f"{HARDWARE}/{path.stem}" for path in folder().glob(f"{HARDWARE}/*.yaml"))


def _layers(file: Path, above: tuple[Path, ...] = ()) -> tuple[Settings, ...]:
    """What a file says, after what its bases say; `above` has the files that it is a base of."""
    if file.resolve() in map(Path.resolve, above):
        raise XzooError(f"{above[-1]}: its base {file.name} is based on it in turn")
    content = read(file)
    base = content.pop("base", None)
    layer = Settings(file, content, head(file))
    if base is None:
        return (layer,)
    if (file.parent / str(base)).is_file():
        return (*_layers(file.parent / str(base), (*above, file)), layer)
    try:
        return (*compose(str(base)).layers, layer)
    except XzooError as error:
        raise XzooError(f"{file}: its base {base} is not beside it; {error}") from None


def read(path: Path) -> dict[str, Any]:
    """What a file says. Raises: XzooError if it is not a YAML mapping."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise XzooError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise XzooError(f"{path} is not a recipe: it has no keys")
    return content


def head(path: Path) -> str:
    """The comment at the head of a file, without its signs: the first line says what it is."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = itertools.takewhile(lambda line: line.startswith("#"), lines)
    return "\n".join(line.removeprefix("#").strip() for line in comment)


def _part(path: Path) -> Part:
    content = read(path)
    return Part(
        name=path.stem,
        kind=content.pop("kind", ""),
        fits=tuple(content.pop("for")),
        excluded=tuple(content.pop("except", ())),
        always=tuple(content.pop("always", ())),
        where=content.pop("where", {}),
        content=content,
        notes=head(path),
    )


def text(layer: Settings) -> str:
    """A file that says the same."""
    if layer.path is not None:
        return layer.path.read_text(encoding="utf-8")
    comment = "".join(f"# {line}".rstrip() + "\n" for line in layer.notes.splitlines())
    return comment + to_yaml(layer.content)


def copy(name: str, to: Path | str) -> list[Path]:
    """Write a recipe as one file into a folder, to be changed there; a file with those it is based
    on.

    Raises: XzooError if there is no such recipe, another file of that name is there, or it cannot
        be written.
    """
    recipe, to = find(name), Path(to)
    file_name = f"{recipe.name.rpartition('/')[2]}.yaml"
    try:
        files = {to / layer.path.name: text(layer) for layer in recipe.layers if layer.path}
        files = files or {to / file_name: text(recipe.layers[0])}
        for file, content in files.items():
            same = file.is_file() and file.read_text(encoding="utf-8") == content
            if file.exists() and not same:
                raise XzooError(f"{file} exists and is another file; choose another folder")
        to.mkdir(parents=True, exist_ok=True)
        for file, content in files.items():
            write_text(file, content)
    except OSError as error:
        raise XzooError(f"cannot copy to {to}: {reason(error)}") from error
    return list(files)


# ---- trust


def check_trusted(recipe: Recipe) -> None:
    """Raise XzooError for a recipe that runs code other than xzoo's, torch's, timm's or
    Lightning's.

    A recipe that came with a model is data, but its parser imports what class or function it names.
    """
    for layer in recipe.layers:
        name = layer.path or recipe.name
        for section in ("data", "model", "trainer"):
            value = layer.content.get(section)
            if isinstance(value, str) and re.search(r"[./\\]", value):  # a class, or a file of one
                raise XzooError(
                    f"{name}: {section} is {value!r}, not written out; add --trust if you trust "
                    "that file"
                )
            for key, named in _texts(value):
                if key == "root" or (section, key) == ("model", "name"):
                    continue
                dotted = re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", named)
                if dotted and named.partition(".")[0] not in TRUSTED:
                    raise XzooError(
                        f"{name}: {key} is {named!r}, code of others; add --trust if you trust "
                        "that file"
                    )


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
