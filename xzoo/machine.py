"""What computes here: CPUs and threads that this process may use, how long threads wait awake,
devices by name.

Imported before torch by the package itself, since OpenMP's library reads its environment when it is
loaded; so torch is imported within functions.
"""

import ctypes
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from math import ceil
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from .errors import XzooError, first_line

if TYPE_CHECKING:
    import torch

# With them a caller says how many threads there shall be.
CHOSEN_BY = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
# How often a thread looks before it sleeps: some 0.3 ms, longer than the pauses between a network's
# layers. By default it is 30 times as often, which is best on a machine that has nothing else to
# do. Where other processes run, threads then burn the time that those they wait for need.
SPINS = "10000"
LOOKS = 10  # at the machine's load, 2 ms apart: one look finds by chance what runs for a moment


def wait_briefly(root: Path | str = "/") -> None:
    """Let the threads of the `xzoo` command sleep soon while they wait, where other processes keep
    the machine busy.

    A program that imports xzoo is left alone. OMP_WAIT_POLICY and GOMP_SPINCOUNT of the user's come
    first.
    """
    if "torch" in sys.modules or not is_command() or "OMP_WAIT_POLICY" in os.environ:
        return
    if "GOMP_SPINCOUNT" not in os.environ and _is_busy(root):
        os.environ["GOMP_SPINCOUNT"] = SPINS


def _is_busy(root: Path | str) -> bool:
    """Whether other processes leave this one less than all of its CPUs."""
    looks = []
    for _ in range(LOOKS):
        try:
            told = (Path(root) / "proc/stat").read_text()
        except OSError:  # not Linux
            return False
        running = re.search(r"^procs_running (\d+)", told, re.MULTILINE)
        looks.append(int(running[1]) - 1 if running else 0)  # but for this one
        time.sleep(0.002)
    others = sorted(looks)[LOOKS // 2]
    return others + cores() > (os.cpu_count() or 1)


def keep_memory() -> None:
    """Keep memory that is freed in this process, for the tensors of the next training step.

    glibc returns each large block to the system when it is freed. The next step then faults every
    page in again, and the system zeroes it: a third of a step of x_vgg16_2 (batch 256, AMD Zen 3).
    Results do not change. For commands alone, since it holds for all of the process; MALLOC_*
    variables of the user's come first, and other C libraries are left as they are.
    """
    chosen = any(name.startswith("MALLOC_") for name in os.environ)
    mallopt = (
        None if chosen or sys.platform != "linux" else getattr(ctypes.CDLL(None), "mallopt", None)
    )
    if mallopt is not None:
        for setting, value in _KEEPING.items():
            mallopt(setting, value)


# Of glibc's malloc.h: no blocks by mmap, nothing trimmed, and the heap grown by 256 MB at a time.
_KEEPING = {-4: 0, -1: -1, -2: 2**28}


def is_command() -> bool:
    """Whether this process is `xzoo ...` or `python -m xzoo ...`."""
    program = sys.argv[0] if sys.argv else ""  # Python within another program may have none
    return Path(program).stem == "xzoo" or ("-m", "xzoo") in pairwise(sys.orig_argv)


# ---- CPUs


def quota(root: Path | str = "/") -> float | None:
    """CPUs that this process's control groups allow it (as `docker --cpus` sets), or None without
    such a limit.

    Versions 1 and 2 of Linux's cgroups; the smallest of a group's own limit and those of the groups
    that it is in.

    Args:
        root: where proc/self/cgroup, proc/self/mountinfo and the folders that they name are looked
            for.
    """
    root = Path(root)
    try:
        # Names in them may be of any bytes.
        groups, mounts = (
            (root / "proc/self" / name).read_text(encoding="utf-8", errors="surrogateescape")
            for name in ("cgroup", "mountinfo")
        )
    except OSError:  # not Linux
        return None
    limits: list[float | None] = []
    for line in groups.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        unified = number == "0" and not controllers
        if unified or "cpu" in controllers.split(","):
            limits += map(_limit, _folders(root, mounts, group, unified))
    return min(filter(None, limits), default=None)


def _folders(root: Path, mounts: str, group: str, unified: bool) -> Iterator[Path]:
    """The folder of a control group and those above it, as far as they can be seen from here."""
    for line in mounts.splitlines():
        left, _, right = line.partition(" - ")
        fields, kind = left.split(), right.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        name, controllers = kind[0], kind[2].split(",")
        if not (name == "cgroup2" if unified else name == "cgroup" and "cpu" in controllers):
            continue
        # Blanks are written as octal numbers there.
        top, place = (re.sub(r"\\(\d{3})", _of_octal, text) for text in fields[3:5])
        at, inside = root / place.lstrip("/"), PurePosixPath(group)
        # In a container the group may be named as the host sees it, where only its own folder is
        # mounted: the parts that are not there are passed over.
        inside = inside.relative_to(top if inside.is_relative_to(top) else "/")
        for folder in (inside, *inside.parents):
            yield at / folder


def _of_octal(found: re.Match[str]) -> str:
    return chr(int(found[1], 8))


def _limit(folder: Path) -> float | None:
    """Of one control group: CPUs, or None where it sets none."""
    with suppress(OSError, ValueError):  # no such file, or not of this version
        most, period = (folder / "cpu.max").read_text().split()
        return None if most == "max" else int(most) / int(period)
    with suppress(OSError, ValueError, ZeroDivisionError):
        most, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(most) / int(period) if int(most) > 0 else None
    return None


def cores(root: Path | str = "/") -> int:
    """CPU cores that this process may use: `taskset` and a container's quota make them fewer than
    there are.

    Args:
        root: as of `quota`, a share of a core counting as one.
    """
    there, allowed = _affinity(), quota(root)
    return there if allowed is None else max(1, min(there, ceil(allowed)))


def _affinity() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---- torch's threads


@contextmanager
def own_threads() -> Iterator[None]:
    """Within, torch has no more threads than there are `cores`, unless its caller chose their
    number.

    torch counts the machine's cores, also where a container's quota leaves half of one; threads
    that wait for each other while they are held back are slower than one.
    """
    import torch

    before, most = torch.get_num_threads(), cores()
    if before <= most or _chosen(before):
        yield
        return
    _untouched.append(before)
    torch.set_num_threads(most)
    try:
        yield
    finally:
        torch.set_num_threads(before)


_untouched: list[int] = []  # torch's own number, where `own_threads` came back to it


def _chosen(threads: int) -> bool:
    """Whether the environment or the caller, by torch.set_num_threads, chose this number of torch's
    threads.
    """
    import torch

    if any(os.environ.get(name) for name in CHOSEN_BY):
        return True
    if threads in _untouched:
        return False
    # torch.set_num_threads turns this off, and nothing else does. A build without MKL does not
    # tell: there the caller chose what is not the number of CPUs.
    with suppress(AttributeError, OSError):
        library = Path(torch.__path__[0]) / "lib" / "libtorch_cpu.so"
        return not ctypes.CDLL(str(library)).mkl_serv_get_dynamic()
    return threads not in (_affinity(), os.cpu_count())


# ---- devices


def device_named(name: str) -> "torch.device":
    """A device by name, "auto" being the first there is of cuda, mps and cpu. Raises: XzooError if
    there is none.
    """
    import torch

    if name == "auto":
        name = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else name
    if name.split(":")[0] not in ("cuda", "mps", "cpu"):
        raise XzooError(f"device={name}: give auto, cpu, cuda or mps")
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise XzooError(f"device={name}: {first_line(error)}; try --device cpu") from error
    return torch.device(name)


def hardware(device: "torch.device") -> str:
    """What computes: the GPU's name, or the CPU's with the number of threads."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu()}, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"


def cpu(root: Path | str = "/") -> str:
    """The CPU's name, as far as the system knows it."""
    facts = cpuinfo(root)
    if "model name" in facts:
        return facts["model name"]
    machine = platform.machine()
    if "CPU part" in facts:  # Linux on ARM has numbers for a name
        return f"{machine}, implementer {facts.get('CPU implementer')}, part {facts['CPU part']}"
    if sys.platform == "darwin":
        with suppress(OSError, subprocess.SubprocessError):
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            told = subprocess.run(command, capture_output=True, text=True, timeout=5).stdout
            return told.strip() or machine
    return platform.processor() or machine


def cpuinfo(root: Path | str = "/") -> dict[str, str]:
    """What Linux tells of the first CPU, by its own names of the facts; nothing elsewhere."""
    try:
        told = (Path(root) / "proc/cpuinfo").read_text("utf-8", errors="replace")
    except OSError:
        return {}
    facts = {}
    for line in told.partition("\n\n")[0].splitlines():
        name, _, value = line.partition(":")
        facts[name.strip()] = value.strip()
    return facts
