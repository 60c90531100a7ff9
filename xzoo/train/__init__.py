"""Training: the classifier, its data, and the recipe that fine-tunes on a folder of images."""

from .callbacks import EMA, Clock
from .classify import classify
from .data import ImageModule
from .finetune import finetune
from .task import Classifier

__all__ = ["EMA", "Classifier", "Clock", "ImageModule", "classify", "finetune"]
