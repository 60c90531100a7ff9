"""What a rule of `auto` says, and the file of the one that `xzoo tune` measured.

The file is XZOO_HOME/tune.json: the rules, and what they were measured on. They hold where the CPU,
the kernels and torch are these. Anywhere else the file is out of date, and auto.py's own rule is
used: a home folder may be of several machines.
"""

import datetime
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import files
from ..errors import XzooError, first_line
from ..home import home
from ..machine import cpu, cpuinfo
from . import native
from .compiler import whole

FORMAT = 1  # of the file
NEVER = 2**31  # a compression that no layer has


class LeastCompression(NamedTuple):
    """Inputs / degree from which a product is faster by our own kernels, by the kind of layer."""

    conv3: int  # 3x3
    conv3_strided: int  # 3x3 with a stride
    conv1: int  # 1x1
    linear: int
    conv1_shared: int  # of a share of auto.SHARED or more, whose outputs read the same inputs
    linear_shared: int


class NativeRule(NamedTuple):
    """For layers with so many lanes: samples, or pixels of all samples where a kernel is 1x1."""

    least_lanes: int
    forward: LeastCompression
    input_grad: LeastCompression
    weight_grad: LeastCompression


class Tuned(NamedTuple):
    """What the file holds; `date` is when it was measured, as 2026-11-29."""

    machine: dict[str, Any]
    date: str
    rules: tuple[NativeRule, ...]


def path() -> Path:
    return home() / "tune.json"


def write(rules: tuple[NativeRule, ...]) -> None:
    """Keep the rules as this machine's. Raises: XzooError where the file cannot be written."""
    entries: list[dict[str, Any]] = []
    for rule in rules:
        entry: dict[str, Any] = {"least_lanes": rule.least_lanes}
        for product in NativeRule._fields[1:]:
            entry[product] = getattr(rule, product)._asdict()
        entries.append(entry)
    table = {"format": FORMAT, "date": datetime.date.today().isoformat()}
    text = json.dumps(table | {"machine": _machine(), "rules": entries}, indent=1)
    files.write_text(path(), f"{text}\n")


def read() -> Tuned | None:
    """The table in the file, of whatever machine; None where there is no file.

    Raises: XzooError for a file that cannot be read, or is none that `write` makes.
    """
    try:
        data = json.loads(path().read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise ValueError(f"its format is {data['format']}, not {FORMAT}")
        if not isinstance(data["machine"], dict):
            raise TypeError("its machine is no object")
        rules = tuple(_rule(entry) for entry in data["rules"])
        lanes = [rule.least_lanes for rule in rules]
        if lanes != sorted(set(lanes), reverse=True) or lanes[-1:] != [0]:
            raise ValueError(f"its rules are for {lanes} lanes, which do not fall to 0")
        return Tuned(data["machine"], str(data["date"]), rules)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        reason = files.reason(error)
    except KeyError as error:
        reason = f"it lacks {error}"
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        reason = first_line(error)
    raise XzooError(
        f"{path()} cannot be used ({reason}); delete it, or run `xzoo tune` to replace it"
    )


def _rule(entry: dict[str, Any]) -> NativeRule:
    parts = []
    for product in NativeRule._fields[1:]:
        kinds = LeastCompression._fields
        parts.append(LeastCompression(*(_count(entry[product][kind]) for kind in kinds)))
    return NativeRule(_count(entry["least_lanes"]), *parts)


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise TypeError(f"{value!r} is no count")
    return value


def difference(table: Tuned) -> str:
    """Why a table does not hold here, to go on after "it is "; empty where it does.

    Loads the kernels where all but them is as it was.
    """
    were, now = table.machine, _machine(built=False)
    if any(were.get(fact) != now[fact] for fact in ("cpu", "model")):
        return f"of another CPU, {were.get('cpu')}, model {were.get('model')}"
    if were.get("torch") != now["torch"]:
        return f"of torch {were.get('torch')}"
    if were.get("kernels") != now["kernels"]:
        return "of another version of the kernels"
    if not native.available():
        return "of kernels that are not available"
    now = _machine()
    if were.get("lanes") != now["lanes"]:
        return f"of vectors of {were.get('lanes')} floats"
    return "" if were == now else "of another class of CPU"


def _machine(built: bool = True) -> dict[str, Any]:
    """What times depend on. The last two facts are those of kernels that are loaded."""
    known = cpuinfo()
    facts: dict[str, Any] = {
        "cpu": cpu(),
        # A virtual machine may have one name for all that its maker sells.
        "model": f"{known.get('cpu family', '')}.{known.get('model', '')}",
        "torch": torch.__version__,
        "kernels": hashlib.sha256(whole(native.SOURCE).encode()).hexdigest()[:16],
    }
    return facts | {"lanes": native.lanes(), "fast": native.fast()} if built else facts
