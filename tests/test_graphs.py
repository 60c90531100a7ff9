"""Graphs are what they are called: degrees, rows, connection, spectrum, and the same bytes
everywhere.

`python tests/test_graphs.py` renews golden/graphs.json. That is a change of format: graphs drawn
from a seed before it and after it differ, while checkpoints (which hold their graphs) stay what
they are.
"""

import itertools
import json
import math
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from xzoo import graphs
from xzoo.errors import GraphError

GOLDEN = Path(__file__).parent / "golden" / "graphs.json"
FREE_KINDS = ("random", "biregular")  # of any degree
examples = settings(derandomize=True, deadline=None, max_examples=150)

SQUARES = [
    (n, n, degree, share)
    for n in (256, 512, 1024)
    for degree in (*(2**e for e in range(2, n.bit_length() - 1)), 5, 48, n // 3, n // 2 - 1)
    for share in (1, 4)
]
RECTANGLES = [
    (n_in, n_out, degree, share)
    for n_in, n_out in ((64, 256), (256, 64))
    for degree in (4, 8, 12, 16, 32)
    for share in (1, 4)
]
SIZES = SQUARES + RECTANGLES


def matrix_of(neighbours, n_in, share=1):
    """The layer's own 0/1 matrix [n_out, n_in] in float64, entry by entry."""
    matrix = np.zeros((len(neighbours) * share, n_in))
    for block, row in enumerate(neighbours):
        for i in row:
            matrix[block * share : (block + 1) * share, i] += 1
    return matrix


def components(neighbours, n_in):
    blocks, degree = neighbours.shape
    edges = (neighbours.ravel(), n_in + np.repeat(np.arange(blocks), degree))
    weights = np.ones(blocks * degree)
    return connected_components(
        coo_array((weights, edges), shape=(n_in + blocks,) * 2), directed=False
    )[0]


@st.composite
def sizes(draw, largest=40):
    n_in = draw(st.integers(1, largest))
    share = draw(st.integers(1, 5))
    blocks = draw(st.integers(1, largest))
    return n_in, blocks * share, draw(st.integers(1, n_in)), share


def fan_out(neighbours, n_in):
    return np.bincount(neighbours.ravel(), minlength=n_in)


def assert_biregular(neighbours, n_in):
    """Every input is read equally often where that is possible, within one elsewhere."""
    read = fan_out(neighbours, n_in)
    base, extra = divmod(neighbours.size, n_in)
    assert sorted(read) == [base] * (n_in - extra) + [base + 1] * extra


def assert_rows_differ(neighbours, n_in):
    blocks, degree = neighbours.shape
    if math.comb(n_in, degree) >= blocks:
        assert len({row.tobytes() for row in neighbours}) == blocks


# Degrees and rows


@examples
@given(kind=st.sampled_from(graphs.KINDS), size=sizes(), seed=st.integers(0, 2**80))
def test_rows_ascend_and_have_the_shape_asked_for(kind, size, seed):
    n_in, n_out, degree, share = size
    if kind in ("group", "shuffle"):
        degree = graphs.largest_divisor(n_in, degree)
    try:
        neighbours = graphs.sample(kind, n_in, n_out, degree, share, seed)
    except GraphError:
        assert kind == "ramanujan"
        return
    assert neighbours.shape == (n_out // share, degree)
    assert neighbours.dtype == np.int32
    assert neighbours.flags.c_contiguous
    graphs.validate(neighbours, n_in)
    assert (np.diff(neighbours, axis=1) > 0).all()
    if kind in FREE_KINDS:
        assert_rows_differ(neighbours, n_in)
    if kind in ("biregular", "ramanujan"):
        assert_biregular(neighbours, n_in)


@pytest.mark.parametrize(("n_in", "degree"), [(n, d) for n in range(1, 7) for d in range(1, n + 1)])
@pytest.mark.parametrize("kind", FREE_KINDS)
def test_small_corners_exhaustively(kind, n_in, degree):
    """One input, degree = inputs, exactly as many blocks as there are rows, and one more than
    those.
    """
    rows = math.comb(n_in, degree)
    for blocks, seed in itertools.product(range(1, rows + 3), range(5)):
        neighbours = graphs.sample(kind, n_in, blocks, degree, seed=seed)
        graphs.validate(neighbours, n_in)
        assert_rows_differ(neighbours, n_in)
        if kind == "biregular":
            assert_biregular(neighbours, n_in)
        if blocks == rows:
            assert sorted(map(tuple, neighbours.tolist())) == list(
                itertools.combinations(range(n_in), degree)
            )


def test_as_many_blocks_as_rows_exist_at_a_real_size():
    neighbours = graphs.sample("biregular", 12, math.comb(12, 6), 6)
    assert_rows_differ(neighbours, 12)
    assert (fan_out(neighbours, 12) == math.comb(11, 5)).all()


@pytest.mark.parametrize(("n_in", "n_out", "degree", "share"), SIZES)
def test_biregular_is_regular_on_both_sides_with_rows_apart(n_in, n_out, degree, share):
    neighbours = graphs.sample("biregular", n_in, n_out, degree, share)
    graphs.validate(neighbours, n_in)
    assert_biregular(neighbours, n_in)
    assert_rows_differ(neighbours, n_in)
    rows = matrix_of(neighbours, n_in).astype(bool)
    assert {row.tobytes() for row in rows}.isdisjoint(row.tobytes() for row in ~rows), (
        "two rows are complementary"
    )


def test_random_rows_are_uniform():
    """Every input is read with probability degree / n_in: within five deviations over 20,000 rows."""
    n_in, degree, blocks = 50, 7, 20_000
    read = fan_out(graphs.sample("random", n_in, blocks, degree), n_in)
    p = degree / n_in
    assert abs(read - blocks * p).max() < 5 * math.sqrt(blocks * p * (1 - p))


def test_random_leaves_inputs_unread_and_biregular_does_not():
    """The reason for `biregular` as the default: (1 - 1/16)^64 of the inputs, 4 of 256 expected."""
    unread = [
        int((fan_out(graphs.sample("random", 256, 64, 16, seed=s), 256) == 0).sum())
        for s in range(20)
    ]
    assert 2 < np.mean(unread) < 6
    assert fan_out(graphs.sample("biregular", 256, 64, 16), 256).min() == 4


# Connection and spectrum


def assert_expander(n_in, n_out, degree, share, seed):
    neighbours = graphs.sample("biregular", n_in, n_out, degree, share, seed)
    blocks = n_out // share
    assert graphs.is_connected(neighbours, n_in)
    second = graphs.singular_values(neighbours, n_in)[1]
    fan = blocks * degree / n_in
    ramanujan = math.sqrt(fan - 1) + math.sqrt(degree - 1)
    random_matrix = (math.sqrt(fan) + math.sqrt(degree)) * math.sqrt(1 - degree / n_in)
    assert second <= 1.05 * min(ramanujan, random_matrix), (
        f"{second / min(ramanujan, random_matrix):.3f}"
    )


WITH_ROOM = [size for size in SIZES if size[1] // size[3] * size[2] >= 2 * size[0]]


@pytest.mark.parametrize(("n_in", "n_out", "degree", "share"), WITH_ROOM)
def test_biregular_is_an_expander(n_in, n_out, degree, share):
    assert_expander(n_in, n_out, degree, share, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
@pytest.mark.parametrize(("n_in", "n_out", "degree", "share"), WITH_ROOM)
def test_biregular_is_an_expander_for_every_seed(n_in, n_out, degree, share, seed):
    assert_expander(n_in, n_out, degree, share, seed)


@pytest.mark.slow
@pytest.mark.parametrize("n", [256, 512])
@pytest.mark.parametrize("share", [1, 4])
def test_biregular_is_an_expander_at_every_degree(n, share):
    for degree in range(max(4, 2 * share), n // 2 + 1, 3):  # degree 2 gives cycles, often several
        assert_expander(n, n, degree, share, seed=degree)


@examples
@given(size=sizes(), seed=st.integers(0, 5))
def test_ramanujan_meets_the_bound_or_refuses(size, seed):
    n_in, n_out, degree, share = size
    room = degree >= 2 and n_out // share * degree >= 2 * n_in
    if not room:
        with pytest.raises(GraphError, match="needs 2 edges or more"):
            graphs.sample("ramanujan", n_in, n_out, degree, share, seed)
        return
    try:
        neighbours = graphs.sample("ramanujan", n_in, n_out, degree, share, seed)
    except GraphError:
        # after 100 draws: `test_ramanujan_exists_at_real_sizes` holds it to succeed where it must
        return
    assert components(neighbours, n_in) == 1
    values = np.linalg.svd(matrix_of(neighbours, n_in), compute_uv=False)
    fan = n_out // share * degree / n_in
    assert np.append(values, 0)[1] <= (math.sqrt(fan - 1) + math.sqrt(degree - 1)) * (1 + 1e-6)


@pytest.mark.parametrize(("n", "degree"), [(12, 2), (16, 3)])
def test_ramanujan_redraws_what_is_disconnected_or_misses_the_bound(n, degree):
    """At degree 2 (cycles) every draw meets the bound and many are disconnected; at 3 some miss the
    bound.
    """
    bound = 2 * math.sqrt(degree - 1) * (1 + 1e-6)

    def is_good(neighbours):
        second = np.linalg.svd(matrix_of(neighbours, n), compute_uv=False)[1]
        return components(neighbours, n) == 1 and second <= bound

    seeds = range(60)
    assert not all(is_good(graphs.sample("biregular", n, n, degree, seed=seed)) for seed in seeds)
    assert all(is_good(graphs.sample("ramanujan", n, n, degree, seed=seed)) for seed in seeds)


@pytest.mark.parametrize(
    ("n_in", "n_out", "degree", "share"), [(64, 64, 4, 1), (256, 256, 16, 4), (64, 256, 8, 1)]
)
def test_ramanujan_exists_at_real_sizes(n_in, n_out, degree, share):
    for seed in range(5):
        neighbours = graphs.sample("ramanujan", n_in, n_out, degree, share, seed)
        bound = graphs.ramanujan_bound(n_in, n_out // share, degree)
        assert np.linalg.svd(matrix_of(neighbours, n_in), compute_uv=False)[1] <= bound * (1 + 1e-6)


@pytest.mark.parametrize(
    ("n_in", "n_out", "degree", "share"), [(8, 8, 1, 1), (64, 16, 4, 1), (64, 64, 4, 4)]
)
def test_ramanujan_refuses_before_drawing(n_in, n_out, degree, share, monkeypatch):
    monkeypatch.setattr(graphs._Words, "take", lambda *_: pytest.fail("a graph was drawn"))
    with pytest.raises(
        GraphError, match=r"needs 2 edges or more; use a larger degree, a smaller share or graph="
    ):
        graphs.sample("ramanujan", n_in, n_out, degree, share)


def test_ramanujan_gives_up_with_the_bound_in_its_message(monkeypatch):
    calls = []
    monkeypatch.setattr(graphs, "singular_values", lambda *a: calls.append(a) or (9.0, 9.0))
    monkeypatch.setattr(graphs, "is_connected", lambda *_: True)
    with pytest.raises(
        GraphError,
        match=r"16 inputs, 16 blocks .* degree 4: none of 100 draws met the bound 3\.4641",
    ):
        graphs.sample("ramanujan", 16, 16, 4)
    assert len(calls) == graphs.MAX_DRAWS == 100


@pytest.mark.parametrize("kind", ["group", "shuffle"])
@pytest.mark.parametrize(
    ("n", "degree", "share"), [(16, 4, 1), (64, 16, 4), (96, 12, 2), (256, 128, 1), (2048, 64, 1)]
)
def test_group_and_shuffle_do_not_mix_in_one_layer(kind, n, degree, share):
    neighbours = graphs.sample(kind, n, n, degree, share)
    first, second = graphs.singular_values(neighbours, n)
    assert second / first == pytest.approx(1, abs=1e-6)
    assert components(neighbours, n) == n // degree
    assert not graphs.is_connected(neighbours, n)


@pytest.mark.parametrize(("n", "degree"), [(16, 4), (64, 8), (64, 16), (144, 12), (256, 64)])
def test_two_layers_mix_with_shuffle_and_not_with_group(n, degree):
    assert degree**2 >= n
    one = {kind: matrix_of(graphs.sample(kind, n, n, degree), n) for kind in ("group", "shuffle")}
    assert (one["shuffle"] @ one["shuffle"]).all()
    assert not (one["group"] @ one["group"]).all()


def test_group_reads_its_own_group_and_shuffle_strides():
    assert graphs.sample("group", 6, 4, 3).tolist() == [[0, 1, 2], [0, 1, 2], [3, 4, 5], [3, 4, 5]]
    x = torch.arange(6.0)
    shuffled = x.reshape(2, 3).T.flatten()  # torch.nn.ChannelShuffle(2)
    expected = [shuffled[:3].sort().values.tolist()] * 2 + [shuffled[3:].sort().values.tolist()] * 2
    assert graphs.sample("shuffle", 6, 4, 3).tolist() == expected


@examples
@given(kind=st.sampled_from(FREE_KINDS), size=sizes(), seed=st.integers(0, 99))
def test_singular_values_equal_a_full_svd(kind, size, seed):
    n_in, n_out, degree, share = size
    neighbours = graphs.sample(kind, n_in, n_out, degree, share, seed)
    exact = np.append(np.linalg.svd(matrix_of(neighbours, n_in, share), compute_uv=False), 0)[:2]
    ours = np.array(graphs.singular_values(neighbours, n_in)) * math.sqrt(share)
    # The root of an eigenvalue whose error is 1e-13 of the largest: a true zero may come out as
    # 3e-7.
    np.testing.assert_allclose(ours, exact, rtol=1e-6, atol=1e-6 * exact[0])


@pytest.mark.parametrize(("n_in", "n_out", "degree"), [(1200, 1100, 6), (1100, 1200, 300)])
@pytest.mark.parametrize("kind", FREE_KINDS)
def test_singular_values_of_large_graphs_equal_a_full_svd(kind, n_in, n_out, degree):
    """Above 1,024 a side they are found by iteration."""
    neighbours = graphs.sample(kind, n_in, n_out, degree)
    exact = np.linalg.svd(matrix_of(neighbours, n_in), compute_uv=False)[:2]
    np.testing.assert_allclose(graphs.singular_values(neighbours, n_in), exact, rtol=1e-6)


def test_iteration_finds_a_second_value_equal_to_the_first():
    """Two expanders side by side: the leading value is there twice, which one start vector may
    hide.
    """
    halves = [graphs.sample("biregular", 600, 600, 16, seed=seed) for seed in (0, 1)]
    first, second = graphs.singular_values(np.vstack([halves[0], halves[1] + 600]), 1200)
    assert (first, second) == pytest.approx((16, 16), rel=1e-6)


@pytest.mark.parametrize(("kind", "n_in", "n_out"), [("random", 1, 5), ("biregular", 7, 1)])
def test_singular_values_of_one_block_or_one_input(kind, n_in, n_out):
    neighbours = graphs.sample(kind, n_in, n_out, 1)
    assert graphs.singular_values(neighbours, n_in) == (math.sqrt(n_out), 0)


@examples
@given(size=sizes(largest=12), seed=st.integers(0, 99))
def test_connection_equals_connected_components(size, seed):
    n_in, n_out, degree, share = size
    neighbours = graphs.sample("random", n_in, n_out, min(degree, 3), share, seed)
    assert graphs.is_connected(neighbours, n_in) == (components(neighbours, n_in) == 1)


def test_ramanujan_bound_by_hand():
    assert graphs.ramanujan_bound(64, 64, 5) == 4
    assert graphs.ramanujan_bound(64, 256, 5) == pytest.approx(math.sqrt(19) + 2)
    # most inputs are read by nobody: their side adds nothing
    assert graphs.ramanujan_bound(64, 4, 2) == 1


# Sizes, seeds and fingerprints


@examples
@given(
    n_in=st.integers(1, 64),
    n_out=st.integers(1, 64),
    degree=st.integers(1, 64),
    share=st.integers(1, 20),
)
def test_effective_share_is_its_definition(n_in, n_out, degree, share):
    allowed = [s for s in range(1, share + 1) if n_out % s == 0 and n_out / s * degree >= 2 * n_in]
    assert graphs.effective_share(n_in, n_out, degree, share) == max(allowed, default=1)


@given(n=st.integers(1, 300), limit=st.integers(1, 400))
@examples
def test_largest_divisor_is_its_definition(n, limit):
    assert graphs.largest_divisor(n, limit) == max(
        d for d in range(1, n + 1) if n % d == 0 and d <= limit
    )


def test_layer_seeds_differ_by_model_seed_and_name():
    seeds = {
        graphs.layer_seed(seed, name)
        for seed in range(20)
        for name in ("conv1", "conv2", "a.conv1", "1/conv1")
    }
    assert len(seeds) == 80
    assert all(0 <= seed < 2**64 for seed in seeds)


def test_a_fingerprint_tells_shape_type_and_values_but_not_byte_order():
    graph = np.arange(6, dtype=np.int32).reshape(2, 3)
    same = [graph.copy(), graph.astype(">i4"), np.asfortranarray(graph)]
    others = [
        graph.reshape(3, 2),
        graph.astype(np.int64),
        graph.astype(np.uint32),
        graph[::-1],
        graph + 1,
    ]
    assert {graphs.fingerprint(other) for other in same} == {graphs.fingerprint(graph)}
    assert len({graphs.fingerprint(other) for other in [graph, *others]}) == 6


def golden_cases():
    free = [
        (kind, *size)
        for kind in FREE_KINDS
        for size in ((64, 64, 8, 1), (17, 30, 5, 3), (6, 24, 3, 1), (5, 20, 3, 1))
    ]
    real = [
        ("biregular", 1024, 1024, 512, 4),
        ("biregular", 64, 256, 4, 1),
        ("random", 1888, 128, 944, 4),
        ("ramanujan", 256, 512, 32, 1),
        ("ramanujan", 64, 64, 4, 1),
        ("group", 64, 96, 16, 4),
        ("shuffle", 64, 96, 16, 4),
    ]
    return [(*case, seed) for case in free + real for seed in (0, 2**64 + 1)]


def golden_now():
    drawn = {
        " ".join(map(str, case)): graphs.fingerprint(graphs.sample(*case))
        for case in golden_cases()
    }
    named = {
        f"layer_seed {seed} {name}": graphs.layer_seed(seed, name)
        for seed in (0, 7)
        for name in ("fc", "ü.0.conv")
    }
    return drawn | named


def test_graphs_are_the_ones_that_were_always_drawn():
    assert golden_now() == json.loads(GOLDEN.read_text())


DRAW_ONE = (
    "from xzoo import graphs; print(graphs.fingerprint(graphs.sample('biregular', 96, 128, 12, 4, "
    "3)))"
)


@pytest.mark.slow
def test_same_seed_same_graph_in_another_process_and_after_other_draws():
    neighbours = graphs.sample("biregular", 96, 128, 12, 4, 3)
    disturbed = f"import random, numpy; numpy.random.seed(5); random.seed(5); {DRAW_ONE}"
    for code in (DRAW_ONE, disturbed):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == graphs.fingerprint(neighbours)


def test_drawing_neither_reads_nor_moves_a_global_stream():
    neighbours = graphs.sample("biregular", 96, 128, 12, 4, 3)
    state = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state()
    with torch.device("meta"):
        again = graphs.sample("biregular", 96, 128, 12, 4, 3)
    assert graphs.fingerprint(again) == graphs.fingerprint(neighbours)
    assert state[:2] == (random.getstate(), np.random.get_state()[1].tobytes())
    assert torch.equal(state[2], torch.get_rng_state())


def test_another_seed_or_kind_is_another_graph():
    drawn = [
        graphs.sample(kind, 64, 64, 8, seed=seed)
        for kind in FREE_KINDS
        for seed in (0, 1, 2**64, 2**64 + 1)
    ]
    assert len({graphs.fingerprint(neighbours) for neighbours in drawn}) == 8


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("ring", 8, 8, 2),
            r"graph='ring' is not a kind of graph; use one of random, biregular, ramanujan, "
            r"group, shuffle",
        ),
        (("random", 8.0, 8, 2), r"n_in=8\.0 is not an integer"),
        (("random", 8, "8", 2), r"n_out='8' is not an integer"),
        (("random", 8, 8, None), r"degree=None is not an integer"),
        (("random", 8, 8, 2, True), r"share=True is not an integer"),
        (("random", 8, 8, 2, 1, 0.5), r"seed=0\.5 is not an integer"),
        (("random", 0, 8, 2), r"from 0 inputs to 8 outputs: both need to be 1 or more"),
        (("random", 8, -1, 2), r"from 8 inputs to -1 outputs"),
        (("random", 8, 8, 0), r"degree=0 with 8 inputs: .* use 1 to 8, or compression >= 1"),
        (("biregular", 8, 8, 9), r"degree=9 with 8 inputs: .* none twice; use 1 to 8"),
        (("random", 8, 8, 2, 3), r"share=3 with 8 outputs: use a divisor of 8"),
        (("random", 8, 8, 2, 0), r"share=0 with 8 outputs"),
        (("random", 8, 8, 2, 1, -1), r"seed=-1: use an integer from 0 on"),
        (
            ("group", 12, 12, 5),
            r"graph='group' with degree=5: 12 inputs .* the nearest that do are 4 and 6$",
        ),
        (("shuffle", 7, 7, 3), r"graph='shuffle' with degree=3: .* nearest that do are 1 and 7$"),
    ],
)
def test_arguments_without_a_graph_are_refused(arguments, message):
    with pytest.raises(GraphError, match=message):
        graphs.sample(*arguments)


def test_numpy_integers_are_integers():
    assert np.array_equal(
        graphs.sample("random", *np.array([8, 8, 2])), graphs.sample("random", 8, 8, 2)
    )


@pytest.mark.parametrize(
    ("neighbours", "message"),
    [
        (
            np.zeros(3, np.int32),
            r"shape \[3\] and dtype int32; allowed is a non-empty integer array \[blocks, degree\]",
        ),
        (np.zeros((2, 0), np.int32), r"shape \[2, 0\]"),
        (np.zeros((2, 1), np.float32), r"dtype float32"),
        (np.zeros((2, 1), bool), r"dtype bool"),
        (np.array([[0, 8]]), r"indices from 0 to 8; the layer has inputs 0 to 7"),
        (np.array([[-1, 3]]), r"indices from -1 to 3"),
        (np.array([[0, 1], [3, 3]]), r"repeats an input: row 1 has 3 followed by 3"),
        (np.array([[0, 1], [5, 3]]), r"is not ascending: row 1 has 5 followed by 3"),
        (np.array([[5, 3]], dtype=np.uint8), r"is not ascending: row 0 has 5 followed by 3"),
    ],
)
def test_arrays_that_are_no_graph_are_refused(neighbours, message):
    with pytest.raises(GraphError, match=message):
        graphs.validate(neighbours, 8)


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(golden_now(), indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    print(f"wrote {len(golden_now())} fingerprints to {GOLDEN}")
