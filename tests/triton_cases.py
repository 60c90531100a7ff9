"""The kernels of the `triton` backend on tensors of a GPU, or of the CPU by Triton's interpreter.

Not collected by itself: test_triton.py runs it in a process of its own, because Triton decides at
its import whether it interprets (TRITON_INTERPRET=1).
"""

import copy
import gc
import math
import os

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from products import NAMES, results

from xzoo import graphs, layers, ops
from xzoo.errors import XzooError
from xzoo.ops import rows as rows_of
from xzoo.ops import triton
from xzoo.ops.auto import choose

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
# The largest error of one rounding of the result; the interpreter cuts bfloat16 off where a GPU
# rounds.
ROUNDING = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-7}


# By their older names: torch.export reads these, and fails where a new one has set half of what
# they stand for.
SWITCHES = {
    torch.backends.cudnn: torch.backends.cudnn.conv,
    torch.backends.cuda.matmul: torch.backends.cuda.matmul,
}


@pytest.fixture(autouse=True)
def exact_float32_and_unwritten_outputs_are_nan():
    before = [switch.allow_tf32 for switch in SWITCHES]
    for switch in SWITCHES:
        switch.allow_tf32 = False
    torch.use_deterministic_algorithms(True)  # also fills torch.empty with NaN
    yield
    torch.use_deterministic_algorithms(False)
    for switch, value in zip(SWITCHES, before, strict=True):
        switch.allow_tf32 = value


def make(
    kernel,
    stride,
    share,
    blocks,
    n_in,
    degree,
    batch,
    size=(5, 4),
    padding=None,
    seed=0,
    biased=True,
    form=None,
):
    """(x, weight, neighbours, bias, grad, geometry): positive values that every type has, so that
    no sum cancels.
    """
    random = torch.Generator().manual_seed(seed)

    def values(*shape):
        return ((torch.rand(*shape, generator=random) * 4).round() / 4 + 0.25).double().to(DEVICE)

    padding = (kernel // 2,) * 2 if padding is None else padding
    rows = torch.stack([torch.randperm(n_in, generator=random)[:degree] for _ in range(blocks)]).to(
        DEVICE
    )
    out = (
        [(s + 2 * p - kernel) // t + 1 for s, p, t in zip(size, padding, stride, strict=True)]
        if kernel
        else []
    )
    x, grad = values(batch, n_in, *(size if kernel else [])), values(batch, blocks * share, *out)
    if kernel:
        x = x.to(memory_format=form or torch.channels_last)
    weight = values(blocks * share, degree, *([kernel] * 2 if kernel else []))
    bias = values(blocks * share) if biased else None
    return x, weight, rows, bias, grad, (stride, padding, (1, 1)) if kernel else ()


@st.composite
def cases(draw):
    kernel, degree = (
        draw(st.sampled_from([0, 1, 3, 3, 2, 5])),
        draw(st.sampled_from([1, 3, 16, 33, 40])),
    )
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    geometry = (
        (draw(st.sampled_from([(1, 1), (2, 2)])), None)
        if draw(st.integers(0, 3))
        else (draw(pair), draw(pair))
    )
    return make(
        kernel,
        geometry[0],
        draw(st.sampled_from([8, 16, 24, 72])),
        draw(st.integers(1, 4)),
        degree + draw(st.sampled_from([0, 1, 30])),
        degree,
        draw(st.sampled_from([0, 1, 2, 3] if kernel else [0, 1, 2, 130])),
        (draw(st.integers(4, 9)), draw(st.integers(4, 9))),
        geometry[1] if kernel else None,
        draw(st.integers(0, 99)),
        draw(st.booleans()),
        draw(st.sampled_from([torch.channels_last, torch.contiguous_format])),
    )


def hold(case, dtype):
    for name, got, want in zip(
        NAMES[:3],
        results(case, "triton", dtype)[:3],
        results(case, None, torch.float64)[:3],
        strict=True,
    ):
        assert (got.shape, got.dtype) == (want.shape, dtype), name
        # One rounding of the result, and those of a sum in float32.
        error, allowed = (
            (got.double() - want).abs().max() if want.numel() else 0,
            ROUNDING[dtype] + 1e-6,
        )
        assert error <= allowed * (want.abs().max() if want.numel() else 0), (
            f"{name} off by {error:.1e}"
        )


LAST, FIRST = torch.channels_last, torch.contiguous_format
FORMS = [LAST, pytest.param(FIRST, marks=pytest.mark.slow)]


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (
            torch.bfloat16,
            {"kernel": 3, "stride": (1, 1), "share": 16, "n_in": 70, "degree": 33, "form": LAST},
        ),
        (
            torch.float16,
            {"kernel": 3, "stride": (2, 2), "share": 8, "n_in": 9, "degree": 4, "form": LAST},
        ),
        (
            torch.float32,
            {"kernel": 3, "stride": (2, 2), "share": 16, "n_in": 9, "degree": 4, "form": FIRST},
        ),
        (
            torch.float16,
            {"kernel": 1, "stride": (1, 1), "share": 24, "n_in": 70, "degree": 33, "form": FIRST},
        ),
        (
            torch.bfloat16,
            {"kernel": 1, "stride": (2, 2), "share": 16, "n_in": 9, "degree": 4, "form": LAST},
        ),
        (
            torch.float32,
            {"kernel": 0, "stride": (1, 1), "share": 8, "n_in": 70, "degree": 33, "batch": 131},
        ),
        (
            torch.bfloat16,
            {"kernel": 0, "stride": (1, 1), "share": 72, "n_in": 9, "degree": 4, "batch": 1},
        ),
    ],
    ids=str,
)
def test_kernels_equal_torch_in_float64(dtype, options):
    hold(make(**{"blocks": 2, "batch": 3, "size": (7, 5), **options}), dtype)


@settings(derandomize=True, deadline=None, max_examples=2)
@given(case=cases(), dtype=st.sampled_from(list(ROUNDING)))
@example(case=make(3, (2, 2), 8, 2, 9, 4, 0), dtype=torch.float16)
@example(case=make(0, (1, 1), 8, 2, 9, 4, 0), dtype=torch.float32)
@example(case=make(3, (3, 2), 24, 1, 9, 4, 1, (1, 2), (2, 1)), dtype=torch.float32)
@example(case=make(1, (3, 2), 8, 1, 9, 4, 2, (2, 5), (0, 1)), dtype=torch.bfloat16)
def test_some_random_layers(case, dtype):
    hold(case, dtype)


@pytest.mark.slow
@settings(derandomize=True, deadline=None, max_examples=400)
@given(case=cases(), dtype=st.sampled_from(list(ROUNDING)))
def test_many_random_layers(case, dtype):
    hold(case, dtype)


@pytest.mark.parametrize("kernel", [1, 0, pytest.param(3, marks=pytest.mark.slow)])
def test_equal_bits_in_every_run(kernel):
    # 570 pixels and more: weight gradients are sums of several parts.
    case = make(kernel, (1, 1), 8, 2, 20, 7, 570 if kernel == 0 else 4, (13, 11))
    hold(case, torch.float32)
    random = torch.Generator().manual_seed(1)
    x, weight, rows, bias, grad, geometry = case
    x, weight, grad = (torch.randn(t.shape, generator=random).to(t) for t in (x, weight, grad))
    runs = [
        results((x, weight, rows.clone(), bias, grad, geometry), "triton", torch.float32)
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][:3], runs[1][:3], strict=True))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_nan_reaches_exactly_what_is_connected(form):
    x, weight, rows, bias, grad, geometry = make(3, (1, 1), 8, 4, 30, 6, 2, form=form)
    bad, channel = x.clone(), int(rows[0, 0])
    bad[1, channel] = math.nan
    reads = (rows == channel).any(1).repeat_interleave(8)
    assert 0 < reads.sum() < len(reads)
    y, dx, dw, _ = results((bad, weight, rows, bias, grad, geometry), "triton", torch.float32)
    assert torch.equal(y.isnan().flatten(2).all(2)[1], reads)
    assert torch.equal(y.isnan().flatten(2).any(2)[1], reads)
    assert not y[0].isnan().any() and not dx.isnan().any()
    edges = (rows == channel).repeat_interleave(8, dim=0)  # [out, degree]
    assert torch.equal(dw.isnan().flatten(2).all(2), edges)
    assert torch.equal(dw.isnan().flatten(2).any(2), edges)
    bad = grad.clone()
    bad[0, 9] = math.nan  # an output of block 1
    _, dx, dw, _ = results((x, weight, rows, bias, bad, geometry), "triton", torch.float32)
    read = torch.zeros(30, dtype=torch.bool, device=DEVICE).index_fill(0, rows[1], True)
    assert torch.equal(dx[0].isnan().flatten(1).any(1), read)
    assert not dx[1].isnan().any()
    assert torch.equal(dw.isnan().flatten(1).any(1), torch.arange(32, device=DEVICE) == 9)


def test_neighbour_out_of_range_is_refused():
    x, weight, rows, bias, _, geometry = make(1, (1, 1), 8, 4, 9, 3, 2)
    x, weight, bias = x.float(), weight.float(), bias.float()
    with ops.backend("triton"):
        ops.conv2d(x, weight, rows, bias, *geometry)
        for bad in (-1, 9):
            rows[2, 1] = bad  # in place: a graph is looked at again when it was changed
            with pytest.raises(
                IndexError, match="neighbours must be from 0 to 8, the inputs there are"
            ):
                ops.conv2d(x, weight, rows, bias, *geometry)


def test_kernels_read_nothing_that_is_not_there(monkeypatch):
    """Behind torch's back a graph may change after it was looked at: its missing inputs are then
    zeros.
    """
    monkeypatch.setattr(triton, "checked", lambda rows, n_in: rows.int())
    x, weight, rows, bias, grad, geometry = make(3, (1, 1), 8, 4, 9, 3, 2)
    around = torch.full((2, 11, 5, 4), math.nan, device=DEVICE).to(
        memory_format=torch.channels_last
    )
    around[:, 1:10] = x
    wrong, gone = rows.clone(), weight.float().clone()
    wrong[0, 0], wrong[1, 2] = -1, 9
    gone[:8, 0], gone[8:16, 2] = 0, 0
    with ops.backend("triton"):
        args = (weight.float(), wrong, bias.float(), *geometry)
        got = ops.conv2d(around[:, 1:10], *args)
        dw = torch.ops.xzoo.conv2d_weight_grad(
            grad.float(), around[:, 1:10], *args[:2], *geometry, "triton"
        )
    want = results((x, gone, rows, bias, grad, geometry), None, torch.float32)[0]
    torch.testing.assert_close(got, want)
    assert not dw.isnan().any() and (dw[:8, 0] == 0).all() and (dw[8:16, 2] == 0).all()


def test_strides_are_read_as_they_are_and_the_memory_format_is_kept():
    case = make(3, (1, 1), 8, 2, 9, 4, 3)
    x, weight, rows, bias, grad, geometry = case
    sliced = [
        torch.stack([t, torch.full_like(t, math.nan)], -1)[..., 0] for t in (x, weight, bias, grad)
    ]
    hold((*sliced[:2], rows.t().contiguous().t(), *sliced[2:], geometry), torch.float32)
    hold(
        (
            x[:1].expand(3, -1, -1, -1),
            weight,
            rows.int(),
            bias,
            grad.transpose(2, 3).contiguous().transpose(2, 3),
            geometry,
        ),
        torch.float32,
    )
    with ops.backend("triton"):
        for form in (torch.contiguous_format, torch.channels_last):
            y = ops.conv2d(
                x.float().to(memory_format=form), weight.float(), rows, bias.float(), *geometry
            )
            assert y.is_contiguous(memory_format=form)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_registered_operations_keep_torchs_rules(form):
    x, weight, rows, bias, grad, geometry = make(3, (2, 2), 8, 2, 9, 4, 2, form=form)
    x, weight, bias, grad = x.float(), weight.float(), bias.float(), grad.float()
    library, tests, geometry = (
        torch.ops.xzoo,
        ["test_schema", "test_faketensor"],
        [list(pair) for pair in geometry],
    )
    torch.library.opcheck(
        library.conv2d, (x, weight, rows, bias, *geometry, "triton"), test_utils=tests
    )
    for operation in (library.conv2d_input_grad, library.conv2d_weight_grad):
        torch.library.opcheck(
            operation, (grad, x, weight, rows, *geometry, "triton"), test_utils=tests
        )
    x, weight, grad = x[:, :, 0, 0], weight[:, :, 0, 0], grad[:, :, 0, 0]
    torch.library.opcheck(library.linear, (x, weight, rows, bias, "triton"), test_utils=tests)
    for operation in (library.linear_input_grad, library.linear_weight_grad):
        torch.library.opcheck(operation, (grad, x, weight, rows, "triton"), test_utils=tests)


def net():
    torch.manual_seed(0)
    conv = layers.ExpanderConv2d(9, 16, 3, padding=1, degree=4, share=8)
    return torch.nn.Sequential(
        conv, torch.nn.Flatten(), layers.ExpanderLinear(16 * 12, 8, degree=48, share=8)
    ).to(DEVICE)


def test_layers_under_autocast_compile_and_export():
    plain, x = net(), torch.randn(2, 9, 3, 4, device=DEVICE)
    compiled = copy.deepcopy(plain)
    with ops.backend("triton"), torch.autocast(DEVICE, torch.bfloat16):
        want = plain(x)
        got = torch.compile(compiled, backend="aot_eager", fullgraph=True)(x)
    assert want.dtype == torch.bfloat16 and torch.equal(got, want)
    for y in (want, got):
        y.float().square().sum().backward()
    for a, b in zip(plain.parameters(), compiled.parameters(), strict=True):
        assert (
            a.grad.dtype == torch.float32 and torch.equal(a.grad, b.grad) and a.grad.abs().sum() > 0
        )
    with ops.backend("triton"):
        want = plain(x)
        exported = torch.export.export(plain, (x,)).module()
    assert torch.equal(exported(x), want)
    with ops.backend("dense"):
        torch.testing.assert_close(plain(x), want, rtol=1e-4, atol=1e-5)
    with torch.inference_mode(), ops.backend("triton"):
        made_inside = copy.deepcopy(plain)  # torch counts no changes of these tensors
        assert torch.equal(made_inside(x), want)


def test_float32_goes_through_tf32_where_torch_may():
    x = torch.ones(1, 1, 1, 1)
    for switch, precision in SWITCHES.items():
        for allowed, name in ((True, "tf32"), (False, "ieee")):
            switch.allow_tf32 = allowed
            assert triton._arithmetic(x, precision) == (name, False)
    if DEVICE == "cuda":
        case = make(0, (1, 1), 16, 2, 64, 64, 64)
        case = (*(torch.randn_like(t) for t in case[:2]), *case[2:])
        exact = results(case, "triton", torch.float32)[0]
        torch.backends.cuda.matmul.allow_tf32 = True
        fast = results(case, "triton", torch.float32)[0]
        assert 1e-5 < (fast - exact).norm() / exact.norm() < 1e-2


@pytest.mark.parametrize(
    ("share", "dtype", "dilation", "said"),
    [
        (4, torch.float32, 1, "share 4; it needs a multiple of 8"),
        (
            8,
            torch.float64,
            1,
            "x of torch.float64 and weight of torch.float64; it takes one of bfloat16",
        ),
        (8, torch.float32, 2, r"dilation \(2, 2\); it needs 1"),
    ],
)
def test_what_has_no_kernel_is_refused_in_one_line(share, dtype, dilation, said):
    x, weight, rows, _, _, _ = make(3, (1, 1), share, 2, 9, 4, 2)
    with (
        ops.backend("triton"),
        pytest.raises(XzooError, match=f"backend 'triton' has no kernel for conv2d with {said}"),
    ):
        ops.conv2d(x.to(dtype), weight.to(dtype), rows, None, (1, 1), (2, 2), (dilation, dilation))
    if dtype != torch.float64:  # gradients are refused as well
        grad = (2, len(weight), 7 - 2 * dilation, 6 - 2 * dilation)
        with pytest.raises(XzooError, match=f"for conv2d with {said}"):
            torch.ops.xzoo.conv2d_input_grad(
                *(torch.ones(grad), x.to(dtype), weight.to(dtype), rows, [1, 1], [1, 1]),
                *([dilation, dilation], "triton"),
            )


def test_it_is_listed_where_it_runs_and_never_chosen():
    assert "triton" in ops.available()
    x, weight, rows, _, _, _ = make(0, (1, 1), 16, 2, 64, 4, 2)
    assert not triton.missing("linear", x.float(), weight.float(), rows)
    assert choose("linear", x.float().bfloat16(), weight.bfloat16(), rows) == "dense"


def test_graphs_are_forgotten_with_their_tensors():
    gc.collect()  # torch.compile leaves some of other tests
    before = len(rows_of._checked), len(triton._readers)
    rows = torch.from_numpy(graphs.sample("group", 64, 32, 16, 8)).to(DEVICE)
    for kind in (rows, rows.long()):
        x = torch.randn(2, 64, device=DEVICE, requires_grad=True)
        with ops.backend("triton"):
            ops.linear(x, torch.randn(32, 16, device=DEVICE), kind).sum().backward()
    assert (len(rows_of._checked), len(triton._readers)) == (before[0] + 2, before[1] + 2)
    del rows, kind, x
    gc.collect()
    assert (len(rows_of._checked), len(triton._readers)) == before
