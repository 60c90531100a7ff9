"""What is measured of a graph is true: against brute force, full SVDs, autograd, and the two
theorems.
"""

import itertools
import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from xzoo import graphs, theory
from xzoo.errors import GraphError
from xzoo.layers import ExpanderConv2d, ExpanderLinear
from xzoo.theory import Graph

examples = settings(derandomize=True, deadline=None, max_examples=60)


def layer_matrix(graph):
    """[n_out, n_in] of the layer itself, by loops."""
    matrix = np.zeros((graph.n_out, graph.n_in))
    for output in range(graph.n_out):
        for i in graph.neighbours[output // graph.share]:
            matrix[output, i] = 1
    return matrix


@st.composite
def drawn(draw):
    n_in, blocks = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    share, degree = draw(st.integers(1, 4)), draw(st.integers(1, n_in))
    return Graph.sample(
        draw(st.sampled_from(["random", "biregular"])),
        n_in,
        blocks * share,
        degree,
        share,
        draw(st.integers(0, 99)),
    )


@st.composite
def exactly_biregular(draw):
    """A graph whose inputs all are read equally often."""
    n_in, share = draw(st.integers(1, 20)), draw(st.integers(1, 3))
    degree = draw(st.integers(1, n_in))
    blocks = n_in // math.gcd(n_in, degree) * draw(st.integers(1, 3))
    return Graph.sample("biregular", n_in, blocks * share, degree, share, draw(st.integers(0, 99)))


# Spectrum


def test_spectrum_by_hand():
    found = theory.spectrum(Graph.sample("biregular", 64, 256, 5))
    assert found.ramanujan == pytest.approx(math.sqrt(19) + 2)
    assert found.random_matrix == pytest.approx((math.sqrt(20) + math.sqrt(5)) * math.sqrt(59 / 64))
    assert found.bound == min(found.ramanujan, found.random_matrix)
    assert found.first == pytest.approx(10)  # sqrt(20 * 5)
    assert found.gap == found.first - found.second
    assert found.normalised == found.second / found.first


def test_a_graph_that_reads_everything_has_no_second_value():
    found = theory.spectrum(Graph.sample("biregular", 12, 30, 12))
    assert found.first == pytest.approx(math.sqrt(12 * 30))
    assert found.normalised == pytest.approx(0, abs=1e-6)
    assert found.random_matrix == 0


@examples
@given(graph=drawn())
def test_the_layer_has_sqrt_share_times_the_spectrum_of_its_quotient(graph):
    found = theory.spectrum(graph)
    layer = np.append(np.linalg.svd(layer_matrix(graph), compute_uv=False), 0)[:2]
    ours = math.sqrt(graph.share) * np.array([found.first, found.second])
    np.testing.assert_allclose(ours, layer, rtol=1e-6, atol=1e-6 * layer[0])
    assert 0 <= found.normalised <= 1 + 1e-6


@examples
@given(graph=drawn())
def test_all_singular_values_equal_an_svd(graph):
    values = theory.all_singular_values(graph)
    exact = np.linalg.svd(layer_matrix(Graph(graph.neighbours, graph.n_in)), compute_uv=False)
    assert values.shape == (min(graph.blocks, graph.n_in),)
    np.testing.assert_allclose(values, exact, rtol=0, atol=1e-6 * exact[0])


def test_a_graph_is_what_sample_draws():
    graph = Graph.sample("random", 24, 60, 5, share=3, seed=7)
    assert np.array_equal(graph.neighbours, graphs.sample("random", 24, 60, 5, 3, 7))
    assert (graph.n_in, graph.blocks, graph.n_out, graph.degree, graph.share) == (24, 20, 60, 5, 3)


# Theorem 2: mixing


@examples
@given(graph=drawn(), data=st.data())
def test_mixing_counts_the_edges_of_the_layer(graph, data):
    inputs = data.draw(st.lists(st.integers(0, graph.n_in - 1), unique=True))
    outputs = data.draw(st.lists(st.integers(0, graph.n_out - 1), unique=True))
    matrix = layer_matrix(graph)
    second = np.append(np.linalg.svd(matrix, compute_uv=False), 0)[1]
    found = theory.mixing(graph, inputs, outputs)
    s, t = len(inputs), len(outputs)
    near = {"rel": 1e-6, "abs": 1e-6 * graph.degree * graph.n_out}
    assert found.edges == sum(matrix[o, i] for o in outputs for i in inputs)
    assert found.expected == pytest.approx(graph.degree * s * t / graph.n_in)
    assert found.bound == pytest.approx(second * math.sqrt(s * t), **near)
    shrink = math.sqrt((1 - s / graph.n_in) * (1 - t / graph.n_out))
    assert found.sharp == pytest.approx(found.bound * shrink, **near)


@examples
@given(graph=exactly_biregular(), seed=st.integers(0, 99))
def test_no_random_pair_of_sets_breaks_theorem_2(graph, seed):
    for found in theory.random_mixing(graph, pairs=50, seed=seed):
        assert abs(found.edges - found.expected) <= found.sharp + 1e-5 * graph.degree * graph.n_out
        assert found.sharp <= found.bound


@pytest.mark.parametrize("share", [1, 2])
def test_no_pair_of_sets_at_all_breaks_theorem_2(share):
    graph = Graph.sample("biregular", 6, 6, 2 * share, share, seed=1)
    for chosen in itertools.product([False, True], repeat=12):
        inputs, outputs = np.flatnonzero(chosen[:6]), np.flatnonzero(chosen[6:])
        found = theory.mixing(graph, inputs, outputs)
        assert abs(found.edges - found.expected) <= found.sharp + 1e-5


def test_the_sharp_bound_is_met_by_one_group():
    """A group reads all of its inputs and none of the others': no graph of its spectrum mixes
    worse.
    """
    graph = Graph.sample("group", 32, 32, 8)
    found = theory.mixing(graph, range(8), range(8))
    assert (found.edges, found.expected) == (64, 16)
    assert found.sharp == pytest.approx(48)
    assert found.bound == pytest.approx(64)
    assert found.ratio == pytest.approx(48 / 64)


def test_the_worst_of_many_random_pairs():
    graph = Graph.sample("biregular", 60, 90, 6, share=3)
    np.random.seed(0)
    before = np.random.get_state()[1].tobytes()
    worst = theory.worst_mixing(graph, pairs=300, seed=4)
    tried = theory.random_mixing(graph, pairs=300, seed=4)
    assert len(tried) == 300
    assert worst.ratio == max(found.ratio for found in tried)
    assert 0 < worst.ratio <= 1
    assert worst != theory.worst_mixing(graph, pairs=300, seed=5)
    assert np.random.get_state()[1].tobytes() == before


def test_random_sets_have_sizes_from_one_to_all():
    graph = Graph.sample("biregular", 6, 6, 6)  # all edges are there: their number is |S| * |T|
    edges = {found.edges for found in theory.random_mixing(graph, pairs=2000)}
    assert edges == {s * t for s in range(1, 7) for t in range(1, 7)}


def test_the_ratio_is_zero_where_nothing_can_deviate():
    found = theory.mixing(Graph.sample("random", 1, 4, 1), [0], [0, 3])
    assert (found.edges, found.expected, found.bound, found.ratio) == (2, 2, 0, 0)


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        ([0, 8], [0], r"inputs from 0 to 8: the layer has inputs 0 to 7"),
        ([0], [-1, 2], r"outputs from -1 to 2: the layer has outputs 0 to 15"),
        ([0, 1, 1], [0], r"inputs has 3 indices and 2 different ones; give none twice"),
        ([0], [0.5], r"outputs=\[0\.5\] is not a list of indices; use integers from 0 to 15"),
        ([[0]], [0], r"inputs=\[\[0\]\] is not a list of indices"),
        ([True], [0], r"inputs=\[True\] is not a list of indices"),
    ],
)
def test_sets_that_are_none_are_refused(inputs, outputs, message):
    with pytest.raises(GraphError, match=message):
        theory.mixing(Graph.sample("biregular", 8, 16, 2, share=2), inputs, outputs)


# Theorem 1: sensitivity


def brute_force(stacked):
    """The 0/1 dependence matrix [outputs, inputs] after each layer, by matrix products."""
    depends = np.eye(stacked[0].n_in, dtype=bool)
    for graph in stacked:
        depends = layer_matrix(graph).astype(int) @ depends > 0
        yield depends


@st.composite
def chains(draw):
    """Up to five graphs, each on the outputs of the one before; widths on both sides of a 64-bit
    word.
    """
    widths = draw(st.lists(st.sampled_from([1, 3, 12, 63, 64, 65, 130]), min_size=2, max_size=6))
    stacked = []
    for n_in, n_out in itertools.pairwise(widths):
        share = draw(st.sampled_from([s for s in (1, 2, 3) if n_out % s == 0]))
        degree = draw(st.integers(1, min(n_in, 6)))
        stacked.append(Graph.sample("random", n_in, n_out, degree, share, draw(st.integers(0, 99))))
    return stacked


@examples
@given(stacked=chains())
def test_reach_equals_matrix_products(stacked):
    found = theory.reach(stacked)
    matrices = list(brute_force(stacked))
    complete = [matrix.all() for matrix in matrices]
    depth = complete.index(True) + 1 if True in complete else None
    assert found.depth == theory.sensitivity_depth(stacked) == depth
    assert found.complete == (depth is not None)
    assert found.connected == pytest.approx([matrix.mean() for matrix in matrices[:depth]])
    assert found.least == pytest.approx([matrix.mean(axis=1).min() for matrix in matrices[:depth]])
    assert found.lost == (0 if depth else int((~matrices[-1].any(axis=0)).sum()))


def test_large_degrees_give_the_same_reach():
    stacked = list(theory.stack("random", 100, 40, layers=3, share=2))
    found = theory.reach(stacked)
    matrices = [matrix.mean() for matrix in brute_force(stacked)]
    assert found.connected == pytest.approx(matrices[: len(found.connected)])


def assert_depth_is_logarithmic(degree, n):
    depth = theory.sensitivity_depth(theory.stack("biregular", n, degree))
    shortest = math.log(n, degree)
    assert depth is not None
    assert math.ceil(shortest - 1e-9) <= depth <= 2 * shortest + 2


@pytest.mark.parametrize("degree", [3, 4, 8])
@pytest.mark.parametrize("exponent", [6, 7, 8, 9, 10])
def test_sensitivity_depth_is_logarithmic(degree, exponent):
    assert_depth_is_logarithmic(degree, 2**exponent)


@pytest.mark.slow
@pytest.mark.parametrize("degree", [3, 4, 8])
@pytest.mark.parametrize("exponent", [11, 12, 13])
def test_sensitivity_depth_is_logarithmic_in_wide_layers(degree, exponent):
    assert_depth_is_logarithmic(degree, 2**exponent)


@pytest.mark.parametrize(
    ("n", "degree", "share"), [(16, 4, 1), (64, 8, 1), (64, 16, 4), (256, 128, 1)]
)
def test_groups_without_a_shuffle_never_complete(n, degree, share):
    found = theory.reach(theory.stack("group", n, degree, share=share))
    assert found.depth is None
    assert len(found.connected) == 40
    assert set(found.connected) == {degree / n} == set(found.least)
    assert found.lost == 0  # each input is read, by its own group alone


def test_one_unread_input_is_never_made_good():
    one = Graph.sample("random", 64, 64, 4, seed=3)
    unread = 64 - len(np.unique(one.neighbours))
    assert unread > 0
    found = theory.reach([one, *theory.stack("biregular", 64, 8, layers=20)])
    assert (found.depth, found.lost) == (None, unread)
    assert found.connected[-1] == (64 - unread) / 64


def test_a_stack_is_drawn_afresh_for_each_layer_and_seed():
    drawn = [
        *theory.stack("biregular", 32, 4, layers=5),
        *theory.stack("biregular", 32, 4, layers=5, seed=1),
    ]
    assert len({graphs.fingerprint(graph.neighbours) for graph in drawn}) == 10


def test_reach_draws_no_layer_after_the_last_it_needs():
    endless = (Graph.sample("biregular", 64, 64, 8, seed=seed) for seed in itertools.count())
    assert theory.sensitivity_depth(endless) == 3
    assert next(endless).n_in == 64


def test_stacks_that_do_not_chain_are_refused():
    with pytest.raises(
        GraphError,
        match=r"graph 2 of the stack has 9 inputs; it needs 16, the outputs of the graph",
    ):
        theory.reach([Graph.sample("random", 8, 16, 2), Graph.sample("random", 9, 8, 2)])
    with pytest.raises(GraphError, match="a stack of no graphs"):
        theory.reach([])


def positive(net):
    for parameter in net.parameters():
        nn.init.constant_(parameter, 1 / 64)
    return net.double()


def assert_gradients_are_dependences(layers, jacobian):
    """jacobian(net) [outputs, inputs] of positive weights is nonzero exactly where an input is
    reached.
    """
    for depth in range(1, len(layers) + 1):
        stacked = [theory.graph_of(layer) for layer in layers[:depth]]
        pattern = jacobian(positive(nn.Sequential(*layers[:depth]))) != 0
        assert np.array_equal(pattern.numpy(), list(brute_force(stacked))[-1])
        found = theory.reach(stacked)
        if len(found.connected) == depth:
            assert pattern.double().mean().item() == pytest.approx(found.connected[-1])
            assert pattern.double().mean(dim=1).min().item() == pytest.approx(found.least[-1])
        assert bool(pattern.all()) == found.complete


@pytest.mark.parametrize("kind", ["biregular", "random", "group", "shuffle"])
def test_gradients_of_linear_stacks_are_nonzero_where_inputs_are_reached(kind):
    layers = [
        ExpanderLinear(24, 24, degree=3, graph=kind, seed=seed, share=1 + seed % 2)
        for seed in range(5)
    ]
    zero = torch.zeros(24, dtype=torch.float64)
    assert_gradients_are_dependences(
        layers, lambda net: torch.autograd.functional.jacobian(net, zero)
    )


def test_gradients_of_convolutions_are_nonzero_where_channels_are_reached():
    widths = [(12, 20, 3), (20, 16, 2), (16, 10, 4)]
    layers = [ExpanderConv2d(i, o, 3, padding=1, degree=d, share=2, seed=o) for i, o, d in widths]

    def jacobian(net):
        zero = torch.zeros(1, 12, 4, 4, dtype=torch.float64)
        return torch.autograd.functional.jacobian(lambda x: net(x).sum(dim=(0, 2, 3)), zero).sum(
            dim=(1, 3, 4)
        )

    assert_gradients_are_dependences(layers, jacobian)


# Models


def x_conv(n_in, n_out, degree=4, **options):
    return ExpanderConv2d(n_in, n_out, 1, degree=degree, **options)


def names(model):
    return [run.names for run in theory.runs(model)]


def test_a_run_passes_over_what_keeps_channels_apart():
    depthwise = nn.Conv2d(16, 16, 3, groups=16)
    model = nn.Sequential(
        x_conv(8, 16),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        depthwise,
        nn.AvgPool2d(2),
        x_conv(16, 24),
        nn.Flatten(),
        ExpanderLinear(24, 8, degree=6),
    )
    (run,) = theory.runs(model)
    assert run.names == ("0", "5", "7")
    assert run.reach == theory.reach([theory.graph_of(model[i]) for i in (0, 5, 7)])
    assert run.reach.complete
    assert run.unread == {}


@pytest.mark.parametrize(
    "mixes",
    [
        nn.Conv2d(16, 16, 1),
        nn.Conv2d(16, 16, 1, groups=4),
        nn.Conv2d(16, 32, 1, groups=16),
        nn.ConvTranspose2d(16, 16, 1),
        nn.Linear(16, 16),
        nn.MultiheadAttention(16, 2),
    ],
)
def test_a_layer_that_mixes_channels_ends_a_run(mixes):
    assert names(nn.Sequential(x_conv(8, 16), mixes, x_conv(16, 16), x_conv(16, 8))) == [
        ("0",),
        ("2", "3"),
    ]


def test_a_run_ends_where_the_channels_do_not_chain():
    """As in a DenseNet, whose layers read the concatenation of all outputs so far."""
    model = nn.Sequential(x_conv(16, 32), x_conv(32, 8), x_conv(24, 32), x_conv(32, 8))
    assert names(model) == [("0", "1"), ("2", "3")]


def test_runs_name_what_is_unread_and_do_not_complete():
    model = nn.Sequential(
        x_conv(64, 64, graph="random", seed=3), x_conv(64, 64, 16), x_conv(64, 64, 16)
    )
    (run,) = theory.runs(model)
    unread = 64 - len(np.unique(theory.graph_of(model[0]).neighbours))
    assert unread > 0
    assert run.unread == {"0": unread}
    assert (run.reach.depth, run.reach.lost) == (None, unread)


def test_a_model_without_x_layers_has_no_runs():
    assert theory.runs(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(8, 2))) == []
    assert theory.graphs_of(nn.Linear(8, 2)) == {}


def test_a_layers_graph_is_its_buffer():
    """Loaded weights bring their graph; the seed of the constructor says nothing any more."""
    saved, layer = (ExpanderLinear(16, 32, degree=4, share=2, seed=seed) for seed in (1, 2))
    layer.load_state_dict(saved.state_dict())
    (name, graph), *rest = theory.graphs_of(nn.Sequential(nn.ReLU(), layer)).items()
    assert name == "1"
    assert not rest
    assert np.array_equal(graph.neighbours, graphs.sample("biregular", 16, 32, 4, 2, 1))
    assert (graph.n_in, graph.share) == (16, 2)
    conv = theory.graph_of(x_conv(8, 12, share=3))
    assert (conv.n_in, conv.n_out, conv.share) == (8, 12, 3)


@pytest.mark.slow
def test_the_largest_graphs_are_measured_in_seconds():
    """The size of x_densenet201 (196 layers, up to 1,888 inputs), and a 4096 x 4096 layer."""
    start = time.process_time()
    for number in range(98):
        n_in = 64 + 1824 * number // 97
        theory.spectrum(Graph.sample("biregular", n_in, 128, n_in // 2, 4, number))
        theory.spectrum(Graph.sample("biregular", 128, 32, 64, 1, number))
    middle = time.process_time()
    graph = Graph.sample("biregular", 4096, 4096, 1024)
    theory.spectrum(graph)
    theory.worst_mixing(graph)
    theory.reach([graph, graph])
    assert middle - start < 10  # measured: 1.4 s and then 3.5 s of one core (AMD EPYC)
    assert time.process_time() - middle < 10
