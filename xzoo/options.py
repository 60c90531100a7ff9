"""What a parser of options complains of, in one line with the nearest name.

jsonargparse tells the truth in many lines, one for each type that a value might have been. Needs
nothing but the standard library, so that the command line starts quickly.
"""

import difflib
import inspect
import pydoc
import re
from collections.abc import Collection, Iterable


def nearest(name: str, known: Iterable[str]) -> str:
    """The hint after an unknown name: those like it, or all if there are few."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"there are {', '.join(known)}" if len(known) <= 30 else "--help tells them"


def explain(message: str, options: Collection[str], classes: Collection[str] = ()) -> str:
    """jsonargparse's message in one line.

    Args:
        options: all that the parser knows, such as "--model.lr".
        classes: short names of classes that a value may name.
    """
    if unknown := re.search(r"unrecognized arguments: (\S+)", message, re.IGNORECASE):
        name = unknown[1].partition("=")[0]
        if name[0] != "-":
            return f"unexpected argument {name}; options begin with --"
        return f"unknown option {name}; {nearest(name, options)}"
    class_path = re.search(r"given class_path '([\w.]+)'", message)
    if unknown := re.search(r"Option '([\w.]+)' is not accepted", message):
        known = _arguments(class_path[1]) if class_path else [option[2:] for option in options]
        of = f"{class_path[1].rpartition('.')[2]} has no option" if class_path else "unknown key"
        return f"{of} {unknown[1]}; {nearest(unknown[1], known)}"
    if unknown := re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message):
        known = [
            option[len(unknown[1]) + 3 :]
            for option in options
            if option.startswith(f"--{unknown[1]}.")
        ]
        return f"{unknown[1]} has no option {unknown[2]}; {nearest(unknown[2], known)}"
    if unknown := re.search(r"Expected a dot import path string: (\S+)", message):
        return f"no class is called {unknown[1]}; {nearest(unknown[1], classes)}"
    return _of_value(message) or " ".join(message.split())


def _of_value(message: str) -> str | None:
    """A value of a wrong type: its key, what it was, and what is expected there."""
    keys = re.findall(r'key "([^"]+)"', message)
    value = re.search(r"Got value: (.*)", message) or re.search(r"Given value: (.*)", message)
    wanted = message.split("Given value type")[0].split("Subtypes:")[-1]
    if len(keys) > 1:  # a value inside of a class's arguments
        wanted = message[message.rindex(f'"{keys[-1]}"') :]
    wanted = wanted.split("Got value")[0]
    expected = [name for name in re.findall(r"<class '([\w.]+)'>", wanted) if name != "NoneType"]
    for listed in re.findall(r"Literal\[([^\]]*)\]", wanted):
        expected += [name.strip(" '") for name in listed.split(",")]
    if not (keys and value and expected):
        return None
    return f"{'.'.join(keys)}={value[1].strip()}: expected {' or '.join(dict.fromkeys(expected))}"


def _arguments(class_path: str) -> list[str]:
    found = pydoc.locate(class_path)
    return (
        [name for name in inspect.signature(found).parameters if name != "self"]
        if callable(found)
        else []
    )
