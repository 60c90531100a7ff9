"""`xzoo tune`: measures on this machine which layers are faster in our own kernels, and keeps that
as the rule that `auto` follows here.

For CPUs that auto.py's rule was not measured on. The layers are of the sizes that models have, in
every class that a rule tells apart: kind of layer, product, lanes and compression.
"""

import itertools
import math
import operator
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import track

from . import files
from .errors import XzooError
from .home import home
from .ops import native, rules
from .ops.auto import NATIVE, SHARED, library
from .ops.rules import NEVER, LeastCompression, NativeRule
from .ops.tune import PRODUCTS, LayerShape, alternate, tensors

BANDS = (16, 2, 0)  # least lanes of each rule
FASTER = 1.1  # times that a product has to be faster, as for auto.py's rule
COMPRESSIONS = (2, 4, 8, 16)
ROUNDS = 3  # of every layer, whatever the time


class Measured(NamedTuple):
    """How many times faster a product of a layer is by our kernels than by the library."""

    product: str
    kind: str
    lanes: int
    compression: int
    ratio: float


class Case(NamedTuple):
    """A layer to measure, and where it stands in a rule."""

    kind: str
    lanes: int
    layer: LayerShape


# ---- the layers

# Of each kind: kernel, inputs, outputs, pixels and stride, and in which batches. With one sample,
# with some, and with a vector's worth of samples other kernels run; so they do by size.
SIZES: dict[str, tuple[tuple[tuple[int, int, int, int, int], tuple[int, ...]], ...]] = {
    "conv3": (
        ((3, 512, 512, 4, 1), (1, 3, 16)),
        ((3, 256, 256, 14, 1), (1,)),
        ((3, 256, 256, 7, 1), (1, 8, 16)),
        ((3, 512, 512, 2, 1), (1,)),
        ((3, 256, 256, 2, 1), (8, 64)),
        ((3, 64, 64, 32, 1), (1,)),
        ((3, 64, 64, 16, 1), (3, 16)),
    ),
    "conv3_strided": (
        ((3, 256, 512, 14, 2), (1,)),
        ((3, 256, 512, 8, 2), (1, 8, 16)),
        ((3, 64, 128, 28, 2), (1, 3, 16)),
    ),
    "conv1": (
        ((1, 256, 64, 28, 1), (1,)),
        ((1, 64, 256, 28, 1), (1, 4)),
        ((1, 1024, 256, 14, 1), (1,)),
        ((1, 512, 512, 7, 1), (1, 8)),
        ((1, 512, 512, 2, 1), (1, 2)),
        ((1, 512, 512, 1, 1), (1, 3)),
        ((1, 256, 1024, 1, 1), (1, 8)),
    ),
    "linear": (
        ((0, 2048, 512, 1, 1), (1, 3, 8, 16, 64)),
        ((0, 512, 512, 1, 1), (1, 3, 8, 16, 64)),
    ),
}


def cases() -> list[Case]:
    """The layers to measure, the larger ones of a kind first."""
    found = []
    for kind, sizes in SIZES.items():
        shares = {kind: 1} if kind.startswith("conv3") else {kind: 1, f"{kind}_shared": SHARED}
        for (shape, batches), (name, share) in itertools.product(sizes, shares.items()):
            kernel, n_in, _, size, _ = shape
            for batch, part in itertools.product(batches, COMPRESSIONS):
                lanes = batch if kernel == 3 else batch * size**2
                for last in (False, True) if size > 1 else (False,):
                    layer = LayerShape(*shape, n_in // part, share, batch, last)
                    found.append(Case(name, lanes, layer))
    return found


# ---- the command's work


def tune(seconds: float = 120.0) -> tuple[NativeRule, ...]:
    """Measure this machine and write its rule to `rules.path()`, in place of one that is there.

    Processes that start afterwards follow it. Shows its progress on a terminal.
    Raises: XzooError without our kernels, and where the file cannot be written, before measuring.
    """
    if not 0 < seconds < math.inf:
        raise XzooError(f"seconds={seconds}: more than 0 are needed, such as 120")
    built = native.examine()
    if isinstance(built, str):
        raise XzooError(f"there are no kernels of xzoo's to measure here: {built}")
    files.check_folder(home(), "XZOO_HOME")
    home().mkdir(parents=True, exist_ok=True)
    files.check_file(rules.path(), "XZOO_HOME")
    made = derived(measure(cases(), seconds))
    rules.write(made)
    return made


def changes(made: Sequence[NativeRule]) -> list[list[str]]:
    """What a rule says against the built-in one of this CPU: a row for each product and band of
    lanes, and in it the least compression of each kind of layer; "2, was 4" where they differ.
    """
    built_in = NATIVE.get((native.lanes(), native.fast()), ())
    rows = []
    for product in PRODUCTS:
        for rule in made:
            before = next((b for b in built_in if rule.least_lanes >= b.least_lanes), None)
            row = [product.replace("_", " "), str(max(1, rule.least_lanes))]
            for kind in LeastCompression._fields:
                is_now = getattr(getattr(rule, product), kind)
                was = NEVER if before is None else getattr(getattr(before, product), kind)
                text = _words(is_now)
                row.append(text if is_now == was else f"{text}, was {_words(was)}")
            rows.append(row)
    return rows


def _words(compression: int) -> str:
    return "never" if compression == NEVER else str(compression)


# ---- measuring


def measure(chosen: Sequence[Case], seconds: float) -> list[Measured]:
    """All products of the layers on one thread, in `seconds` or as long as the least number of
    rounds takes.

    What is not FASTER is measured once more at the end, and the better of the two counts: a class
    is not lost by what the machine did for a moment.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = _looked(chosen, 0.8 * seconds, "measuring layers")
        doubtful = [case for case in chosen if min(map(_ratio, found[case])) < FASTER]
        again = _looked(doubtful, 0.2 * seconds, "again what was not faster")
    finally:
        torch.set_num_threads(threads)
    for case, second in again.items():
        found[case] = [max(pair, key=_ratio) for pair in zip(found[case], second, strict=True)]
    return list(itertools.chain.from_iterable(found.values()))


def _looked(chosen: Sequence[Case], seconds: float, what: str) -> dict[Case, list[Measured]]:
    found: dict[Case, list[Measured]] = {}
    end = time.perf_counter() + seconds
    console = Console(stderr=True)
    hidden = not console.is_terminal
    for case in track(chosen, what, console=console, transient=True, disable=hidden):
        left = max(0.0, end - time.perf_counter()) / (len(chosen) - len(found))
        found[case] = list(_measured(case, left / len(PRODUCTS)))
    return found


def _ratio(one: Measured) -> float:
    return one.ratio


def _measured(case: Case, seconds: float) -> Iterator[Measured]:
    # A random graph is drawn ten times as fast as a biregular one, and takes as long to compute.
    drawn = tensors(case.layer, graph="random")
    theirs = library(drawn.operation, drawn.x, drawn.weight, drawn.neighbours)
    for product, suffix in PRODUCTS.items():
        operation = getattr(torch.ops.xzoo, drawn.operation + suffix)
        arguments = drawn.arguments(product)
        calls = {name: partial(operation, *arguments, name) for name in (theirs, "native")}
        times = alternate(calls, ROUNDS, seconds)
        pairs = zip(times[theirs].seconds, times["native"].seconds, strict=True)
        ratio = median(itertools.starmap(operator.truediv, pairs))
        compression = case.layer.n_in // case.layer.degree
        yield Measured(product, case.kind, case.lanes, compression, ratio)


# ---- from times to a rule


def derived(found: Iterable[Measured]) -> tuple[NativeRule, ...]:
    """A rule for each of BANDS: our kernels from the least compression on at which, and above
    which, all that was measured is FASTER, in either memory format; never where none is.

    Auto.py's rule lets one of a hundred layers be slower, by a fifth at most. Here a class has some
    ten, so that none may be.
    """
    classes: dict[tuple[int, str, str], list[Measured]] = {}
    for one in found:
        band = next(least for least in BANDS if one.lanes >= least)
        classes.setdefault((band, one.product, one.kind), []).append(one)
    made = []
    for band in BANDS:
        parts = []
        for product in PRODUCTS:
            least = [_least(classes.get((band, product, k), ())) for k in LeastCompression._fields]
            parts.append(LeastCompression(*least))
        made.append(NativeRule(band, *parts))
    return tuple(made)


def _least(found: Sequence[Measured]) -> int:
    least = NEVER
    for compression in sorted({one.compression for one in found}, reverse=True):
        if min(one.ratio for one in found if one.compression == compression) < FASTER:
            break
        least = compression
    return least
