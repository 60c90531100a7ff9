"""What computes on this machine, and why not something better: `xzoo doctor`."""

import os
import platform
import shlex
from importlib import import_module
from pathlib import Path

import torch

from . import ops
from .errors import XzooError
from .home import home
from .machine import hardware
from .ops import auto, native, operations, rules

VECTORS = {
    16: "AVX-512, 16 floats at a time",
    8: "AVX2, 8 floats at a time",
    4: "4 floats at a time, which `auto` takes only where they were measured",
}
LEVELS = {"v4": "x86-64-v4 (AVX-512)", "v3": "x86-64-v3 (AVX2)"}


def doctor() -> dict[str, str]:
    """Facts by name, one line each, in the order in which they are printed.

    Builds the kernels if they are missing, and tries again where that failed before.
    """
    found = native.examine()
    facts = {
        "xzoo": f"{import_module('xzoo').__version__}, Python {platform.python_version()}",
        "torch": f"{torch.__version__}, which uses {torch.backends.cpu.get_cpu_capability()}",
        "CPU": hardware(torch.device("cpu")),
        "vectors": _vectors(),
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none found by torch",
        "backends": ", ".join(ops.available()),
        "cache": str(home()),
    }
    if isinstance(found, str):
        return facts | {"kernels": "none; torch's are used", "reason": found}
    record = found.record
    facts |= {
        "kernels": VECTORS[native.lanes()],
        "compiler": f"{shlex.join(record['command'])}: {record['version']}",
        "flags": " ".join(record["flags"]),
        "library": str(found.path),
    }
    facts["rule of auto"] = _rule()
    if reason := _limited_by(record["level"], record["refused"]):
        facts["limited by"] = reason
    if found.skipped:
        facts["not used"] = "; ".join(found.skipped)
    return facts


def advice() -> str:
    """What `xzoo tune` would bring on this machine, in one line; empty where it is not needed: no
    kernels, a CPU that was measured, or one that the user has measured.

    Compiles nothing.
    """
    if operations.forced() != "auto" or not native.possible() or auto.is_measured():
        return ""
    try:
        table = rules.read()
    except XzooError:
        table = None
    if table is not None and not rules.difference(table):
        return ""
    return (
        "xzoo's own kernels were not measured on a CPU like this one: `xzoo tune` finds out in two "
        "minutes which layers they make faster here, and `auto` then takes them for those"
    )


def _rule() -> str:
    """The one that `auto` follows here, and why not the user's own."""
    built_in = "built-in"
    if not auto.is_measured():
        built_in += ", not measured on a CPU like this one (`xzoo tune` measures it)"
    try:
        table = rules.read()
    except XzooError as error:
        return f"{built_in}; {error}"
    if table is None:
        return built_in
    if stale := rules.difference(table):
        return f"{built_in}; {rules.path()} is {stale}: `xzoo tune` replaces it"
    return f"tuned on {table.date}: {rules.path()}"


def _vectors() -> str:
    """The vectors that the CPU has, and the limit that is set for them."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return platform.machine()
    best = next((LEVELS[level] for level in native.levels()), "less than x86-64-v3 (AVX2)")
    held = os.environ.get("ATEN_CPU_CAPABILITY", "")
    return f"{best}, held to it by ATEN_CPU_CAPABILITY={held}" if held in native.HELD else best


def _limited_by(level: str, refused: list[str]) -> str:
    if refused and level != next(iter(native.levels()), ""):
        return refused[0]
    if platform.machine() not in ("x86_64", "AMD64"):
        return ""
    if os.environ.get("ATEN_CPU_CAPABILITY", "") in native.HELD:
        return (
            f"ATEN_CPU_CAPABILITY={os.environ['ATEN_CPU_CAPABILITY']} holds torch and our kernels "
            "to this"
        )
    if level == "v4":
        return ""
    if not Path("/proc/cpuinfo").exists():
        return "/proc/cpuinfo, which lists what this CPU has, is missing"
    return f"this CPU lacks {'AVX-512' if level == 'v3' else 'AVX2'}"
