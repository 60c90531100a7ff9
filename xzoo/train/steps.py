"""What is done to the weights after an optimizer's step, where a recipe asks for it."""

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

SHRINKAGE = 1e-3  # beta of HAM


@torch.no_grad()
def ham_(optimizer: Optimizer, strength: float) -> None:
    """Hyperbolic aware minimization: multiply each weight by exp(-rate (strength sign(w) gradient +
    1e-3)).

    A weight that the gradient wants to change its sign crosses zero sooner. It goes weight by
    weight, so that a compact weight is treated as its dense matrix would be. Matrices and kernels
    alone: vectors are left.

    Source: Jacobs et al., "Hyperbolic Aware Minimization", ICLR 2026 (alpha and beta there).
    """
    for group in optimizer.param_groups:
        for weight in group["params"]:
            if weight.ndim > 1 and weight.grad is not None:
                weight.mul_(
                    torch.exp(-group["lr"] * (strength * weight.sign() * weight.grad + SHRINKAGE))
                )


class Lookahead:
    """Averages that training goes on from: every `every` steps average <- lerp(average, weights),
    weights <- average.

    What the average keeps of itself grows over the run, 0.95^every * progress^3: it forgets the
    beginning, and in the end it smooths the last few hundred steps. Of weights and batch norm's
    statistics; integers (graphs, counters) are left alone.

    Source: Zhang et al. 2019, arXiv 1907.08610; the schedule: Jordan 2024, arXiv 2404.00498.

    Args:
        net: whose state is averaged from now on.
        every: steps.
    """

    def __init__(self, net: nn.Module, every: int) -> None:
        self.net, self.every = net, every
        self.average = {name: tensor.clone() for name, tensor in self._state().items()}

    def _state(self) -> dict[str, Tensor]:
        state = self.net.state_dict()  # without gradients, and the tensors themselves
        return {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}

    @torch.no_grad()
    def step(self, step: int, progress: float) -> None:
        """After `step` steps, at `progress` (0 to 1) of the run; at its end the average is what
        stays.
        """
        if step % self.every and progress < 1:
            return
        kept = 0.95**self.every * progress**3
        for name, tensor in self._state().items():
            average = self.average[name]
            if step % self.every == 0:
                average.lerp_(tensor, 1 - kept)
            tensor.copy_(average)

    def load(self, average: dict[str, Tensor]) -> None:
        """Go on from a checkpoint's average."""
        for name, tensor in average.items():
            self.average[name].copy_(tensor)
