"""Our own kernels, native/native.cpp: float32 on CPUs, 3x3 and 1x1 convolutions and linear layers.

They are compiled at the first call (some 5 s), for the widest vectors of this CPU and its compiler,
and kept under XZOO_HOME (compiler.py). They know neither torch nor Python: a function gets
addresses and sizes, and the address of OpenMP's entry, so that it works in torch's pool of threads
and in no second one. Without a compiler, or where compiling fails, `available` says why, once, and
the library's backends do the work.

Not here: anything but float32, other kernels, paddings and strides (`missing`); those are dense's.
"""

import contextlib
import ctypes
import logging
import os
import platform
import struct
import threading
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import XzooError
from ..machine import cpuinfo
from .compiler import BuildError, Built, Variant, compilers
from .compiler import build as compiled
from .rows import Pair, checked

SOURCE = Path(__file__).parent / "native" / "native.cpp"
# No -march=native: a home folder may be shared by machines of which one lacks what another has.
LEVELS = {
    "v4": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
    "v3": {"avx2", "bmi2", "fma", "f16c"},
}
# What ATEN_CPU_CAPABILITY, torch's own variable, leaves of them.
HELD = {"avx2": ["v3"], "default": []}

_LAYER = struct.Struct("12q")  # layer.h's
_CODES = {"": 0, "relu": 1, "relu6": 2}  # of the activations, done in the store of a result
_TENSORS = {  # its functions, and how many tensors they take
    **{"xzoo_conv3": 5, "xzoo_conv3_input_grad": 4, "xzoo_conv3_weight_grad": 4},
    **{"xzoo_point": 5, "xzoo_point_input_grad": 4, "xzoo_point_weight_grad": 4},
}
_NORM_TENSORS = {"xzoo_norm": 7, "xzoo_norm_grad": 6}  # those of norms.py

_logger = logging.getLogger(__name__)
_lock = threading.Lock()
_loaded: list[ctypes.CDLL | None] = []  # what the first call found: the library, or None


# ---- as backends.Backend says

ACTIVATIONS: Collection[str] = tuple(_CODES)
CHECKS_NEIGHBOURS = True


def missing(operation: str, x: Tensor, weight: Tensor, neighbours: Tensor, *geometry: Any) -> str:
    if not _has_kernel(operation, x, weight, *geometry):
        layer = f"{operation} of {x.dtype} on {x.device.type} with weight {list(weight.shape)}"
        return f"has no kernel for {layer}, geometry {geometry}"
    return "" if available() else "is not available here (no compiler, or compiling failed)"


def _has_kernel(operation: str, x: Tensor, weight: Tensor, *geometry: Any) -> bool:
    """For any neighbours."""
    if not x.is_cpu or x.dtype != torch.float32:
        return False
    if x.layout != torch.strided or weight.layout != torch.strided:
        return False
    if operation == "linear":
        return True
    kernel, (stride, padding, dilation) = tuple(weight.shape[2:]), map(tuple, geometry)
    if kernel == (1, 1):
        return padding == (0, 0)
    return kernel == (3, 3) and stride in ((1, 1), (2, 2)) and padding == dilation == (1, 1)


def conv2d(
    x: Tensor,
    weight: Tensor,
    neighbours: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    activation: str = "",
) -> Tensor:
    x, point = _seen(x, weight, stride), weight.shape[2] == 1
    step = 1 if point else stride[0]
    batch, _, height, width = x.shape
    shape = [batch, len(weight), (height - 1) // step + 1, (width - 1) // step + 1]
    y = _empty(shape, x)
    name = "xzoo_point" if point else "xzoo_conv3"
    return _call(
        name, y, x, y, weight, neighbours, step, x, weight, neighbours, bias, activation=activation
    )


def conv2d_input_grad(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    neighbours: Tensor,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> Tensor:
    grad, point = laid_out(grad), weight.shape[2] == 1
    dx = _empty(x[:, :, :: stride[0], :: stride[1]].shape if point else x.shape, x)
    name = "xzoo_point_input_grad" if point else "xzoo_conv3_input_grad"
    _call(name, dx, dx, grad, weight, neighbours, _step(weight, stride), grad, weight, neighbours)
    if dx.shape == x.shape:
        return dx
    whole = _empty(x.shape, x).zero_()  # inputs between the strides of a 1x1 kernel are never read
    whole[:, :, :: stride[0], :: stride[1]] = dx
    return whole


def conv2d_weight_grad(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    neighbours: Tensor,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> Tensor:
    x, grad = _seen(x, weight, stride), laid_out(grad)
    dw = torch.empty_like(weight, memory_format=torch.contiguous_format)
    name = "xzoo_point_weight_grad" if weight.shape[2] == 1 else "xzoo_conv3_weight_grad"
    return _call(name, dw, x, grad, weight, neighbours, _step(weight, stride), grad, x, neighbours)


def linear(
    x: Tensor, weight: Tensor, neighbours: Tensor, bias: Tensor | None, activation: str = ""
) -> Tensor:
    x, y = laid_out(x), x.new_empty(x.shape[0], weight.shape[0])
    tensors = (x, weight, neighbours, bias)
    return _call("xzoo_point", y, x, y, weight, neighbours, 1, *tensors, activation=activation)


def linear_input_grad(grad: Tensor, x: Tensor, weight: Tensor, neighbours: Tensor) -> Tensor:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    grad = laid_out(grad)
    return _call(
        "xzoo_point_input_grad", dx, dx, grad, weight, neighbours, 1, grad, weight, neighbours
    )


def linear_weight_grad(grad: Tensor, x: Tensor, weight: Tensor, neighbours: Tensor) -> Tensor:
    x, grad = laid_out(x), laid_out(grad)
    dw = torch.empty_like(weight, memory_format=torch.contiguous_format)
    return _call("xzoo_point_weight_grad", dw, x, grad, weight, neighbours, 1, grad, x, neighbours)


def _call(
    name: str,
    result: Tensor,
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    neighbours: Tensor,
    stride: int,
    *tensors: Tensor | None,
    activation: str = "",
) -> Tensor:
    """The function of native.cpp on the addresses of `tensors` and of `result`; x and y give the
    layer's sizes."""
    sizes, (n_out, degree, *_) = (*x.shape, 1, 1)[:4], weight.shape
    if not sizes[0]:
        return result.zero_()
    if neighbours.dtype != torch.int32:
        rows = checked(readable(neighbours), sizes[1])
        tensors = tuple(rows if t is neighbours else t for t in tensors)
    lying: list[Tensor] = []  # keeps what is made here until the call has ended
    addresses: list[int | None] = []
    for t in tensors:
        if t is None:
            addresses.append(None)
            continue
        # Activations lie in either order already; a layer's own tensors in one.
        if t is not x and t is not y and not t.is_contiguous():
            t = readable(t).contiguous()
        address = t.data_ptr()
        short = t.untyped_storage().nbytes() < t.nbytes + 4 * t.storage_offset()
        if short or not address or t.is_neg():
            t = readable(t)
            address = t.data_ptr()
        lying.append(t)
        addresses.append(address)
    addresses.append(result.data_ptr())
    share, last = n_out // neighbours.shape[0], (_last(x), _last(y))
    threads = torch.get_num_threads()
    layer = _LAYER.pack(*sizes, n_out, degree, share, stride, *last, threads, _CODES[activation])
    if answer := getattr(_loaded[0], name)(layer, *addresses):
        raise _refusal(answer, list(x.shape), list(weight.shape), share)
    return result


def call(name: str, sizes: bytes, tensors: Sequence[Tensor | None]) -> None:
    """A function of native.cpp that is not a layer's, on the addresses of contiguous or
    channels_last tensors."""
    tensors = [None if t is None else readable(t) for t in tensors]
    addresses = [None if t is None else t.data_ptr() for t in tensors]
    answer = getattr(_loaded[0], name)(sizes, *addresses)
    if answer == 2:
        raise MemoryError(f"no memory for {name} of the native kernels: take a smaller batch")
    if answer:
        raise XzooError(f"{name} of the native kernels does not support these sizes")


def readable(t: Tensor) -> Tensor:
    """A tensor whose numbers lie in memory as they are, for functions that get an address and
    nothing else.

    A bit that says "negative" and zeros without memory are written out. Raises RuntimeError where
    memory was given back, or is too small for the tensor's sizes; torch itself would read past its
    end.
    """
    if t._is_zerotensor():
        return torch.zeros(t.shape, dtype=t.dtype)
    end = t.storage_offset() + 1
    for size, step in zip(t.shape, t.stride()):  # noqa: B905 (a microsecond of a small layer's 10)
        end += (size - 1) * step
    if t.untyped_storage().nbytes() < t.element_size() * end and t.numel():
        raise RuntimeError(
            f"a tensor of {list(t.shape)} lacks its memory: the storage was freed or resized"
        )
    return t.resolve_neg() if t.is_neg() else t


def _refusal(answer: int, x: list[int], weight: list[int], share: int) -> Exception:
    """What native.cpp's Answer means, of a layer of these shapes."""
    if answer == 1:
        return IndexError(f"neighbours must be from 0 to {x[1] - 1}, the inputs there are")
    layer = f"a layer of x {x}, weight {weight}, share {share}"
    if answer == 2:
        return MemoryError(
            f"no memory for what the native kernels keep of {layer}: take a smaller batch"
        )
    return XzooError(f"the native kernels do not support {layer}; use backend 'dense'")


def _step(weight: Tensor, stride: tuple[int, int]) -> int:
    """The kernel's own stride: the pixels that a 1x1 kernel passes over are left out beforehand."""
    return 1 if weight.shape[2] == 1 else stride[0]


def _seen(x: Tensor, weight: Tensor, stride: tuple[int, int]) -> Tensor:
    """x without the pixels that a 1x1 kernel passes over, dense in memory."""
    if weight.shape[2] == 1 and tuple(stride) != (1, 1):
        form = torch.channels_last if _last(x) else torch.contiguous_format
        return readable(x)[:, :, :: stride[0], :: stride[1]].contiguous(memory_format=form)
    return laid_out(x)


def laid_out(x: Tensor) -> Tensor:
    return x if x.is_contiguous() or _last(x) else readable(x).contiguous()


def _last(x: Tensor) -> bool:
    """As torch.channels_last, and not both ways."""
    if x.is_contiguous() or x.dim() != 4:
        return False
    return x.is_contiguous(memory_format=torch.channels_last)


def _empty(shape: Any, like: Tensor) -> Tensor:
    form = torch.channels_last if _last(like) else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, memory_format=form)


# ---- building and loading

# LEVELS in words that GCC before 11 and clang before 12 know; then what the source cannot do
# without.
SPELLED = {
    "v4": [
        "-mavx512f -mavx512bw -mavx512cd -mavx512dq -mavx512vl"
        " -mavx2 -mfma -mbmi -mbmi2 -mf16c -mlzcnt -mmovbe",
        "-mavx512f -mavx2 -mfma",
    ],
    "v3": ["-mavx2 -mfma -mbmi -mbmi2 -mf16c -mlzcnt -mmovbe", "-mavx2 -mfma"],
}

_found: list[Built | str] = []  # as _loaded, with how it was built, or why it was not


def possible() -> bool:
    """Whether there is a chance: a compiler, and no failure so far. Compiles nothing."""
    if os.name != "posix" or _loaded:
        return os.name == "posix" and _loaded[0] is not None
    try:
        return next(compilers(), None) is not None
    except BuildError:
        return False


def available() -> bool:
    """Whether the kernels are there; the first call compiles them, or says why they are not."""
    if not _loaded:
        with _lock:
            if not _loaded:
                _first()
                if isinstance(_found[0], str):
                    _logger.warning(
                        "xzoo's own CPU kernels are not available, torch's are used: %s", _found[0]
                    )
    return _loaded[0] is not None


def loaded() -> ctypes.CDLL | None:
    """The library, where a call has loaded it already."""
    return _loaded[0] if _loaded else None


def examine() -> Built | str:
    """How the kernels were built, or why there are none. A failure, also a remembered one, is tried
    again."""
    with _lock:
        if not _loaded or _loaded[0] is None:
            _first(again=True)
        return _found[0]


def lanes() -> int:
    """Floats in a vector of the kernels: 16, 8 or 4."""
    library = _loaded[0]
    assert library, "ask available() first"
    return int(library.xzoo_lanes())


def fast() -> bool:
    """Whether this CPU multiplies twice as fast as its caches were built for: FAST of vectors.h."""
    library = _loaded[0]
    assert library, "ask available() first"
    return bool(library.xzoo_fast())


def _first(again: bool = False) -> None:
    try:
        found: Built | str = _build(_flags(), again)
    except (OSError, BuildError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        found = lines[0]
    _found[:] = [found]
    _loaded[:] = [None if isinstance(found, str) else found.library]


def _flags() -> list[str]:
    """The compiler's flags for this CPU, or for what torch is told to use of it."""
    flags = ["-std=c++17", "-O3", "-fno-math-errno", "-shared", "-fPIC", "-pthread"]
    level = next(iter(levels()), None)
    return [*flags, f"-march=x86-64-{level}"] if level else flags


def levels() -> list[str]:
    """Those of LEVELS that this CPU has, the best first; fewer where torch is told to use less
    (HELD)."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return []
    has = set(cpuinfo().get("flags", "").split())
    allowed = HELD.get(os.environ.get("ATEN_CPU_CAPABILITY", ""), LEVELS)
    return [level for level in allowed if LEVELS[level] <= has]


def _variants(flags: list[str]) -> list[Variant]:
    """These flags, and what to ask a compiler for that does not take them: other words, then lower
    levels."""
    wanted = flags[-1].removeprefix("-march=x86-64-")
    if wanted not in SPELLED:
        return [Variant("", flags)]
    common, found = flags[:-1], []
    for level in list(SPELLED)[list(SPELLED).index(wanted) :]:
        found.append(Variant(level, [*common, f"-march=x86-64-{level}"]))
        found += [
            Variant(level, [*common, "-march=x86-64", *words.split()]) for words in SPELLED[level]
        ]
    return [*found, Variant("", common)]


def build(flags: list[str]) -> ctypes.CDLL:
    """The kernels compiled with these flags, from the cache if they are there.

    Raises: OSError or RuntimeError (BuildError) where that cannot be done.
    """
    return _build(flags).library


def _build(flags: list[str], again: bool = False) -> Built:
    if os.name != "posix":
        raise BuildError("the kernels can be built on Linux and macOS only")
    return compiled(SOURCE, _variants(flags), _opened, again)


def _opened(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for name, count in (_TENSORS | _NORM_TENSORS).items():
        getattr(library, name).argtypes = [ctypes.c_void_p] * (1 + count)
    process = ctypes.CDLL(None)
    names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads", "omp_in_parallel")
    with contextlib.suppress(AttributeError):  # no OpenMP in the process: one thread
        library.xzoo_init(*(ctypes.cast(getattr(process, name), ctypes.c_void_p) for name in names))
    return library
