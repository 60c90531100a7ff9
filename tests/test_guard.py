"""The kernels touch no memory that is not theirs, whatever they are given, and want of memory ends
no process.

The slow tests run tests/guard.py, which says more, in processes of their own: minutes, most of
which compiling takes, once for each level and fault. XZOO_GUARD_CASES takes that many cases of each
instead:

    XZOO_GUARD_CASES=10000 pytest -n 0 -m slow tests/test_guard.py -k pages
    XZOO_GUARD_CASES=20000 pytest -n 0 -m slow tests/test_guard.py -k backends
    XZOO_GUARD_SECONDS=600 pytest -n 0 -m slow tests/test_guard.py -k sanitizer
"""

import itertools
import os
import platform
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from xzoo import ops
from xzoo.errors import XzooError
from xzoo.ops import native

GUARD = Path(__file__).parent / "guard.py"
CASES = int(os.environ.get("XZOO_GUARD_CASES", "0"))
SECONDS = float(os.environ.get("XZOO_GUARD_SECONDS", "10"))
LEVELS = ["best", "x86-64-v3", "x86-64", "plain512", "plain512fast"]

pytestmark = pytest.mark.skipif(not native.possible(), reason="no C++ compiler")


def level_of(name: str) -> str:
    """What -march= takes, of a name in LEVELS; skips what this CPU has not, or has under another
    name.
    """
    best = next(
        (flag.partition("=")[2] for flag in native._flags() if flag.startswith("-march=")), ""
    )
    if name == "best":
        return best
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("these levels are those of x86")
    if name == best or (name == "x86-64-v3" and not best):
        pytest.skip(f"this CPU's best level is {best or 'plain'}")
    return name


def guard(folder, *args, **environment):
    """(exit code, last line, what to show) of guard.py in a process of its own."""
    note = folder / "case"
    # Threads that wait do not spin, which beside other work takes most of the time.
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive", **environment}
    command = [sys.executable, str(GUARD), *map(str, args), "--note", str(note)]
    # An hour is far more than these take, but for as many cases as somebody asks for.
    limit = None if CASES else 3600 + SECONDS
    run = subprocess.run(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=limit,
    )
    shown = (
        f"{run.stdout[-3000:]}\nexit code {run.returncode} in the case "
        f"{note.read_text() if note.exists() else '-'}"
    )
    return run.returncode, run.stdout.strip().rpartition("\n")[2], shown


def cases(number: int) -> int:
    return CASES or number


@pytest.mark.slow
@pytest.mark.parametrize("name", LEVELS)
def test_pages_beside_every_array_are_never_touched(name, tmp_path):
    count = cases(300)
    code, last, shown = guard(tmp_path, "pages", level_of(name), "--cases", count)
    assert code == 0 and f": {count} cases, 0 faults" in last, shown


@pytest.mark.slow
@pytest.mark.parametrize("name", LEVELS[:-1])  # norms are alike on FAST CPUs
def test_pages_beside_a_norms_arrays_are_never_touched(name, tmp_path):
    count = cases(300)
    code, last, shown = guard(tmp_path, "norms", level_of(name), "--cases", count)
    assert code == 0 and f": {count} cases, 0 faults" in last, shown


@pytest.mark.slow
@pytest.mark.parametrize("name", LEVELS)
def test_scratch_that_is_refused_ends_in_a_memory_error(name, tmp_path):
    count = cases(60)
    code, last, shown = guard(tmp_path, "scratch", level_of(name), "--cases", count)
    assert code == 0 and f": {count} cases, 0 faults" in last, shown


@pytest.mark.slow
def test_arguments_that_are_wrong_in_one_place_touch_nothing_else(tmp_path):
    count = cases(300)
    code, last, shown = guard(tmp_path, "hostile", level_of("best"), "--cases", count)
    assert code == 0 and f": {count} cases, 0 faults" in last, shown


@pytest.mark.slow
def test_backends_agree_in_one_process_with_1_to_5_threads(tmp_path):
    count = cases(500)
    code, last, shown = guard(tmp_path, "backends", "--cases", count)
    assert code == 0 and f": {count} cases, 0 faults" in last, shown


def libraries() -> str:
    """What has to be loaded before everything else for the address sanitizer; skips where there is
    none.
    """
    compiler, found = shlex.split(os.environ.get("CXX", "")) or ["g++"], []
    if not shutil.which(compiler[0]):
        pytest.skip(f"no {compiler[0]}, which knows where the address sanitizer is")
    for name in ("libasan.so", "libstdc++.so.6"):
        run = subprocess.run(
            [*compiler, f"-print-file-name={name}"], capture_output=True, text=True
        )
        if not Path(run.stdout.strip()).is_absolute():
            pytest.skip(f"{compiler[0]} has no {name}")
        found.append(run.stdout.strip())
    return " ".join(found)


def sanitized(tmp_path, *args):
    options = "detect_leaks=0:quarantine_size_mb=64:allocator_may_return_null=1"
    return guard(tmp_path, "asan", *args, LD_PRELOAD=libraries(), ASAN_OPTIONS=options)


@pytest.mark.slow
# at other levels: test_native.py, without Python
def test_the_address_sanitizer_finds_nothing(tmp_path):
    code, last, shown = sanitized(tmp_path, level_of("best"), "--seconds", SECONDS)
    assert code == 0 and re.search(r": \d+ cases, 0 faults", last), shown


# Faults put into the kernels, each of which has to be found: a last vector written whole, one read
# whole, a vector read before an array, scratch too short by the vectors that are loaded past its
# end, a result of which a part stays.
FAULTS = {
    "written": (
        "if (i < n) store_some(to + i, load_some(from + i, n - i), n - i);",
        "if (i < n) store(to + i, all(0));",
    ),
    "read": (
        "r[l] = l >= n ? all(0) : some == VL ? load(p) : load_some(p, some);",
        "r[l] = l >= n ? all(0) : load(p);",
    ),
    "before": (
        "const float* sample = x + n * C * H * W;\n      to_rows",
        "const float* sample = x + n * C * H * W - 1;\n      to_rows",
    ),
    "scratch": ("scratch[0].floats(C * plane + VL * VL)", "scratch[0].floats(C * plane - VL)"),
    "unwritten": (
        "if (l < n) store_some(to + l * row + i, r[l], some);",
        "if (l + 1 < n) store_some(to + l * row + i, r[l], some);",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_kernels_is_found(fault, tmp_path):
    code, last, shown = guard(
        tmp_path, "pages", level_of("best"), "--cases", 300, "--change", *FAULTS[fault]
    )
    assert code == (1 if fault == "unwritten" else -signal.SIGSEGV), shown
    assert code != 1 or re.search(r": 300 cases, [1-9]\d* faults", last), shown


# ---- sizes

# Each a layer of native.py's 12 numbers that ended the process, by a division by zero or by numbers
# that overflow.
LAYER = {"N": 2, "C": 8, "H": 5, "W": 5, "O": 4, "degree": 3, "share": 1, "stride": 1}
NO_LAYERS = [
    *({name: 0} for name in ("C", "O", "degree", "share", "stride")),
    *({name: -1} for name in LAYER),
    *(
        {"share": 3},
        {"share": 5},
        {"stride": 3},
        {"threads": 0},
        {"threads": -4},
        {"activation": 3},
    ),
    *({"O": 2**31, "degree": 2**31}, {"O": 2**16, "degree": 2**15}, {"C": 2**31}, {"C": 2**32 + 8}),
    *(
        {"N": 2**31, "H": 2**31, "W": 2**31},
        {"H": 2**62},
        {"degree": 2**62},
        {"share": 2**62, "O": 2**63 - 1},
    ),
]


@pytest.mark.parametrize("wrong", NO_LAYERS, ids=str)
def test_sizes_that_are_no_layer_are_refused_before_any_address_is_used(wrong):
    assert native.available()
    sizes = {**LAYER, "x_last": 0, "y_last": 0, "threads": 1, "activation": 0, **wrong}
    for name, tensors in native._TENSORS.items():
        function = getattr(native._loaded[0], name)
        assert function(struct.pack("12q", *sizes.values()), *[None] * tensors) == 3, name


def test_a_layer_that_the_kernels_do_not_do_is_refused_by_its_shapes():
    assert native.available()
    x, weight, rows = torch.ones(20, 8), torch.ones(4, 0), torch.zeros(4, 0).int()
    with pytest.raises(
        XzooError,
        match=r"do not support a layer of x \[20, 8\], weight \[4, 0\], share 1; use backend",
    ):
        native.linear_weight_grad(torch.ones(20, 4), x, weight, rows)


@pytest.mark.parametrize("last", [False, True])
def test_a_batch_without_pictures_has_results_without_and_gradients_of_zero(last):
    x, grad = torch.ones(0, 8, 3, 3), torch.ones(0, 4, 3, 3)
    if last:
        x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
    rows, geometry = torch.tensor([[0, 1, 2]] * 4), ((1, 1), (0, 0), (1, 1))
    for threads, share in itertools.product((1, 3), (1, 4)):
        torch.set_num_threads(threads)
        weight = torch.ones(4, 3, 1, 1)
        with ops.backend("native"):
            y = ops.conv2d(x, weight, rows[::share], None, *geometry)
        assert y.shape == grad.shape
        name = [*geometry, "native"]
        dx = torch.ops.xzoo.conv2d_input_grad(grad, x, weight, rows[::share], *name)
        dw = torch.ops.xzoo.conv2d_weight_grad(grad, x, weight, rows[::share], *name)
        assert dx.shape == x.shape and torch.equal(dw, torch.zeros_like(weight))
    torch.set_num_threads(1)


@pytest.mark.parametrize("size", [(2, 8, 0, 5), (20, 8, 5, 0), (1, 8, 0, 0)])
@pytest.mark.parametrize("backend", ["auto", "dense", "native"])
def test_a_picture_without_pixels_is_refused_as_torch_does(size, backend):
    x, weight, rows = torch.ones(size), torch.ones(4, 3, 1, 1), torch.tensor([[0, 1, 2]] * 4)
    with pytest.raises(RuntimeError):
        torch.nn.functional.conv2d(x, torch.ones(4, 8, 1, 1))
    with ops.backend(backend), pytest.raises(RuntimeError, match="only the batch may be empty"):
        ops.conv2d(x, weight, rows)


# ---- what torch's own convolutions do wrong

STRIDED = """
import itertools, torch
from xzoo import ops
geometry = ((2, 2), (0, 0), (1, 1))
for backend, n_in, threads in itertools.product(("dense", "gather", "group"), (3, 7), (1, 2, 3)):
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    x = torch.randn(8, n_in, 56, 6).contiguous(memory_format=torch.channels_last)
    grad, weight, rows = torch.randn(8, 20, 28, 3), torch.randn(20, n_in, 1, 1), torch.arange(n_in)[None].int()
    want = torch.einsum("bohw,bchw->oc", grad.double(), x[:, :, ::2, ::2].double())
    for _ in range(50):
        dw = torch.ops.xzoo.conv2d_weight_grad(grad, x, weight, rows, *geometry, backend)
        torch.testing.assert_close(dw[:, :, 0, 0].double(), want, rtol=0, atol=1e-3)
print("done")
"""


@pytest.mark.slow
def test_weight_gradients_of_strided_1x1_kernels_of_few_channels(tmp_path):
    # oneDNN's kernel for them, in channels_last, writes beside its memory, or leaves the result
    # wrong (oneDNN#6035).
    run = subprocess.run(
        [sys.executable, "-c", STRIDED], capture_output=True, text=True, timeout=600
    )
    assert (run.returncode, run.stdout) == (0, "done\n"), run.stderr[-2000:]


# ---- memory that cannot be had

LIMITED = """
import resource, torch
from xzoo.ops import native
torch.set_num_threads(1)
assert native.available()
x, grad, weight = torch.rand(16, 128, 96, 96), torch.rand(16, 4, 96, 96), torch.rand(4, 2, 3, 3)
rows, geometry = torch.tensor([[0, 1], [2, 3], [4, 5], [126, 127]]).int(), ((1, 1), (1, 1), (1, 1))
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (16 << 20), resource.RLIM_INFINITY))
for _ in range(2):
    try:
        native.conv2d_weight_grad(grad, x, weight, rows, *geometry)
    except MemoryError as error:
        print(error)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
got = native.conv2d_weight_grad(grad, x, weight, rows, *geometry)
want = torch.nn.grad.conv2d_weight(x[:, :2], [1, 2, 3, 3], grad[:, :1], padding=1)
torch.testing.assert_close(got[:1], want, rtol=1e-3, atol=0)
print("done")
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_AS and /proc")
def test_a_process_without_memory_goes_on_after_a_memory_error():
    run = subprocess.run(
        [sys.executable, "-c", LIMITED], capture_output=True, text=True, timeout=600
    )
    said = (
        "no memory for what the native kernels keep of a layer of x [16, 128, 96, 96], weight [4, "
        "2, 3, 3], share 1"
    )
    assert run.stdout.splitlines() == [f"{said}: take a smaller batch"] * 2 + ["done"], run.stderr[
        -2000:
    ]
