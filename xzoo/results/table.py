"""A CSV table whose columns are the fields of a dataclass: every value checked, rows only ever
appended.

The fields are texts, whole numbers, numbers and truth values, or any of these `| None` for one that
may be empty. A row's own conditions stand in its `__post_init__`; an error there names the column,
here the line.
"""

import csv
import difflib
import io
import math
import os
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock

from ..errors import XzooError
from ..files import atomic, reason

T = TypeVar("T")

_KINDS: dict[type, str] = {
    str: "text",
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
}


def columns(table: type) -> dict[str, tuple[type, bool]]:
    """Name -> (type, whether it may be empty)."""
    found = {}
    for name, hint in typing.get_type_hints(table).items():
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        found[name] = (options[0], type(None) in options)
    return found


# ---- conditions


def check_types(row: Any) -> None:
    """Raise XzooError unless every field has its type; texts are one line, numbers finite."""
    for name, (kind, optional) in columns(type(row)).items():
        value = getattr(row, name)
        if value is None and optional:
            continue
        fits = isinstance(value, bool) == (kind is bool) and isinstance(
            value, (int, float) if kind is float else kind
        )
        if not fits or (kind is float and not math.isfinite(value)):
            raise XzooError(f"column {name}: {value!r} is not {_KINDS[kind]}")
        if kind is str and (not value or value != value.strip() or not value.isprintable()):
            raise XzooError(
                f"column {name}: {value!r}; a text is one line, not empty, without spaces at its "
                "ends"
            )


def refuse(name: str, value: Any, wrong: bool, allowed: str) -> None:
    """Raise XzooError if `wrong`, telling what is allowed."""
    if wrong:
        raise XzooError(f"column {name}: {value!r}; it is {allowed}")


def check_known(name: str, value: str, known: Iterable[str]) -> None:
    names = list(known)
    near = difflib.get_close_matches(value, names, n=1)
    hint = f"one of {', '.join(names)}" + (f"; did you mean {near[0]}?" if near else "")
    refuse(name, value, value not in names, hint)


# ---- the file


def read(path: Path, table: type[T], key: Callable[[T], Any] = id) -> list[T]:
    """All rows, in their order.

    Args:
        key: what no two rows have in common.
    Raises: XzooError for a file that cannot be read or is no such table, naming line and column.
    """
    try:
        return _parse(path.read_bytes(), path, table, key)
    except OSError as error:
        raise XzooError(f"cannot read {path}: {reason(error)}") from error


def append(path: Path, row: T, key: Callable[[T], Any] = id) -> bool:
    """Write the row after all others; make the table if there is none.

    One process at a time, which writes the file anew and puts it in the place of the old one:
    nobody sees half a row, and a write that fails changes nothing. Beside the table stays the file
    that is locked. Returns: False if the table has this very row already. Raises: XzooError if
    another row has the same key, or the table is malformed or cannot be written.
    """
    path = Path(os.path.realpath(path))  # of a link, the file
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):
            held = path.read_bytes() if path.exists() else b""
            for number, old in enumerate(_parse(held, path, type(row), key) if held else [], 2):
                if old == row:
                    return False
                if key(old) == key(row):
                    raise XzooError(
                        f"{path}, line {number}, tells of the same run with "
                        f"{_differences(old, row)}; rows are never "
                        "replaced: commit what changed since, or run another seed"
                    )
            head = "" if held else header(type(row))
            with atomic(path) as draft:
                draft.write_bytes(held + (head + _line(_texts(row))).encode())
    except OSError as error:
        raise XzooError(
            f"cannot write {path}: {reason(error)}; the rows that it had are kept"
        ) from error
    return True


def header(table: type) -> str:
    """The first line of the file."""
    return _line(list(columns(table)))


def _parse(content: bytes, path: Path, table: type[T], key: Callable[[T], Any]) -> list[T]:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        number = content[: error.start].count(b"\n") + 1
        raise XzooError(
            f"{path}, line {number}: byte {content[error.start]:#x} is not UTF-8"
        ) from None
    lines = text.splitlines()
    if not lines:
        raise XzooError(
            f"{path} is empty; its first line must name the columns: {', '.join(columns(table))}"
        )
    if not text.endswith("\n"):
        raise XzooError(
            f"{path}, line {len(lines)}, is cut short: remove it, and append its row again"
        )
    _check_header(next(csv.reader(lines[:1]), []), list(columns(table)), path)
    rows: list[T] = []
    seen: dict[Any, int] = {}
    for number, line in enumerate(lines[1:], 2):
        try:
            row = _from_line(line, table)
            if seen.setdefault(key(row), number) != number:
                raise XzooError(
                    f"tells of the run of line {seen[key(row)]} again; keep one of them"
                )
        except (XzooError, csv.Error) as error:
            raise XzooError(f"{path}, line {number}: {error}") from None
        rows.append(row)
    return rows


def _check_header(found: list[str], wanted: list[str], path: Path) -> None:
    if found == wanted:
        return
    what = f"{len(found)} columns for {len(wanted)}"
    for place, (have, want) in enumerate(zip(found, wanted, strict=False), 1):
        if have != want:
            what = f"column {place} is {have!r} and must be {want!r}"
            break
    raise XzooError(f"{path}, line 1: {what}; the columns are {', '.join(wanted)}")


def _from_line(line: str, table: type[T]) -> T:
    names = columns(table)
    texts = next(csv.reader([line], strict=True), [])
    if len(texts) != len(names):
        raise XzooError(f"{len(texts)} values for {len(names)} columns")
    return table(
        **{name: _value(name, text, *names[name]) for name, text in zip(names, texts, strict=True)}
    )


def _value(name: str, text: str, kind: type, optional: bool) -> Any:
    if not text and optional:
        return None
    if kind is str:
        return text
    # Python reads more than a number as one: "1_000", " 7".
    with suppress(KeyError, ValueError):
        if "_" not in text and text == text.strip():
            return {"true": True, "false": False}[text] if kind is bool else kind(text)
    raise XzooError(f"column {name}: {text!r} is not {_KINDS[kind]}")


def _texts(row: Any) -> list[str]:
    texts = []
    for name in columns(type(row)):
        value = getattr(row, name)
        if value is None:
            value = ""
        texts.append(str(value).lower() if isinstance(value, bool) else str(value))
    return texts


def _differences(old: Any, new: Any) -> str:
    pairs = ((name, getattr(old, name), getattr(new, name)) for name in columns(type(old)))
    return ", ".join(f"{name}={a!r} where this has {b!r}" for name, a, b in pairs if a != b)


def _line(texts: Sequence[str]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(texts)
    return line.getvalue()
