"""Drawing channel graphs: which inputs each output of a layer reads.

A graph is an integer array `neighbours [blocks, degree]`: row b lists the inputs of the `share`
consecutive outputs b * share to (b + 1) * share - 1, ascending and none twice, so that
blocks = n_out / share. The graph with one node for each block is the quotient graph; it is the
one that is drawn. Its outputs have degree d_r = `degree`, its inputs d_l = blocks * degree / n_in
on average.

Source: Prabhu, Varma and Namboodiri, "Deep Expander Networks", ECCV 2018. Expanders and their
spectra: Hoory, Linial and Wigderson, "Expander graphs and their applications", 2006, section 2.

The random stream is part of the format: only raw 64-bit words of numpy's PCG64 are used, because
numpy keeps those for ever and the results of `Generator.permutation` and the like only for a while.

Not here: weights (layers.py), measurements (theory.py), pictures (drawing.py), anything that needs
torch.
"""

import hashlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import GraphError

# of `ramanujan`; at the sizes of real layers the first or second draw meets the bound
MAX_DRAWS = 100

Neighbours = NDArray[np.int32]


def sample(
    kind: str, n_in: int, n_out: int, degree: int, share: int = 1, seed: int = 0
) -> Neighbours:
    """Draw the graph of one layer; equal arguments give equal bytes on every machine.

    Args:
        kind: one of `KINDS`.
            `random`: each block reads `degree` inputs drawn uniformly.
            `biregular`: the same, and every input is read equally often (within one where
            blocks * degree is not a multiple of n_in).
            `ramanujan`: biregular, connected, and its second singular value is at most
            `ramanujan_bound`; redrawn until that holds.
            `group`: the blocks in order read the n_in / degree groups of consecutive inputs.
            `shuffle`: the same after a channel shuffle (Zhang et al., "ShuffleNet", 2018).
        n_in, n_out: channels of the layer.
        degree: inputs that each output reads, from 1 to n_in; for `group` and `shuffle` a divisor
            of n_in.
        share: consecutive outputs that read the same inputs; divides n_out.
        seed: a non-negative integer of any size; `group` and `shuffle` do not depend on it.

    Returns: neighbours [n_out // share, degree] int32. The rows of `random` and `biregular` differ
        from one another as long as there are enough different rows.

    Raises: GraphError where the arguments admit no such graph, or where `MAX_DRAWS` draws of
        `ramanujan` all missed the bound.
    """
    check(kind, n_in, n_out, degree, share, seed)
    neighbours = _DRAW[kind](_Words(seed), n_in, n_out // share, degree)
    return np.ascontiguousarray(neighbours, dtype=np.int32)


def effective_share(n_in: int, n_out: int, degree: int, share: int) -> int:
    """The largest divisor s of n_out, s <= share, with (n_out / s) * degree >= 2 * n_in; 1 where
    none has it.

    With a larger share some inputs would be read by one block only, or by none.
    """
    fits = (
        s
        for s in range(min(share, n_out), 1, -1)
        if n_out % s == 0 and n_out // s * degree >= 2 * n_in
    )
    return next(fits, 1)


def largest_divisor(n: int, limit: int) -> int:
    """The largest divisor of n that is at most `limit` (1 <= limit): the degree that `group` can
    have.
    """
    return next(d for d in range(min(n, limit), 0, -1) if n % d == 0)


def layer_seed(seed: int, name: str) -> int:
    """The seed of the layer `name` in a model of seed `seed`: a hash, so that no order of
    construction matters.
    """
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little")


def fingerprint(neighbours: NDArray[Any]) -> str:
    """sha256 (hex) of shape, dtype and little-endian bytes: equal for equal graphs, and for those
    only.
    """
    array = np.ascontiguousarray(neighbours, dtype=neighbours.dtype.newbyteorder("<"))
    return hashlib.sha256(
        f"{array.shape} {array.dtype.str} ".encode() + array.tobytes()
    ).hexdigest()


def validate(neighbours: NDArray[Any], n_in: int) -> None:
    """Raise GraphError unless `neighbours` is an integer array [blocks, degree] of ascending inputs
    below n_in.
    """
    if neighbours.ndim != 2 or 0 in neighbours.shape or neighbours.dtype.kind not in "iu":
        raise GraphError(
            f"neighbours has shape {list(neighbours.shape)} and dtype {neighbours.dtype}; "
            "allowed is a non-empty integer array [blocks, degree]"
        )
    low, high = int(neighbours.min()), int(neighbours.max())
    if low < 0 or high >= n_in:
        raise GraphError(
            f"neighbours has indices from {low} to {high}; the layer has inputs 0 to {n_in - 1}"
        )
    # Compared, not subtracted: differences of unsigned integers wrap.
    falls = np.argwhere(neighbours[:, 1:] <= neighbours[:, :-1])
    if len(falls):
        row, column = (int(i) for i in falls[0])
        first, second = (int(i) for i in neighbours[row, column : column + 2])
        what = "repeats an input" if first == second else "is not ascending"
        raise GraphError(f"neighbours {what}: row {row} has {first} followed by {second}")


def is_connected(neighbours: Neighbours, n_in: int) -> bool:
    """Whether every input and every block can be reached from every other along edges."""
    reached = np.zeros(n_in, dtype=bool)
    reached[neighbours[0]] = True
    count = 0
    while count < (count := int(reached.sum())):
        reached[neighbours[reached[neighbours].any(axis=1)]] = True
    return count == n_in


def singular_values(neighbours: Neighbours, n_in: int) -> tuple[float, float]:
    """The two largest singular values of the 0/1 matrix [blocks, n_in] of the quotient graph.

    A layer's own matrix repeats every row `share` times, so both of its values are sqrt(share)
    times these. The second is 0 where there is one block or one input. Relative error below 1e-6.
    """
    blocks, degree = neighbours.shape
    if min(blocks, n_in) == 1:
        return math.sqrt(blocks * degree), 0.0
    matrix = adjacency(neighbours, n_in).astype(np.float32)
    if min(blocks, n_in) <= 1024:
        gram = (matrix @ matrix.T if blocks <= n_in else matrix.T @ matrix).astype(np.float64)
        top = np.linalg.eigvalsh(gram)[-2:]
    else:
        # 0.3 s to import; only large graphs need it
        from scipy.sparse.linalg import LinearOperator, eigsh

        apply = LinearOperator(
            (blocks, blocks), matvec=lambda v: matrix @ (matrix.T @ v), dtype=np.float32
        )
        start = np.sin(np.arange(1, blocks + 1))  # fixed, and not near the all-ones leading vector
        top = np.sort(eigsh(apply, k=2, which="LA", v0=start, tol=1e-6, return_eigenvectors=False))
    second, first = (math.sqrt(max(float(value), 0.0)) for value in top)
    return first, second


def ramanujan_bound(n_in: int, blocks: int, degree: int) -> float:
    """sqrt(d_l - 1) + sqrt(d_r - 1): the least second singular value that large biregular graphs
    can have.

    Bipartite form: Feng and Li, "Spectra of hypergraphs and applications", 1996. 0 for degrees
    below 1.
    """
    return math.sqrt(max(blocks * degree / n_in - 1, 0)) + math.sqrt(degree - 1)


def matching(neighbours: Neighbours, n_in: int, share: int = 1) -> NDArray[np.int64]:
    """For each output of a layer the input that it is matched with, -1 for none: [n_out], no input
    twice.

    The matching has as many pairs as any, of outputs with inputs that they read; the `share`
    outputs of a block get different inputs. Where every input is read equally often, it saturates
    the smaller side: every input is matched if n_in <= n_out, every output if n_out <= n_in (a
    biregular graph splits into matchings: Koenig 1916; by Hall's condition). With share 1 equally
    often within one is enough, so every `biregular` and `ramanujan` graph will do. Otherwise
    (`random`, or a share where blocks * degree is not a multiple of n_in) some may be left.

    Equal arguments give equal matchings, but another version of scipy may choose other pairs.
    Source: Hopcroft and Karp, "An n^{5/2} algorithm for maximum matchings in bipartite graphs",
    1973.
    """
    # like scipy.sparse.linalg above: slow to import, and seldom needed
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import maximum_bipartite_matching

    blocks, degree = neighbours.shape
    n_out = blocks * share
    columns = np.repeat(neighbours, share, axis=0).ravel()
    rows = np.arange(0, n_out * degree + 1, degree)
    graph = csr_array((np.ones(n_out * degree, dtype=bool), columns, rows), shape=(n_out, n_in))
    return np.asarray(maximum_bipartite_matching(graph, perm_type="column"), dtype=np.int64)


class _Words:
    """Raw words of PCG64 and the few choices that graphs need, made from them by argsort alone."""

    def __init__(self, seed: int):
        self._generator = np.random.PCG64(seed)

    def take(self, count: int) -> NDArray[np.uint64]:
        return np.asarray(self._generator.random_raw(count), dtype=np.uint64)

    def below(self, limit: int) -> int:
        return int(self._generator.random_raw()) % limit  # bias below limit / 2^64

    def order(self, count: int) -> NDArray[np.intp]:
        return np.argsort(self.take(count), kind="stable")

    def subset(self, n: int, size: int) -> NDArray[np.intp]:
        """`size` different integers below n, ascending."""
        return np.sort(np.argpartition(self.take(n), size - 1)[:size])


def _random(words: _Words, n_in: int, blocks: int, degree: int) -> NDArray[Any]:
    distinct = math.comb(n_in, degree) >= blocks
    rows: dict[bytes, NDArray[Any]] = {}
    while len(rows) < blocks:
        row = words.subset(n_in, degree)
        # Without enough different rows the number of the row makes its key unique.
        rows.setdefault(row.tobytes() if distinct else str(len(rows)).encode(), row)
    return np.stack(list(rows.values()))


def _biregular(words: _Words, n_in: int, blocks: int, degree: int) -> NDArray[Any]:
    """Random rows, then edges moved from over-read to under-read inputs, each in a random row that
    allows it.

    A move never gets stuck: it takes input u, read more often than v, out of a row that lacks v.
    There are more rows with u and not v than with v and not u, and two different rows never become
    the same row by the exchange, so at least one of the former becomes a row that does not exist
    yet. (Dealing rows from whole permutations is regular too, but at degree n / 2 it makes
    neighbouring rows complementary, and the second singular value a fifth too large.)
    """
    rows = _random(words, n_in, blocks, degree)
    reads = np.ascontiguousarray(adjacency(rows, n_in).T)  # [n_in, blocks]
    surplus, deficit = _moves(words, reads.sum(axis=1), blocks * degree)
    # A row's key is the xor of one random word for each of its inputs: a move changes it in two
    # steps, and equal rows have equal keys. (Two different rows with one key would only forbid a
    # move that is allowed.)
    word = words.take(n_in)
    keys = [int(key) for key in np.bitwise_xor.reduce(word[rows], axis=1)]
    taken = set(keys)
    distinct = len(taken) == blocks
    for u, v in zip(surplus, deficit, strict=True):
        change = int(word[u] ^ word[v])
        candidates = np.flatnonzero(reads[u] & ~reads[v])
        start = words.below(len(candidates))
        for row in np.roll(candidates, -start):
            if not distinct or keys[row] ^ change not in taken:
                break
        else:
            raise AssertionError("no row allows a move, which the counting argument above excludes")
        reads[u, row], reads[v, row] = False, True
        taken.discard(keys[row])
        keys[row] ^= change
        taken.add(keys[row])
    return np.nonzero(reads.T)[1].reshape(blocks, degree)


def _moves(words: _Words, fan_out: NDArray[Any], edges: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Inputs that must lose an edge, with repetition, and in random pairing those that must gain
    one.
    """
    n_in = len(fan_out)
    base, extra = divmod(edges, n_in)
    target = np.full(n_in, base)
    # The inputs that are read most keep the odd edge; ties fall at random.
    target[np.lexsort((words.order(n_in), -fan_out))[:extra]] += 1
    surplus = np.repeat(np.arange(n_in), np.maximum(fan_out - target, 0))
    deficit = np.repeat(np.arange(n_in), np.maximum(target - fan_out, 0))
    return surplus, deficit[words.order(len(deficit))]


def _ramanujan(words: _Words, n_in: int, blocks: int, degree: int) -> NDArray[Any]:
    if degree < 2 or blocks * degree < 2 * n_in:
        raise GraphError(
            f"graph='ramanujan' with {n_in} inputs, {blocks} blocks of outputs and degree "
            f"{degree}: every input and every block needs 2 edges or more; use a larger degree, "
            "a smaller share or graph='biregular'"
        )
    bound = ramanujan_bound(n_in, blocks, degree)
    for _ in range(MAX_DRAWS):
        neighbours = _biregular(words, n_in, blocks, degree)
        if is_connected(neighbours, n_in) and singular_values(neighbours, n_in)[1] <= bound * (
            1 + 1e-9
        ):
            return neighbours
    raise GraphError(
        f"graph='ramanujan' with {n_in} inputs, {blocks} blocks of outputs and degree {degree}: "
        f"none of {MAX_DRAWS} draws met the bound {bound:.4f}; use another seed, another degree "
        "or graph='biregular'"
    )


def _group(words: _Words, n_in: int, blocks: int, degree: int) -> NDArray[Any]:
    groups = n_in // degree
    return (np.arange(blocks) * groups // blocks)[:, None] * degree + np.arange(degree)


def _shuffle(words: _Words, n_in: int, blocks: int, degree: int) -> NDArray[Any]:
    # A channel shuffle of G groups puts channel (i mod G) * degree + i // G into place i.
    groups = n_in // degree
    place = _group(words, n_in, blocks, degree)
    return np.sort(place % groups * degree + place // groups, axis=1)


_DRAW: dict[str, Callable[[_Words, int, int, int], NDArray[Any]]] = {
    "random": _random,
    "biregular": _biregular,
    "ramanujan": _ramanujan,
    "group": _group,
    "shuffle": _shuffle,
}
KINDS = tuple(_DRAW)


def adjacency(neighbours: NDArray[Any], n_in: int) -> NDArray[np.bool_]:
    """The quotient graph as a bool matrix [blocks, n_in]: True where a block reads an input."""
    matrix = np.zeros((len(neighbours), n_in), dtype=bool)
    np.put_along_axis(matrix, neighbours.astype(np.intp), True, axis=1)
    return matrix


def check(kind: str, n_in: int, n_out: int, degree: int, share: int, seed: int) -> None:
    """Raise GraphError where `sample` would, but for what only drawing can tell of a `ramanujan`
    graph.
    """
    if kind not in KINDS:
        raise GraphError(f"graph={kind!r} is not a kind of graph; use one of {', '.join(KINDS)}")
    sizes = {"n_in": n_in, "n_out": n_out, "degree": degree, "share": share, "seed": seed}
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise GraphError(f"{name}={value!r} is not an integer")
    if min(n_in, n_out) < 1:
        raise GraphError(
            f"a graph from {n_in} inputs to {n_out} outputs: both need to be 1 or more"
        )
    if not 1 <= degree <= n_in:
        raise GraphError(
            f"degree={degree} with {n_in} inputs: an output reads at least one input and none "
            f"twice; use 1 to {n_in}, or compression >= 1 (degree = inputs // compression)"
        )
    if share < 1 or n_out % share:
        raise GraphError(f"share={share} with {n_out} outputs: use a divisor of {n_out}")
    if seed < 0:
        raise GraphError(f"seed={seed}: use an integer from 0 on")
    if kind in ("group", "shuffle") and n_in % degree:
        below = largest_divisor(n_in, degree)
        above = n_in // largest_divisor(n_in, n_in // degree)
        raise GraphError(
            f"graph={kind!r} with degree={degree}: {n_in} inputs do not fall into groups of "
            f"{degree}; the nearest that do are {below} and {above}"
        )
