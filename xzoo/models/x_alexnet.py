"""X-AlexNet for 224 px: dense convolutions, two hidden linear layers expanded, a dense classifier.

Krizhevsky, "One weird trick for parallelizing convolutional neural networks", 2014, in the widths
of torchvision, with BatchNorm after every convolution and hidden layer and without dropout, as in
the authors' code. The paper prints 7.6M and 9.7M weights; the degrees that give them are inferred.
"""

from typing import Any

from timm.models import register_model
from torch import nn

from ._build import build, cfg, rows
from ._plain import PlainNet

__all__ = ["AlexNet"]

_CFG = cfg(min_input_size=(3, 64, 64), pool_size=(6, 6), first_conv="features.0", classifier="fc")

default_cfgs = rows({"x_alexnet_1": _CFG, "x_alexnet_2": _CFG})

# Output channels, kernel, stride, padding; a 3x3 pooling of stride 2 follows convolutions 1, 2 and
# 5.
_CONVS = ((64, 11, 4, 2), (192, 5, 1, 2), (384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1))


class AlexNet(PlainNet):
    """AlexNet with BatchNorm. Shape: [B, in_chans, 224, 224] -> [B, num_classes]; the last map is
    pooled to 6x6.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ):
        factory = {"device": device, "dtype": dtype}
        layers: list[nn.Module] = []
        taps = []
        channels, reduction = in_chans, 4
        for index, (width, kernel, stride, padding) in enumerate(_CONVS):
            conv = nn.Conv2d(channels, width, kernel, stride, padding, **factory)
            layers += [conv, nn.BatchNorm2d(width, **factory), nn.ReLU(inplace=True)]
            channels = width
            if index in (0, 1, 4):
                taps.append((len(layers) - 1, channels, reduction))
                layers.append(nn.MaxPool2d(3, stride=2))
                reduction *= 2
        taps.append((len(layers) - 1, channels, reduction))
        hidden: list[nn.Module] = []
        for n_in in (channels * 6 * 6, 4096):
            hidden += [
                nn.Linear(n_in, 4096, **factory),
                nn.BatchNorm1d(4096, **factory),
                nn.ReLU(inplace=True),
            ]
        features = nn.Sequential(*layers)
        super().__init__(
            features,
            taps,
            6,
            nn.Sequential(*hidden),
            4096,
            num_classes,
            in_chans,
            global_pool,
            drop_rate,
            **factory,
        )


def _x_alexnet(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    wrapper = {"flatten_sequential": True, "out_indices": (0, 1, 2, 3)}
    return build(
        AlexNet, variant, pretrained, expanded=("hidden.?",), feature_cfg=wrapper, **kwargs
    )


@register_model
def x_alexnet_1(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The paper's X-AlexNet-1: 7.6M weights (degrees inferred)."""
    return _x_alexnet(
        "x_alexnet_1", pretrained, **{"compression": {"hidden.0": 128, "hidden.3": 128}} | kwargs
    )


@register_model
def x_alexnet_2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The paper's X-AlexNet-2: 9.7M weights (degrees inferred)."""
    return _x_alexnet(
        "x_alexnet_2", pretrained, **{"compression": {"hidden.0": 256, "hidden.3": 512}} | kwargs
    )
