"""X-MobileNet-v1: timm's, with expander graphs in its pointwise convolutions, at width 1.0 and 0.5.

Howard et al., "MobileNets", 2017, Table 1; the X form: Prabhu et al. 2018. The pointwise
convolutions of blocks 2 to 13 are expanded; the stem, the depthwise convolutions, the first
pointwise one and the classifier stay dense. At width 0.5 every layer is halved (stem 16, features
512), which gives the published MACs; the authors' code leaves the stem and the last block as they
are.
"""

from functools import partial
from typing import Any

from timm.models import register_model
from timm.models._builder import pretrained_cfg_for_features
from timm.models.efficientnet import (
    EfficientNet,
    EfficientNetFeatures,
    decode_arch_def,
    round_channels,
)
from torch import nn

from ._build import build, cfg, rows

__all__: list[str] = []

_CFG = cfg(first_conv="conv_stem", classifier="classifier")
_NAMES = (
    "x_mobilenet050_c2",
    "x_mobilenet050_c4",
    "x_mobilenet050_c8",
    "x_mobilenet050_c16",
    "x_mobilenet100_c4",
)

default_cfgs = rows(dict.fromkeys(_NAMES, _CFG))

# Depthwise separable blocks: repeats, kernel, stride, channels at width 1.0.
_STAGES = [
    ["dsa_r1_k3_s1_c64"],
    ["dsa_r2_k3_s2_c128"],
    ["dsa_r2_k3_s2_c256"],
    ["dsa_r6_k3_s2_c512"],
    ["dsa_r2_k3_s2_c1024"],
]


def _x_mobilenet(variant: str, pretrained: bool, width: float, **kwargs: Any) -> nn.Module:
    network: dict[str, Any] = {
        "block_args": decode_arch_def(_STAGES),
        "num_features": 0,  # no convolution between the last block and the pooling
        "stem_size": 32,
        "round_chs_fn": partial(round_channels, multiplier=width),
        "norm_layer": "batchnorm2d",
        "act_layer": "relu6",
    }
    kwargs = network | kwargs
    layers: dict[str, Any] = {
        "expanded": ("blocks.*.conv_pw",),
        "dense_too": ("blocks.0.0.conv_pw",),
    }
    # As in timm, plain features_only has a class of its own, which does without the head.
    if kwargs.get("features_only") and not {"feature_cfg", "feature_cls"} & kwargs.keys():
        kwargs |= {"features_only": False, "pretrained_strict": False}
        kwargs["kwargs_filter"] = ("num_classes", "num_features", "global_pool")
        model: Any = build(EfficientNetFeatures, variant, pretrained, **layers, **kwargs)
        model.pretrained_cfg = model.default_cfg = pretrained_cfg_for_features(model.pretrained_cfg)
        return model
    return build(EfficientNet, variant, pretrained, **layers, **kwargs)


@register_model
def x_mobilenet050_c2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """X-MobileNet at half width, compression 2: the paper's."""
    return _x_mobilenet("x_mobilenet050_c2", pretrained, 0.5, **{"compression": 2} | kwargs)


@register_model
def x_mobilenet050_c4(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """X-MobileNet at half width, compression 4: the paper's."""
    return _x_mobilenet("x_mobilenet050_c4", pretrained, 0.5, **{"compression": 4} | kwargs)


@register_model
def x_mobilenet050_c8(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """X-MobileNet at half width, compression 8: the paper's."""
    return _x_mobilenet("x_mobilenet050_c8", pretrained, 0.5, **{"compression": 8} | kwargs)


@register_model
def x_mobilenet050_c16(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """X-MobileNet at half width, compression 16: the paper's."""
    return _x_mobilenet("x_mobilenet050_c16", pretrained, 0.5, **{"compression": 16} | kwargs)


@register_model
def x_mobilenet100_c4(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """X-MobileNet at full width, compression 4."""
    return _x_mobilenet("x_mobilenet100_c4", pretrained, 1.0, **{"compression": 4} | kwargs)
