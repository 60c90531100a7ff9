"""X-VGG-16 for 32 px: 13 convolutions with BatchNorm, a hidden linear layer of 512, a classifier.

Simonyan and Zisserman 2015, configuration D; the X form: Prabhu et al. 2018. Every convolution but
the first is expanded, and so is the hidden layer. The paper prints two rows of counts, 1.65M and
1.15M; the degrees that give them are inferred, those of `x_vgg16` are the released code's.
"""

from typing import Any

from timm.models import register_model
from torch import nn

from ._build import build, cfg_cifar, rows
from ._plain import PlainNet

__all__ = ["VGG"]

_CFG = cfg_cifar(pool_size=(1, 1), first_conv="features.0", classifier="fc")
_NAMES = ("x_vgg16", "x_vgg16_1", "x_vgg16_2", "x_vgg16_c4", "x_vgg16_c8", "x_vgg16_c16")

default_cfgs = rows(dict.fromkeys(_NAMES, _CFG))

_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# Convolutions 2 to 13 in `features`, where norm and activation follow each and a pooling each
# stage; the hidden layer.
_EXPANDED = (*(f"features.{i}" for i in (3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40)), "hidden.0")


class VGG(PlainNet):
    """VGG-16 with BatchNorm. Shape: [B, in_chans, 32, 32] -> [B, num_classes]; larger inputs are
    average-pooled.

    Smaller ones pass too, down to 1 px: poolings round odd sizes up. At multiples of 32 px no size
    is odd.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ):
        factory = {"device": device, "dtype": dtype}
        layers: list[nn.Module] = []
        taps = []
        channels = in_chans
        for level, stage in enumerate(_STAGES):
            for width in stage:
                conv = nn.Conv2d(channels, width, 3, padding=1, **factory)
                layers += [conv, nn.BatchNorm2d(width, **factory), nn.ReLU(inplace=True)]
                channels = width
            taps.append((len(layers) - 1, channels, 2**level))
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        taps.append((len(layers) - 1, channels, 32))
        hidden = nn.Sequential(nn.Linear(512, 512, **factory), nn.ReLU(inplace=True))
        features = nn.Sequential(*layers)
        super().__init__(
            features, taps, 1, hidden, 512, num_classes, in_chans, global_pool, drop_rate, **factory
        )


def _degrees(conv2_4: int, conv5_7: int, conv8_13: int, hidden: int) -> dict[str, int]:
    degrees = (conv2_4,) * 3 + (conv5_7,) * 3 + (conv8_13,) * 6 + (hidden,)
    return dict(zip(_EXPANDED, degrees, strict=True))


def _x_vgg(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    wrapper = {"flatten_sequential": True, "out_indices": (0, 1, 2, 3, 4, 5)}
    return build(VGG, variant, pretrained, expanded=_EXPANDED, feature_cfg=wrapper, **kwargs)


@register_model
def x_vgg16(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """X-VGG-16 with the degrees of the released code: 0.81M weights."""
    return _x_vgg("x_vgg16", pretrained, **{"compression": _degrees(64, 16, 16, 128)} | kwargs)


@register_model
def x_vgg16_1(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The paper's X-VGG16-1: 1.65M weights (degrees inferred)."""
    return _x_vgg("x_vgg16_1", pretrained, **{"compression": _degrees(64, 64, 32, 256)} | kwargs)


@register_model
def x_vgg16_2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The paper's X-VGG16-2: 1.14M weights (degrees inferred)."""
    return _x_vgg("x_vgg16_2", pretrained, **{"compression": _degrees(64, 64, 16, 128)} | kwargs)


@register_model
def x_vgg16_c4(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """X-VGG-16, compression 4 in every layer."""
    return _x_vgg("x_vgg16_c4", pretrained, **{"compression": 4} | kwargs)


@register_model
def x_vgg16_c8(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """X-VGG-16, compression 8 in every layer."""
    return _x_vgg("x_vgg16_c8", pretrained, **{"compression": 8} | kwargs)


@register_model
def x_vgg16_c16(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """X-VGG-16, compression 16 in every layer."""
    return _x_vgg("x_vgg16_c16", pretrained, **{"compression": 16} | kwargs)
