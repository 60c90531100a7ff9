"""What a backend is, and the table of them.

A backend is a module that fits `Backend`, and a row in BACKENDS: nothing else has to know it. It
only computes: operations.py has checked its tensors (rows.unfit) and knows the derivatives. mypy
holds the modules against the protocol, and tests/test_ops.py each of them against the definition.
"""

from collections.abc import Collection
from typing import Any, Protocol

from torch import Tensor

from ..errors import XzooError
from . import dense, gather, group, native, triton
from .rows import Pair


class Backend(Protocol):
    """The names a backend's module has.

    x is [B, C_in, H, W] or [B, in], weight [C_out, degree, kh, kw] or [out, degree], neighbours
    [outputs / share, degree] of any integers, bias [outputs] or None, grad of the output's shape.
    All floating-point tensors have one dtype and all tensors one device, but any strides. Results
    are of that dtype and new.
    """

    # What conv2d and linear do to their result by themselves, where it is given as their last
    # argument.
    ACTIVATIONS: Collection[str]
    # Whether the functions raise IndexError by themselves where a neighbour is not an input. Other
    # backends get neighbours that were checked, as int32 and dense in memory.
    CHECKS_NEIGHBOURS: bool

    def possible(self) -> bool:
        """Whether there is a chance that it runs on this machine. Builds and loads nothing."""
        ...

    def missing(
        self, operation: str, x: Tensor, weight: Tensor, neighbours: Tensor, *geometry: Any
    ) -> str:
        """Why such a layer cannot run here, and empty where it can: all six functions, or none.

        `operation` is conv2d or linear, `geometry` a convolution's stride, padding and dilation.
        What is said goes on after "backend 'name' ".
        """
        ...

    def conv2d(
        self,
        x: Tensor,
        weight: Tensor,
        neighbours: Tensor,
        bias: Tensor | None,
        stride: Pair,
        padding: Pair,
        dilation: Pair,
    ) -> Tensor:
        """[B, C_out, H', W']"""
        ...

    def conv2d_input_grad(
        self,
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        neighbours: Tensor,
        stride: Pair,
        padding: Pair,
        dilation: Pair,
    ) -> Tensor:
        """Of x's shape; of x, the values are not read."""
        ...

    def conv2d_weight_grad(
        self,
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        neighbours: Tensor,
        stride: Pair,
        padding: Pair,
        dilation: Pair,
    ) -> Tensor:
        """Of weight's shape; of weight, the values are not read."""
        ...

    def linear(self, x: Tensor, weight: Tensor, neighbours: Tensor, bias: Tensor | None) -> Tensor:
        """[B, out]"""
        ...

    def linear_input_grad(
        self, grad: Tensor, x: Tensor, weight: Tensor, neighbours: Tensor
    ) -> Tensor:
        """Of x's shape; of x, the values are not read."""
        ...

    def linear_weight_grad(
        self, grad: Tensor, x: Tensor, weight: Tensor, neighbours: Tensor
    ) -> Tensor:
        """Of weight's shape; of weight, the values are not read."""
        ...


BACKENDS: dict[str, Backend] = {
    "dense": dense,
    "gather": gather,
    "group": group,
    "native": native,
    "triton": triton,
}


def available() -> tuple[str, ...]:
    """The backends that can run on this machine; what a layer lacks for one, its `missing` says."""
    return tuple(name for name, module in BACKENDS.items() if module.possible())


def known(name: str) -> Backend:
    """The backend of this name. Raises XzooError for other names."""
    if name not in BACKENDS:
        raise XzooError(f"backend {name!r} is not one of auto, {', '.join(BACKENDS)}")
    return BACKENDS[name]
