"""Every backend computes what the definition says, forward and backward; and the choice of a
backend.

The oracle knows nothing of xzoo.ops: plain loops build the dense weight, and torch's own operation
does the rest in float64.

`python tests/test_ops.py` renews golden/auto.csv, the times that the rule of `auto` is held
against: some 20 minutes on one thread (thread time, so that other work on the machine matters
little).
"""

import csv
import dataclasses
import functools
import itertools
import math
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from xzoo import graphs, ops
from xzoo.errors import XzooError
from xzoo.ops import backends, operations
from xzoo.ops.auto import library

GOLDEN = Path(__file__).parent / "golden" / "auto.csv"
# `triton`, where there is a GPU, is none of a CPU's (test_triton.py).
ON_CPU = [b for b in ops.available() if b != "triton"]
BACKENDS = pytest.mark.parametrize("backend", ON_CPU)
# What computes every geometry and type; `native` refuses what it has no kernel for
# (test_native.py).
LIBRARY = pytest.mark.parametrize("backend", ["dense", "gather", "group"])
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
NAMES = ("y", "dx", "dw", "db")
LAYOUTS = ("contiguous", "channels_last", "transposed", "sliced")


@pytest.fixture(autouse=True, scope="module")
def unwritten_outputs_are_nan():
    torch.use_deterministic_algorithms(True)  # also fills torch.empty with NaN
    yield
    torch.use_deterministic_algorithms(False)


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of an operation: tensors of float64 and, for a convolution, its geometry."""

    x: torch.Tensor
    weight: torch.Tensor
    neighbours: torch.Tensor
    bias: torch.Tensor | None
    grad: torch.Tensor
    geometry: tuple[tuple[int, int], ...] = ()
    layout: str = "contiguous"

    def run(self, backend, dtype):
        """(y, dx, dw, db) of xzoo.ops; `backend=None` gives torch's on the dense weight."""
        x = strided(self.x.to(dtype), self.layout).requires_grad_()
        weight = strided(self.weight.to(dtype), self.layout)
        bias = None if self.bias is None else self.bias.to(dtype, copy=True).requires_grad_()
        grad = strided(self.grad.to(dtype), self.layout)
        if backend is None:
            weight = dense_weight(weight, self.neighbours, x.shape[1])
        weight.requires_grad_()
        with ops.backend(backend or "auto"):
            if self.geometry:
                conv = F.conv2d if backend is None else ops.conv2d
                args = (bias,) if backend is None else (self.neighbours, bias)
                y = conv(x, weight, *args, *self.geometry)
            else:
                y = (
                    F.linear(x, weight, bias)
                    if backend is None
                    else ops.linear(x, weight, self.neighbours, bias)
                )
            y.backward(grad)
        dw = compact_weight(weight.grad, self.neighbours) if backend is None else weight.grad
        return y.detach(), x.grad, dw, None if bias is None else bias.grad


def strided(x, layout):
    """The same values with other strides."""
    if layout == "channels_last" and x.dim() == 4:
        return x.detach().clone(memory_format=torch.channels_last)
    if layout == "transposed":
        return x.detach().transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced":  # every second element of storage that is NaN elsewhere
        return torch.stack([x.detach(), torch.full_like(x, math.nan)], dim=-1)[..., 0]
    return x.detach().clone(memory_format=torch.contiguous_format)


def dense_weight(weight, neighbours, n_in):
    share = len(weight) // len(neighbours)
    dense = weight.new_zeros(len(weight), n_in, *weight.shape[2:])
    for o in range(len(weight)):
        for j, i in enumerate(neighbours[o // share].tolist()):
            dense[o, i] = weight[o, j].detach()
    return dense


def compact_weight(dense, neighbours):
    share = len(dense) // len(neighbours)
    return torch.stack([dense[o, neighbours[o // share].long()] for o in range(len(dense))])


def rows_for(backend, n_in, n_out, degree, share=1):
    """A graph that this backend can run: `group` does those of groups alone."""
    kind = "shuffle" if backend == "group" else "biregular"
    own = 1 if backend == "group" else share
    return torch.from_numpy(graphs.sample(kind, n_in, n_out, degree, own, seed=0))


def positive(generator, *shape):
    """Between 0.5 and 1.5: no sum cancels, so a relative error measures the arithmetic and not the
    data.
    """
    return torch.rand(*shape, generator=generator, dtype=torch.float64) + 0.5


@st.composite
def parted(draw):
    """(neighbours, n_in, n_out) of groups, whose inputs lie in any order."""
    n_groups, degree = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    blocks, share = n_groups * draw(st.integers(1, 3)), draw(st.integers(1, 4))
    n_in, kind = n_groups * degree, draw(st.sampled_from(["group", "shuffle", "permuted", "any"]))
    if kind in ("group", "shuffle"):
        rows = graphs.sample(kind, n_in, blocks * share, degree, share)
        return torch.from_numpy(rows), n_in, blocks * share
    order = torch.tensor(draw(st.permutations(range(n_in))), dtype=torch.int32)
    rows = order.view(n_groups, degree)
    rows = rows.sort()[0] if kind == "permuted" else rows
    return rows.repeat_interleave(blocks // n_groups, dim=0), n_in, blocks * share


@st.composite
def graph(draw):
    """(neighbours, n_in, n_out)"""
    share, blocks = draw(st.sampled_from([1, 2, 3, 4, 8])), draw(st.integers(1, 7))
    kind = draw(st.sampled_from(graphs.KINDS))
    degree = draw(st.integers(2 if kind == "ramanujan" else 1, 6))
    if kind in ("group", "shuffle"):
        n_in = degree * draw(st.integers(1, 4))
    elif kind == "ramanujan":
        degree, n_in = 4, 8
        blocks += 5  # 2 edges or more for each input
    else:
        n_in = draw(st.integers(degree, 17))
    rows = graphs.sample(kind, n_in, blocks * share, degree, share, draw(st.integers(0, 99)))
    return torch.from_numpy(rows), n_in, blocks * share


@st.composite
def linear_cases(draw, of=graph):
    neighbours, n_in, n_out = draw(of())
    batch = draw(st.sampled_from([0, 1, 2, 5, 17]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    return Case(
        x=positive(generator, batch, n_in),
        weight=positive(generator, n_out, neighbours.shape[1]),
        neighbours=neighbours,
        bias=positive(generator, n_out) if draw(st.booleans()) else None,
        grad=positive(generator, batch, n_out),
        layout=draw(st.sampled_from(["contiguous", "transposed", "sliced"])),
    )


@st.composite
def conv_cases(draw, least=1, layouts=LAYOUTS, of=graph):
    neighbours, n_in, n_out = draw(of())
    pairs = {
        name: (draw(values), draw(values))
        for name, values in {
            "size": st.integers(least, 9),
            "kernel": st.sampled_from([1, 2, 3, 5]),
            "stride": st.integers(1, 3),
            "padding": st.integers(0, 3),
            "dilation": st.integers(1, 2),
        }.items()
    }
    kernel, size = pairs.pop("kernel"), pairs.pop("size")
    out = [
        (size[i] + 2 * pairs["padding"][i] - pairs["dilation"][i] * (kernel[i] - 1) - 1)
        // pairs["stride"][i]
        + 1
        for i in (0, 1)
    ]
    assume(min(out) >= 1)
    batch = draw(st.sampled_from([0, 1, 2, 3]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    return Case(
        x=positive(generator, batch, n_in, *size),
        weight=positive(generator, n_out, neighbours.shape[1], *kernel),
        neighbours=neighbours,
        bias=positive(generator, n_out) if draw(st.booleans()) else None,
        grad=positive(generator, batch, n_out, *out),
        geometry=tuple(pairs.values()),
        layout=draw(st.sampled_from(layouts)),
    )


CASES = st.one_of(conv_cases(), linear_cases())
# Without what plain torch 2.14 gets wrong in bfloat16 on a CPU with AVX-512: F.conv2d of images of
# 1 to 3 pixels, and of channels_last ones, at times reads or writes out of bounds (garbage,
# segmentation faults).
HALF_CASES = st.one_of(conv_cases(least=4, layouts=("contiguous",)), linear_cases())
# Those of groups, which `group` can run.
PARTED_CASES = st.one_of(conv_cases(of=parted), linear_cases(of=parted))
PARTED_HALF_CASES = st.one_of(
    conv_cases(least=4, layouts=("contiguous",), of=parted), linear_cases(of=parted)
)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("backend", backends.BACKENDS)
@settings(derandomize=True, deadline=None, max_examples=120)
@given(case=CASES)
def test_backend_equals_the_dense_oracle(backend, dtype, case):
    tensors = case.x.to(dtype), case.weight.to(dtype), case.neighbours
    operation = "conv2d" if case.geometry else "linear"
    if said := backends.BACKENDS[backend].missing(operation, *tensors, *case.geometry):
        with pytest.raises(XzooError, match=re.escape(f"backend {backend!r} {said}; use 'auto'")):
            case.run(backend, dtype)
        return
    assert_equal_to_the_oracle(case, backend, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("backend", ["group", "auto"])
@settings(derandomize=True, deadline=None, max_examples=200)
@given(case=PARTED_CASES)
def test_groups_in_any_order_equal_the_dense_oracle(backend, dtype, case):
    assert_equal_to_the_oracle(case, backend, dtype)


def assert_equal_to_the_oracle(case, backend, dtype):
    rounded = dataclasses.replace(
        case, **{n: getattr(case, n).to(dtype).double() for n in ("x", "weight", "grad")}
    )
    oracle = rounded.run(None, torch.float64)
    for name, got, want in zip(NAMES, case.run(backend, dtype), oracle, strict=True):
        assert (got is None) == (want is None)
        if want is None:
            continue
        assert got.shape == want.shape
        assert got.dtype == dtype
        error, allowed = (got - want).norm(), TOLERANCE[dtype] * want.norm()
        assert error <= allowed, f"{name} off by {error:.1e}, allowed {allowed:.1e}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@LIBRARY
@settings(derandomize=True, deadline=None, max_examples=60)
@given(data=st.data())
def test_half_precision_is_as_exact_as_plain_torch(backend, dtype, data):
    case = data.draw(PARTED_HALF_CASES if backend == "group" else HALF_CASES)
    # Small integers and halves: exact in both types, so that the oracle sees the same data.
    exact = {n: (getattr(case, n) * 4).round() / 4 for n in ("x", "weight", "grad")}
    case = dataclasses.replace(case, bias=None, **exact)
    runs = [case.run(b, t) for b, t in ((backend, dtype), (None, dtype), (None, torch.float64))]
    for name, got, plain, want in zip(NAMES[:3], *(run[:3] for run in runs), strict=True):
        assert got.dtype == dtype
        # Twice torch's own error, and one rounding of the result where torch had none to make.
        error = (got.double() - want).norm()
        allowed = 2 * (plain.double() - want).norm() + torch.finfo(dtype).eps / 2 * want.norm()
        assert error <= allowed, f"{name} off by {error:.1e}, allowed {allowed:.1e}"


@LIBRARY
def test_half_gradient_of_an_input_with_many_readers_is_rounded_once(backend):
    generator = torch.Generator().manual_seed(0)
    rows = rows_for(backend, 4, 512, 1)
    x, weight, grad = (
        positive(generator, *shape).bfloat16() for shape in [(8, 4), (512, 1), (8, 512)]
    )
    case = Case(x, weight, rows, None, grad)
    got, want = (
        case.run(*how)[1].double() for how in ((backend, torch.bfloat16), (None, torch.float64))
    )
    assert (got - want).norm() <= torch.finfo(torch.bfloat16).eps / 2 * want.norm()


@pytest.mark.parametrize(
    ("share", "geometry"),
    [(1, ((1, 1), (0, 0), (1, 1))), (2, ((2, 1), (1, 2), (1, 2))), (4, ((1, 3), (2, 0), (2, 1)))],
)
def test_dense_convolution_is_the_nested_loop(share, geometry):
    (sh, sw), (ph, pw), (dh, dw) = geometry
    rows = graphs.sample("random", 5, 4, 2, share, seed=share)
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (positive(generator, *shape) for shape in [(2, 5, 6, 7), (4, 2, 3, 2), (4,)])
    h, w = (6 + 2 * ph - 2 * dh - 1) // sh + 1, (7 + 2 * pw - dw - 1) // sw + 1
    grad = positive(generator, 2, 4, h, w)
    y = bias.numpy()[None, :, None, None] * np.ones((2, 4, h, w))
    dx, dweight = np.zeros(x.shape), np.zeros(weight.shape)
    for b, o, j, p, q, i, k in np.ndindex(2, 4, 2, 3, 2, h, w):
        channel, row, column = rows[o // share, j], i * sh + p * dh - ph, k * sw + q * dw - pw
        if 0 <= row < 6 and 0 <= column < 7:
            y[b, o, i, k] += weight[o, j, p, q] * x[b, channel, row, column]
            dx[b, channel, row, column] += weight[o, j, p, q] * grad[b, o, i, k]
            dweight[o, j, p, q] += x[b, channel, row, column] * grad[b, o, i, k]
    got = Case(x, weight, torch.from_numpy(rows), bias, grad, geometry).run("dense", torch.float64)
    for name, ours, loops in zip(
        NAMES, got, (y, dx, dweight, grad.sum((0, 2, 3)).numpy()), strict=True
    ):
        np.testing.assert_allclose(ours.numpy(), loops, rtol=1e-12, err_msg=name)


@pytest.mark.parametrize("share", [1, 2, 3])
def test_dense_linear_is_the_nested_loop(share):
    rows = graphs.sample("biregular", 5, 6, 3, share, seed=1)
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, grad = (
        positive(generator, *shape) for shape in [(4, 5), (6, 3), (6,), (4, 6)]
    )
    y = np.tile(bias.numpy(), (4, 1))
    dx, dweight = np.zeros((4, 5)), np.zeros((6, 3))
    for b, o, j in np.ndindex(4, 6, 3):
        i = rows[o // share, j]
        y[b, o] += weight[o, j] * x[b, i]
        dx[b, i] += weight[o, j] * grad[b, o]
        dweight[o, j] += x[b, i] * grad[b, o]
    got = Case(x, weight, torch.from_numpy(rows), bias, grad).run("dense", torch.float64)
    for name, ours, loops in zip(NAMES, got, (y, dx, dweight, grad.sum(0).numpy()), strict=True):
        np.testing.assert_allclose(ours.numpy(), loops, rtol=1e-12, err_msg=name)


@pytest.mark.parametrize("backend", [b for b in ON_CPU if b != "dense"])
def test_nan_reaches_connected_outputs_only(backend):
    rows = rows_for(backend, 12, 8, 3, share=2)
    reads = (rows == 5).any(1).repeat_interleave(8 // len(rows))  # [8]: outputs that read input 5
    assert 0 < reads.sum() < 8
    x, weight = torch.ones(2, 12, 4, 4), torch.ones(8, 3, 1, 1)
    x[0, 5] = math.nan
    with ops.backend(backend):
        y = ops.conv2d(x, weight, rows)
        z = ops.linear(x[:, :, 0, 0], weight[:, :, 0, 0], rows)
    assert torch.equal(y[0].isnan().all((1, 2)), reads)
    assert torch.equal(y[0].isnan().any(1).any(1), reads)
    assert torch.equal(z[0].isnan(), reads)
    assert not y[1].isnan().any()
    assert not z[1].isnan().any()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("backend", ["auto", *ON_CPU])
def test_registered_operations_keep_torchs_rules(backend, layout):
    rows = rows_for(backend, 8, 6, 4, share=2)
    x, weight, grad = (
        strided(torch.randn(*s), layout) for s in [(2, 8, 7, 5), (6, 4, 3, 3), (2, 6, 4, 3)]
    )
    bias, geometry, library = torch.randn(6), ([2, 2], [1, 1], [1, 1]), torch.ops.xzoo
    # A backend is judged by its results; how an operation is registered is the same for all of
    # them.
    tests = ["test_schema", "test_faketensor"]
    if backend == "auto":
        tests += ["test_autograd_registration", "test_aot_dispatch_dynamic"]
    for last in ((), ("relu6",)):
        torch.library.opcheck(
            library.conv2d, (x, weight, rows, bias, *geometry, backend, *last), test_utils=tests
        )
    for operation in (library.conv2d_input_grad, library.conv2d_weight_grad):
        torch.library.opcheck(
            operation, (grad, x, weight, rows, *geometry, backend), test_utils=tests
        )
    x, weight, grad = x[:, :, 0, 0], weight[:, :, 0, 0], grad[:, :, 0, 0]
    for last in ((), ("relu",)):
        torch.library.opcheck(
            library.linear, (x, weight, rows, bias, backend, *last), test_utils=tests
        )
    for operation in (library.linear_input_grad, library.linear_weight_grad):
        torch.library.opcheck(operation, (grad, x, weight, rows, backend), test_utils=tests)


@LIBRARY
def test_convolution_keeps_the_memory_format(backend):
    rows = rows_for(backend, 8, 6, 4)
    weight = torch.randn(6, 4, 3, 3).to(memory_format=torch.channels_last)
    with ops.backend(backend):
        for form in (torch.contiguous_format, torch.channels_last):
            y = ops.conv2d(torch.randn(2, 8, 5, 5).to(memory_format=form), weight, rows)
            assert y.is_contiguous(memory_format=form)


@LIBRARY
def test_gradients_are_those_of_finite_differences(backend):
    rows = rows_for(backend, 6, 4, 3, share=2)
    tensors = [
        torch.randn(*s, dtype=torch.float64, requires_grad=True)
        for s in [(2, 6, 5, 4), (4, 3, 3, 2), (4,)]
    ]
    with ops.backend(backend):
        args = ((2, 1), (1, 0), (1, 2))
        assert torch.autograd.gradcheck(lambda x, w, b: ops.conv2d(x, w, rows, b, *args), tensors)
        tensors = [
            torch.randn(*s, dtype=torch.float64, requires_grad=True)
            for s in [(2, 3, 6), (4, 3), (4,)]
        ]
        assert torch.autograd.gradcheck(lambda x, w, b: ops.linear(x, w, rows, b), tensors)


@BACKENDS
@pytest.mark.parametrize("activation", ["relu", "relu6"])
def test_an_activation_is_done_with_and_without_gradients(backend, activation):
    rows = rows_for(backend, 6, 4, 3, share=2)
    x, weight, bias = 4 * torch.randn(5, 6, 7, 7), torch.randn(4, 3, 3, 3), torch.randn(4)
    function = getattr(F, activation)
    with ops.backend(backend):
        for op, tensors, args in (
            (ops.conv2d, (x, weight, rows, bias), ((1, 1), (1, 1), (1, 1))),
            (ops.linear, (x[:, :, 0, 0], weight[:, :, 0, 0], rows, bias), ()),
        ):
            want = function(op(*tensors, *args))
            assert torch.equal(op(*tensors, *args, activation), want)
            first, *others = tensors
            grads = []
            for call in (
                lambda t: op(t, *others, *args, activation),  # noqa: B023
                lambda t: function(op(t, *others, *args)),  # noqa: B023
            ):
                leaf = first.clone().requires_grad_()
                y = call(leaf)
                assert torch.equal(y, want)
                grads += torch.autograd.grad(y.square().sum(), leaf)
            assert torch.equal(*grads)


@BACKENDS
def test_an_unknown_activation_is_refused_by_name(backend):
    x, weight, rows = torch.ones(1, 1), torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int32)
    with (
        ops.backend(backend),
        pytest.raises(ValueError, match="activation 'gelu' is not relu, relu6 or none"),
    ):
        ops.linear(x, weight, rows, None, "gelu")


def test_linear_takes_any_leading_sizes():
    rows = torch.from_numpy(graphs.sample("biregular", 6, 4, 3, seed=0))
    weight, x = torch.randn(4, 3), torch.randn(2, 5, 3, 6)
    dense = dense_weight(weight, rows, 6)
    for part in (x, x[0, 0, 0], x[:, :0], x.transpose(0, 2)):
        torch.testing.assert_close(ops.linear(part, weight, rows), F.linear(part, dense))


@BACKENDS
def test_flop_counter_reports_the_sparse_count(backend):
    rows = rows_for(backend, 16, 12, 4, share=2)
    x = torch.randn(3, 16, 9, 7, requires_grad=True)
    weight = torch.randn(12, 4, 3, 3, requires_grad=True)
    with ops.backend(backend), FlopCounterMode(display=False) as counter:
        ops.conv2d(x, weight, rows, None, (2, 2), (1, 1)).sum().backward()
    macs = 12 * 4 * 9 * 3 * 5 * 4  # weights, batch, output positions
    assert counter.get_total_flops() == 3 * 2 * macs
    with ops.backend(backend), FlopCounterMode(display=False) as counter:
        ops.linear(torch.randn(5, 2, 16), weight[:, :, 0, 0].detach(), rows)
    assert counter.get_total_flops() == 2 * 12 * 4 * 10


def test_whatever_looks_on_sees_one_operation():
    call = ops.conv2d
    rows = torch.from_numpy(graphs.sample("biregular", 8, 6, 4, seed=0))
    x, weight = torch.randn(3, 8, 5, 5), torch.randn(6, 4, 3, 3)
    expected = call(x, weight, rows)
    with torch.profiler.profile() as profile:
        call(x, weight, rows)
    assert "xzoo::conv2d" in [event.key for event in profile.key_averages()]
    graph = make_fx(lambda x: call(x, weight, rows))(x)
    assert [node.target for node in graph.graph.nodes if node.op == "call_function"] == [
        torch.ops.xzoo.conv2d.default
    ]
    each = torch.vmap(lambda x: call(x, weight, rows))(x[:, None])
    torch.testing.assert_close(each.squeeze(1), expected)


class Calls(list):
    """Which backend ran which function, in order."""

    def __init__(self, monkeypatch):
        for backend in (ops.dense, ops.gather):
            for operation in ("conv2d", "linear"):
                for name in (operation, f"{operation}_input_grad", f"{operation}_weight_grad"):
                    monkeypatch.setattr(backend, name, self._record(backend, name))

    def _record(self, backend, name):
        plain = getattr(backend, name)

        def recorded(*args):
            self.append((backend.__name__.rpartition(".")[2], name))
            return plain(*args)

        return recorded


def small_call(**options):
    rows = torch.from_numpy(graphs.sample("biregular", 6, 4, 3, seed=0))
    return ops.conv2d(torch.randn(2, 6, 5, 5, **options), torch.randn(4, 3, 3, 3, **options), rows)


def test_context_manager_chooses_nests_and_restores(monkeypatch):
    calls = Calls(monkeypatch)
    with ops.backend("gather"):
        small_call()
        with ops.backend("dense"):
            small_call()
        with pytest.raises(RuntimeError, match="inside"), ops.backend("dense"):
            raise RuntimeError("inside")
        small_call()
        with ops.backend("auto"):
            assert operations.forced() == "auto"
    assert calls == [("gather", "conv2d"), ("dense", "conv2d"), ("gather", "conv2d")]
    assert operations.forced() == os.environ.get("XZOO_BACKEND", "auto")


def test_backward_runs_on_the_backend_of_its_forward(monkeypatch):
    with ops.backend("gather"):
        y = small_call(requires_grad=True)
    calls = Calls(monkeypatch)
    y.sum().backward()
    assert calls == [("gather", "conv2d_input_grad"), ("gather", "conv2d_weight_grad")]


def test_unknown_backend_is_refused_by_name():
    with (
        pytest.raises(XzooError, match=r"backend 'magic' is not one of auto, dense, gather, group"),
        ops.backend("magic"),
    ):
        pass


@pytest.mark.slow
def test_environment_chooses_the_backend():
    code = (
        "import torch; from xzoo import ops\n"
        "ops.gather.linear = lambda *a: print('gather') or torch.zeros(1, 1)\n"
        "ops.linear(torch.ones(1, 1), torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int32))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "XZOO_BACKEND": "gather"},
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert (run.stdout.strip(), run.stderr, run.returncode) == ("gather", "", 0)


def test_unknown_backend_in_the_environment_is_refused_at_the_first_call(monkeypatch):
    monkeypatch.setattr(operations, "_forced", "magic")  # what XZOO_BACKEND=magic sets at import
    with pytest.raises(
        XzooError, match=r"backend 'magic' is not one of auto, dense, gather, group"
    ):
        small_call()


def chosen(row, device="cpu", dtype=torch.float32, form=torch.contiguous_format):
    """What `auto` takes for a row of the table where `native` does not do it (test_native.py)."""
    kernel, n_in, n_out, size, degree, share, batch = (int(row[name]) for name in COLUMNS[:7])
    taps, pixels = ([kernel, kernel], [size, size]) if kernel else ([], [])
    with FakeTensorMode():  # no memory
        x = torch.empty([batch, n_in, *pixels], device=device, dtype=dtype).to(memory_format=form)
        weight = torch.empty([n_out, degree, *taps], device=device, dtype=dtype)
        neighbours = torch.empty([n_out // share, degree], device=device, dtype=torch.int32)
        return library("conv2d" if kernel else "linear", x, weight, neighbours)


def test_auto_never_takes_what_was_measured_slower():
    with GOLDEN.open() as file:
        rows = list(csv.DictReader(file))
    gathered = [row for row in rows if chosen(row) == "gather"]
    assert {row["kernel"] for row in gathered} == {"0", "3"}
    assert len(gathered) > 40
    for row in gathered:
        assert min(float(row["forward"]), float(row["training"])) >= 1.1, row


def test_auto_takes_dense_where_nothing_was_measured():
    row = dict(zip(COLUMNS, (3, 512, 512, 7, 32, 32, 16), strict=False))
    assert chosen(row) == "gather"
    assert (
        chosen(row, device="meta")
        == chosen(row, dtype=torch.float64)
        == chosen(row, dtype=torch.bfloat16)
        == "dense"
    )
    assert chosen(row | {"share": 1}) == chosen(row | {"share": 4, "degree": 256}) == "dense"
    assert chosen(row | {"kernel": 1}) == chosen(row, form=torch.channels_last) == "dense"


# The table of `auto`: how many times slower `dense` is than `gather`, forward alone and with both
# gradients. Kernel 0 is a linear layer. Rows with more than 8 copies of each input are left out:
# gather loses.

COLUMNS = ("kernel", "n_in", "n_out", "size", "degree", "share", "batch", "forward", "training")
SIZES = [(k, n, size) for k in (3, 1) for n, size in ((64, 32), (256, 14), (512, 7))] + [
    (0, 512, 1),
    (0, 2048, 1),
]


def ratio(call, leaves, training):
    """Median time of dense over that of gather, in pairs."""
    times = {"dense": [], "gather": []}
    end = time.perf_counter() + 0.1
    while len(times["gather"]) < 4 or time.perf_counter() < end:
        for backend, seconds in times.items():
            for leaf in leaves:
                leaf.grad = None
            with ops.backend(backend), torch.set_grad_enabled(training):
                start = time.thread_time()
                y = call()
                if training:
                    y.backward(y)
                seconds.append(time.thread_time() - start)
    # the first one warms up
    dense, gather = (statistics.median(seconds[1:]) for seconds in times.values())
    return round(dense / gather, 2)


def measure():
    for (kernel, n, size), part, share, batch in itertools.product(
        SIZES, (2, 4, 8, 16), (4, 8, 16, 32), (1, 16, 128)
    ):
        degree, copies = n // part, n / share / part
        if not 1 <= copies <= 8:
            continue
        rows = torch.from_numpy(graphs.sample("random", n, n, degree, share, seed=0))
        shapes = (
            [(batch, n, size, size), (n, degree, kernel, kernel)]
            if kernel
            else [(batch, n), (n, degree)]
        )
        x, weight = leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
        if kernel:
            call = functools.partial(
                ops.conv2d, x, weight, rows, None, (1, 1), (kernel // 2, kernel // 2)
            )
        else:
            call = functools.partial(ops.linear, x, weight, rows)
        yield (
            kernel,
            n,
            n,
            size,
            degree,
            share,
            batch,
            *(ratio(call, leaves, training) for training in (False, True)),
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    with GOLDEN.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *measure()])
