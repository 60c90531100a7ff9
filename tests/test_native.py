"""Our CPU kernels: against torch in float64, over threads, processes and machines without what they
need.

`python tests/test_native.py` renews golden/native.csv, the times that the rule of `auto` is held
against: some 15 minutes on one thread. Under ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2
MKL_ENABLE_INSTRUCTIONS=AVX2, which hold torch and our kernels, it renews the rows of machines that
have vectors of 8 floats.
"""

import csv
import itertools
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from products import NAMES, results

from xzoo import graphs, ops
from xzoo.errors import XzooError
from xzoo.ops import native
from xzoo.ops.auto import choose, library
from xzoo.ops.compiler import whole
from xzoo.ops.tune import PRODUCTS, LayerShape, tune

GOLDEN = Path(__file__).parent / "golden" / "native.csv"
pytestmark = pytest.mark.skipif(not native.possible(), reason="no C++ compiler")


@st.composite
def cases(draw):
    """(x, weight, neighbours, bias, grad, geometry), positive, so that no sum cancels; float32
    values in float64.
    """
    share, blocks = draw(st.sampled_from([1, 2, 3, 4, 5, 8])), draw(st.integers(1, 9))
    n_in = draw(st.sampled_from([1, 3, 7, 16, 33, 65, 400]))
    degree, kernel = draw(st.integers(1, n_in)), draw(st.sampled_from([0, 1, 3, 3]))
    batch = draw(st.sampled_from([0, 1, 2, 4, 5, 8, 9, 16, 17, 33]))
    sizes = st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 9, 14, 15, 17, 21, 33])
    stride = draw(st.sampled_from([1, 2]))
    geometry = ((stride,) * 2, (kernel // 2,) * 2, (1, 1)) if kernel else ()
    pixels = [draw(sizes), draw(sizes)] if kernel else []
    random = torch.Generator().manual_seed(draw(st.integers(0, 99)))

    def positive(*shape):
        return (torch.rand(*shape, generator=random) + 0.5).double()

    rows = torch.stack([torch.randperm(n_in, generator=random)[:degree] for _ in range(blocks)])
    last = torch.channels_last if kernel and draw(st.booleans()) else torch.contiguous_format
    return (
        positive(batch, n_in, *pixels).to(memory_format=last),
        positive(blocks * share, degree, *([kernel] * 2 if kernel else [])),
        rows.to(draw(st.sampled_from([torch.int32, torch.int64]))),
        positive(blocks * share) if draw(st.booleans()) else None,
        positive(batch, blocks * share, *((s - 1) // stride + 1 for s in pixels)).to(
            memory_format=draw(st.sampled_from([last, torch.contiguous_format]))
        ),
        geometry,
    )


@settings(derandomize=True, deadline=None, max_examples=150)
@given(case=cases(), threads=st.sampled_from([1, 2, 3]))
def check(case, threads):
    torch.set_num_threads(threads)
    for name, got, want in zip(
        NAMES,
        results(case, "native", torch.float32),
        results(case, None, torch.float64),
        strict=True,
    ):
        if want is not None:
            assert got.shape == want.shape
            error, allowed = (got - want).norm(), 1e-5 * want.norm()
            assert error <= allowed, f"{name} off by {error:.1e}, allowed {allowed:.1e}"


def test_kernels_equal_torch_in_float64(kernels):
    assert native.lanes() in (4, 8, 16)
    check()


def random_case(kernel=3, n_in=24, n_out=16, size=9, degree=5, share=1, batch=20, stride=1):
    rows = torch.from_numpy(graphs.sample("random", n_in, n_out, degree, share, seed=0))
    taps, pixels = ([kernel] * 2, [size] * 2) if kernel else ([], [])
    y = [(size - 1) // stride + 1] * 2 if kernel else []
    shapes = [batch, n_in, *pixels], [n_out, degree, *taps], [n_out], [batch, n_out, *y]
    x, weight, bias, grad = (
        torch.randn(s, generator=torch.Generator().manual_seed(0)) for s in shapes
    )
    return (
        x,
        weight,
        rows,
        bias,
        grad,
        ((stride,) * 2, (kernel // 2,) * 2, (1, 1)) if kernel else (),
    )


@pytest.mark.parametrize(
    "options",
    [{}, {"batch": 3}, {"stride": 2}, {"kernel": 1, "share": 4}, {"kernel": 0}]
    # dx: threads by blocks of inputs
    + [{"kernel": 1, "share": 4, "n_in": 130, "size": 2, "batch": 1}]
    + [{"kernel": 1, "n_in": 600}]  # dw: the sums of three panels; y: blocks of inputs
    + [{"size": size, "batch": batch} for size, batch in ((2, 1), (4, 2), (5, 1), (8, 1))]
    + [
        {"stride": 2, "batch": 1},
        {"stride": 2, "batch": 3, "size": 33},
        {"kernel": 0, "share": 4, "batch": 2},
    ]
    + [{"kernel": 0, "n_in": 512, "n_out": 1024, "degree": 256, "batch": 1}],  # dx: sums of pieces
    ids=str,
)
def test_bits_do_not_depend_on_the_number_of_threads(kernels, options):
    case, found = random_case(**options), []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        found.append(results(case, "native", torch.float32)[:3])
    assert all(torch.equal(a, b) for run in found[1:] for a, b in zip(run, found[0], strict=True))


def forward(x, weight, rows, bias, geometry, activation=""):
    with ops.backend("native"):
        if not geometry:
            return ops.linear(x, weight, rows, bias, activation)
        return ops.conv2d(x, weight, rows, bias, *geometry, activation=activation)


def agree(case):
    for name, got, want in zip(
        NAMES,
        results(case, "native", torch.float32),
        results(case, None, torch.float64),
        strict=True,
    ):
        torch.testing.assert_close(
            got.double(), want, rtol=1e-5, atol=0, msg=lambda said, name=name: f"{name}: {said}"
        )


def test_small_planes_of_few_samples(kernels):
    generator = torch.Generator().manual_seed(0)
    sizes, batches, strides = (
        itertools.product((1, 2, 3, 4, 5, 8), (1, 2, 3, 4, 7, 8)),
        (1, 3, 9),
        (1, 2),
    )
    for (height, width), batch, stride in itertools.product(sizes, batches, strides):
        y = (height - 1) // stride + 1, (width - 1) // stride + 1
        shapes = (batch, 7, height, width), (19, 5, 3, 3), (19,), (batch, 19, *y)
        x, weight, bias, grad = (
            torch.rand(*shape, generator=generator).double() + 0.5 for shape in shapes
        )
        rows = torch.stack([torch.randperm(7, generator=generator)[:5] for _ in range(19)])
        for form in (torch.contiguous_format, torch.channels_last):
            x, grad = x.to(memory_format=form), grad.to(memory_format=form)
            agree((x, weight, rows, bias, grad, ((stride,) * 2, (1, 1), (1, 1))))


@pytest.mark.parametrize("share", [1, 3, 8])
def test_linear_layers_of_few_samples(kernels, share):
    generator = torch.Generator().manual_seed(0)
    for batch, (blocks, degree) in itertools.product(
        (1, 2, 4), ((7, 1), (6, 31), (5, 64), (1032 // share, 517))
    ):
        rows = torch.stack(
            [torch.randperm(517, generator=generator)[:degree] for _ in range(blocks)]
        )
        shapes = (batch, 517), (blocks * share, degree), (blocks * share,), (batch, blocks * share)
        x, weight, bias, grad = (
            torch.rand(*shape, generator=generator).double() + 0.5 for shape in shapes
        )
        agree((x, weight, rows, bias, grad, ()))


@pytest.mark.parametrize(
    "options",
    [
        *({}, {"batch": 3}, {"batch": 3, "share": 2}, {"stride": 2}, {"stride": 2, "batch": 2}),
        *({"size": size, "batch": 1} for size in (2, 4, 5, 8)),
        *(
            {"kernel": 1},
            {"kernel": 1, "share": 4},
            {"kernel": 1, "n_in": 600, "degree": 2},
            {"kernel": 1, "batch": 1},
        ),
        *({"kernel": 0}, {"kernel": 0, "share": 4}, {"kernel": 0, "batch": 1}),
    ],
    ids=str,
)
def test_an_activation_in_the_store_is_the_one_after_it(kernels, options):
    x, weight, rows, bias, _, geometry = random_case(**options)
    x[0, rows[0, 0]] = math.nan
    for form in (torch.contiguous_format, torch.channels_last)[: x.dim() // 2]:
        x = x.to(memory_format=form)
        plain = forward(x, 3 * weight, rows, bias, geometry)
        assert plain.isnan().any() and (plain < 0).any() and (plain > 6).any()
        for name, function in (("relu", F.relu), ("relu6", F.relu6)):
            y = forward(x, 3 * weight, rows, bias, geometry, name)
            assert torch.equal(y.nan_to_num(9), function(plain).nan_to_num(9)), name


@pytest.mark.parametrize("batch", [2, 20])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("kernel", [3, 1, 0])
def test_nan_and_infinity_reach_exactly_the_connected_outputs(kernels, kernel, value, batch):
    x, weight, rows, _, _, geometry = random_case(kernel, batch=batch)
    weight = weight.abs() + 1
    x[1, 4] = value
    with ops.backend("native"):
        y = ops.conv2d(x, weight, rows, None, *geometry) if kernel else ops.linear(x, weight, rows)
    reads = (rows == 4).any(1)
    assert 0 < reads.sum() < len(reads)
    finite = y.flatten(2).isfinite() if kernel else y.isfinite()[:, :, None]
    assert torch.equal(finite[1].all(1), ~reads)
    assert torch.equal(finite[1].any(1), ~reads)
    assert finite[0].all() and finite[2:].all()


@pytest.mark.parametrize("batch", [2, 40])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("kernel", "share", "stride"),
    [(3, 1, 1), (3, 1, 2), (1, 1, 1), (1, 4, 1), (0, 1, 1), (0, 4, 1)],
)
def test_nan_and_infinity_in_a_gradient_reach_exactly_what_it_belongs_to(
    kernels, kernel, share, stride, value, batch
):
    x, weight, rows, _, grad, geometry = random_case(
        kernel, share=share, batch=batch, stride=stride
    )
    grad[1, 6] = value
    _, dx, dw, _ = results(
        (x.abs() + 1, weight.abs() + 1, rows, None, grad, geometry), "native", torch.float32
    )
    read = torch.zeros(x.shape[1], dtype=torch.bool)
    read[rows[6 // share].long()] = True
    assert 0 < read.sum() < len(read)
    finite = dx.reshape(*dx.shape[:2], -1).isfinite()
    assert torch.equal(finite[1].all(1), ~read) and torch.equal(finite[1].any(1), ~read)
    assert finite[0].all() and finite[2:].all()
    finite = dw.reshape(len(dw), -1).isfinite()
    assert not finite[6].any()
    assert finite[:6].all() and finite[7:].all()


def test_strided_tensors_are_read_as_they_are(kernels):
    x, weight, rows, bias, grad, geometry = random_case()
    strided = [
        torch.stack([t, torch.full_like(t, math.nan)], -1)[..., 0] for t in (x, weight, bias, grad)
    ]
    case = (*strided[:2], rows.t().contiguous().t(), *strided[2:], geometry)
    for got, want in zip(
        results(case, "native", torch.float32),
        results((x, weight, rows, bias, grad, geometry), "native", torch.float32),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


def test_output_keeps_the_memory_format(kernels):
    for kernel, batch in itertools.product((3, 1), (2, 20)):
        x, weight, rows, bias, _, geometry = random_case(kernel, batch=batch)
        with ops.backend("native"):
            for form in (torch.contiguous_format, torch.channels_last):
                assert ops.conv2d(
                    x.to(memory_format=form), weight, rows, bias, *geometry
                ).is_contiguous(memory_format=form)


def test_neighbour_out_of_range_is_refused(kernels):
    x, weight, rows, bias, _, geometry = random_case()
    for bad in (-1, x.shape[1]):
        wrong = rows.clone()
        wrong[3, 2] = bad
        with (
            ops.backend("native"),
            pytest.raises(IndexError, match="neighbours must be from 0 to 23"),
        ):
            ops.conv2d(x, weight, wrong, bias, *geometry)


@pytest.mark.parametrize(
    ("options", "dtype", "geometry"),
    [
        ({}, torch.float64, None),
        ({}, torch.float32, ((1, 1), (0, 0), (1, 1))),
        ({}, torch.float32, ((2, 1), (1, 1), (1, 1))),
        ({}, torch.float32, ((1, 1), (1, 1), (2, 2))),
        ({"kernel": 5}, torch.float32, None),
        ({"kernel": 1}, torch.float32, ((1, 1), (1, 1), (1, 1))),
    ],
)
def test_what_has_no_kernel_is_refused_by_name_and_done_by_auto(options, dtype, geometry):
    x, weight, rows, bias, _, own = random_case(**options)
    args = [t.to(dtype) if t.is_floating_point() else t for t in (x, weight, rows, bias)]
    with (
        ops.backend("native"),
        pytest.raises(XzooError, match="backend 'native' has no kernel for conv2d of"),
    ):
        ops.conv2d(*args, *(geometry or own))
    dense = ops.dense.scatter(args[1], rows, x.shape[1])
    torch.testing.assert_close(
        ops.conv2d(*args, *(geometry or own)), F.conv2d(args[0], dense, args[3], *(geometry or own))
    )


def test_two_threads_may_call_at_once(kernels):
    torch.set_num_threads(2)
    made = [
        random_case(size=s, batch=b, stride=t)
        for s, b, t in ((14, 20, 1), (9, 3, 1), (8, 33, 2), (5, 16, 1))
    ]
    want = [results(case, "native", torch.float32) for case in made]
    wrong = []

    def work(case, expected):
        for _ in range(20):
            got = results(case, "native", torch.float32)
            wrong.extend(
                1 for a, b in zip(got[:3], expected[:3], strict=True) if not torch.equal(a, b)
            )

    workers = [threading.Thread(target=work, args=pair) for pair in zip(made, want, strict=True)]
    with ops.backend("native"):
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert not wrong


def test_kernels_are_held_to_the_vectors_that_torch_is_held_to(monkeypatch):
    found = {}
    for capability in ("", "avx512", "avx2", "default"):
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", capability)
        found[capability] = [flag for flag in native._flags() if flag.startswith("-march=")]
    assert found["default"] == []
    assert found["avx512"] == found[""]  # torch does not use what the CPU lacks, nor do we
    assert found["avx2"] == [flag.replace("-v4", "-v3") for flag in found[""]]


# ---- building, each in a process of its own

CALL = """
import logging, sys, torch
from xzoo import ops
from xzoo.ops import native
logging.basicConfig(format="%(message)s")
x, weight = torch.ones(2, 4), torch.ones(3, 2)
rows = torch.tensor([[0, 1], [1, 2], [2, 3]])
"""


def process(code, home, **environment):
    environment = {**os.environ, "XZOO_HOME": str(home), **environment}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", CALL + code], env=environment, **pipes)


def said(run):
    out, err = run.communicate(timeout=300)
    # On a slow machine a first build says that it lasts; test_native_build.py is about that.
    lines = [
        line for line in err.splitlines() if "CPU kernels" not in line or "not available" in line
    ]
    return out.strip(), "\n".join(lines).strip(), run.returncode


NATIVE = "\nwith ops.backend('native'): print(ops.linear(x, weight, rows).sum().item())"
AUTO = "\nfor _ in range(2): print(native.available(), ops.linear(x, weight, rows).sum().item())"


@pytest.mark.slow
def test_import_compiles_nothing(tmp_path):
    assert said(process("print(native._loaded)", tmp_path / "home")) == ("[]", "", 0)
    assert not (tmp_path / "home").exists()


@pytest.mark.slow
def test_a_broken_compiler_is_said_once_and_the_library_used(tmp_path):
    out, err, code = said(process(AUTO, tmp_path, CXX="/bin/false"))
    assert (out, code) == ("False 12.0\nFalse 12.0", 0)
    assert len(err.splitlines()) == 1
    assert err.startswith(
        "xzoo's own CPU kernels are not available, torch's are used: /bin/false failed with code 1"
    )
    out, err, code = said(process(NATIVE, tmp_path, CXX="/nowhere/g++"))
    assert code == 1 and "backend 'native' is not available here" in err
    assert [path.suffix for path in (tmp_path / "native").iterdir()] == [".lock"]


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_is_done_without(tmp_path):
    (tmp_path / "file").write_text("")  # for root, every folder can be written
    for home in (tmp_path / "file", "/proc/none"):
        assert said(process(NATIVE, home, TMPDIR=str(tmp_path)))[::2] == ("12.0", 0)
    # for all that cannot use their cache
    assert len(list(tmp_path.glob("xzoo-*/native/*.so"))) == 1


@pytest.mark.slow
def test_eight_processes_compile_once(tmp_path):
    counter = tmp_path / "c++"
    counter.write_text(
        f'#!/bin/sh\ncase " $* " in *" -c "*) echo x >> {tmp_path}/count;; esac\nexec c++ "$@"\n'
    )
    counter.chmod(0o755)
    runs = [process(NATIVE, tmp_path / "home", CXX=str(counter)) for _ in range(8)]
    for run in runs:
        out, err, code = said(run)
        # it may say that it waits
        assert (out, code) == ("12.0", 0) and len(err.splitlines()) <= 1, err
    assert (tmp_path / "count").read_text() == "x\n"
    assert sorted(path.suffix for path in (tmp_path / "home" / "native").iterdir()) == [
        ".json",
        ".lock",
        ".so",
    ]


@pytest.mark.slow
def test_a_killed_build_is_made_again(tmp_path):
    run = process(NATIVE, tmp_path)
    folder = tmp_path / "native"
    while not list(folder.glob("*.tmp")):
        time.sleep(0.01)
    os.kill(run.pid, signal.SIGKILL)
    run.communicate()
    assert list(folder.glob("*.tmp"))
    assert said(process(NATIVE, tmp_path))[::2] == ("12.0", 0)
    assert not list(folder.glob("*.tmp"))


def test_a_forked_process_computes_alone(tmp_path):
    code = """
import os
torch.set_num_threads(2)
x, w, r = torch.ones(64, 8, 9, 9), torch.ones(8, 2, 3, 3), torch.tensor([[0, 1]] * 8)
def run():
    with ops.backend("native"):
        return ops.conv2d(x, w, r, None, (1, 1), (1, 1)).numpy().tobytes()  # torch's own operations hang in the child
want = run()
child = os.fork()
if not child:
    os._exit(0 if run() == want else 3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), run() == want)
"""
    assert said(process(code, os.environ.get("XZOO_HOME", tmp_path))) == ("0 True", "", 0)


# ---- memory, under the compiler's sanitizers

# Every function on layers whose tensors end where their numbers end; `scratch` ends where it was
# asked to.
DRIVER = r"""
#include <cstdint>
#include <cstdio>
#include <sanitizer/asan_interface.h>
#include "checked.h"
#include "native.cpp"

static uint64_t state = 1;
static long below(long n) { return (long)((state = state * 6364136223846793005u + 1442695040888963407u) >> 33) % n; }
static int number, count;
static int zero() { return 0; }
static void one_after_another(void (*f)(void*), void* task, unsigned threads, unsigned) {
  for (count = (int)threads, number = 0; number < count; number++) f(task);
}
static float* made(long n, bool result) {
  float* p = (float*)malloc(n * sizeof(float));
  for (long i = 0; i < n; i++) p[i] = result ? __builtin_nanf("") : (float)(below(200) - 100) / 64;
  return p;
}
static void finish(const Layer& a, const char* name, int code, float* p, long n) {
  for (long i = 0; i < n; i++) code |= p[i] != p[i];
  free(p);
  if (!code) return;
  printf("%s fails or leaves a result unwritten:", name);
  for (int i = 0; i < 12; i++) printf(" %ld", (long)(&a.N)[i]);
  exit(2);
}

static void run(int kernel, long N, long C, long H, long W, long share, long blocks, long degree, long stride) {
  const long O = share * blocks, taps = kernel * kernel;
  Layer a{N, C, H, W, O, degree, share, stride, below(2), below(2), 1 + below(3), below(3)};
  const long nx = N * C * H * W, ny = N * O * ((H - 1) / stride + 1) * ((W - 1) / stride + 1), nw = O * degree * taps;
  float *x = made(nx, false), *d = made(ny, false), *w = made(nw, false), *bias = below(2) ? made(O, false) : nullptr;
  float *y = made(ny, true), *dx = made(nx, true), *dw = made(nw, true);
  int32_t* rows = (int32_t*)malloc(blocks * degree * sizeof(int32_t));
  for (long b = 0; b < blocks; b++)
    for (long j = 0, first = below(C); j < degree; j++) rows[b * degree + j] = (int32_t)((first + j) % C);
  const bool three = kernel == 3;
  finish(a, "y", (three ? xzoo_conv3 : xzoo_point)(&a, x, w, rows, bias, y), y, ny);
  finish(a, "dx", (three ? xzoo_conv3_input_grad : xzoo_point_input_grad)(&a, d, w, rows, dx), dx, nx);
  finish(a, "dw", (three ? xzoo_conv3_weight_grad : xzoo_point_weight_grad)(&a, d, x, rows, dw), dw, nw);
  free(x), free(d), free(w), free(bias), free(rows);
}

int main() {
  const long batches[] = {1, 2, 5, 8, 16, 17, 33}, sizes[] = {1, 2, 3, 4, 5, 7, 8, 14, 15, 17};
  const long inputs[] = {1, 3, 7, 19, 33}, shares[] = {1, 2, 3, 4, 5, 7};
  int layers = 0;
  xzoo_init((void*)one_after_another, (void*)(int (*)())[] { return number; }, (void*)(int (*)())[] { return count; },
            (void*)zero);
  for (int kernel : {3, 1, 3, 1, 3, 1})
    for (long N : batches)
      for (long H : sizes) {
        const long C = inputs[below(5)], W = below(2) ? H : sizes[below(10)], stride = kernel == 3 ? 1 + below(2) : 1;
        run(kernel, N, C, H, W, shares[below(6)], 1 + below(9), 1 + below(C), stride);
        layers++;
      }
  for (long N : batches)  // linear, and more inputs than a block of the first level of cache takes
    for (long share : {1, 3, 4}) run(1, N, 531, 1, 1 + below(2), share, 37, 1 + below(200), 1), layers++;
  for (long N : {1, 2}) run(1, N, 531, 1, 1, 4, 131, 520, 1), layers++;  // sums of pieces
  for (int i = 0; i < 4; i++)  // images of which a few rows are packed at a time
    for (long stride : {1, 2}) run(3, 17, 97, 53, 59, 1, 5, 3, stride), layers++;
  printf("%d layers\n", layers);
}
"""


@pytest.mark.slow
@pytest.mark.parametrize("level", ["best", "x86-64-v3", "x86-64"])
def test_no_kernel_touches_memory_that_is_not_its_own(level, tmp_path):
    flags = [flag for flag in native._flags() if flag not in ("-O3", "-shared", "-fPIC")]
    if level != "best":
        if not flags[-1].startswith("-march=x86-64"):
            pytest.skip(f"this CPU is not {level}")
        flags[-1] = f"-march={level}"
    source, found = whole(native.SOURCE), "    return p;\n  }\n};\nthread_local"
    assert source.count(found) == 1
    exact = (
        "    __asan_unpoison_memory_region(p, bytes), __asan_poison_memory_region(p + n, bytes - "
        "n * sizeof(float));\n"
    )
    (tmp_path / "native.cpp").write_text(source.replace(found, exact + found))
    (tmp_path / "driver.cpp").write_text(DRIVER)
    shutil.copy(Path(__file__).parent / "checked.h", tmp_path)
    checks = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-g"]
    (tmp_path / "empty.cpp").write_text("int main() {}")
    for name in ("empty", "driver"):
        command = [*next(native.compilers()), *flags, *checks, "-o", name, f"{name}.cpp"]
        run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
        if run.returncode and name == "empty":
            pytest.skip(f"this compiler has no sanitizers: {run.stderr[:300]}")
        assert not run.returncode, run.stderr[:3000]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    run = subprocess.run([tmp_path / "driver"], timeout=600, **pipes)
    assert (run.returncode, run.stdout) == (0, "451 layers\n"), run.stdout[-3000:]


# ---- the choice


@pytest.mark.parametrize(("lanes", "fast"), [(16, False), (16, True), (8, False)])
def test_auto_takes_native_only_where_it_was_measured_faster(lanes, fast, monkeypatch):
    monkeypatch.setattr(native, "lanes", lambda: lanes)
    monkeypatch.setattr(native, "fast", lambda: fast)
    with GOLDEN.open() as file:
        rows = [
            row
            for row in csv.DictReader(file)
            if (row["lanes"], row["fast"]) == (str(lanes), str(int(fast)))
        ]
    taken = {part: [] for part in PRODUCTS}
    for row in rows:
        x, weight, neighbours, geometry = shapes(row)
        for part, suffix in PRODUCTS.items():
            name = ("conv2d" if geometry else "linear") + suffix
            if choose(name, x, weight, neighbours, *geometry) == "native":
                taken[part].append((float(row[part]), row))
    for part, found in taken.items():
        assert len(found) > len(rows) / 3, part
        slower = [pair for pair in found if pair[0] < 1.1]
        worst = min(found, key=lambda pair: pair[0])
        assert len(slower) <= len(found) / (40 if fast else 100) and worst[0] >= 0.8, (
            part,
            len(slower),
            worst,
        )


def test_auto_takes_the_library_where_vectors_of_4_floats_were_not_measured(monkeypatch):
    monkeypatch.setattr(native, "lanes", lambda: 4)
    monkeypatch.setattr(native, "fast", lambda: False)
    with GOLDEN.open() as file:
        rows = list(csv.DictReader(file))
    for row, suffix in itertools.product(rows, PRODUCTS.values()):
        x, weight, neighbours, geometry = shapes(row)
        operation = "conv2d" if geometry else "linear"
        taken = choose(operation + suffix, x, weight, neighbours, *geometry)
        assert taken == library(operation, x, weight, neighbours)


# The table of `auto`: how many times slower what it took before (dense or gather) is than `native`,
# in the same layout, for the operation and for each of its gradients.

COLUMNS = ("lanes", "fast", *LayerShape._fields, *PRODUCTS)
SHAPES = [
    *(
        (3, 64, 64, 32, 1),
        (3, 256, 256, 8, 1),
        (3, 512, 512, 4, 1),
        (3, 512, 512, 2, 1),
        (3, 256, 256, 14, 1),
    ),
    *(
        (3, 512, 512, 7, 1),
        (3, 128, 256, 16, 2),
        (1, 64, 256, 28, 1),
        (1, 256, 64, 28, 1),
        (1, 512, 512, 7, 1),
    ),
    *(
        (1, 1024, 256, 14, 1),
        (1, 128, 128, 4, 1),
        (1, 256, 512, 14, 2),
        (1, 512, 512, 2, 1),
        (1, 512, 512, 1, 1),
    ),
    *((0, 512, 512, 1, 1), (0, 2048, 1000, 1, 1)),
]


def shapes(row):
    """(x, weight, neighbours, geometry) of a row, as shapes of tensors."""
    kernel, n_in, n_out, size, stride, degree, share, batch, last = (
        int(row[name]) for name in LayerShape._fields
    )
    taps, pixels = ([kernel, kernel], [size, size]) if kernel else ([], [])
    x = torch.empty([batch, n_in, *pixels])
    if last:
        x = x.to(memory_format=torch.channels_last)
    geometry = ([stride] * 2, [kernel // 2] * 2, [1, 1]) if kernel else ()
    weight = torch.empty([n_out, degree, *taps])
    return x, weight, torch.zeros([n_out // share, degree], dtype=torch.int32), geometry


def ratios(layer):
    x, weight, neighbours, geometry = shapes(layer._asdict())
    before = library("conv2d" if geometry else "linear", x, weight, neighbours)
    rows = tune(layer, (before, "native"), rounds=3, seconds=0.03)
    for slow, fast in zip(rows[::2], rows[1::2], strict=True):
        yield round(
            statistics.median(slow.times.seconds) / statistics.median(fast.times.seconds), 2
        )


def measure():
    for shape, part, share, batch, last in itertools.product(
        SHAPES, (2, 4, 16), (1, 4), (1, 4, 8, 16, 64), (0, 1)
    ):
        kernel, n_in, *_ = shape
        if not (last and kernel == 0):
            layer = LayerShape(*shape, n_in // part, share, batch, last)
            yield native.lanes(), int(native.fast()), *layer, *ratios(layer)


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert native.available()
    kept = []
    if GOLDEN.exists():
        with GOLDEN.open() as file:
            mine = [str(native.lanes()), str(int(native.fast()))]
            kept = [row for row in csv.reader(file) if row[:2] not in (mine, list(COLUMNS[:2]))]
    new = [[str(value) for value in row] for row in measure()]
    with GOLDEN.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(
            [COLUMNS, *sorted([*kept, *new], key=lambda r: -int(r[0]))]
        )
