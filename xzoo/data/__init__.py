"""Images: reading them in any form, which one is seen when, augmentation, and the data modules of
training.
"""

from .imagenet import ImageNet
from .memory import CIFAR10, CIFAR100, TinyImageNet
from .photos import ImageFolder, ImageModule

__all__ = ["CIFAR10", "CIFAR100", "ImageFolder", "ImageModule", "ImageNet", "TinyImageNet"]
