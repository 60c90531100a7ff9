"""torch's own grouped convolution, where the graph is one of groups, as `group` and `shuffle` are.

That is where blocks that follow one another read the same inputs, and these groups of blocks are
equally large and read every input once: the layer is a grouped operation of the library on its
inputs in the order of the groups. Nothing is laid out anew but the inputs, and those only where
the groups are not of consecutive ones. Keeps NaN to the outputs that are connected to it.
"""

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .dense import only_read
from .native import readable
from .rows import Memory, Pair, checked, remembered

_ACTIVATIONS = {"relu": F.relu, "relu6": F.relu6}
_parts: Memory = {}


class Parts(NamedTuple):
    """How many groups there are, the inputs in their order, and the places that bring them back,
    int64 [n_in]; None where they are in order."""

    groups: int
    order: Tensor | None
    inverse: Tensor | None


# ---- as backends.Backend says

ACTIVATIONS: Collection[str] = ("", *_ACTIVATIONS)
CHECKS_NEIGHBOURS = True


def possible() -> bool:
    return True


def missing(operation: str, x: Tensor, weight: Tensor, neighbours: Tensor, *geometry: Any) -> str:
    if neighbours.is_meta:
        return "has to read the neighbours, and tensors on meta have no numbers"
    n_in = x.shape[1]
    if parts(neighbours, n_in) is not None:
        return ""
    checked(neighbours, n_in)
    given = f"neighbours {list(neighbours.shape)} of {n_in} inputs are none"
    return f"runs graphs of groups that part the inputs, as group and shuffle do; {given}"


def conv2d(
    x: Tensor,
    weight: Tensor,
    neighbours: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    activation: str = "",
) -> Tensor:
    n_groups, order, _ = _known(neighbours, x)
    y = F.conv2d(_ordered(x, order), weight, bias, stride, padding, dilation, n_groups)
    return _activated(y, activation)


def conv2d_input_grad(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    neighbours: Tensor,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> Tensor:
    n_groups, _, inverse = _known(neighbours, x)
    geometry = (stride, padding, dilation, False, [0, 0], n_groups)
    wanted = [True, False, False]
    dx = torch.ops.aten.convolution_backward(grad, x, weight, None, *geometry, wanted)[0]
    return _ordered(dx, inverse)


def conv2d_weight_grad(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    neighbours: Tensor,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> Tensor:
    n_groups, order, _ = _known(neighbours, x)
    x, stride = only_read(x, weight, stride, padding)
    geometry = (stride, padding, dilation, False, [0, 0], n_groups)
    wanted = [False, True, False]
    x = _ordered(x, order)
    return torch.ops.aten.convolution_backward(grad, x, weight, None, *geometry, wanted)[1]


def linear(
    x: Tensor, weight: Tensor, neighbours: Tensor, bias: Tensor | None, activation: str = ""
) -> Tensor:
    n_groups, order, _ = _known(neighbours, x)
    # [groups, B, degree] @ [groups, degree, outputs of a group]
    y = _columns(_ordered(x, order), n_groups) @ weight.unflatten(0, (n_groups, -1)).transpose(1, 2)
    y = y.transpose(0, 1).flatten(1)
    return _activated(y if bias is None else y + bias, activation)


def linear_input_grad(grad: Tensor, x: Tensor, weight: Tensor, neighbours: Tensor) -> Tensor:
    n_groups, _, inverse = _known(neighbours, x)
    dx = _columns(grad, n_groups) @ weight.unflatten(0, (n_groups, -1))  # [groups, B, degree]
    return _ordered(dx.transpose(0, 1).flatten(1), inverse)


def linear_weight_grad(grad: Tensor, x: Tensor, weight: Tensor, neighbours: Tensor) -> Tensor:
    n_groups, order, _ = _known(neighbours, x)
    # [groups, outputs of a group, B] @ [groups, B, degree]
    dw = _columns(grad, n_groups).transpose(1, 2) @ _columns(_ordered(x, order), n_groups)
    return dw.flatten(0, 1)


# ---- the graph


def parts(neighbours: Tensor, n_in: int) -> Parts | None:
    """The groups of these neighbours, None where they have none. Sizes tell of many graphs; numbers
    are looked at once, and again after torch has counted a change of them."""
    blocks, degree = neighbours.shape
    if n_in % degree or blocks % (n_in // degree):
        return None
    return remembered(_parts, neighbours, (n_in,), lambda: _found(neighbours, n_in))


def order_of(neighbours: Tensor, n_in: int) -> str:
    """Whether the inputs are "ascending" or "permuted" in the order of the groups; empty where
    there are none."""
    found = parts(neighbours, n_in)
    if found is None:
        return ""
    return "ascending" if found.order is None else "permuted"


def _found(neighbours: Tensor, n_in: int) -> Parts | None:
    n_groups = n_in // neighbours.shape[1]
    rows = (
        readable(neighbours).long().unflatten(0, (n_groups, -1))
    )  # [groups, blocks of a group, degree]
    if not torch.equal(rows, rows[:, :1].expand_as(rows)):
        return None
    order = rows[:, 0].flatten().clone()  # no view: what is remembered must not keep its key alive
    inputs = torch.arange(n_in, device=order.device)
    if torch.equal(order, inputs):
        return Parts(n_groups, None, None)
    ascending, inverse = order.sort()
    return Parts(n_groups, order, inverse) if torch.equal(ascending, inputs) else None


def _known(neighbours: Tensor, x: Tensor) -> Parts:
    found = parts(neighbours, x.shape[1])
    assert found is not None  # `missing` was asked
    return found


def _ordered(x: Tensor, order: Tensor | None) -> Tensor:
    """The channels of x in this order, in x's memory format."""
    if order is None:
        return x
    # An index keeps channels_last; index_select is the faster one where pixels lie together.
    return x.index_select(1, order) if x.is_contiguous() else x[:, order]


def _columns(x: Tensor, n_groups: int) -> Tensor:
    """[B, n] as [groups, B, n / groups]."""
    return x.unflatten(1, (n_groups, -1)).transpose(0, 1)


def _activated(y: Tensor, activation: str) -> Tensor:
    return _ACTIVATIONS[activation](y, inplace=True) if activation else y
