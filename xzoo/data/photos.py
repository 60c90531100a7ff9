"""The data modules of the user's images: timm's transforms over `Views` (loader.py)."""

from typing import Any

import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from rich.console import Console
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform

from ..machine import cores
from ..names import say
from .loader import Loader, Transform, Views, batch_bytes
from .module import DataModule
from .order import EvalOrder, TrainOrder, run_position
from .scan import ImageData, read


class ImageModule(DataModule):
    """Batches (images float32 [B, 3, H, W], labels int64 [B]) of an `ImageData`.

    Its validation images are the test images, too.

    Args:
        data: the images.
        data_config: timm's description of the input (`timm.data.resolve_model_data_config`).
        batch_size: images in a step, over all devices.
        seed: of the order and the augmentation.
        crop: smallest share of the area that a training crop shows.
        mirror: also show mirror images in training.
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
        self.num_classes, self.grey_range = len(data.classes), dict(data.ranges)
        self.img_size, self.crop_pct = data_config["input_size"][-1], data_config["crop_pct"]
        self.mean, self.std = tuple(data_config["mean"]), tuple(data_config["std"])
        self._interpolation: str = data_config["interpolation"]
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

    @property
    def interpolation(self) -> str:
        return self._interpolation

    @property
    def class_names(self) -> list[str]:
        return self.data.classes

    @property
    def dataset(self) -> None:
        """None: these images are not in the table of results."""
        return None

    @property
    def n_val(self) -> int:
        return len(self.data.val)

    @property
    def n_test(self) -> int:
        return len(self.data.val)

    def train_order(
        self, rank: int = 0, world: int = 1, done: int = 0, limit: int | float = 1.0
    ) -> TrainOrder:
        n = len(self.data.train)
        return TrainOrder(n, self.batch_size, self.seed, rank, world, done, limit)

    def train_dataloader(self) -> Loader:
        views = Views(self.data.train, self.train_transform, self.seed)
        return self._loader(views, self.train_order(*run_position(self.trainer)))

    def val_dataloader(self) -> Loader:
        rank, world, *_ = run_position(self.trainer)
        order = EvalOrder(len(self.data.val), self.batch_size, rank, world)
        return self._loader(Views(self.data.val, self.eval_transform, None), order)

    def test_dataloader(self) -> Loader:
        return self.val_dataloader()

    def _loader(self, views: Views, order: TrainOrder | EvalOrder) -> Loader:
        size = batch_bytes(self.batch_size, self.input_size)
        return Loader(views, order, self.workers, batch_bytes=size)


class ImageFolder(ImageModule):
    """The images of DATA in any form that `xzoo finetune` reads (see sources.py), for a recipe of
    one's own.

    Its validation images are the data's own, or a fifth held out by a hash of their names.

    Args:
        root: folder of class folders or of parquet files, data set on the Hub (org/name), or
            digits.
        img_size: side of the images that the model sees, in pixels.
        crop_pct: share of the shorter side that is seen in validation.
        interpolation: timm's name of the filter that resizes.
        mean: of the colors, in 0 to 1.
        std: likewise.
        batch_size, seed, crop, mirror, workers: as in ImageModule.
    Raises: DataError as `scan.read`, which runs here: a recipe's model needs the number of classes.
    """

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
        config = {
            "input_size": (3, img_size, img_size),
            "crop_pct": crop_pct,
            "interpolation": interpolation,
            "mean": tuple(mean),
            "std": tuple(std),
        }
        data = read(root, at_least=2 * img_size)
        _tell(root, data)
        super().__init__(data, config, batch_size, seed, crop, mirror, workers)


@rank_zero_only
def _tell(root: str, data: ImageData) -> None:
    console = Console(stderr=True)
    for text in (*data.remarks, data.account()):
        say(console, f"{root}: {text}")
