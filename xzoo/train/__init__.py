"""Training: the classifier, its data, and the recipe that fine-tunes on a folder of images."""

from xzoo.train.callbacks import EMA, Clock
from xzoo.train.classify import classify
from xzoo.train.data import ImageModule
from xzoo.train.finetune import finetune
from xzoo.train.task import Classifier

__all__ = ["EMA", "Classifier", "Clock", "ImageModule", "classify", "finetune"]
