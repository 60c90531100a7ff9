"""Measuring graphs: spectrum, mixing, and how fast a stack of them connects everything.

The two theorems of the paper, as numbers of the graphs that are really there:

    Theorem 1 (sensitivity)  after O(log n) layers every output depends on every input: `reach`,
                             `runs`
    Theorem 2 (mixing)       any two vertex sets have about as many edges between them as random
                             ones: `mixing`, `random_mixing`; the smaller the second singular
                             value, the closer

Source: Prabhu, Varma and Namboodiri, "Deep Expander Networks", ECCV 2018. Both hold for graphs of
equal degrees on equal sides; the bipartite forms are quoted where they are used. A guarantee that
follows from the spectrum is 1.7 to 6 times deeper than what `reach` counts, so depth is counted and
not bounded.

Not here: drawing at random (graphs.py) and pictures (drawing.py).
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import nn

from . import graphs
from .errors import GraphError
from .layers import X_LAYERS, ExpanderConv2d, ExpanderLinear, modules_of

Packed = NDArray[np.uint64]  # sets of channels, one to a row, one channel to a bit


@dataclass(frozen=True, eq=False)
class Graph:
    """One layer's graph: `neighbours` [blocks, degree] (see graphs.py) and what they do not say."""

    neighbours: graphs.Neighbours
    n_in: int
    share: int = 1

    @classmethod
    def sample(
        cls, kind: str, n_in: int, n_out: int, degree: int, share: int = 1, seed: int = 0
    ) -> "Graph":
        """The graph that `graphs.sample` draws from the same arguments."""
        return cls(graphs.sample(kind, n_in, n_out, degree, share, seed), n_in, share)

    @property
    def blocks(self) -> int:
        return len(self.neighbours)

    @property
    def n_out(self) -> int:
        return self.blocks * self.share

    @property
    def degree(self) -> int:
        return self.neighbours.shape[1]

    def matrix(self) -> NDArray[np.float32]:
        """[blocks, n_in] of 0 and 1. The layer's own matrix repeats every row `share` times."""
        return graphs.adjacency(self.neighbours, self.n_in).astype(np.float32)


@dataclass(frozen=True)
class Spectrum:
    """The two largest singular values of a quotient graph and what the second is measured against.

    Everything here is sqrt(share) times larger for the layer's own matrix; `normalised` is not.
    """

    first: float  # sqrt(d_l * d_r) of a biregular graph
    second: float  # lambda in Theorem 2
    ramanujan: float  # sqrt(d_l - 1) + sqrt(d_r - 1): the least that large sparse graphs can have
    # sqrt(d_l (1 - p)) + sqrt(d_r (1 - p)), p = degree / n_in: the smaller at large p
    random_matrix: float

    @property
    def normalised(self) -> float:
        """second / first: 0 where every output reads everything, 1 where parts are not connected at
        all.
        """
        return self.second / self.first

    @property
    def gap(self) -> float:
        """The spectral gap, first - second."""
        return self.first - self.second

    @property
    def bound(self) -> float:
        """The smaller of the two bounds: what a good graph of these sizes comes near."""
        return min(self.ramanujan, self.random_matrix)


@dataclass(frozen=True)
class Mixing:
    """Edges between a set S of a layer's inputs and a set T of its outputs, against Theorem 2."""

    edges: int
    expected: float  # degree * |S| * |T| / n_in
    # of |edges - expected|: lambda * sqrt(|S| * |T|), lambda the layer's second singular value
    bound: float
    sharp: float  # the same times sqrt((1 - |S| / n_in) * (1 - |T| / n_out)): still a bound

    @property
    def ratio(self) -> float:
        """|edges - expected| / bound: at most 1 for every pair of sets of a biregular graph."""
        return abs(self.edges - self.expected) / self.bound if self.bound else 0.0


@dataclass(frozen=True)
class Reach:
    """How the outputs of a stack come to depend on its inputs; ends with the layer that completes
    it.
    """

    # after each layer: the part of all pairs (input, output) that is connected
    connected: tuple[float, ...]
    # after each layer: the part of the inputs that the least connected output sees
    least: tuple[float, ...]
    # sensitivity depth: layers until all is connected; None where the stack ends before
    depth: int | None
    lost: int  # inputs of the stack that no output depends on

    @property
    def complete(self) -> bool:
        return self.depth is not None


@dataclass(frozen=True)
class Stretch:
    """Consecutive X-layers of a model, each reading what the one before it computes."""

    names: tuple[str, ...]
    reach: Reach
    unread: dict[str, int]  # layer -> how many of its inputs nobody reads; absent where it is none


def spectrum(graph: Graph) -> Spectrum:
    """Second singular value and both bounds; relative error below 1e-6, a 4096 x 4096 graph in a
    second.

    The random-matrix value is the edge of the spectrum of a matrix of independent entries of
    variance p (1 - p). It is a heuristic: for growing degrees only second = O(sqrt(larger degree))
    is proved (Zhu, arXiv 2005.08103).
    """
    first, second = graphs.singular_values(graph.neighbours, graph.n_in)
    absent = 1 - graph.degree / graph.n_in
    fan_out = graph.blocks * graph.degree / graph.n_in
    return Spectrum(
        first,
        second,
        ramanujan=graphs.ramanujan_bound(graph.n_in, graph.blocks, graph.degree),
        random_matrix=math.sqrt(fan_out * absent) + math.sqrt(graph.degree * absent),
    )


def all_singular_values(graph: Graph) -> NDArray[np.float64]:
    """All min(blocks, n_in) singular values of the quotient graph, descending.

    Absolute error below 1e-6 * first; 1,024 a side take 0.1 s, 4,096 take 8 s (one core, AMD EPYC).
    """
    matrix = graph.matrix()
    if graph.blocks > graph.n_in:
        matrix = matrix.T
    # Products of 0 and 1 summed in float32 are exact below 2^24 terms.
    gram = (matrix @ matrix.T).astype(np.float64)
    return np.sqrt(np.clip(np.linalg.eigvalsh(gram)[::-1], 0, None))


def mixing(graph: Graph, inputs: ArrayLike, outputs: ArrayLike) -> Mixing:
    """Count the edges between given vertex sets and compare them with Theorem 2.

    Source: Haemers, "Interlacing eigenvalues and graphs", Linear Algebra Appl. 226, 1995, for
    biregular graphs. A layer is one where every input is read equally often; elsewhere the bound is
    a yardstick.

    Args:
        inputs, outputs: indices of the *layer's* inputs (below n_in) and outputs (below n_out),
            none twice.
    Raises: GraphError for indices out of range or repeated.
    """
    members = _members("inputs", inputs, graph.n_in), _members("outputs", outputs, graph.n_out)
    return _mixing(graph, *(m[None] for m in members))[0]


def random_mixing(graph: Graph, pairs: int = 1000, seed: int = 0) -> list[Mixing]:
    """`mixing` of random pairs of sets, with sizes drawn evenly on a logarithmic scale from 1 to
    all.
    """
    draw = np.random.default_rng(seed)

    def sets(n: int) -> NDArray[np.bool_]:
        sizes = np.exp(draw.uniform(0, math.log(n + 1), pairs)).astype(int)
        return draw.random((pairs, n)).argsort(axis=1) < sizes[:, None]

    return _mixing(graph, sets(graph.n_in), sets(graph.n_out))


def worst_mixing(graph: Graph, pairs: int = 1000, seed: int = 0) -> Mixing:
    """The pair of largest ratio among those of `random_mixing`."""
    return max(random_mixing(graph, pairs, seed), key=lambda found: found.ratio)


def stack(
    kind: str, n: int, degree: int, layers: int = 40, share: int = 1, seed: int = 0
) -> Iterator[Graph]:
    """`layers` graphs on n + n channels, one after the other drawn afresh from seeds that `seed`
    gives.
    """
    for number in range(layers):
        yield Graph.sample(kind, n, n, degree, share, graphs.layer_seed(seed, str(number)))


def reach(stacked: Iterable[Graph]) -> Reach:
    """Follow every input through a stack of graphs, up to the layer that connects everything.

    Later graphs of an iterator are never drawn, because no layer can undo a complete dependence:
    each of its outputs reads one channel at least. 8,192 channels take 0.1 s a layer at degree 8.

    Raises: GraphError for an empty stack, or where a graph's inputs are not the outputs before it.
    """
    connected: list[float] = []
    least: list[float] = []
    # row c: the inputs that channel c depends on
    depends = everything = np.empty((0, 0), dtype=np.uint64)
    n = 0
    for graph in stacked:
        if not connected:
            n = graph.n_in
            depends = _packed_identity(n)
            everything = np.bitwise_or.reduce(depends, axis=0)
        elif graph.n_in != len(depends):
            raise GraphError(
                f"graph {len(connected) + 1} of the stack has {graph.n_in} inputs; it needs "
                f"{len(depends)}, the outputs of the graph before it"
            )
        depends = np.repeat(_unions(depends, graph.neighbours, everything), graph.share, axis=0)
        seen = np.bitwise_count(depends).sum(axis=1, dtype=np.int64)
        connected.append(float(seen.mean()) / n)
        least.append(float(seen.min()) / n)
        if seen.min() == n:
            return Reach(tuple(connected), tuple(least), depth=len(connected), lost=0)
    if not connected:
        raise GraphError("a stack of no graphs has no reach; give one graph or more")
    found = np.bitwise_count(np.bitwise_or.reduce(depends, axis=0)).sum(dtype=np.int64)
    return Reach(tuple(connected), tuple(least), depth=None, lost=n - int(found))


def sensitivity_depth(stacked: Iterable[Graph]) -> int | None:
    """Layers after which every output depends on every input (Theorem 1); None if the stack ends
    before.
    """
    return reach(stacked).depth


def graph_of(layer: ExpanderConv2d | ExpanderLinear) -> Graph:
    """The graph that a layer computes with: its buffer, not what its seed would draw."""
    n_in = layer.in_channels if isinstance(layer, ExpanderConv2d) else layer.in_features
    return Graph(layer.neighbours.cpu().numpy(), n_in, layer.share)


def graphs_of(model: nn.Module) -> dict[str, Graph]:
    """Qualified name -> graph, of every X-layer in the order of `named_modules`."""
    return {name: graph_of(layer) for name, layer in modules_of(model, X_LAYERS).items()}


def runs(model: nn.Module) -> list[Stretch]:
    """Every maximal run of X-layers of which each reads the outputs of the one before it.

    The order of `named_modules` is taken for the order of computation, as it is in the zoo's
    models. A run ends at a layer that mixes all channels (a dense convolution or linear layer,
    grouped ones included) and where the next X-layer has another number of inputs, as after a
    concatenation. Depthwise convolutions, norms, activations and pooling keep channels apart and do
    not end it. Shortcuts and concatenations are left out: they can only add dependences, so what a
    run connects is connected in the model.
    """
    found: list[dict[str, Graph]] = []
    last: Graph | None = None
    for name, module in model.named_modules():
        if isinstance(module, ExpanderConv2d | ExpanderLinear):
            graph = graph_of(module)
            if last is None or last.n_out != graph.n_in:
                found.append({})
            found[-1][name] = last = graph
        elif _mixes_channels(module):
            last = None
    return [_run(layers) for layers in found]


def _run(layers: dict[str, Graph]) -> Stretch:
    unread = {name: graph.n_in - len(np.unique(graph.neighbours)) for name, graph in layers.items()}
    return Stretch(
        tuple(layers), reach(layers.values()), {name: n for name, n in unread.items() if n}
    )


def _mixes_channels(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.conv._ConvNd):
        return not module.groups == module.in_channels == module.out_channels
    return isinstance(module, nn.Linear | nn.Bilinear | nn.MultiheadAttention)


def _members(side: str, indices: ArrayLike, n: int) -> NDArray[np.bool_]:
    """Indices as a vector [n] of True and False."""
    chosen = np.asarray(indices)
    if chosen.ndim != 1 or (chosen.size and chosen.dtype.kind not in "iu"):
        raise GraphError(
            f"{side}={indices!r} is not a list of indices; use integers from 0 to {n - 1}"
        )
    if chosen.size and (chosen.min() < 0 or chosen.max() >= n):
        raise GraphError(
            f"{side} from {chosen.min()} to {chosen.max()}: the layer has {side} 0 to {n - 1}"
        )
    members = np.zeros(n, dtype=bool)
    members[chosen.astype(np.intp)] = True
    if members.sum() != chosen.size:
        different = members.sum()
        raise GraphError(
            f"{side} has {chosen.size} indices and {different} different ones; give none twice"
        )
    return members


def _mixing(graph: Graph, inputs: NDArray[np.bool_], outputs: NDArray[np.bool_]) -> list[Mixing]:
    """One result for each row of inputs [pairs, n_in] and outputs [pairs, n_out]."""
    second = math.sqrt(graph.share) * graphs.singular_values(graph.neighbours, graph.n_in)[1]
    # [pairs, blocks]: members of S that each block reads
    read = inputs.astype(np.float32) @ graph.matrix().T
    taken = outputs.reshape(len(outputs), graph.blocks, graph.share).sum(axis=2)
    edges = (read.astype(np.int64) * taken).sum(axis=1)
    results = []
    for count, s, t in zip(edges, inputs.sum(axis=1), outputs.sum(axis=1), strict=True):
        bound = second * math.sqrt(s * t)
        left = (1 - s / graph.n_in) * (1 - t / graph.n_out)
        expected = graph.degree * int(s) * int(t) / graph.n_in
        results.append(Mixing(int(count), expected, bound, bound * math.sqrt(left)))
    return results


def _packed_identity(n: int) -> Packed:
    """[n, words]: bit i of row i alone is set. Sixty-four inputs to a word: 8,192 of them take 8
    MB.
    """
    words = np.zeros((n, -(-n // 64)), dtype=np.uint64)
    channel = np.arange(n)
    words[channel, channel // 64] = np.uint64(1) << (channel % 64).astype(np.uint64)
    return words


def _unions(depends: Packed, neighbours: graphs.Neighbours, everything: Packed) -> Packed:
    """Row b: the union of what the neighbours of block b depend on."""
    unions = depends[neighbours[:, 0]]
    unfinished = np.arange(len(neighbours))
    for column in range(1, neighbours.shape[1]):
        unions[unfinished] |= depends[neighbours[unfinished, column]]
        # at 1, 2, 4, ...: at large degrees most rows are full after a few
        if column & (column - 1) == 0:
            unfinished = unfinished[(unions[unfinished] != everything).any(axis=1)]
    return unions
