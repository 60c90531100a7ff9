"""Convolutions in a row, then hidden linear layers: the form of AlexNet and VGG, with timm's
interface.
"""

import itertools
import math
from typing import Any

import torch
from timm.layers import SelectAdaptivePool2d
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ..errors import ModelError


class PlainNet(nn.Module):
    """`features`, pooling to a fixed size, flattening, `hidden`, `fc`.

    Shape: x [B, in_chans, H, W] -> forward_features [B, num_features, h, w] -> logits [B,
    num_classes].

    Args:
        features: convolutions, norms, activations and poolings in a row, or modules made of them.
        taps: for each level of features: index in `features`, channels, reduction (input pixels a
            pixel).
        pooled: height and width that the last map is pooled to.
        hidden: takes [B, num_features * pooled^2] to [B, head_hidden_size]. Its layers are the last
            of the network that are expanded.
        global_pool: "avg", "max" or "avgmax" over what falls into one of the pooled pixels; ""
            leaves out pooling and hidden layers, for num_classes = 0 only.
        head_bias: whether the classifier has one.
    """

    def __init__(
        self,
        features: nn.Sequential,
        taps: list[tuple[int, int, int]],
        pooled: int,
        hidden: nn.Sequential,
        hidden_size: int,
        num_classes: int,
        in_chans: int,
        global_pool: str,
        drop_rate: float,
        device: Any,
        dtype: torch.dtype | None,
        head_bias: bool = True,
    ):
        super().__init__()
        self.num_classes, self.in_chans = num_classes, in_chans
        self.grad_checkpointing = False
        self.features = features
        self.feature_ends = [index for index, _, _ in taps]
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": channels, "reduction": reduction, "module": f"features.{index}"}
            for index, channels, reduction in taps
        ]
        self.num_features = taps[-1][1]
        self.head_hidden_size = hidden_size
        self._pooled, self._hidden_size, self._head_bias = pooled, hidden_size, head_bias
        self.hidden = hidden
        self.head_drop = nn.Dropout(drop_rate)
        self._set_head(global_pool, {"device": device, "dtype": dtype})
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear) and module is not self.fc:
                # The rule of the X-layers, so that the dense twin starts alike.
                nn.init.normal_(module.weight, std=math.sqrt(2 / module.weight[0].numel()))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        return {"stem": r"^features\.0", "blocks": r"^features\.(\d+)"}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier of num_classes outputs (0: none); None keeps the pooling."""
        self.num_classes = num_classes
        weight = next(self.parameters())
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        self._set_head(pool, {"device": weight.device, "dtype": weight.dtype})

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Last features and a list of those at the taps `indices` (an int: the last so many; None:
        all).
        """
        if output_fmt != "NCHW":
            raise ModelError(f"output_fmt={output_fmt!r}: a convolutional network has NCHW only")
        take, last = feature_take_indices(len(self.feature_ends), indices)
        taken = {self.feature_ends[i] for i in take}
        end = self.feature_ends[last] + 1 if stop_early else len(self.features)
        intermediates = []
        for index, layer in enumerate(self.features[:end]):
            x = layer(x)
            if index in taken:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the taps `indices` do not need; returns those that stay."""
        take, last = feature_take_indices(len(self.feature_ends), indices)
        cut = last < len(self.feature_ends) - 1
        self.features = self.features[: self.feature_ends[last] + 1]
        if cut:
            self.num_features = self.feature_info[last]["num_chs"]
        if prune_head or cut:
            self.hidden = nn.Sequential()
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            # A level each: a checkpoint keeps its input, which the in-place activation must not be
            # the first to get.
            levels = []
            for before, end in itertools.pairwise([-1, *self.feature_ends]):
                levels.append(self.features[before + 1 : end + 1])
            return checkpoint_seq(levels, x)
        return self.features(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.global_pool(x)
        if self._has_pool:
            x = self.head_drop(self.hidden(x.flatten(1)))
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def _set_head(self, pool: str, factory: dict[str, Any]) -> None:
        if pool not in ("avg", "max", "avgmax") and (pool or self.num_classes):
            raise ModelError(
                f"global_pool={pool!r} with num_classes={self.num_classes}: the hidden layers need "
                "'avg', 'max' or 'avgmax'; '' goes with num_classes=0"
            )
        self._has_pool = bool(pool)
        self.global_pool = SelectAdaptivePool2d(output_size=self._pooled, pool_type=pool)
        self.head_hidden_size = self._hidden_size if pool else self.num_features
        self.fc: nn.Module = nn.Identity()
        if self.num_classes:
            fc = nn.Linear(self._hidden_size, self.num_classes, self._head_bias, **factory)
            nn.init.normal_(fc.weight, std=0.01)
            if self._head_bias:
                nn.init.zeros_(fc.bias)
            self.fc = fc
        self.fc.train(self.training)
