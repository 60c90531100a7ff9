"""Random layers, and memory that ends where its numbers end: test_guard.py runs it, in processes of
their own.

    python tests/guard.py pages LEVEL     every array and all scratch of the kernels between pages that cannot be read
    python tests/guard.py norms LEVEL     the same of batch norms
    python tests/guard.py scratch LEVEL   each request for scratch refused once
    python tests/guard.py hostile LEVEL   arguments that are wrong in one place, through the door of xzoo.ops
    python tests/guard.py asan LEVEL      the kernels under AddressSanitizer (which has to be preloaded)
    python tests/guard.py backends        native, gather, dense and group against float64, through the door of xzoo.ops

Options: --cases (or --seconds), --seed, and --first, the number of the first case: a case is its
seed and its number, so that one can be had again. A LEVEL is what -march= takes, or "plain512": the
kernels of AVX-512 with its instructions in plain code (avx512.h), for every CPU; "plain512fast" are
those that there are for FAST ones. Prints one line for each fault and one at the end; a crash is
told with the case that it came in.
"""

import argparse
import contextlib
import ctypes
import faulthandler
import math
import mmap
import random
import struct
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from xzoo import ops
from xzoo.ops import dense, gather, group, native
from xzoo.ops.compiler import whole
from xzoo.ops.operations import activate

HERE = Path(__file__).parent
EPS = torch.finfo(torch.float32).eps
PARTS = ("", "_input_grad", "_weight_grad")

# In place of memory.h's: made anew at each request, as long as asked, and full of NaN (as an index,
# of -1).
SCRATCH = r"""
extern "C" { int xzoo_guard_begin; long xzoo_scratch_asked, xzoo_scratch_refused; }
struct Scratch {
  char* base = nullptr;
  size_t total = 0;
  float* floats(long n) {
    if (__atomic_add_fetch(&xzoo_scratch_asked, 1, __ATOMIC_RELAXED) == xzoo_scratch_refused) {
      no_memory = true;
      return nullptr;
    }
#if defined(__SANITIZE_ADDRESS__)
    free(base);
    base = (char*)memset(malloc(n * sizeof(float)), 0xff, n * sizeof(float));
    return (float*)base;
  }
  ~Scratch() { free(base); }
#else
    const size_t guard = 32 << 20, need = ((size_t)n * sizeof(float) + 4095) & ~(size_t)4095;
    if (base) munmap(base, total);
    total = need + 2 * guard;
    base = (char*)mmap(nullptr, total, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED || (need && mprotect(base + guard, need, PROT_READ | PROT_WRITE))) abort();
    memset(base + guard, 0xff, need);
    return (float*)(base + guard + (xzoo_guard_begin ? 0 : need - n * sizeof(float)));
  }
  ~Scratch() { if (base) munmap(base, total); }
#endif
};
"""

# So that small layers fill them, and are done in parts.
SMALL_CACHES = {
    "FAST_L2 = 800 << 10;": "FAST_L2 = 32 << 10;",
    "FAST_L1 = 52 << 10;": "FAST_L1 = 24 << 10;",
}


def built(level: str, sanitize: bool = False, change: tuple[str, str] | None = None) -> ctypes.CDLL:
    """The kernels with guarded scratch; `change` replaces a piece of them (to see that the fault is
    found).
    """
    source = whole(native.SOURCE)
    begin, end = (
        source.index("// Scratch of one thread"),
        source.index("thread_local Scratch scratch"),
    )
    source = source[:begin] + SCRATCH + source[end:]
    if change:
        assert source.count(change[0]) == 1
        source = source.replace(*change)
    flags = [flag for flag in native._flags() if not flag.startswith("-march=")]
    if level in ("plain512", "plain512fast"):
        source = (HERE / "avx512.h").read_text() + source
        flags += ["-march=x86-64", "-D__AVX512F__", "-Wno-psabi", "-O1"]  # in half the time
        flags += [f"-DXZOO_FAST={int(level == 'plain512fast')}"]
    elif level:
        flags += [f"-march={level}"]
    if level == "plain512fast":
        for size, small in SMALL_CACHES.items():
            assert source.count(size) == 1
            source = source.replace(size, small)
    if sanitize:
        source = (HERE / "checked.h").read_text() + source
        flags += ["-fsanitize=address", "-O1", "-g"]
    with tempfile.TemporaryDirectory() as folder:
        before, native.SOURCE = native.SOURCE, Path(folder) / "guarded.cpp"
        native.SOURCE.write_text(source)
        try:
            return native.build(flags)
        finally:
            native.SOURCE = before


# ---- random layers


class Case(NamedTuple):
    x: Tensor
    weight: Tensor
    rows: Tensor
    bias: Tensor | None
    grad: Tensor
    geometry: tuple
    activation: str
    distinct: bool  # no output reads an input twice, which `dense` cannot do
    threads: int
    products: int  # as many as a dense layer has

    @property
    def operation(self):
        return "conv2d" if self.geometry else "linear"

    def tensors(self, part):
        if part:
            return self.grad, self.x, self.weight, self.rows
        return self.x, self.weight, self.rows, self.bias

    def __str__(self):
        tensors = {"x": self.x, "weight": self.weight, "rows": self.rows, "grad": self.grad}
        shapes = " ".join(f"{name} {list(t.shape)} {t.stride()}" for name, t in tensors.items())
        return (
            f"{shapes} {self.geometry} {self.activation!r} bias {self.bias is not None} threads "
            f"{self.threads}"
        )


SIZES = [
    1,
    2,
    3,
    4,
    5,
    6,
    7,
    8,
    9,
    11,
    12,
    13,
    14,
    15,
    16,
    17,
    20,
    21,
    28,
    31,
    32,
    33,
    35,
    40,
    56,
    65,
]
BATCHES = [1, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 65, 66, 97, 128, 130, 257]
INPUTS = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 100, 257]


def drawn(
    seed: int, numbers: tuple[int, ...] = (20_000,) * 5 + (60_000,) * 4 + (300_000, 2_000_000)
) -> Case:
    """The layer of a seed; `numbers` are what its largest activation may have, one of them taken."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    limit = draw.choice(numbers)
    kind, threads = draw.choice(["linear", "1", "1", "3", "3", "3s"]), draw.choice([1, 1, 2, 3, 5])
    share, blocks = (
        draw.choice([1, 1, 2, 3, 4, 5, 6, 7, 8, 16]),
        draw.choice([1, 1, 2, 3, 4, 5, 7, 12, 17, 40]),
    )
    n_in, batch, height, width = (
        draw.choice(choices) for choices in (INPUTS, BATCHES, SIZES, SIZES)
    )
    if kind == "linear":
        height = width = 1
        batch *= draw.choice([1, 1, 8])
    n_out, taps = share * blocks, 9 if kind[0] == "3" else 1
    if limit > 300_000:  # the largest that may be, not only the largest that happens
        grow = int(math.sqrt(limit / (batch * max(n_in, n_out) * height * width)))
        height, width = (
            (height, width) if kind == "linear" else (max(1, height * grow), max(1, width * grow))
        )
    while batch * max(n_in, n_out) * height * width > limit and batch > 1:
        batch //= 2
    while batch * max(n_in, n_out) * height * width > limit:
        height, width = max(1, height // 2), max(1, width // 2)
    degree = draw.choice([1, n_in, draw.randint(1, n_in), draw.randint(1, min(n_in, 8))])
    while degree > 1 and batch * n_out * height * width * degree * taps > 10_000_000:
        degree //= 2
    rows, distinct = torch.stack([torch.randperm(n_in)[:degree] for _ in range(blocks)]).int(), True
    if draw.random() < 0.7:
        rows = rows.sort(1).values
    if draw.random() < 0.1:
        rows, distinct = torch.randint(0, n_in, (blocks, degree)).int(), degree == 1
    bias, activation = (
        torch.randn(n_out) if draw.random() < 0.5 else None,
        draw.choice(["", "relu", "relu6"]),
    )
    if kind == "linear":
        x, weight, grad, geometry = (
            torch.randn(batch, n_in),
            torch.randn(n_out, degree),
            torch.randn(batch, n_out),
            (),
        )
        return Case(
            x,
            weight,
            rows,
            bias,
            grad,
            geometry,
            activation,
            distinct,
            threads,
            batch * n_in * n_out,
        )
    kernel, stride = (
        int(kind[0]),
        2 if kind == "3s" else draw.choice([1, 1, 2, 3]) if kind == "1" else 1,
    )
    geometry = ((stride, stride), (kernel // 2, kernel // 2), (1, 1))
    x, weight = torch.randn(batch, n_in, height, width), torch.randn(n_out, degree, kernel, kernel)
    grad = torch.randn(batch, n_out, (height - 1) // stride + 1, (width - 1) // stride + 1)
    x, grad = (
        t.contiguous(memory_format=torch.channels_last) if draw.random() < 0.4 else t
        for t in (x, grad)
    )
    products = batch * n_in * n_out * height * width * taps
    return Case(x, weight, rows, bias, grad, geometry, activation, distinct, threads, products)


def drawn_distinct(seed: int, numbers: tuple[int, ...]) -> tuple[Case, int]:
    """The first layer, from a seed on, in which no output reads an input twice, and its seed."""
    case = drawn(seed, numbers)
    while not case.distinct:
        seed += 5 * 10**6
        case = drawn(seed, numbers)
    return case, seed


def exact(case: Case, part: str) -> Tensor:
    """In float64, by `dense`, or `gather` where an output reads an input twice."""
    tensors = [
        t.double() if t is not None and t.is_floating_point() else t for t in case.tensors(part)
    ]
    result = getattr(dense if case.distinct else gather, case.operation + part)(
        *tensors, *case.geometry
    )
    return result if part else activate(result, case.activation)


def tolerance(case: Case, part: str) -> float:
    """Of float32 sums of numbers of a normal distribution: one product less, or one too many, is
    further off.
    """
    taps = case.weight[0, 0].numel()
    if part == "_weight_grad":
        terms = case.grad.numel() // case.grad.shape[1]
    elif part == "_input_grad":
        terms = (
            int(case.rows.flatten().bincount().max()) * (len(case.weight) // len(case.rows)) * taps
        )
    else:
        terms = case.weight.shape[1] * taps
    return 2 * EPS * (terms + 32)


def difference(got: Tensor, want: Tensor, allowed: float) -> str:
    """What is wrong with a result, or nothing."""
    if got.shape != want.shape:
        return f"shape {list(got.shape)}, not {list(want.shape)}"
    off = float((got.double() - want).abs().max()) if got.numel() else 0.0
    return "" if off <= allowed else f"off by {off:.1e}, allowed {allowed:.1e}"


# ---- memory between pages that cannot be read


class Region:
    """Room for one array between unreadable pages, where it ends (or begins) at one of them."""

    size, guard = 64 << 20, 32 << 20

    def __init__(self):
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        base = libc.mmap(
            None, self.size + 2 * self.guard, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0
        )
        assert base not in (None, 2**64 - 1)
        self.begin = base + self.guard
        assert libc.mprotect(self.begin, self.size, mmap.PROT_READ | mmap.PROT_WRITE) == 0

    def address(self, size: int, begin: bool) -> int:
        assert size <= self.size
        return self.begin if begin else self.begin + self.size - size

    def place(self, t: Tensor) -> Tensor:
        """The same numbers, in an array that ends with the region."""
        size = t.numel() * t.element_size()
        if not size:
            return t
        buffer = (ctypes.c_char * size).from_address(self.address(size, False))
        return (
            torch.frombuffer(buffer, dtype=t.dtype)
            .as_strided(t.shape, t.contiguous().stride())
            .copy_(t)
        )


CANARY = b"\x5a" * 4096


def array_bytes(name: str, sizes: bytes) -> list[int]:
    """Of each array that a function of native.cpp takes, by the sizes that it gets before them."""
    if "norm" in name:
        batch, channels, pixels, *_ = struct.unpack("7q2d", sizes)
        x, statistics = batch * channels * pixels, 4 * channels
        forward, backward = (
            (x, *[channels] * 4, statistics, x),
            (x, x, statistics, *[channels] * 2, x),
        )
        return [4 * count for count in (backward if "grad" in name else forward)]
    batch, n_in, height, width, n_out, degree, share, stride, *_ = struct.unpack("12q", sizes)
    pixels, results = height * width, ((height - 1) // stride + 1) * ((width - 1) // stride + 1)
    x, y, rows = batch * n_in * pixels, batch * n_out * results, n_out // share * degree
    weight = n_out * degree * (9 if "conv3" in name else 1)
    counts = {
        "": (x, weight, rows, n_out, y),
        "input": (y, weight, rows, x),
        "weight": (y, x, rows, weight),
    }
    part = "input" if "input" in name else "weight" if "weight" in name else ""
    return [4 * count for count in counts[part]]


class Guarded:
    """A library of kernels whose functions get copies of their arrays, each in a region of its own.

    Copying reads what a kernel may read of an array by the sizes it is told, so that one that is
    shorter crashes here.
    """

    def __init__(self, library: ctypes.CDLL, report):
        self.library, self.report, self.begin = library, report, False
        self.regions = [Region() for _ in range(5)]

    def __getattr__(self, name):
        function = getattr(self.library, name)
        return (
            function
            if name in ("xzoo_lanes", "xzoo_fast")
            else lambda *args: self.call(name, function, *args)
        )

    def call(self, name, function, layer, *addresses):
        sizes = array_bytes(name, layer)
        ctypes.c_int.in_dll(self.library, "xzoo_guard_begin").value = self.begin
        places = [
            address and region.address(size, self.begin)
            for region, size, address in zip(
                self.regions[: len(sizes)], sizes, addresses, strict=True
            )
        ]
        given = [(place, size) for place, size in zip(places[:-1], sizes, strict=False) if place]
        for place, size, address in zip(places[:-1], sizes, addresses, strict=False):
            if place:
                ctypes.memmove(place, address, size)
        ctypes.memset(places[-1], 0xFF, sizes[-1])  # NaN, where nobody writes
        beside = places[-1] + sizes[-1] if self.begin else places[-1] - len(CANARY)
        ctypes.memmove(beside, CANARY, len(CANARY))
        before = [ctypes.string_at(place, size) for place, size in given]
        answer = function(layer, *places)
        if ctypes.string_at(beside, len(CANARY)) != CANARY:
            self.report(f"{name} wrote beside its result")
        if [ctypes.string_at(place, size) for place, size in given] != before:
            self.report(f"{name} wrote to an input")
        ctypes.memmove(addresses[-1], places[-1], sizes[-1])
        return answer


# ---- what is run


class Run:
    """Counts cases and faults, and keeps the case at hand where a crash leaves it."""

    def __init__(self, args):
        self.args, self.faults, self.done, self.case = args, 0, 0, ""

    def seeds(self):
        began, number = time.monotonic(), self.args.first
        while (
            time.monotonic() < began + self.args.seconds
            if self.args.seconds
            else self.done < self.args.cases
        ):
            yield self.args.seed * 10**7 + number
            number, self.done = number + 1, self.done + 1

    def begin(self, case, seed):
        self.case = f"--seed {seed // 10**7} --first {seed % 10**7}: {case}"
        if self.args.note:
            Path(self.args.note).write_text(self.case)

    def report(self, what):
        self.faults += 1
        print(f"{what}; {self.case}", flush=True)


def native_result(case: Case, part: str, bias=True) -> Tensor:
    activation = {} if part else {"activation": case.activation}
    return getattr(native, case.operation + part)(*case.tensors(part), *case.geometry, **activation)


def pages(run: Run, library: ctypes.CDLL) -> None:
    """Every kernel at both ends of its arrays: equal bits, and right ones."""
    guarded = Guarded(library, run.report)
    native._loaded[:] = [guarded]
    for seed in run.seeds():
        case = drawn(seed)
        run.begin(case, seed)
        torch.set_num_threads(case.threads)
        for part in PARTS:
            results = []
            for guarded.begin in (False, True):
                results.append(native_result(case, part))
            if not torch.equal(*results):
                run.report(f"{case.operation}{part} differs between the ends of a page")
            if case.products < 20_000_000 and seed % 3 == 0:
                wrong = difference(results[0], exact(case, part), tolerance(case, part))
                if wrong:
                    run.report(f"{case.operation}{part} {wrong}")


def norms(run: Run, library: ctypes.CDLL) -> None:
    """Batch norms at both ends of their arrays: equal bits, nothing written elsewhere."""
    regions = [Region() for _ in range(9)]
    begin = ctypes.c_int.in_dll(library, "xzoo_guard_begin")
    for seed in run.seeds():
        draw = random.Random(seed)
        torch.manual_seed(seed)
        batch, channels, pixels = draw.choice(BATCHES), draw.choice(INPUTS), draw.choice(SIZES)
        pixels *= draw.choice([1, pixels])
        while batch * channels * pixels > 300_000:
            pixels = (pixels + 1) // 2
            batch = (batch + 1) // 2
        training = batch * pixels > 1 and draw.random() < 0.7
        options = draw.randint(0, 1), draw.choice([1, 1, 2, 3, 5]), draw.randint(0, 3), training
        sizes = struct.pack("7q2d", batch, channels, pixels, *options, 1e-5, 0.1)
        affine, tracked = draw.random() < 0.7, not training or draw.random() < 0.7
        run.begin(f"{batch} x {channels} x {pixels}, {options}, {affine}, {tracked}", seed)
        x, grad = torch.randn(2, batch * channels * pixels)
        each = torch.rand(4, channels)
        given = [
            x,
            *(each[:2] if affine else (None, None)),
            *(each[2:] if tracked else (None,) * 2),
        ]
        results = []
        for begin.value in (False, True):
            places = [
                None if t is None else put(region, t, begin.value)
                for region, t in zip(regions[:5], given, strict=True)
            ]
            statistics = put(regions[5], torch.full([4 * channels], math.nan), begin.value)
            y = put(regions[6], torch.full([len(x)], math.nan), begin.value)
            found = [address_of(t) for t in (*places, statistics, y)]
            answers = [library.xzoo_norm(sizes, *found)]
            results.append([t.clone() for t in (*places[3:], statistics, y) if t is not None])
            d = put(regions[7], grad, begin.value)
            dscale, dbias = (
                put(r, torch.full([channels], math.nan), begin.value) for r in regions[1:3]
            )
            found = [address_of(t) for t in (d, places[0], statistics, dscale, dbias, y)]
            answers.append(library.xzoo_norm_grad(sizes, *found))
            results[-1] += [t.clone() for t in (dscale, dbias, y)]
            if any(answers) or not torch.equal(places[0], x) or not torch.equal(d, grad):
                run.report(f"answers {answers}, or an input is another")
        for a, b in zip(*results, strict=True):
            if not torch.equal(a, b) or not a.isfinite().all():
                run.report("a result differs between the ends of a page, or is not written")


def put(region: Region, t: Tensor, begin: bool) -> Tensor:
    """The same numbers in a region, at its begin or end."""
    buffer = (ctypes.c_char * (4 * t.numel())).from_address(region.address(4 * t.numel(), begin))
    return torch.frombuffer(buffer, dtype=t.dtype).copy_(t)


def address_of(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def asan(run: Run, library: ctypes.CDLL) -> None:
    """Every kernel on torch's own arrays; the sanitizer ends the process at the first fault."""
    native._loaded[:] = [library]
    for seed in run.seeds():
        case = drawn(seed)
        run.begin(case, seed)
        torch.set_num_threads((1, 2, 3, 5)[seed % 4])
        for part in PARTS:
            result = native_result(case, part)
            if case.products < 2_000_000:
                wrong = difference(result, exact(case, part), tolerance(case, part))
                if wrong:
                    run.report(f"{case.operation}{part} {wrong}")


def scratch(run: Run, library: ctypes.CDLL) -> None:
    """No request for scratch that is refused ends the process, and the next call is as ever."""
    native._loaded[:] = [library]
    asked, refused = (
        ctypes.c_long.in_dll(library, f"xzoo_scratch_{name}") for name in ("asked", "refused")
    )
    for seed in run.seeds():
        case = drawn(seed, numbers=(20_000,))
        run.begin(case, seed)
        torch.set_num_threads(case.threads)
        for part in PARTS:
            asked.value = refused.value = 0
            want = native_result(case, part)
            # With threads, one more or less may be asked for each time: what is never reached is
            # not refused.
            for number in range(1, asked.value + 1):
                asked.value, refused.value = 0, number
                with contextlib.suppress(MemoryError):
                    native_result(case, part)
                    if asked.value >= number:
                        run.report(
                            f"{case.operation}{part} does not say that scratch {number} was refused"
                        )
                refused.value = 0
                if not torch.equal(native_result(case, part), want):
                    run.report(f"{case.operation}{part} differs after scratch {number} was refused")


def results(case: Case, backend: str, dtype=torch.float32) -> tuple[Tensor | None, ...]:
    """(y, dx, dw, db) through the door."""
    x, weight = (t.to(dtype).detach().requires_grad_() for t in (case.x, case.weight))
    bias = None if case.bias is None else case.bias.to(dtype).detach().requires_grad_()
    with ops.backend(backend):
        y = getattr(ops, case.operation)(
            x, weight, case.rows, bias, *case.geometry, activation=case.activation
        )
        y.backward(case.grad.to(dtype))
    return y.detach(), x.grad, weight.grad, None if bias is None else bias.grad


def backends(run: Run) -> None:
    """native, gather, dense and group in turn against float64, with 1 to 5 threads in turn, in one
    process.
    """
    assert native.available()
    for seed in run.seeds():
        case, seed = drawn_distinct(seed, (3_000,) * 8 + (20_000, 60_000))
        run.begin(case, seed)
        torch.set_num_threads(seed % 5 + 1)
        # A value at the bend of an activation rounds to either side of it, and its gradient is let
        # through or not.
        if case.activation:
            value, near = exact(case._replace(activation=""), ""), tolerance(case, "")
            case = case._replace(
                grad=case.grad * ((value.abs() > near) & ((value - 6).abs() > near))
            )
        want = results(case, "dense", torch.float64)
        allowed = [tolerance(case, part) for part in PARTS]
        allowed.append(2 * EPS * (case.grad.numel() // case.grad.shape[1] + 32))
        names = ["native", "gather", "dense"]
        if group.parts(case.rows, case.x.shape[1]) is not None:
            names.append("group")
        for backend in names:
            got = results(case, backend)
            for name, a, b, limit in zip(("y", "dx", "dw", "db"), got, want, allowed, strict=True):
                wrong = "" if b is None else difference(a, b, limit)
                if wrong:
                    run.report(f"{backend}: {name} {wrong}")


# ---- arguments that are wrong in one place

REFUSED = (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError)
UNREAD = {"_input_grad": "x", "_weight_grad": "weight"}  # of these only the sizes count


def spoilt(case: Case, draw: random.Random) -> tuple[str, dict]:
    """What is wrong, and the arguments x, weight, rows, bias and grad with it."""
    given = {
        "x": case.x,
        "weight": case.weight,
        "rows": case.rows,
        "bias": case.bias,
        "grad": case.grad,
    }
    name = draw.choice([name for name, t in given.items() if t is not None])
    t = given[name]
    what = draw.choice(
        ["dtype", "shape", "shape", "value", "storage", "expanded", "negated", "empty"]
    )
    if what == "dtype":
        types = [
            torch.float16,
            torch.bfloat16,
            torch.float64,
            torch.int64,
            torch.int16,
            torch.uint8,
            torch.complex64,
        ]
        given[name] = t.to(draw.choice(types))
        return f"{name} is {given[name].dtype}", given
    if what == "shape":
        axis = draw.randrange(t.dim())
        length = max(0, t.shape[axis] + draw.choice([-2, -1, 1, 2]))
        longer = torch.cat([t, t, t, t], axis) if length > t.shape[axis] else t
        given[name] = longer.narrow(axis, 0, min(length, longer.shape[axis])).contiguous()
        if draw.random() < 0.2:
            given[name] = t[None] if draw.random() < 0.5 else t[0]
    elif what == "value":
        rows = case.rows.to(draw.choice([torch.int32, torch.int64]))
        far = [-1, case.x.shape[1], 2**31 - 1, -(2**31)] + [2**32, 2**40 + 1] * (
            rows.dtype == torch.int64
        )
        rows.data[draw.randrange(len(rows)), draw.randrange(rows.shape[1])] = draw.choice(far)
        name, given["rows"] = "rows", rows
    elif what == "storage":
        given[name] = t.clone()
        given[name].untyped_storage().resize_(0)
        return f"{name} has lost its storage", given
    elif what == "expanded":
        given[name] = t[:1].expand(t.shape)
    elif what == "negated":
        given[name] = torch._neg_view(t) if t.is_floating_point() else t
    elif what == "empty":
        axis = draw.randrange(t.dim())
        given[name] = t.narrow(axis, 0, 0).contiguous()
    return f"{name} {what} {list(given[name].shape)}", given


def has_lost_its_storage(t: Tensor | None) -> bool:
    return t is not None and t.numel() > 0 and not t.untyped_storage().nbytes()


def hostile(run: Run, library: ctypes.CDLL) -> None:
    """Arguments that are wrong in one place are refused, or computed as `dense` does; nothing else
    is read.
    """
    native._loaded[:] = [Guarded(library, run.report)]
    regions = [Region() for _ in range(5)]
    for seed in run.seeds():
        case, seed = drawn_distinct(seed, (2_000,))
        what, given = spoilt(case, random.Random(seed))
        run.begin(f"{what}, of {case}", seed)
        torch.set_num_threads(case.threads)
        for region, (name, t) in zip(regions, given.items(), strict=True):
            if (
                t is not None
                and t.untyped_storage().nbytes()
                and t.is_contiguous()
                and not t.is_neg()
            ):
                given[name] = region.place(t)
        for part in PARTS:
            names = ("grad", "x", "weight", "rows") if part else ("x", "weight", "rows", "bias")
            gone = [name for name in names if has_lost_its_storage(given[name])]
            calls = {"native": given, "auto": given, "dense": given}
            if gone:  # torch's own operations crash
                calls = {"native": given}
            if gone == [UNREAD.get(part)]:
                calls["dense"] = given | {gone[0]: getattr(case, gone[0])}
            found = {}
            for backend, values in calls.items():
                operation = getattr(torch.ops.xzoo, case.operation + part)
                tensors = [values[name] for name in names]
                try:
                    found[backend] = operation(*tensors, *case.geometry, backend)
                except REFUSED as error:
                    found[backend] = type(error).__name__
            want = found.get("dense", "no storage")
            for backend, got in found.items():
                if isinstance(got, Tensor) and isinstance(want, str):
                    run.report(
                        f"{backend} {case.operation}{part} accepts what dense refuses ({want})"
                    )
                elif isinstance(got, Tensor):
                    wrong = difference(
                        got,
                        want.double(),
                        1e-3 * max(1, float(want.abs().max()) if want.numel() else 1),
                    )
                    if wrong:
                        run.report(f"{backend} {case.operation}{part} {wrong}")


RUNS = {"pages": pages, "norms": norms, "scratch": scratch, "hostile": hostile, "asan": asan}


def main() -> int:
    faulthandler.enable()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=[*RUNS, "backends"])
    parser.add_argument("level", nargs="?", default="")
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--note", default="", help="the file that names the case at hand")
    parser.add_argument("--change", nargs=2, help="a piece of the kernels, and what to put there")
    args = parser.parse_args()
    run, began = Run(args), time.monotonic()
    if args.what == "backends":
        backends(run)
    else:
        library = built(args.level, args.what == "asan", args.change)
        began = time.monotonic()
        RUNS[args.what](run, library)
    print(
        f"{args.what} {args.level}: {run.done} cases, {run.faults} faults, "
        f"{time.monotonic() - began:.0f} s"
    )
    return int(run.faults > 0)


if __name__ == "__main__":
    sys.exit(main())
