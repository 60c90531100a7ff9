"""Batch norms that do the activation after them in the same passes: faster training on CPUs.

    xzoo.fuse(model)

Modules, parameters and names stay where they are, so state dicts, optimizers, EMA and DDP see no
difference. A norm marks the tensor that it returns, and the activation module after it passes a
marked tensor on. Whatever takes the norm's place (SyncBatchNorm, a quantized one) marks nothing,
and the activation acts. A mark that is lost, as between the parts of a checkpointed model, costs a
pass and nothing else, since relu(relu(x)) is relu(x). Compiled and exported models compute as if
nothing had been fused.
"""

from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from .ops.norms import batch_norm_act
from .ops.operations import is_observed
from .tracing import following

_ACTIVATED = "_xzoo_activated"  # a tensor's attribute: the activation that its norm has done


def fuse(model: nn.Module) -> nn.Module:
    """Let each batch norm do the activation after it, in place; the model.

    Norms of timm (BatchNormAct2d) have their activation with them: ReLU, ReLU6 or GELU. For torch's
    BatchNorm2d, torch.fx finds the ReLU or ReLU6 that alone reads its result; without one, or in a
    model that cannot be traced, the norm alone gets faster. Other norms and subclasses stay as they
    are.

    The outputs and gradients change by rounding. torch.fx traces a model only after `unfuse`. A
    forward hook on a norm is given the norm's own result, and so costs what the fusion gains.
    """
    pairs = dict(following(model, "fused"))
    modules = dict(model.named_modules())
    for name, norm in modules.items():
        if type(norm) not in (nn.BatchNorm2d, BatchNormAct2d):
            continue
        act = modules[pairs[name]] if name in pairs else nn.Identity()
        if type(norm) is nn.BatchNorm2d and type(act) in (nn.ReLU, nn.ReLU6):
            vars(norm)["activation"] = _name(act)
            act.__class__ = _FUSED[type(act)]
        norm.__class__ = _FUSED[type(norm)]
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Undo `fuse`, in place; the model."""
    for part in model.modules():
        if type(part) in _PLAIN:
            part.__class__ = _PLAIN[type(part)]
            vars(part).pop("activation", None)
    return model


def _name(act: nn.Module) -> str:
    """What ops.norms calls this activation; "" where it has none for it."""
    if type(act) is nn.GELU and act.approximate == "none":
        return "gelu"
    return {nn.ReLU: "relu", nn.ReLU6: "relu6"}.get(type(act), "")


def _normed(norm: nn.BatchNorm2d, x: Tensor, activation: str) -> Tensor:
    """What norm's own forward computes, and the activation."""
    momentum = norm.momentum
    if norm.training and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if momentum is None:  # the mean over all batches
            momentum = 1.0 / float(norm.num_batches_tracked)
    by_batch = norm.training or norm.running_mean is None
    tracked = not norm.training or norm.track_running_stats
    mean, var = (norm.running_mean, norm.running_var) if tracked else (None, None)
    scale = norm.weight, norm.bias
    return batch_norm_act(x, mean, var, *scale, by_batch, momentum or 0.0, norm.eps, activation)


class FusedBatchNorm2d(nn.BatchNorm2d):
    """torch's, with the activation of the module after it. Made by `fuse`."""

    activation = ""

    def forward(self, x: Tensor) -> Tensor:
        if is_observed(x):
            return super().forward(x)
        self._check_input_dim(x)
        activation = "" if self._forward_hooks else self.activation
        y = _normed(self, x, activation)
        if activation:
            setattr(y, _ACTIVATED, activation)
        return y


class FusedBatchNormAct2d(BatchNormAct2d):
    """timm's, in the same passes. Made by `fuse`."""

    def forward(self, x: Tensor) -> Tensor:
        act, drop = type(self.act), type(self.drop)
        if is_observed(x) or drop is not nn.Identity or not (_name(self.act) or act is nn.Identity):
            return super().forward(x)
        return _normed(self, x, _name(self.act))


class _AfterNorm(nn.Module):
    """An activation that is left out where a fused norm has done it."""

    activation = ""

    def forward(self, x: Tensor) -> Tensor:
        if type(x) is Tensor and getattr(x, _ACTIVATED, "") == self.activation:
            return x
        return super().forward(x)


class FusedReLU(_AfterNorm, nn.ReLU):
    activation = "relu"


class FusedReLU6(_AfterNorm, nn.ReLU6):
    activation = "relu6"


_FUSED: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm2d: FusedBatchNorm2d,
    BatchNormAct2d: FusedBatchNormAct2d,
    nn.ReLU: FusedReLU,
    nn.ReLU6: FusedReLU6,
}
_PLAIN = {fused: plain for plain, fused in _FUSED.items()}
