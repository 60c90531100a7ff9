"""One layer at a time: how fast it is beside dense, masked and grouped forms; the rule of `auto`;
what `share` buys.

Ours is the operation of xzoo.ops as a layer calls it, by the backend that `auto` takes, into fresh
outputs. Dense is torch's own on a weight that lies ready, in the faster of its two memory formats.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import starmap
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import graphs, ops, theory
from ..errors import XzooError
from ..ops import dense as definition
from ..ops import native, operations
from ..ops.auto import choose
from ..ops.tune import PRODUCTS, LayerShape, Tensors, alternate, tensors
from .figures import Figure, fastest, format_seconds, ratios, with_progress

ROUNDS = 3  # to find the faster memory format, before the pairs that count
# numbers in an intermediate result: the gather-multiply-sum of a large batch has no place
LARGEST = 2**27
CALL = 30e6  # multiply-accumulates that would take as long as calling an operation does


class LayerCase(NamedTuple):
    """A layer, one of its products, and the least part of `ideal` wanted with vectors of 16 and of
    8 floats.
    """

    layer: LayerShape
    product: str = "forward"
    bars: tuple[float, float] | None = None

    def __str__(self) -> str:
        return f"{self.product.replace('_', ' ')}, {name(self.layer)}"

    @property
    def work(self) -> float:
        """Of one call of each form."""
        kernel, n_in, n_out, size, stride, *_ = self.layer
        return 5 * (
            n_in * n_out * max(kernel, 1) ** 2 * self.layer.batch * (size // stride) ** 2 + CALL
        )


def name(layer: LayerShape) -> str:
    """Such as "3x3 256->256 14x14 b16 d64 s1"; with a stride "/2" after the pixels, and "last" at
    the end.
    """
    kernel, n_in, n_out, size, stride, degree, share, batch, last = layer
    kind = (
        f"{kernel}x{kernel} {n_in}->{n_out} {size}x{size}" if kernel else f"linear {n_in}->{n_out}"
    )
    step = f"/{stride}" if stride > 1 else ""
    return f"{kind}{step} b{batch} d{degree} s{share}{' last' if last else ''}"


_NAME = re.compile(
    r"(?:(\d+)x\1|linear) (\d+)->(\d+)(?: (\d+)x\4(?:/(\d+))?)? b(\d+) d(\d+) s(\d+)( last)?"
)


def named(text: str) -> LayerShape | None:
    """The layer that `name` calls so."""
    found = _NAME.fullmatch(text)
    if found is None or (found[1] is None) != (found[4] is None) or int(found[1] or 1) % 2 == 0:
        return None
    numbers = map(int, found.groups(default="0")[:-1])
    kernel, n_in, n_out, size, stride, batch, degree, share = numbers
    layer = LayerShape(
        kernel, n_in, n_out, size or 1, stride or 1, degree, share, batch, bool(found[9])
    )
    graphs.check("biregular", n_in, n_out, degree, share, 0)
    return layer


# ---- what is measured: the rows and bars of the notes that the kernels were designed by


def _shapes(names: Iterable[str]) -> list[LayerShape]:
    return list(filter(None, map(named, names)))


def _many(
    rows: str, product: str, bars: tuple[float, float] | None, shares: str = ""
) -> list[LayerCase]:
    """A case for each row and share; the shares of a row stand at its end, if not in `shares`."""
    cases = []
    for row in rows.splitlines():
        sizes, _, own = row.strip().partition(" s")
        for share in (shares or own).split(","):
            cases += [LayerCase(layer, product, bars) for layer in _shapes([f"{sizes} s{share}"])]
    return cases


_POINTWISE = """1x1 1024->256 14x14 b16 d128
    1x1 1024->256 14x14 b16 d256
    1x1 1024->256 14x14 b16 d512
    1x1 256->1024 14x14 b16 d64
    1x1 256->1024 14x14 b16 d128
    1x1 512->2048 7x7 b16 d128
    1x1 512->128 28x28 b16 d128
    1x1 128->512 28x28 b16 d32
    1x1 256->64 56x56 b16 d64
    1x1 512->512 14x14 b1 d64
    1x1 256->1024 14x14 b1 d64
    1x1 256->1024 14x14 b1 d128"""
_TRAINED = """3x3 512->512 4x4 b128 d16 s1,4
    3x3 256->256 8x8 b128 d16 s1,4
    3x3 256->256 8x8 b128 d64 s1,4
    3x3 256->256 14x14 b16 d64 s1,4"""
_TRAINED_POINTWISE = """1x1 1024->256 14x14 b16 d128
    1x1 256->1024 14x14 b16 d64
    1x1 512->512 14x14 b1 d64"""
CASES = (
    *_many(
        """3x3 512->512 4x4 b128 d16 s1
        3x3 256->256 8x8 b128 d16 s1
        3x3 128->128 16x16 b128 d16 s1""",
        "forward",
        (0.75, 0.60),
    ),
    *_many("3x3 256->256 8x8 b128 d64 s1", "forward", (0.90, 0.75)),
    *_many("3x3 64->64 32x32 b128 d8 s1", "forward", (0.60, 0.50)),
    *_many(
        "3x3 128->256 16x16/2 b128 d16 s1\n3x3 256->256 28x28/2 b16 d64 s1", "forward", (0.55, 0.42)
    ),
    *_many(
        "3x3 256->256 14x14 b16 d64 s1\n3x3 256->256 14x14 b16 d128 s1", "forward", (0.70, 0.62)
    ),
    *_many(
        """3x3 256->256 14x14 b1 d64 s1
        3x3 256->256 14x14 b1 d128 s1
        3x3 128->128 28x28 b1 d32 s1,4
        3x3 512->512 7x7 b1 d128 s1,4
        3x3 64->64 32x32 b1 d8 s1,4""",
        "forward",
        (0.80, 0.55),
    ),
    *_many("1x1 1024->256 14x14 b16 d128 s4,8", "forward", (0.52, 0.42)),
    *_many(
        """1x1 256->1024 14x14 b16 d64 s4,8
        1x1 256->1024 14x14 b16 d128 s4,8
        1x1 512->2048 7x7 b16 d128 s4,8
        1x1 256->1024 14x14 b1 d64 s4,8
        1x1 256->1024 14x14 b1 d128 s4,8""",
        "forward",
        (0.75, 0.65),
    ),
    *_many(
        """1x1 1024->256 14x14 b16 d256 s4,8
        1x1 1024->256 14x14 b16 d512 s4,8
        1x1 512->128 28x28 b16 d128 s4,8
        1x1 128->512 28x28 b16 d32 s4,8
        1x1 256->64 56x56 b16 d64 s4,8
        1x1 512->512 14x14 b1 d64 s4,8""",
        "forward",
        None,
    ),
    # The notes give a range for these two shares; its lower end is asked for.
    *_many(_POINTWISE, "forward", (0.50, 0.40), shares="2"),
    *_many(_POINTWISE, "forward", (0.40, 0.38), shares="1"),
    *_many("linear 3072->768 b1 d307 s1", "forward", (0.2, 0.2)),
    *_many("linear 3072->768 b1 d307 s4", "forward", (0.5, 0.5)),
    *_many("linear 3072->768 b64 d307 s1", "forward", (0.70, 0.6)),
    *_many("linear 3072->768 b64 d307 s4", "forward", (0.95, 0.7)),
    *_many(
        """linear 3072->768 b4 d307 s1,4
        linear 3072->768 b16 d307 s1,4
        linear 3072->768 b128 d307 s1,4
        linear 3072->768 b512 d307 s1,4""",
        "forward",
        None,
    ),
    *_many(_TRAINED, "input_grad", (0.70, 0.55)),
    *_many(_TRAINED, "weight_grad", (0.55, 0.65)),
    *_many(_TRAINED_POINTWISE, "input_grad", (0.50, 0.48), shares="1"),
    *_many(_TRAINED_POINTWISE, "weight_grad", (0.38, 0.37), shares="1"),
    *_many(_TRAINED_POINTWISE, "input_grad", (0.50, 0.48), shares="4"),
    *_many(_TRAINED_POINTWISE, "weight_grad", (0.52, 0.52), shares="4"),
)


# ---- layers


def layers(selected: Sequence[str] = (), pairs: int = 15) -> Iterator[Figure]:
    """Measure layers against the dense, masked, grouped and (linear) gathered forms of the same
    sizes.

    Args:
        selected: texts, of which the name of a case has to contain one, or sizes such as "3x3
            64->64 8x8 b16 d8 s1"; empty for all.
        pairs: how often each form is measured.
    Raises: XzooError, GraphError for a text that is in no case's name and gives no sizes of a
    layer.
    """
    _check_pairs(pairs)
    cases: dict[LayerCase, None] = {}
    for text in selected:
        found = list(starmap(LayerCase, itertools.product(_shapes([text]), PRODUCTS)))
        found = found or [case for case in CASES if text in str(case)]
        if not found:
            raise XzooError(
                f"layer {text!r}: no case is called so; give sizes such as '{name(CASES[0].layer)}'"
            )
        cases |= dict.fromkeys(found)
    return _layers(list(cases or CASES), pairs)


def _layers(cases: list[LayerCase], pairs: int) -> Iterator[Figure]:
    for case in with_progress(cases, str, lambda case: case.work * pairs):
        yield from _measure(case, pairs)


def _measure(case: LayerCase, pairs: int) -> Iterator[Figure]:
    drawn = tensors(case.layer)
    form, dense_call = _faster_dense(drawn, case.product)
    calls = {"ours": ours(drawn, case.product), "dense": dense_call}
    times = alternate(calls | rivals(_formats(drawn)[form], case), pairs)
    spent, ideal = times.pop("ours"), case.layer.n_in / case.layer.degree
    wanted = {16: 0, 8: 1}.get(native.lanes()) if case.bars and native.available() else None
    for against, theirs in times.items():
        dense = against == "dense"
        yield Figure(
            str(case),
            against,
            "x",
            ratios(theirs.seconds, spent.seconds),
            case.bars[wanted] * ideal if dense and case.bars and wanted is not None else None,
            part="layer",
            ideal=ideal if dense else None,
            ours=format_seconds(median(spent.seconds)),
            faults=spent.faults,
            note=_taken(drawn, case.product),
        )


def ours(drawn: Tensors, product: str) -> Callable[[], Tensor]:
    """The operation as a layer, or its backward pass, calls it."""
    if product == "forward":
        operation = ops.conv2d if drawn.geometry else ops.linear
        geometry: list[Any] = list(map(tuple, drawn.geometry))
        return partial(operation, drawn.x, drawn.weight, drawn.neighbours, None, *geometry)
    operation = getattr(torch.ops.xzoo, drawn.operation + PRODUCTS[product])
    return partial(operation, *drawn.arguments(product), operations.forced())


def rivals(drawn: Tensors, case: LayerCase) -> dict[str, Callable[[], Tensor]]:
    """Forms of a layer as sparse as this one: the authors' masked one, a group convolution, and of
    a linear layer a gather of each output's inputs, multiplied and summed. The memory format is
    that of `drawn`.
    """
    layer, product = case.layer, case.product
    weight = definition.scatter(drawn.weight, drawn.neighbours, layer.n_in)
    mask = definition.scatter(torch.ones_like(drawn.weight), drawn.neighbours, layer.n_in)

    def masked() -> Tensor:
        if product == "weight_grad":
            return library(drawn, product, weight) * mask
        return library(drawn, product, weight * mask)

    forms: dict[str, Callable[[], Tensor]] = {"masked": masked}
    degree = graphs.largest_divisor(layer.n_in, layer.degree)
    groups = layer.n_in // degree
    if layer.n_out % groups == 0 and (layer.kernel or product == "forward"):
        grouped = torch.randn(layer.n_out, degree, *drawn.weight.shape[2:])
        forms["group"] = partial(library, drawn, product, grouped, groups)
    if not layer.kernel and product == "forward" and drawn.weight.numel() * layer.batch <= LARGEST:
        rows = definition.index(drawn.neighbours, layer.n_out)
        forms["gather, multiply, sum"] = lambda: (drawn.x[:, rows] * drawn.weight).sum(-1)
    return forms


def library(drawn: Tensors, product: str, weight: Tensor, groups: int = 1) -> Tensor:
    """torch's own operation for this product on a dense or grouped weight."""
    x, grad = drawn.x, drawn.grad
    if drawn.geometry:
        stride, padding, dilation = drawn.geometry
        if product == "forward":
            return F.conv2d(x, weight, None, stride, padding, dilation, groups)
        wanted = [product == "input_grad", product == "weight_grad", False]
        geometry = (stride, padding, dilation, False, [0, 0], groups)
        return torch.ops.aten.convolution_backward(grad, x, weight, None, *geometry, wanted)[
            not wanted[0]
        ]
    if groups > 1:  # [groups, B, degree] @ [groups, degree, outputs of a group]
        parts = x.unflatten(1, (groups, -1)).transpose(0, 1) @ weight.unflatten(
            0, (groups, -1)
        ).transpose(1, 2)
        return parts.transpose(0, 1).flatten(1)
    if product == "forward":
        return F.linear(x, weight)
    return grad @ weight if product == "input_grad" else grad.t() @ x


def _formats(drawn: Tensors) -> dict[str, Tensors]:
    """The layer as it is, and where it has pixels in channels_last as well."""
    if not drawn.geometry:
        return {"contiguous": drawn}
    last = {key: getattr(drawn, key).to(memory_format=torch.channels_last) for key in ("x", "grad")}
    return {"contiguous": drawn, "channels_last": drawn._replace(**last)}


def _faster_dense(drawn: Tensors, product: str) -> tuple[str, Callable[[], Tensor]]:
    weight, forms = definition.scatter(drawn.weight, drawn.neighbours, drawn.x.shape[1]), {}
    for form, each in _formats(drawn).items():
        own = weight.to(memory_format=torch.channels_last) if form == "channels_last" else weight
        forms[form] = partial(library, each, product, own)
    best = fastest(alternate(forms, ROUNDS)) if len(forms) > 1 else "contiguous"
    return best, forms[best]


def _taken(drawn: Tensors, product: str) -> str:
    if operations.forced() != "auto":
        return operations.forced()
    operation = drawn.operation + PRODUCTS[product]
    return choose(operation, drawn.x, drawn.weight, drawn.neighbours, *drawn.geometry)


def _check_pairs(pairs: int) -> None:
    if pairs < 1:
        raise XzooError(f"pairs={pairs}: 1 or more are needed")


# ---- the rule of `auto`

# From layers of the models, with every second one at a compression of 2, where a sparse kernel
# gains little or loses.
POLICY = _shapes(
    (
        "3x3 64->64 32x32 b128 d32 s1",
        "3x3 128->128 16x16 b64 d16 s1",
        "3x3 256->256 8x8 b128 d128 s1",
        "3x3 512->512 4x4 b128 d32 s1",
        "3x3 512->512 2x2 b64 d256 s1",
        "3x3 512->512 2x2 b1 d32 s1",
        "3x3 256->256 14x14 b1 d128 s1",
        "3x3 128->256 28x28/2 b16 d16 s1",
        "3x3 512->512 7x7 b16 d256 s1",
        "3x3 64->64 56x56 b1 d8 s1",
        "1x1 256->64 56x56 b16 d128 s4",
        "1x1 512->128 28x28 b16 d64 s4",
        "1x1 1024->256 14x14 b16 d512 s1",
        "1x1 256->1024 14x14 b1 d64 s4",
        "1x1 512->2048 7x7 b16 d256 s4",
        "1x1 512->512 14x14 b16 d64 s4",
        "1x1 24->96 16x16 b64 d12 s1",
        "linear 3072->768 b64 d307 s4",
        "linear 512->512 b128 d256 s1",
        "linear 512->512 b1 d128 s4",
    )
)


def policy(pairs: int = 15) -> Iterator[Figure]:
    """Time of what `auto` takes over that of the library's fastest dense path, for 20 shapes and
    each product.

    A layer's input comes in the memory format in which it is faster, on both sides.
    Raises: XzooError for pairs below 1.
    """
    _check_pairs(pairs)
    pairings = itertools.product(PRODUCTS, POLICY)
    return _policy([LayerCase(layer, product) for product, layer in pairings], pairs)


def _policy(cases: list[LayerCase], pairs: int) -> Iterator[Figure]:
    medians: dict[str, list[float]] = {product: [] for product in PRODUCTS}
    for case in with_progress(cases, str, lambda case: case.work * pairs):
        forms = _formats(tensors(case.layer))
        candidates = {form: ours(each, case.product) for form, each in forms.items()}
        best = fastest(alternate(candidates, ROUNDS))
        dense = _faster_dense(forms["contiguous"], case.product)[1]
        times = alternate({"auto": candidates[best], "dense": dense}, pairs)
        figure = Figure(
            str(case),
            "dense",
            "x",
            ratios(times["auto"].seconds, times["dense"].seconds),
            1.1,
            at_least=False,
            part="policy",
            ours=format_seconds(median(times["auto"].seconds)),
            faults=times["auto"].faults,
            note=f"{_taken(forms[best], case.product)}, {best}",
        )
        medians[case.product].append(figure.quartiles[1])
        yield figure
    for product, found in medians.items():
        what = f"{product.replace('_', ' ')}, median of {len(found)} shapes"
        yield Figure(what, "dense", "x", tuple(found), 1.0, at_least=False, part="policy")


# ---- what `share` buys

SHARES = (1, 2, 4, 8, 16)
CLASSES = (
    "3x3 256->256 8x8 b64 d64",
    "1x1 1024->256 14x14 b16 d128",
    "1x1 256->1024 14x14 b16 d64",
    "linear 1024->1024 b64 d128",
)


def share(pairs: int = 15) -> Iterator[Figure]:
    """For each share and class of layer: the graph's second singular value, and the speed forwards
    and in training.

    Raises: XzooError for pairs below 1.
    """
    _check_pairs(pairs)
    return _share(_shapes(starmap("{} s{}".format, itertools.product(CLASSES, SHARES))), pairs)


def _share(chosen: list[LayerShape], pairs: int) -> Iterator[Figure]:
    for layer in with_progress(chosen, name, lambda layer: LayerCase(layer).work * pairs * 2):
        drawn = tensors(layer)
        found = theory.spectrum(theory.Graph(drawn.neighbours.numpy(), layer.n_in, layer.share))
        bounds = {"first singular value": found.first, "bound of random graphs": found.bound}
        for against, value in bounds.items():
            what = f"second singular value, {name(layer)}"
            yield Figure(what, against, "x", (found.second / value,), part="share")
        seconds: dict[str, list[list[float]]] = {"ours": [], "dense": []}
        for product in PRODUCTS:
            calls = {"ours": ours(drawn, product), "dense": _faster_dense(drawn, product)[1]}
            for form, times in alternate(calls, pairs).items():
                seconds[form].append(times.seconds)
        # A step in training is all three.
        steps = [np.sum(seconds[form], axis=0).tolist() for form in ("ours", "dense")]
        speeds = {"forward": [seconds["ours"][0], seconds["dense"][0]], "training": steps}
        for what, (mine, theirs) in speeds.items():
            yield Figure(
                f"{what}, {name(layer)}",
                "dense",
                "x",
                ratios(theirs, mine),
                part="share",
                ideal=layer.n_in / layer.degree,
                ours=format_seconds(median(mine)),
            )


# ---- threads

SCALING = (
    "3x3 512->512 4x4 b128 d16 s1",
    "3x3 256->256 14x14 b16 d64 s1",
    "3x3 256->256 14x14 b1 d64 s1",
    "1x1 256->1024 14x14 b16 d64 s4",
    "1x1 1024->256 14x14 b16 d256 s4",
)
SCALED = 0.95  # least part of what threads gain a dense operation


def scaling(pairs: int = 15) -> Iterator[Figure]:
    """What this number of threads gains our kernels, over what it gains the dense operation, by the
    clock.

    Raises: XzooError on one thread, and for pairs below 1.
    """
    _check_pairs(pairs)
    if torch.get_num_threads() == 1:
        raise XzooError("threads=1: there is nothing to gain; give two or more")
    cases = list(starmap(LayerCase, itertools.product(_shapes(SCALING), PRODUCTS)))
    return _scaling(cases, pairs)


def _scaling(cases: list[LayerCase], pairs: int) -> Iterator[Figure]:
    count = torch.get_num_threads()

    def on(threads: int, call: Callable[[], Tensor]) -> None:
        torch.set_num_threads(threads)
        call()

    for case in with_progress(cases, str, lambda case: case.work * pairs):
        drawn = tensors(case.layer)
        forms = {"ours": ours(drawn, case.product), "dense": _faster_dense(drawn, case.product)[1]}
        calls: dict[tuple[str, int], Callable[[], None]] = {}
        for form, call in forms.items():
            calls |= {(form, 1): partial(on, 1, call), (form, count): partial(on, count, call)}
        try:
            times = alternate(calls, pairs)
        finally:
            torch.set_num_threads(count)
        gains = {form: ratios(times[form, 1].seconds, times[form, count].seconds) for form in forms}
        yield Figure(
            f"gain of {count} threads, {case}",
            "gain of dense",
            "x",
            ratios(gains["ours"], gains["dense"]),
            SCALED,
            part="threads",
            ours=f"{median(gains['ours']):.2f}x",
            note=f"dense {median(gains['dense']):.2f}x",
        )
