"""What computes on this machine, and why not something better: `xzoo doctor`."""

import os
import platform
import shlex
from importlib import import_module
from pathlib import Path

import torch

from . import ops
from .home import home
from .machine import hardware
from .ops import native

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
    if reason := _limited_by(record["level"], record["refused"]):
        facts["limited by"] = reason
    if found.skipped:
        facts["not used"] = "; ".join(found.skipped)
    return facts


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
