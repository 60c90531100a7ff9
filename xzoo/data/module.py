"""What training, evaluation and the files of a run ask of a data module."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import pytorch_lightning as pl
from torch import Tensor

from .order import TrainOrder


class DataModule(pl.LightningDataModule, ABC):
    """Images and labels for training, validation and testing.

    Every loader yields batches (images float32 [B, 3, img_size, img_size], labels int64 [B]), with
    a Trainer on its device, without one on the CPU. Training batches come in an order that is a
    function of `seed` and the epoch, so that a resumed run sees what an uninterrupted one sees.

    Attributes:
        num_classes: number of classes.
        batch_size: images in a training step, over all devices.
        seed: of the order and the augmentation.
        img_size: side of the images that the model sees, in pixels.
        crop_pct: share of the shorter side that validation sees; None where nothing is cropped.
        mean: of the colors, in 0 to 1.
        std: likewise.
        holdout: number of training images that are held out to validate on; 0 where the data have
            a part for that.
        grey_range: largest values of grey images with more than 8 bits, by kind
            (`images.grey_ranges`).
    """

    num_classes: int
    batch_size: int
    seed: int
    img_size: int
    crop_pct: float | None = None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    holdout: int = 0
    grey_range: Mapping[str, float] = {}

    # Whether `sample` gives training images.
    has_sample: ClassVar[bool] = False

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Channels, height and width of an image, as the model sees it."""
        return 3, self.img_size, self.img_size

    @property
    @abstractmethod
    def interpolation(self) -> str | None:
        """timm's name of the filter that resizes; None where nothing is resized."""

    @property
    @abstractmethod
    def class_names(self) -> list[str]:
        """Name of each label."""

    @property
    @abstractmethod
    def dataset(self) -> str | None:
        """Key in `xzoo.datasets`; None for other images, and for a part of a data set."""

    @property
    @abstractmethod
    def n_val(self) -> int:
        """Number of validation images."""

    @property
    @abstractmethod
    def n_test(self) -> int:
        """Number of test images."""

    @abstractmethod
    def train_order(
        self, rank: int = 0, world: int = 1, done: int = 0, limit: int | float = 1.0
    ) -> TrainOrder:
        """Which training images each batch has; arguments as `order.run_position` gives them."""

    def batches_per_epoch(self, world: int = 1) -> int:
        """Steps in an epoch, known before any loader exists."""
        return len(self.train_order(world=world))

    def sample(self, count: int) -> Tensor:
        """About `count` training images as validation would show them: float32 [N, 3, S, S], on the
        CPU. Only where `has_sample`.
        """
        raise NotImplementedError

    @abstractmethod
    def val_dataloader(self) -> Any:
        """Batches of the validation images, in order."""

    def predict_dataloader(self) -> Any:
        """The test images."""
        return self.test_dataloader()
