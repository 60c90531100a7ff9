"""The stop-watch: how long each backend takes for each of the three products of one layer.

Times on a busy machine mean little, so what is compared takes turns within one run, and a ratio is
that of medians or, better, the median of the ratios of neighbours. On one thread of a CPU a time is
the thread's own, which leaves out what others do meanwhile; it is the clock's on several threads
and on a device, which is waited for.

Nothing here chooses: the rule of `auto` is written down in auto.py, and its test holds it against
times from here.
"""

import math
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .. import graphs
from ..errors import XzooError
from .backends import available

Name = TypeVar("Name", bound=Hashable)

# A product of a layer, and how the operation's name ends.
PRODUCTS = {"forward": "", "input_grad": "_input_grad", "weight_grad": "_weight_grad"}
TURN = 5e-4  # seconds that a turn lasts at least: a call of microseconds is repeated within it


class LayerShape(NamedTuple):
    """Sizes of a layer. Kernel 0 is a linear one, of size and stride 1; `last` is channels_last."""

    kernel: int
    n_in: int
    n_out: int
    size: int
    stride: int
    degree: int
    share: int
    batch: int
    last: bool = False


class Tensors(NamedTuple):
    """What the registered operations take; `geometry` is empty for a linear layer."""

    x: Tensor
    weight: Tensor
    neighbours: Tensor
    grad: Tensor
    geometry: tuple[list[int], ...]

    @property
    def operation(self) -> str:
        return "conv2d" if self.geometry else "linear"

    def arguments(self, product: str) -> tuple[Any, ...]:
        """Those of torch.ops.xzoo's operation for this product, up to the backend."""
        if product == "forward":
            return (self.x, self.weight, self.neighbours, None, *self.geometry)
        return (self.grad, self.x, self.weight, self.neighbours, *self.geometry)


class Times(NamedTuple):
    """Seconds of a call in each round, and minor page faults of a call: memory that had to be
    mapped afresh."""

    seconds: list[float]
    faults: float


class Timing(NamedTuple):
    product: str
    backend: str
    times: Times


def tune(
    layer: LayerShape,
    backends: Iterable[str] | None = None,
    rounds: int = 5,
    seconds: float = 0.0,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> list[Timing]:
    """Measure the forward pass and both gradients of a layer by each backend that can run it.

    Args:
        backends: names; None is all that are available on this machine.
        rounds, seconds: as in `alternate`.
    Raises: GraphError where no such graph exists; XzooError for unknown backends.
    """
    drawn = tensors(layer, device, dtype)
    rows = []
    for product, suffix in PRODUCTS.items():
        operation = getattr(torch.ops.xzoo, drawn.operation + suffix)
        calls = {}
        for name in available() if backends is None else backends:
            call = partial(operation, *drawn.arguments(product), name)
            if backends is None:
                try:
                    call()
                except XzooError:  # it has no kernel for this layer
                    continue
            calls[name] = call
        rows += [
            Timing(product, name, times)
            for name, times in alternate(calls, rounds, seconds, device).items()
        ]
    return rows


def tensors(
    layer: LayerShape,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    graph: str = "biregular",
) -> Tensors:
    """A layer of these sizes with random values: x [batch, n_in, size, size], or [batch, n_in] of a
    linear one."""
    kernel, n_in, n_out, size, stride, degree, share, batch, last = layer
    random = torch.Generator(device).manual_seed(0)
    draw = partial(torch.randn, generator=random, device=device, dtype=dtype)
    neighbours = torch.from_numpy(graphs.sample(graph, n_in, n_out, degree, share)).int().to(device)
    if not kernel:
        return Tensors(draw(batch, n_in), draw(n_out, degree), neighbours, draw(batch, n_out), ())
    form = torch.channels_last if last else torch.contiguous_format
    x, weight = (
        draw(batch, n_in, size, size).to(memory_format=form),
        draw(n_out, degree, kernel, kernel),
    )
    grad = draw(batch, n_out, *[(size - 1) // stride + 1] * 2).to(memory_format=form)
    return Tensors(x, weight, neighbours, grad, ([stride] * 2, [kernel // 2] * 2, [1, 1]))


def alternate(
    calls: Mapping[Name, Callable[[], Any]], rounds: int, seconds: float = 0.0, device: str = "cpu"
) -> dict[Name, Times]:
    """Let all take turns, for `rounds` rounds at least and until `seconds` have gone by; the first
    does not count.

    What a call returns is dropped within its turn, as the next layer of a model drops it: outputs
    are fresh.
    """
    now, faults = _clock(device), dict.fromkeys(calls, 0.0)
    taken: dict[Name, list[float]] = {name: [] for name in calls}
    repeats: dict[Name, int] = {}
    # The first call compiles, allocates and plans; the second tells how long a turn is.
    for name, call in calls.items():
        call()
        begun = now()
        call()
        repeats[name] = max(1, math.ceil(TURN / max(now() - begun, 1e-9)))
    end, done = time.perf_counter() + seconds, 0
    while done < rounds or time.perf_counter() < end:
        for name, call in calls.items():
            before, begun = _faults(), now()
            for _ in range(repeats[name]):
                call()
            taken[name].append((now() - begun) / repeats[name])
            faults[name] += (_faults() - before) / repeats[name]
        done += 1
    return {name: Times(taken[name], faults[name] / done) for name in calls}


def _clock(device: str) -> Callable[[], float]:
    if device != "cpu":

        def now() -> float:
            torch.accelerator.synchronize()
            return time.perf_counter()

        return now
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter


def _faults() -> int:
    """Minor page faults of this process so far; 0 where the system does not count them."""
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
