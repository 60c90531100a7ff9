"""X-ResNet: timm's ResNet with expander graphs in its residual branches.

He et al., "Deep Residual Learning for Image Recognition", 2016, Table 1; the X form: Prabhu et al.
2018. The stem, the shortcut projections and the classifier stay dense.
"""

from typing import Any

from timm.models import register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

from ._build import build, cfg, rows

__all__: list[str] = []

_CFG = cfg(first_conv="conv1", classifier="fc")
_NAMES = (
    "x_resnet18",
    "x_resnet34",
    "x_resnet50",
    "x_resnet50_c4",
    "x_resnet50_c8",
    "x_resnet101",
    "x_resnet152",
)

default_cfgs = rows(dict.fromkeys(_NAMES, _CFG))


def _x_resnet(
    variant: str, pretrained: bool, block: type[nn.Module], layers: tuple[int, ...], **kwargs: Any
) -> nn.Module:
    facts: dict[str, Any] = {
        "block": block,
        "layers": layers,
        "compression": 2,
        "expanded": ("layer?.*.conv?",),
    }
    return build(ResNet, variant, pretrained, **facts | kwargs)


@register_model
def x_resnet18(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """X-ResNet-18, compression 2: 6.2M weights, half the MACs of ResNet-18."""
    return _x_resnet("x_resnet18", pretrained, BasicBlock, (2, 2, 2, 2), **kwargs)


@register_model
def x_resnet34(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """X-ResNet-34, compression 2: the paper's."""
    return _x_resnet("x_resnet34", pretrained, BasicBlock, (3, 4, 6, 3), **kwargs)


@register_model
def x_resnet50(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """X-ResNet-50, compression 2: the paper's."""
    return _x_resnet("x_resnet50", pretrained, Bottleneck, (3, 4, 6, 3), **kwargs)


@register_model
def x_resnet50_c4(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """X-ResNet-50, compression 4."""
    return _x_resnet(
        "x_resnet50_c4", pretrained, Bottleneck, (3, 4, 6, 3), **{"compression": 4} | kwargs
    )


@register_model
def x_resnet50_c8(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """X-ResNet-50, compression 8."""
    return _x_resnet(
        "x_resnet50_c8", pretrained, Bottleneck, (3, 4, 6, 3), **{"compression": 8} | kwargs
    )


@register_model
def x_resnet101(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """X-ResNet-101, compression 2: the paper's."""
    return _x_resnet("x_resnet101", pretrained, Bottleneck, (3, 4, 23, 3), **kwargs)


@register_model
def x_resnet152(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """X-ResNet-152, compression 2: the paper's."""
    return _x_resnet("x_resnet152", pretrained, Bottleneck, (3, 8, 36, 3), **kwargs)
