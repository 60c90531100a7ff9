"""Our own kernels, native.cpp: float32 on CPUs, 3x3 and 1x1 convolutions and linear layers.

The file is compiled at the first call (some 5 s), for the widest vectors of this CPU, and kept under
XZOO_HOME. It knows neither torch nor Python: a function gets addresses and sizes, and the address of
OpenMP's entry, so that it works in torch's pool of threads and in no second one. Without a compiler, or
where compiling fails, `available` says why, once, and the library's backends do the work.

Not here: anything but float32, other kernels, paddings and strides (`supports`); those are dense's.
"""

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import struct
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import XzooError
from ..home import home

SOURCE = Path(__file__).with_suffix(".cpp")
# No -march=native: a home folder may be shared by machines of which one lacks what another has.
LEVELS = {"v4": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}, "v3": {"avx2", "bmi2", "fma", "f16c"}}
HELD = {"avx2": ["v3"], "default": []}  # what ATEN_CPU_CAPABILITY, torch's own variable, leaves of them

_LAYER = struct.Struct("12q")  # native.cpp's
ACTIVATIONS = {"": 0, "relu": 1, "relu6": 2}  # done in the store of a result
_TENSORS = {  # its functions, and how many tensors they take
    **{"xzoo_conv3": 5, "xzoo_conv3_input_grad": 4, "xzoo_conv3_weight_grad": 4},
    **{"xzoo_point": 5, "xzoo_point_input_grad": 4, "xzoo_point_weight_grad": 4},
}

_logger = logging.getLogger(__name__)
_lock = threading.Lock()
_loaded: list[ctypes.CDLL | None] = []  # what the first call found: the library, or None


# ---- the two operations


def supports(operation: str, x: Tensor, weight: Tensor, *geometry: Any) -> bool:
    """Whether the kernels do such a layer: `geometry` is a convolution's stride, padding and dilation."""
    if not x.is_cpu or x.dtype != torch.float32:
        return False
    return operation == "linear" or _geometry(*weight.shape[2:], *map(tuple, geometry))


@functools.lru_cache(maxsize=256)
def _geometry(height: int, width: int, stride: Any, padding: Any, dilation: Any) -> bool:
    if (height, width) == (1, 1):
        return bool(padding == (0, 0))
    kinds = {((1, 1), (1, 1), (1, 1)), ((2, 2), (1, 1), (1, 1))}
    return (height, width) == (3, 3) and (stride, padding, dilation) in kinds


def conv2d(x, weight, neighbours, bias, stride, padding, dilation, activation=""):
    x, point = _seen(x, weight, stride), weight.shape[2] == 1
    step = 1 if point else stride[0]
    batch, _, height, width = x.shape
    shape = [batch, len(weight), (height - 1) // step + 1, (width - 1) // step + 1]
    y = _empty(shape, x)
    name = "xzoo_point" if point else "xzoo_conv3"
    return _call(name, y, x, y, weight, neighbours, step, x, weight, neighbours, bias, activation=activation)


def conv2d_input_grad(grad, x, weight, neighbours, stride, padding, dilation):
    grad, point = _laid_out(grad), weight.shape[2] == 1
    dx = _empty(x[:, :, :: stride[0], :: stride[1]].shape if point else x.shape, x)
    name = "xzoo_point_input_grad" if point else "xzoo_conv3_input_grad"
    _call(name, dx, dx, grad, weight, neighbours, _step(weight, stride), grad, weight, neighbours)
    if dx.shape == x.shape:
        return dx
    whole = _empty(x.shape, x).zero_()  # inputs between the strides of a 1x1 kernel are never read
    whole[:, :, :: stride[0], :: stride[1]] = dx
    return whole


def conv2d_weight_grad(grad, x, weight, neighbours, stride, padding, dilation):
    x, grad = _seen(x, weight, stride), _laid_out(grad)
    dw = torch.empty_like(weight, memory_format=torch.contiguous_format)
    name = "xzoo_point_weight_grad" if weight.shape[2] == 1 else "xzoo_conv3_weight_grad"
    return _call(name, dw, x, grad, weight, neighbours, _step(weight, stride), grad, x, neighbours)


def linear(x, weight, neighbours, bias, activation=""):
    x, y = x.contiguous(), x.new_empty(len(x), len(weight))
    return _call("xzoo_point", y, x, y, weight, neighbours, 1, x, weight, neighbours, bias, activation=activation)


def linear_input_grad(grad, x, weight, neighbours):
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    grad = grad.contiguous()
    return _call("xzoo_point_input_grad", dx, dx, grad, weight, neighbours, 1, grad, weight, neighbours)


def linear_weight_grad(grad, x, weight, neighbours):
    x, grad, dw = x.contiguous(), grad.contiguous(), torch.empty_like(weight, memory_format=torch.contiguous_format)
    return _call("xzoo_point_weight_grad", dw, x, grad, weight, neighbours, 1, grad, x, neighbours)


def _call(name, result, x, y, weight, neighbours, stride, *tensors, activation=""):
    """The function of native.cpp on the addresses of `tensors` and of `result`; x and y give the layer's sizes."""
    sizes, (n_out, degree, *_) = (*x.shape, 1, 1)[:4], weight.shape
    if not sizes[0]:
        return result.zero_()
    # Activations lie in either order already; a layer's own tensors in one.
    lying = [t if t is None or t is x or t is y or t.is_contiguous() else t.contiguous() for t in (*tensors, result)]
    if neighbours.dtype != torch.int32:
        lying = [t.int() if t is not None and not t.is_floating_point() else t for t in lying]
    addresses = [None if t is None else t.data_ptr() for t in lying]
    share, last = n_out // neighbours.shape[0], (_last(x), _last(y))
    threads = torch.get_num_threads()
    layer = _LAYER.pack(*sizes, n_out, degree, share, stride, *last, threads, ACTIVATIONS[activation])
    if answer := getattr(_loaded[0], name)(layer, *addresses):
        raise _refusal(answer, list(x.shape), list(weight.shape), share)
    return result


def _refusal(answer: int, x: list[int], weight: list[int], share: int) -> Exception:
    """What native.cpp's Answer means, of a layer of these shapes."""
    if answer == 1:
        return IndexError(f"neighbours must be from 0 to {x[1] - 1}, the inputs there are")
    layer = f"a layer of x {x}, weight {weight}, share {share}"
    if answer == 2:
        return MemoryError(f"no memory for what the native kernels keep of {layer}: take a smaller batch")
    return XzooError(f"{layer} is none that the native kernels do; use backend 'dense'")


def _step(weight: Tensor, stride: tuple[int, int]) -> int:
    """The kernel's own stride: the pixels that a 1x1 kernel passes over are left out beforehand."""
    return 1 if weight.shape[2] == 1 else stride[0]


def _seen(x: Tensor, weight: Tensor, stride: tuple[int, int]) -> Tensor:
    """x without the pixels that a 1x1 kernel passes over, dense in memory."""
    if weight.shape[2] == 1 and tuple(stride) != (1, 1):
        form = torch.channels_last if _last(x) else torch.contiguous_format
        return x[:, :, :: stride[0], :: stride[1]].contiguous(memory_format=form)
    return _laid_out(x)


def _laid_out(x: Tensor) -> Tensor:
    return x if x.is_contiguous() or _last(x) else x.contiguous()


def _last(x: Tensor) -> bool:
    """As torch.channels_last, and not both ways."""
    return not x.is_contiguous() and x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


def _empty(shape: Any, like: Tensor) -> Tensor:
    form = torch.channels_last if _last(like) else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, memory_format=form)


# ---- building and loading


def possible() -> bool:
    """Whether there is a chance: a compiler, and no failure so far. Compiles nothing."""
    return os.name == "posix" and (_loaded[0] is not None if _loaded else _compiler() is not None)


def available() -> bool:
    """Whether the kernels are there; the first call compiles them, or says why they are not."""
    if not _loaded:
        with _lock:
            if not _loaded:
                _loaded.append(_first())
    return _loaded[0] is not None


def lanes() -> int:
    """Floats in a vector of the kernels: 16, 8 or 4."""
    library = _loaded[0]
    assert library, "ask available() first"
    return int(library.xzoo_lanes())


def _first() -> ctypes.CDLL | None:
    try:
        return build(_flags())
    except (OSError, subprocess.SubprocessError, RuntimeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        _logger.warning("xzoo's own CPU kernels are not available, torch's are used: %s", lines[0])
        return None


def _flags() -> list[str]:
    """The compiler's flags for this CPU, or for what torch is told to use of it."""
    flags = ["-std=c++17", "-O3", "-fno-math-errno", "-shared", "-fPIC", "-pthread"]
    if platform.machine() not in ("x86_64", "AMD64"):
        return flags
    has: set[str] = set()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                has = set(line.partition(":")[2].split())
                break
    allowed = HELD.get(os.environ.get("ATEN_CPU_CAPABILITY", ""), LEVELS)
    level = next((level for level in allowed if LEVELS[level] <= has), None)
    return [*flags, f"-march=x86-64-{level}"] if level else flags


def _compiler() -> str | None:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    return next((found for name in names if (found := shutil.which(name))), None)


def build(flags: list[str]) -> ctypes.CDLL:
    """The kernels compiled with these flags, from the cache if they are there.

    Raises OSError, subprocess.SubprocessError or RuntimeError where that cannot be done.
    """
    compiler = _compiler()
    if os.name != "posix" or compiler is None:
        raise RuntimeError("no C++ compiler: install g++ or clang++, or name one in CXX")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=60).stdout
    parts = [SOURCE.read_text(), " ".join(flags), version.partition("\n")[0], platform.machine()]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    with contextlib.suppress(OSError), _locked(home() / "native", key) as folder:
        return _load(folder, key, [compiler, *flags])
    # The cache cannot be written to. A folder of ours alone (0700) instead; what is loaded needs no file.
    private = tempfile.mkdtemp(prefix="xzoo-native-")
    try:
        return _load(Path(private), key, [compiler, *flags])
    finally:
        shutil.rmtree(private, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path, key: str) -> Iterator[Path]:
    """One process at a time; the lock goes with the process, however that ends."""
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{key}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for left in folder.glob(f"{key}.*.tmp"):  # by a process that was killed
            left.unlink()
        yield folder


def _load(folder: Path, key: str, command: list[str]) -> ctypes.CDLL:
    path = folder / f"{key}.so"
    if path.exists() and path.stat().st_uid == os.getuid():
        with contextlib.suppress(OSError):  # damaged: compile it anew
            return _opened(path)
    file, name = tempfile.mkstemp(dir=folder, prefix=f"{key}.", suffix=".tmp")
    os.close(file)
    try:
        run = subprocess.run([*command, "-o", name, str(SOURCE)], capture_output=True, text=True, timeout=600)
        if run.returncode:
            said = [line for line in run.stderr.splitlines() if "error" in line] or run.stderr.splitlines()
            raise RuntimeError(f"{command[0]} failed with code {run.returncode}: {(said or ['no message'])[0]}")
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)
    return _opened(path)


def _opened(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for name, count in _TENSORS.items():
        getattr(library, name).argtypes = [ctypes.c_void_p] * (1 + count)
    process = ctypes.CDLL(None)
    names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads", "omp_in_parallel")
    with contextlib.suppress(AttributeError):  # no OpenMP in the process: one thread
        library.xzoo_init(*(ctypes.cast(getattr(process, name), ctypes.c_void_p) for name in names))
    return library
