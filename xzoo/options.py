"""What a parser of options complains of, in one line with the nearest name.

jsonargparse's own messages have many lines, one for each type that a value might have been. Needs
nothing but the standard library, so that the command line starts quickly.
"""

import difflib
import inspect
import pydoc
import re
from argparse import ArgumentParser
from collections.abc import Collection, Iterable


def similar(name: str, known: Iterable[str], otherwise: str) -> str:
    """The hint after an unknown name: up to three names like it, or `otherwise`."""
    near = difflib.get_close_matches(name, list(known), n=3)
    return f"did you mean {' or '.join(near)}?" if near else otherwise


def nearest(name: str, known: Iterable[str]) -> str:
    """The hint after an unknown name: those like it, or all if there are few."""
    known = list(known)
    listed = f"there are {', '.join(known)}" if len(known) <= 30 else "--help lists them"
    return similar(name, known, listed)


def option_names(parser: ArgumentParser) -> list[str]:
    """All long options of a parser, such as "--model.lr"."""
    return [name for name in parser._option_string_actions if name.startswith("--")]


def explain(message: str, options: Collection[str], classes: Collection[str] = ()) -> str:
    """jsonargparse's message in one line.

    Args:
        options: all that the parser knows, such as "--model.lr".
        classes: short names of classes that a value may name.
    """
    if unknown := re.search(r"unrecognized arguments: ([^\s=]+)", message, re.IGNORECASE):
        if unknown[1][0] != "-":
            return f"unexpected argument {unknown[1]}; options begin with --"
        return f"unknown option {unknown[1]}; {nearest(unknown[1], options)}"
    keys = [option.removeprefix("--") for option in options]
    class_path = re.search(r"given class_path '([\w.]+)'", message)
    if unknown := re.search(r"Option '([\w.]+)' is not accepted", message):
        kind = pydoc.locate(class_path[1]) if class_path else None
        known = list(inspect.signature(kind).parameters) if callable(kind) else keys
        of = f"{class_path[1].rpartition('.')[2]} has no option" if class_path else "unknown key"
        return f"{of} {unknown[1]}; {nearest(unknown[1], known)}"
    if unknown := re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message):
        start = f"{unknown[1]}."
        known = [key.removeprefix(start) for key in keys if key.startswith(start)]
        return f"{unknown[1]} has no option {unknown[2]}; {nearest(unknown[2], known)}"
    if unknown := re.search(r"Expected a dot import path string: (\S+)", message):
        return f"no class is called {unknown[1]}; {nearest(unknown[1], classes)}"
    return _of_value(message) or " ".join(message.split())


def _of_value(message: str) -> str | None:
    """A value of a wrong type: its key, what it was, and what is expected there."""
    keys = re.findall(r'key "([^"]+)"', message)
    value = re.search(r"Got value: (.*)", message) or re.search(r"Given value: (.*)", message)
    types = message.split("Given value type")[0].split("Subtypes:")[-1]
    if len(keys) > 1:  # a value inside of a class's arguments
        types = message[message.rindex(f'"{keys[-1]}"') :]
    types = types.split("Got value")[0]
    expected = re.findall(r"<class '(?!NoneType')([\w.]+)'>", types)
    for listed in re.findall(r"Literal\[([^\]]*)\]", types):
        expected += listed.replace("'", "").split(", ")
    if not (keys and value and expected):
        return None
    return f"{'.'.join(keys)}={value[1].strip()}: expected {' or '.join(dict.fromkeys(expected))}"
