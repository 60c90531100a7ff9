"""X-DenseNet: timm's DenseNet with expander graphs in its dense layers, and DenseNet-BC for 32 px.

Huang et al., "Densely Connected Convolutional Networks", 2017, Tables 1 and 2; the X form: Prabhu
et al. 2018. Both convolutions of every dense layer are expanded. The stem and the classifier stay
dense, and at 224 px the transitions; the authors' CIFAR networks expand those too.
"""

from typing import Any

from timm.models import register_model
from timm.models.densenet import DenseNet
from torch import nn

from ._build import build, cfg, cfg_cifar, rows

__all__ = ["DenseNetBC"]

_CFG = cfg(first_conv="features.conv0", classifier="classifier")
_CFG_CIFAR = cfg_cifar(pool_size=(8, 8), first_conv="features.conv0", classifier="classifier")
_NAMES = ("x_densenet121", "x_densenet161", "x_densenet169", "x_densenet201")
_NAMES_CIFAR = (
    "x_densenetbc_40_24",
    "x_densenetbc_40_36",
    "x_densenetbc_40_48",
    "x_densenetbc_40_60",
    "x_densenetbc_58_60",
    "x_densenetbc_70_60",
    "x_densenetbc_100_12",
)

default_cfgs = rows(dict.fromkeys(_NAMES, _CFG) | dict.fromkeys(_NAMES_CIFAR, _CFG_CIFAR))


class DenseNetBC(DenseNet):
    """DenseNet-BC for small images: a 3x3 stem of stride 1 without norm or pooling, and three dense
    blocks.

    Shape: [B, 3, 32, 32] -> features [B, num_features, 8, 8]. Arguments: timm's DenseNet's, and
    `depth`, the number of convolutions and linear layers (4 more than a multiple of 6).
    """

    def __init__(self, depth: int = 40, growth_rate: int = 24, in_chans: int = 3, **kwargs: Any):
        super().__init__(
            growth_rate, (depth // 6 - (depth % 6 < 4),) * 3, in_chans=in_chans, **kwargs
        )
        self.features.conv0 = nn.Conv2d(
            in_chans,
            2 * growth_rate,
            3,
            padding=1,
            bias=False,
            device=kwargs.get("device"),
            dtype=kwargs.get("dtype"),
        )
        nn.init.kaiming_normal_(self.features.conv0.weight)
        del self.features.norm0, self.features.pool0
        levels = ("conv0", "denseblock1", "denseblock2", "norm5")
        for info, level, reduction in zip(self.feature_info, levels, (1, 1, 2, 4), strict=True):
            info.update(module=f"features.{level}", reduction=reduction)
        names = list(self.features._modules)
        self.feature_ends = list(map(names.index, levels))


def _x_densenet(
    variant: str, pretrained: bool, growth_rate: int, blocks: tuple[int, ...], **kwargs: Any
) -> nn.Module:
    facts: dict[str, Any] = {
        "growth_rate": growth_rate,
        "block_config": blocks,
        "compression": 2,
        "expanded": ("features.denseblock*.conv?",),
        "feature_cfg": {"flatten_sequential": True},
    }
    return build(DenseNet, variant, pretrained, **facts | kwargs)


def _x_densenetbc(
    variant: str, pretrained: bool, depth: int, growth_rate: int, **kwargs: Any
) -> nn.Module:
    facts: dict[str, Any] = {
        "depth": depth,
        "growth_rate": growth_rate,
        "compression": 2,
        "expanded": ("features.denseblock*.conv?", "features.transition?.conv"),
        "feature_cfg": {"flatten_sequential": True, "out_indices": (0, 1, 2, 3)},
    }
    return build(DenseNetBC, variant, pretrained, **facts | kwargs)


@register_model
def x_densenet121(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """X-DenseNet-121, compression 2: the paper's."""
    return _x_densenet("x_densenet121", pretrained, 32, (6, 12, 24, 16), **kwargs)


@register_model
def x_densenet161(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """X-DenseNet-161, compression 2: the paper's."""
    return _x_densenet("x_densenet161", pretrained, 48, (6, 12, 36, 24), **kwargs)


@register_model
def x_densenet169(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """X-DenseNet-169, compression 2: the paper's."""
    return _x_densenet("x_densenet169", pretrained, 32, (6, 12, 32, 32), **kwargs)


@register_model
def x_densenet201(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """X-DenseNet-201, compression 2."""
    return _x_densenet("x_densenet201", pretrained, 32, (6, 12, 48, 32), **kwargs)


@register_model
def x_densenetbc_40_24(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """X-DenseNet-BC of depth 40 and growth 24, compression 2: the paper's."""
    return _x_densenetbc("x_densenetbc_40_24", pretrained, 40, 24, **kwargs)


@register_model
def x_densenetbc_40_36(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """X-DenseNet-BC of depth 40 and growth 36, compression 2: the paper's."""
    return _x_densenetbc("x_densenetbc_40_36", pretrained, 40, 36, **kwargs)


@register_model
def x_densenetbc_40_48(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """X-DenseNet-BC of depth 40 and growth 48, compression 2: the paper's."""
    return _x_densenetbc("x_densenetbc_40_48", pretrained, 40, 48, **kwargs)


@register_model
def x_densenetbc_40_60(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """X-DenseNet-BC of depth 40 and growth 60, compression 2: the paper's."""
    return _x_densenetbc("x_densenetbc_40_60", pretrained, 40, 60, **kwargs)


@register_model
def x_densenetbc_58_60(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """X-DenseNet-BC, depth 58, growth 60, compression 2: of the paper's wider/deeper figure."""
    return _x_densenetbc("x_densenetbc_58_60", pretrained, 58, 60, **kwargs)


@register_model
def x_densenetbc_70_60(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """X-DenseNet-BC, depth 70, growth 60, compression 2: of the paper's wider/deeper figure."""
    return _x_densenetbc("x_densenetbc_70_60", pretrained, 70, 60, **kwargs)


@register_model
def x_densenetbc_100_12(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """X-DenseNet-BC of depth 100 and growth 12, compression 2."""
    return _x_densenetbc("x_densenetbc_100_12", pretrained, 100, 12, **kwargs)
