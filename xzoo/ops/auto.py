"""The rule of `auto`: which backend runs a layer of given sizes. No stop-watch, so that runs are reproducible."""

from torch import Tensor


def choose(operation: str, x: Tensor, weight: Tensor, neighbours: Tensor) -> str:
    return "dense"
