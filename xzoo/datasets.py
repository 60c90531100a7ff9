"""The data sets that results and weights are of: what is true of each, written down once."""

from dataclasses import dataclass, replace

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

_NO_LICENSE = (
    "was published without a licence, so none can be given for weights that were trained on it"
)
_IMAGENET = (
    "has images of ImageNet, whose terms are for research and teaching without commercial use"
)
# Of CIFAR, the means and standard deviations of the X-Nets authors' code.
_CIFAR10_MEAN, _CIFAR10_STD = (
    (125.3 / 255, 123.0 / 255, 113.9 / 255),
    (63.0 / 255, 62.1 / 255, 66.7 / 255),
)
_CIFAR100_MEAN, _CIFAR100_STD = (
    (129.3 / 255, 124.1 / 255, 112.4 / 255),
    (68.2 / 255, 65.4 / 255, 70.4 / 255),
)


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """One data set.

    Args:
        title: its name in text and pictures.
        hub: its name on the Hugging Face Hub.
        classes: how many there are.
        sides: of its images in pixels, the usual one first; empty where every image has a size of
            its own.
        mean: of the colours, in 0 to 1.
        std: likewise.
        split: the part that accuracies are of.
        n: images in that part.
        train: images to learn from.
        license: why weights that were trained on it have the license "other"; follows the title in
            a sentence.
        lossless: whether its files keep every pixel, so that JPEG copies are another data set.
    """

    title: str
    hub: str
    classes: int
    sides: tuple[int, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    split: str
    n: int
    train: int
    license: str
    lossless: bool = False


_CIFAR10 = DataSet(
    title="CIFAR-10",
    hub="uoft-cs/cifar10",
    classes=10,
    sides=(32,),
    mean=_CIFAR10_MEAN,
    std=_CIFAR10_STD,
    split="test",
    n=10_000,
    train=50_000,
    license=_NO_LICENSE,
    lossless=True,
)
DATASETS = {
    "cifar10": _CIFAR10,
    # Of rows and weights that are there already; no run makes one any more.
    "cifar10_q75": replace(_CIFAR10, title="CIFAR-10 as JPEG of quality 75", lossless=False),
    "cifar100": DataSet(
        title="CIFAR-100",
        hub="uoft-cs/cifar100",
        classes=100,
        sides=(32,),
        mean=_CIFAR100_MEAN,
        std=_CIFAR100_STD,
        split="test",
        n=10_000,
        train=50_000,
        license=_NO_LICENSE,
        lossless=True,
    ),
    "tiny_imagenet": DataSet(
        title="Tiny-ImageNet",
        hub="zh-plus/tiny-imagenet",
        classes=200,
        sides=(64, 32),
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        split="val",
        n=10_000,
        train=100_000,
        license=_IMAGENET,
    ),
    "imagenet": DataSet(
        title="ImageNet-1k",
        hub="ILSVRC/imagenet-1k",
        classes=1000,
        sides=(),
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        split="val",
        n=50_000,
        train=1_281_167,
        license=_IMAGENET,
    ),
}
