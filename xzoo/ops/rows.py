"""What a call of an operation has to be, and the graph as backends read it, made once for each
tensor of neighbours.

Not here: what a backend has a kernel for (`missing` of each), and whether rows are sorted and have
no repetition: no operation needs that, a layer does (xzoo.layers).
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

INTEGERS = frozenset({torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8})

Pair = tuple[int, int]  # for H and W

# What was made of tensors that are alive, by id: a tensor, its state then, and what was made.
# torch.utils.weak has dictionaries for this; a look into them takes three times as long.
Memory = dict[int, tuple[weakref.ref[Tensor], tuple, Any]]

_checked: Memory = {}


def unfit(
    operation: str,
    x: Tensor,
    weight: Tensor,
    neighbours: Tensor,
    bias: Tensor | None,
    grad: Tensor | None,
    stride: Sequence[int] = (),
    padding: Sequence[int] = (),
    dilation: Sequence[int] = (),
) -> str:
    """Why these tensors do not go together, with what each of them is; empty where they do.

    Looks at types, devices and sizes alone, which takes some 2 us; values are the backends' to look
    at.
    """
    # Two CPU tensors are on one device; comparing devices takes thrice the time.
    dtype, cpu = x.dtype, x.is_cpu
    if weight.dtype != dtype or not ((cpu and weight.is_cpu) or weight.device == x.device):
        return _apart(x, "weight", weight)
    if bias is not None and (
        bias.dtype != dtype or not ((cpu and bias.is_cpu) or bias.device == x.device)
    ):
        return _apart(x, "bias", bias)
    if grad is not None and (
        grad.dtype != dtype or not ((cpu and grad.is_cpu) or grad.device == x.device)
    ):
        return _apart(x, "grad", grad)
    if not ((cpu and neighbours.is_cpu) or neighbours.device == x.device):
        given = f"x is on {x.device}, neighbours on {neighbours.device}"
        return f"{given}; they must be on the same device"
    if neighbours.dtype not in INTEGERS:
        return f"neighbours are of {neighbours.dtype}; they must be integers, such as torch.int32"
    dims = 4 if operation == "conv2d" else 2
    sizes, rows, inputs = weight.shape, neighbours.shape, x.shape
    if len(inputs) != dims or len(sizes) != dims or len(rows) != 2:
        form = (
            "[B, C_in, H, W], weight [C_out, degree, kh, kw]"
            if dims == 4
            else "[B, in], weight [out, degree]"
        )
        given = f"x {list(inputs)}, weight {list(sizes)}, neighbours {list(rows)}"
        return f"{given}; they must be {form}, neighbours [outputs / share, degree]"
    if not x.numel() and 0 in inputs[1:]:
        return f"x is {list(inputs)}; only the batch may be empty"
    n_out, degree = sizes[0], sizes[1]
    if rows[1] != degree or not rows[0] or n_out % rows[0] or not degree or not n_out:
        given = f"weight {list(sizes)}, neighbours {list(rows)}"
        must = "the degree (second size) must be the same, 1 or more"
        return f"{given}; {must}, and the first sizes divide evenly"
    if bias is not None and bias.shape != (n_out,):
        return f"bias is {list(bias.shape)}; {n_out} outputs need [{n_out}]"
    if grad is not None:
        shape = output_shape(x, weight, stride, padding, dilation)
        if grad.shape != shape:
            given = f"grad is {list(grad.shape)}, x {list(inputs)}, weight {list(sizes)}"
            return f"{given}; the output of these, and so grad, is {list(shape)}"
    return ""


def _apart(x: Tensor, name: str, other: Tensor) -> str:
    if x.dtype != other.dtype:
        return f"x is of {x.dtype}, {name} of {other.dtype}; they must be of the same type"
    return f"x is on {x.device}, {name} on {other.device}; they must be on the same device"


def output_shape(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int] = (),
    padding: Sequence[int] = (),
    dilation: Sequence[int] = (),
) -> tuple[int, ...]:
    """Of the operation on x and weight; of a linear layer where there is no stride."""
    size = []
    for i, step in enumerate(stride):
        reach = dilation[i] * (weight.shape[i + 2] - 1) + 1
        size.append((x.shape[i + 2] + 2 * padding[i] - reach) // step + 1)
    return x.shape[0], weight.shape[0], *size


def remembered(table: Memory, neighbours: Tensor, key: tuple, make: Callable[[], Any]) -> Any:
    """make(), or what it gave for this tensor and key, if torch has counted no change of it
    since."""
    if neighbours.is_inference():  # torch counts no changes of these
        return make()
    number, key = id(neighbours), (*key, neighbours._version, neighbours.data_ptr())
    known = table.get(number)
    # A number is given again when its tensor is gone.
    if known is not None and known[1] == key and known[0]() is neighbours:
        return known[2]
    made = make()
    table[number] = (weakref.ref(neighbours, lambda _: table.pop(number, None)), key, made)
    return made


def checked(neighbours: Tensor, n_in: int) -> Tensor:
    """neighbours as int32, dense in memory. Waits for a GPU once a graph. IndexError where an input
    is missing."""

    def make() -> Tensor | None:
        check_range(neighbours, n_in)
        rows = neighbours.to(torch.int32).contiguous()
        # Not the tensor itself: the table must not keep its own key alive.
        return None if rows is neighbours else rows

    rows = remembered(_checked, neighbours, (n_in,), make)
    return neighbours if rows is None else rows


def check_range(neighbours: Tensor, n_in: int) -> None:
    """IndexError unless all are inputs, 0 to n_in - 1; looks at them whatever was seen before."""
    if bool(((neighbours < 0) | (neighbours >= n_in)).any()):
        raise IndexError(f"neighbours must be from 0 to {n_in - 1}, the inputs there are")
