"""X-Air: a network for small images that learns in few epochs. It is ours and not in the paper.

The form is that of Jordan, "94% on CIFAR-10 in 3.29 seconds on a single GPU", 2024 (arXiv
2404.00498): a 2x2 stem that is meant to whiten patches, three stages that pool before they
normalize, global max pooling, and a classifier without bias. Every convolution of the stages is
expanded but the first, which reads the 24 channels of the stem. compression=1 is the dense network:
airbench96 for `x_air96`, airbench94 of twice the width for `x_air94`.

BatchNorm has torch's momentum of 0.1, and the stem is drawn as every other layer; the recipe sets
what the source does about both.
"""

from typing import Any

from timm.models import register_model
from torch import Tensor, nn

from ._build import build, cfg_cifar, rows
from ._plain import PlainNet

__all__ = ["Air"]

_CFG = cfg_cifar(pool_size=(3, 3), first_conv="features.0", classifier="fc")

default_cfgs = rows({"x_air94": _CFG, "x_air96": _CFG})

_STEM = 24  # both signs of the 2 * 2 * 3 eigenvectors of the patches of RGB images


class Stage(nn.Module):
    """Convolution, pooling, norm, activation; one more convolution, or two and a shortcut round
    them.

    Shape: [B, n_in, H, W] -> [B, n_out, H // 2, W // 2].
    """

    def __init__(self, n_in: int, n_out: int, convs: int, factory: dict[str, Any]):
        super().__init__()
        self.enter = nn.Sequential(
            _conv(n_in, n_out, factory),
            nn.MaxPool2d(2),
            nn.BatchNorm2d(n_out, **factory),
            nn.GELU(),
        )
        branch: list[nn.Module] = []
        if convs == 3:
            branch += [_conv(n_out, n_out, factory), nn.BatchNorm2d(n_out, **factory), nn.GELU()]
        self.branch = nn.Sequential(
            *branch, _conv(n_out, n_out, factory), nn.BatchNorm2d(n_out, **factory)
        )
        self.shortcut = convs == 3
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        y = self.branch(x)
        if self.shortcut:
            y = y + x
        return self.act(y)


class Scale(nn.Module):
    """x times a constant."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor

    def extra_repr(self) -> str:
        return str(self.factor)


class Air(PlainNet):
    """Stem, three stages, global max pooling, classifier.

    Shape: [B, in_chans, 32, 32] -> [B, num_classes]; from 9 px on, and larger images, by the global
    pooling.

    Args:
        widths: channels of the three stages.
        convs: convolutions of each stage: 2, or 3 with a shortcut.
    """

    def __init__(
        self,
        widths: tuple[int, int, int] = (128, 512, 512),
        convs: int = 2,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "max",
        drop_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ):
        factory = {"device": device, "dtype": dtype}
        layers: list[nn.Module] = [nn.Conv2d(in_chans, _STEM, 2, **factory), nn.GELU()]
        taps = [(1, _STEM, 1)]
        channels = _STEM
        for level, width in enumerate(widths):
            layers.append(Stage(channels, width, convs, factory))
            channels = width
            taps.append((len(layers) - 1, channels, 2 ** (level + 1)))
        # Logits of a maximum over pixels are large: the source divides them by 9.
        hidden = nn.Sequential(Scale(1 / 9))
        features = nn.Sequential(*layers)
        super().__init__(
            features,
            taps,
            1,
            hidden,
            channels,
            num_classes,
            in_chans,
            global_pool,
            drop_rate,
            **factory,
            head_bias=False,
        )


def _conv(n_in: int, n_out: int, factory: dict[str, Any]) -> nn.Conv2d:
    return nn.Conv2d(n_in, n_out, 3, padding=1, bias=False, **factory)


def _x_air(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    facts: dict[str, Any] = {
        "compression": 4,
        "expanded": ("features.?.*",),
        "dense_too": ("features.2.enter.0",),
    }
    wrapper = {"flatten_sequential": True, "out_indices": (0, 1, 2, 3)}
    return build(Air, variant, pretrained, feature_cfg=wrapper, **facts | kwargs)


@register_model
def x_air94(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Two convolutions a stage, widths 128, 512, 512, compression 4: 1.99M weights, 131M MACs."""
    return _x_air("x_air94", pretrained, **{"widths": (128, 512, 512), "convs": 2} | kwargs)


@register_model
def x_air96(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Three convolutions and a shortcut a stage, widths 128, 384, 512, compression 4: 2.50M
    weights, 133M MACs.
    """
    return _x_air("x_air96", pretrained, **{"widths": (128, 384, 512), "convs": 3} | kwargs)
