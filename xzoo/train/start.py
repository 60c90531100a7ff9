"""Initial values that a recipe asks for: layers that pass their inputs on, and a first one that
whitens.

Both come from Jordan, "94% on CIFAR-10 in 3.29 seconds on a single GPU", 2024 (arXiv 2404.00498).
That a sparse layer passes its inputs on along a matching of its graph is ours.
"""

from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import graphs
from ..errors import ModelError
from ..layers import ExpanderConv2d, ExpanderLinear

CHUNK = 2**22  # numbers of patches that are held at once, in float64: 32 MiB


class Identity(NamedTuple):
    """What `identity_start` did."""

    layers: int  # that it changed
    passed: int  # inputs that one of the outputs copies, in all these layers
    # the smaller of inputs and outputs, in all these layers: `passed` where nothing was in the way
    possible: int


def identity_start(net: nn.Module) -> Identity:
    """Let every layer begin by copying as many of its inputs as it can; the other outputs stay as
    they were drawn.

    A matched output has weight 1 at the center tap of its input, weight 0 elsewhere and bias 0. A
    dense layer matches output i with input i, as torch.nn.init.dirac_; an X-layer goes by
    `graphs.matching`, and where its graph has no matching that takes all of the smaller side, the
    outputs that are left over stay as they were drawn.

    Changed are convolutions (nn.Conv2d and X) without groups whose kernel has a center, and linear
    layers (nn.Linear and X). Not changed are the first convolution (`first_conv` of
    net.pretrained_cfg) and the classifier.
    """
    classifier = set(cast(Any, net).get_classifier().modules())
    layers, passed, possible = 0, 0, 0
    for name, layer in net.named_modules():
        if name in _first_convs(net) or layer in classifier or not _has_identity(layer):
            continue
        n_in, n_out, outputs, columns = _pairs(layer)
        with torch.no_grad():
            weight = cast(Tensor, layer.weight)
            taps: tuple[Any, ...] = (outputs, columns, *(size // 2 for size in weight.shape[2:]))
            weight[outputs] = 0
            weight[taps] = 1
            if layer.bias is not None:
                cast(Tensor, layer.bias)[outputs] = 0
        layers, passed, possible = layers + 1, passed + len(outputs), possible + min(n_in, n_out)
    return Identity(layers, passed, possible)


def whiten(net: nn.Module, images: Tensor, eps: float = 5e-4) -> None:
    """Let the first convolution begin with filters that whiten the patches of `images`.

    Filters 0 to k - 1 are the eigenvectors of the patches' second moment E[p p^T] with the k
    largest eigenvalues, each divided by sqrt(eigenvalue + eps); filters k to 2 k - 1 are the same
    with the other sign. So the outputs of the first k have E[y y^T] = I (but for eps). k is the
    size of a patch, C * kh * kw, or half the number of filters where that is less. Filters from 2 k
    on keep their values; the bias is zero.

    Args:
        net: a model of timm's form; its first convolution is `first_conv` of net.pretrained_cfg.
        images: float32 [N, C, H, W], as the network sees them: normalized, of the training set.
        eps: keeps directions in which patches hardly differ from being blown up.
    Raises: ModelError where the first layer is not a dense convolution of C inputs, or has fewer
    than 2 filters.
    """
    layer = first_convolution(net, images.shape[1])
    weight = layer.weight
    values, vectors = torch.linalg.eigh(_second_moment(layer, images))  # ascending
    size = min(len(values), len(weight) // 2)
    values, vectors = values[-size:].flip(0), vectors[:, -size:].flip(1)
    filters = (vectors / torch.sqrt(values.clamp(min=0) + eps)).T.reshape(size, *weight.shape[1:])
    with torch.no_grad():
        weight[: 2 * size] = torch.cat([filters, -filters]).to(weight)
        if layer.bias is not None:
            layer.bias.zero_()


def first_convolution(net: nn.Module, channels: int) -> nn.Conv2d:
    """The layer that `whiten` changes, for images of so many channels.

    Raises: ModelError, as `whiten` does.
    """
    names = _first_convs(net)
    if len(names) != 1:
        listed = f"{len(names)} first convolutions, {', '.join(names)}"
        raise ModelError(
            f"{type(net).__name__} has {listed if names else 'no first convolution'}; whitening "
            "needs one: leave it out"
        )
    layer = net.get_submodule(names[0])
    if not isinstance(layer, nn.Conv2d) or layer.groups != 1:
        kind = "a grouped Conv2d" if isinstance(layer, nn.Conv2d) else type(layer).__name__
        raise ModelError(
            f"first layer {names[0]} is {kind}; whitening needs a dense nn.Conv2d: leave it out"
        )
    if layer.in_channels != channels:
        raise ModelError(
            f"first layer {names[0]} reads {layer.in_channels} channels and the images have "
            f"{channels}; whitening "
            f"needs images as the network sees them, or a model built with in_chans={channels}"
        )
    if layer.out_channels < 2:
        raise ModelError(
            f"first layer {names[0]} has {layer.out_channels} filter; whitening needs 2 or more, "
            "for both signs"
        )
    return layer


def _has_identity(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Conv2d | ExpanderConv2d):
        return layer.groups == 1 and all(size % 2 == 1 for size in layer.kernel_size)
    return isinstance(layer, nn.Linear | ExpanderLinear)


def _pairs(layer: nn.Module) -> tuple[int, int, Tensor, Tensor]:
    """Numbers of inputs and outputs; matched outputs, and for each the column of its weights that
    its input has.
    """
    weight = cast(Tensor, layer.weight)
    n_out, degree = weight.shape[:2]
    if not isinstance(layer, ExpanderConv2d | ExpanderLinear):
        first = torch.arange(min(degree, n_out), device=weight.device)
        return degree, n_out, first, first
    neighbours = layer.neighbours.numpy(force=True)
    inputs = graphs.matching(neighbours, layer._n_in, layer.share)
    outputs = np.flatnonzero(inputs >= 0)
    rows = neighbours[outputs // layer.share]
    columns = (rows == inputs[outputs, None]).argmax(axis=1)
    device = weight.device
    return (
        layer._n_in,
        n_out,
        torch.from_numpy(outputs).to(device),
        torch.from_numpy(columns).to(device),
    )


def _first_convs(net: nn.Module) -> tuple[str, ...]:
    """Names of the layers that read the images: one, but for a few models of timm's."""
    names = cast(Any, net).pretrained_cfg.get("first_conv") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _second_moment(layer: nn.Conv2d, images: Tensor) -> Tensor:
    """E[p p^T], float64 [d, d], over the patches p of d = C * kh * kw numbers that lie wholly
    within the images.
    """
    geometry: Any = {name: getattr(layer, name) for name in ("kernel_size", "stride", "dilation")}
    d = layer.weight[0].numel()
    moment, count = images.new_zeros(d, d, dtype=torch.float64), 0
    for part in images.split(max(1, CHUNK // (d * images[0, 0].numel()))):
        patches = F.unfold(part, **geometry).transpose(0, 1).flatten(1).double()  # [d, B * places]
        moment += patches @ patches.T
        count += patches.shape[1]
    return moment / count
