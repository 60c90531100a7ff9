"""The data module of the user's images: timm's transforms over `Views` (loader.py)."""

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from rich.console import Console
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform

from ..machine import cores
from ..names import say
from .loader import Loader, Transform, Views, batch_bytes
from .order import EvalOrder, TrainOrder, standing
from .scan import ImageData, read


class ImageModule(pl.LightningDataModule):
    """Batches (images float32 [B, 3, H, W], labels int64 [B]) of an `ImageData`.

    Args:
        data_config: timm's description of the input (`timm.data.resolve_model_data_config`).
        batch_size: images in a step, over all devices.
        crop: smallest share of the area that a training crop shows.
        workers: processes that decode and transform; None decides. Without them images come from
            the training process itself, which is best where pixels are in memory and the CPU trains
            as well.
    """

    def __init__(
        self,
        data: ImageData,
        data_config: dict[str, Any],
        batch_size: int = 64,
        seed: int = 0,
        crop: float = 0.5,
        mirror: bool = True,
        workers: int | None = None,
    ) -> None:
        super().__init__()
        self.data, self.batch_size, self.seed = data, batch_size, seed
        self.input_size: tuple[int, int, int] = data_config["input_size"]
        self.mean, self.std = tuple(data_config["mean"]), tuple(data_config["std"])
        self.class_names = data.classes
        self.train_transform: Transform = create_transform(
            **data_config,
            is_training=True,
            scale=(crop, 1.0),
            ratio=(4 / 5, 5 / 4),
            hflip=0.5 if mirror else 0.0,
            color_jitter=0.1 if mirror else 0.0,
        )
        self.eval_transform: Transform = create_transform(**data_config, is_training=False)
        if workers is None:
            workers = 0 if data.in_memory and not torch.cuda.is_available() else min(8, cores())
        self.workers = workers

    def batches_per_epoch(self, world: int = 1) -> int:
        """Steps in an epoch, known before any loader exists."""
        return len(TrainOrder(len(self.data.train), self.batch_size, world=world))

    def train_dataloader(self) -> Loader:
        order = TrainOrder(
            len(self.data.train), self.batch_size, self.seed, *standing(self.trainer)
        )
        return self._loader(Views(self.data.train, self.train_transform, self.seed), order)

    def val_dataloader(self) -> Loader:
        rank, world, *_ = standing(self.trainer)
        order = EvalOrder(len(self.data.val), self.batch_size, rank, world)
        return self._loader(Views(self.data.val, self.eval_transform, None), order)

    def _loader(self, views: Views, order: TrainOrder | EvalOrder) -> Loader:
        size = batch_bytes(self.batch_size, self.input_size)
        return Loader(views, order, self.workers, batch_bytes=size)


@rank_zero_only
def _tell(root: str, data: ImageData) -> None:
    console = Console(stderr=True)
    for text in (*data.remarks, data.account()):
        say(console, f"{root}: {text}")


class ImageFolder(ImageModule):
    """The images of DATA in any form that `xzoo finetune` reads (see sources.py), for a recipe of
    one's own.

    Its validation images, its own or a fifth held out by a hash of their names, are those that are
    tested too.

    Args:
        root: folder of class folders or of parquet files, data set on the Hub (org/name), or
            digits.
        img_size: pixels a side that the model sees.
        crop_pct: share of the shorter side that is seen in validation.
        interpolation: timm's name of the filter that resizes.
        mean, std: of the colours, in 0 to 1.
        batch_size, seed, crop, mirror, workers: as in ImageModule.
    Raises: DataError as `scan.read`, which runs here: a recipe's model needs the number of classes.
    """

    dataset, holdout = None, 0  # none of the table of results

    def __init__(
        self,
        root: str,
        img_size: int = 224,
        batch_size: int = 64,
        seed: int = 0,
        crop: float = 0.5,
        mirror: bool = True,
        crop_pct: float = 1.0,
        interpolation: str = "bicubic",
        mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN,
        std: tuple[float, float, float] = IMAGENET_DEFAULT_STD,
        workers: int | None = None,
    ) -> None:
        self.img_size, self.input_size, self.crop_pct = img_size, (3, img_size, img_size), crop_pct
        self.interpolation, self.mean, self.std = interpolation, tuple(mean), tuple(std)
        config = {
            name: getattr(self, name)
            for name in ("input_size", "crop_pct", "interpolation", "mean", "std")
        }
        data = read(root, at_least=2 * img_size)
        _tell(root, data)
        super().__init__(data, config, batch_size, seed, crop, mirror, workers)
        self.grey_range = dict(data.ranges)
        self.num_classes = len(data.classes)
        self.n_val = self.n_test = len(data.val)

    def test_dataloader(self) -> Loader:
        return self.val_dataloader()

    def predict_dataloader(self) -> Loader:
        return self.val_dataloader()
