"""X-ResNet: timm's ResNet with expander graphs in its residual branches.

He et al., "Deep Residual Learning for Image Recognition", 2016, Table 1; the X form: Prabhu et al. 2018. Dense
stay the stem, the shortcut projections and the classifier.
"""

from typing import Any

from timm.models import generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

from ._build import build, cfg

__all__: list[str] = []

_CFG = cfg(first_conv="conv1", classifier="fc")
_NAMES = ("x_resnet18", "x_resnet34", "x_resnet50", "x_resnet50_c4", "x_resnet50_c8", "x_resnet101", "x_resnet152")

default_cfgs = generate_default_cfgs({f"{name}.untrained": _CFG for name in _NAMES})


def _x_resnet(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    return build(ResNet, variant, pretrained, expanded=("layer?.*.conv?",), **kwargs)


@register_model
def x_resnet18(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """X-ResNet-18, compression 2: 6.2M weights, half the MACs of ResNet-18."""
    facts = {"block": BasicBlock, "layers": (2, 2, 2, 2), "compression": 2}
    return _x_resnet("x_resnet18", pretrained, **facts | kwargs)


@register_model
def x_resnet34(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """X-ResNet-34, compression 2: the paper's."""
    facts = {"block": BasicBlock, "layers": (3, 4, 6, 3), "compression": 2}
    return _x_resnet("x_resnet34", pretrained, **facts | kwargs)


@register_model
def x_resnet50(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """X-ResNet-50, compression 2: the paper's."""
    facts = {"block": Bottleneck, "layers": (3, 4, 6, 3), "compression": 2}
    return _x_resnet("x_resnet50", pretrained, **facts | kwargs)


@register_model
def x_resnet50_c4(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """X-ResNet-50, compression 4."""
    facts = {"block": Bottleneck, "layers": (3, 4, 6, 3), "compression": 4}
    return _x_resnet("x_resnet50_c4", pretrained, **facts | kwargs)


@register_model
def x_resnet50_c8(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """X-ResNet-50, compression 8."""
    facts = {"block": Bottleneck, "layers": (3, 4, 6, 3), "compression": 8}
    return _x_resnet("x_resnet50_c8", pretrained, **facts | kwargs)


@register_model
def x_resnet101(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """X-ResNet-101, compression 2: the paper's."""
    facts = {"block": Bottleneck, "layers": (3, 4, 23, 3), "compression": 2}
    return _x_resnet("x_resnet101", pretrained, **facts | kwargs)


@register_model
def x_resnet152(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """X-ResNet-152, compression 2: the paper's."""
    facts = {"block": Bottleneck, "layers": (3, 8, 36, 3), "compression": 2}
    return _x_resnet("x_resnet152", pretrained, **facts | kwargs)
