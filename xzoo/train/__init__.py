"""Training: the classifier, its data, and the recipe that fine-tunes on a folder of images."""

from .callbacks import EMA, Clock, SyncBatchNorm
from .classify import classify
from .data import ImageFolder, ImageModule
from .finetune import finetune
from .imagenet import ImageNet
from .memory import CIFAR10, CIFAR100, TinyImageNet
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
