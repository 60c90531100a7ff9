"""Training: the classifier, the callbacks that it needs, and the recipe that fine-tunes on a folder
of images.

The data modules are those of `xzoo.data`, named here too.
"""

from ..data import CIFAR10, CIFAR100, ImageFolder, ImageModule, ImageNet, TinyImageNet
from .callbacks import EMA, Clock, SyncBatchNorm
from .classify import classify
from .finetune import finetune
from .task import Classifier

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "EMA",
    "Classifier",
    "Clock",
    "ImageFolder",
    "ImageModule",
    "ImageNet",
    "SyncBatchNorm",
    "TinyImageNet",
    "classify",
    "finetune",
]
