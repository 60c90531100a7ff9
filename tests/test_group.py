"""torch's own grouped operations: which graphs they can run, also after a change in place; and the
rule of `auto` for them.

That they compute what the definition says, test_ops.py shows, for graphs in any order.

`python tests/test_group.py` renews golden/group.csv, the times that the rule is held against, for
this machine's class of CPU: some 15 minutes on one thread.
"""

import csv
import gc
import importlib
import itertools
import statistics
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import xzoo
from xzoo import ExpanderConv2d, graphs, ops
from xzoo.convert import dense_form
from xzoo.errors import XzooError
from xzoo.ops import auto, group, native, operations
from xzoo.ops.auto import choose
from xzoo.ops.tune import PRODUCTS, LayerShape, Tensors, alternate, tensors

deploy_module = importlib.import_module("xzoo.deploy")  # `xzoo.deploy` is the function
GOLDEN = Path(__file__).parent / "golden" / "group.csv"
GEOMETRY = ((1, 1), (1, 1), (1, 1))
KERNELS = pytest.mark.skipif(not native.possible(), reason="no C++ compiler")


def rows_of(kind, n_in=32, n_out=64, degree=8, share=1):
    return torch.from_numpy(graphs.sample(kind, n_in, n_out, degree, share))


def grouped(x, weight, neighbours):
    """torch's own convolution on the inputs in the order of the groups."""
    n_groups = x.shape[1] // neighbours.shape[1]
    order = neighbours[:: len(neighbours) // n_groups].flatten().long()
    return F.conv2d(x[:, order], weight, None, *GEOMETRY, n_groups)


# ---- which graphs


@pytest.mark.parametrize("share", [1, 4, 16])
@pytest.mark.parametrize("kind", ["group", "shuffle"])
def test_it_is_torchs_own_operation(kind, share):
    rows, x, weight = rows_of(kind, share=share), torch.randn(2, 32, 6, 6), torch.randn(64, 8, 3, 3)
    with ops.backend("group"):
        assert torch.equal(ops.conv2d(x, weight, rows, None, *GEOMETRY), grouped(x, weight, rows))
    found = group.parts(rows, 32)
    assert found.groups == 4
    assert (found.order is None) == (kind == "group")


def spoilt():
    """Graphs of the sizes of groups, of which each is none for another reason."""
    rows = rows_of("group")
    yield rows_of("biregular")
    yield rows_of("random")
    for first, second in ((0, 63), (15, 16)):
        swapped = rows.clone()
        swapped[[first, second]] = swapped[[second, first]]
        yield swapped
    twice = rows.clone()
    twice[16:32] = twice[:16]
    yield twice
    again = rows.clone()
    again[:16, 0] = 1  # reads input 1 twice and 0 never
    yield again


def test_other_graphs_are_refused_by_what_they_are():
    x, weight = torch.randn(2, 32, 6, 6), torch.randn(64, 8, 3, 3)
    said = r"backend 'group' runs graphs of groups that part the inputs, as group and shuffle do; "
    with ops.backend("group"):
        for rows in spoilt():
            assert group.parts(rows, 32) is None
            given = r"neighbours \[64, 8\] of 32 inputs are none; use 'auto'"
            with pytest.raises(XzooError, match=said + given):
                ops.conv2d(x, weight, rows, None, *GEOMETRY)
        for n_in, blocks, degree in ((32, 6, 8), (32, 4, 5), (32, 3, 32 // 4)):
            rows = torch.arange(blocks * degree).view(blocks, degree) % n_in
            with pytest.raises(XzooError, match=said):
                ops.linear(torch.randn(2, n_in), torch.randn(2 * blocks, degree), rows)
        meta = [t.to("meta") for t in (x[:, :, 0, 0], weight[:, :, 0, 0], rows_of("group"))]
        with pytest.raises(XzooError, match="tensors on meta have no numbers"):
            ops.linear(*meta)


def test_a_change_in_place_is_seen():
    rows, x, weight = rows_of("group"), torch.randn(2, 32, 6, 6), torch.randn(64, 8, 3, 3)
    with ops.backend("group"):
        for kind in ("group", "shuffle", "group"):
            rows.copy_(rows_of(kind))
            y = ops.conv2d(x, weight, rows, None, *GEOMETRY)
            assert torch.equal(y, grouped(x, weight, rows))
        rows[0, 0] = 9
        with pytest.raises(XzooError, match="graphs of groups"):
            ops.conv2d(x, weight, rows, None, *GEOMETRY)
        rows[0, 0] = 32
        with pytest.raises(IndexError, match="from 0 to 31"):
            ops.conv2d(x, weight, rows, None, *GEOMETRY)
        rows.data = rows_of("shuffle")
        y = ops.conv2d(x, weight, rows, None, *GEOMETRY)
        assert torch.equal(y, grouped(x, weight, rows))


def test_numbers_of_tensors_in_inference_mode_are_looked_at_each_time():
    with torch.inference_mode(), ops.backend("group"):
        rows, x, weight = (
            rows_of("group").clone(),
            torch.randn(1, 32, 4, 4),
            torch.randn(64, 8, 3, 3),
        )
        for kind in ("group", "shuffle"):
            rows.copy_(rows_of(kind))
            y = ops.conv2d(x, weight, rows, None, *GEOMETRY)
            assert torch.equal(y, grouped(x, weight, rows))


def test_nothing_is_kept_of_a_graph_that_is_gone(monkeypatch):
    monkeypatch.setattr(group, "_parts", {})  # graphs of other tests may go meanwhile
    for kind in ("group", "shuffle", "biregular") * 5:
        rows = rows_of(kind)
        assert (group.parts(rows, 32) is None) == (kind == "biregular")
    assert len(group._parts) == 1
    del rows
    gc.collect()
    assert not group._parts


def test_memory_that_was_given_back_is_not_read():
    rows = rows_of("group").clone()
    rows.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="lacks its memory"):
        group.parts(rows, 32)


# ---- the choice


@pytest.fixture
def measured(monkeypatch):
    """A class of CPU whose times are known, whatever this one is."""
    if not native.available():
        pytest.skip("no kernels")
    monkeypatch.setattr(native, "lanes", lambda: auto.AVX2[0])
    monkeypatch.setattr(native, "fast", lambda: auto.AVX2[1])
    monkeypatch.setattr(operations, "_CHOSEN", {})


def taken(monkeypatch):
    """The names of the backends that run `conv2d` from now on."""
    names = []
    for module in (ops.dense, ops.gather, ops.group, ops.native):
        plain, name = module.conv2d, module.__name__.rpartition(".")[2]
        monkeypatch.setattr(module, "conv2d", lambda *a, f=plain, n=name: names.append(n) or f(*a))
    return names


@KERNELS
def test_auto_takes_it_by_the_numbers_of_a_graph(measured, monkeypatch):
    x, weight = torch.randn(1, 128, 28, 28), torch.randn(128, 64, 1, 1)
    names = taken(monkeypatch)
    ordered, shuffled, other = (
        rows_of(kind, 128, 128, 64) for kind in ("group", "shuffle", "biregular")
    )
    changing, want = ordered.clone(), []
    for _ in range(3):  # the first calls choose, the others remember
        for rows in (ordered, shuffled, other):
            ops.conv2d(x, weight, rows)
            changing.copy_(rows)
            ops.conv2d(x, weight, changing)
            want += ["group" if rows is ordered else "dense"] * 2
    assert names == want


@KERNELS
def test_auto_takes_what_it_took_where_nothing_was_measured(measured, monkeypatch):
    x, weight = torch.randn(1, 128, 28, 28), torch.randn(128, 64, 3, 3)
    rows, name = rows_of("group", 128, 128, 64), "conv2d_weight_grad"
    assert choose(name, x, weight, rows, *GEOMETRY) == "group"
    for dtype in (torch.float64, torch.bfloat16):
        assert choose(name, x.to(dtype), weight.to(dtype), rows, *GEOMETRY) == "dense"
    meta = (t.to("meta") for t in (x, weight, rows))
    assert choose(name, *meta, *GEOMETRY) == "dense"
    for lanes, fast in (auto.AVX512, auto.AVX512_FAST, (4, False)):
        monkeypatch.setattr(native, "lanes", lambda lanes=lanes: lanes)
        monkeypatch.setattr(native, "fast", lambda fast=fast: fast)
        assert choose(name, x, weight, rows, *GEOMETRY) in ("native", "dense")


@KERNELS
def test_a_model_of_groups_trains_and_deploys_alike(measured):
    """What `auto` takes there is the definition's up to rounding, in every layer and gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(
        ExpanderConv2d(32, 64, 3, padding=1, degree=16, graph="group"),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        ExpanderConv2d(64, 64, 3, padding=1, stride=2, degree=32, graph="shuffle", bias=False),
        nn.ReLU(),
        ExpanderConv2d(64, 128, 1, degree=32, share=4, graph="group", bias=False),
    )
    x = torch.randn(2, 32, 28, 28)
    found = []
    for backend in ("auto", "dense"):
        model.zero_grad()
        with ops.backend(backend):
            y = model(x)
            y.square().mean().backward()
        found.append([y.detach(), *(p.grad for p in model.parameters())])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(xzoo.deploy(model, x)(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ["", "relu", "relu6"])
def test_torchs_own_layer_in_the_place_of_one_of_groups(activation):
    layer = ExpanderConv2d(32, 64, 3, padding=1, stride=2, degree=8, share=4, graph="group")
    layer.activation = activation
    x = torch.randn(2, 32, 9, 9)
    own = dense_form(layer, 4)
    inner = own[0] if activation else own
    assert (type(inner), inner.groups) == (nn.Conv2d, 4)
    assert inner.weight.numel() == layer.weight.numel()
    torch.testing.assert_close(own(x), layer(x))
    assert [deploy_module._groups(graph) for graph in (layer, of("shuffle"), of("biregular"))] == [
        4,
        1,
        1,
    ]


def of(graph):
    return ExpanderConv2d(32, 64, 3, degree=8, graph=graph)


@KERNELS
@pytest.mark.parametrize("last", [False, True])
def test_bits_of_what_auto_takes_do_not_depend_on_the_number_of_threads(measured, last):
    before = torch.get_num_threads()
    try:
        for sizes in (
            (3, 64, 64, 28, 1, 32, 1, 2),
            (3, 64, 64, 28, 2, 32, 1, 2),
            (0, 256, 256, 1, 1, 64, 1, 9),
        ):
            drawn = tensors(LayerShape(*sizes, last and sizes[0] > 0), graph="group")
            for part, suffix in PRODUCTS.items():
                call = partial(
                    getattr(torch.ops.xzoo, drawn.operation + suffix),
                    *drawn.arguments(part),
                    "auto",
                )
                results = []
                for threads in (1, 2, 3):
                    torch.set_num_threads(threads)
                    results.append(call())
                assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    finally:
        torch.set_num_threads(before)


@KERNELS
def test_auto_takes_it_only_where_it_was_measured_faster(measured):
    with GOLDEN.open() as file:
        rows = list(csv.DictReader(file))
    found = {part: [] for part in PRODUCTS}
    for row in rows:
        assert (row["lanes"], row["fast"]) == ("8", "0")
        layer = LayerShape(*(int(row[name]) for name in LayerShape._fields))
        drawn = sizes_of(layer, row["graph"])
        for part, suffix in PRODUCTS.items():
            if choose(drawn.operation + suffix, *drawn[:3], *drawn.geometry) == "group":
                found[part].append((float(row[part]), row))
    for part, ratios in found.items():
        assert len(ratios) > len(rows) / 20, part
        slower = [pair for pair in ratios if pair[0] < 1.0]
        worst = min(ratios, key=lambda pair: pair[0])
        assert len(slower) <= len(ratios) / 20 and worst[0] >= 0.5, (part, len(slower), worst)


# The table: how many times slower what `auto` takes for other graphs of these sizes is than
# `group`, in the same memory format, for each product.

COLUMNS = ("lanes", "fast", "graph", *LayerShape._fields, *PRODUCTS)
SHAPES = [
    *((3, 64, 64, 56, 1), (3, 64, 64, 32, 1), (3, 128, 128, 28, 1), (3, 256, 256, 14, 1)),
    *((3, 256, 256, 8, 1), (3, 512, 512, 7, 1), (3, 512, 512, 4, 1), (3, 512, 512, 2, 1)),
    *((3, 128, 256, 16, 2), (3, 256, 256, 28, 2)),
    *((1, 64, 256, 56, 1), (1, 256, 64, 56, 1), (1, 512, 128, 28, 1), (1, 1024, 256, 14, 1)),
    *((1, 256, 1024, 14, 1), (1, 512, 2048, 7, 1), (1, 512, 512, 4, 1), (1, 256, 512, 28, 2)),
    *((1, 2048, 512, 7, 1), (1, 512, 512, 7, 1)),
    *((0, 512, 512, 1, 1), (0, 2048, 1024, 1, 1), (0, 3072, 768, 1, 1)),
    *((5, 128, 128, 14, 1), (5, 64, 64, 28, 1), (7, 64, 64, 14, 2)),
]
GRAPHS = [("group", 1), ("group", 4), ("shuffle", 1), ("shuffle", 4)]


def cases():
    """(graph, layer): the shares of `shuffle` are those that models have, and large planes come
    with few samples."""
    for shape, part, batch, last, (graph, share) in itertools.product(
        SHAPES, (2, 4, 8, 16), (1, 4, 16, 128), (False, True), GRAPHS
    ):
        kernel, n_in, _, size, _ = shape
        if (kernel == 0 and last) or (batch == 128 and size >= 14):
            continue
        if kernel > 3 and (batch in (4, 128) or part in (4, 16) or share == 4):
            continue
        if batch == 4 and share != (1 if kernel > 1 else 4):
            continue
        if graph == "shuffle" and share != (1 if kernel > 1 else 4):
            continue
        yield graph, LayerShape(*shape, n_in // part, share, batch, last)


def sizes_of(layer, graph):
    """Its tensors, of which the graph alone holds numbers."""
    kernel, n_in, n_out, size, stride, degree, share, batch, last = layer
    rows = torch.from_numpy(graphs.sample(graph, n_in, n_out, degree, share))
    if not kernel:
        return Tensors(torch.empty(batch, n_in), torch.empty(n_out, degree), rows, rows, ())
    form = torch.channels_last if last else torch.contiguous_format
    x = torch.empty(batch, n_in, size, size, memory_format=form)
    geometry = ([stride] * 2, [kernel // 2] * 2, [1, 1])
    return Tensors(x, torch.empty(n_out, degree, kernel, kernel), rows, rows, geometry)


def ratios(graph, layer):
    drawn = tensors(layer, graph=graph)
    no_groups = torch.zeros_like(drawn.neighbours)
    for part, suffix in PRODUCTS.items():
        name = drawn.operation + suffix
        before = choose(name, drawn.x, drawn.weight, no_groups, *drawn.geometry)
        operation = getattr(torch.ops.xzoo, name)
        calls = {b: partial(operation, *drawn.arguments(part), b) for b in (before, "group")}
        times = alternate(calls, rounds=3, seconds=0.02)
        slow, fast = (statistics.median(times[b].seconds) for b in (before, "group"))
        yield round(slow / fast, 2)


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert native.available()
    mine = [str(native.lanes()), str(int(native.fast()))]
    kept = []
    if GOLDEN.exists():
        with GOLDEN.open() as file:
            kept = [row for row in csv.reader(file) if row[:2] not in (mine, list(COLUMNS[:2]))]
    new = [[*mine, graph, *map(int, layer), *ratios(graph, layer)] for graph, layer in cases()]
    with GOLDEN.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *kept, *new])
