"""The plan of `xzoo finetune`: what its options come to for a model and a set of images.

Two recipes, because they want opposite things. A pretrained network has to be moved gently: the
head is new and learns ten times as fast as the body, which waits until the head makes sense. A
network from scratch learns everything at once, needs more steps, and smaller images where the data
are small. Weights that learned from thumbnails are between the two: they know little that lasts, so
they are where the second recipe starts.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from timm.models import get_pretrained_cfg

from .. import weights as weights_table
from ..data.scan import ImageData
from ..errors import ModelError, XzooError
from ..models import create_model

# 500 steps are BiT's for small sets. From scratch x_resnet18 has 98 % on the digits after 300 of 64
# images.
STEPS = 500
EPOCHS_SCRATCH, EPOCHS_PRETRAINED = (20, 100), (10, 60)
# Pixels a side up to which a network has seen thumbnails. Ten hand signs from ten images each, on
# held-out training images: x_vgg16_2.cifar10_q75 (32) 76 % at a tenth of the rate, 91 at all of it,
# 81 from scratch; x_mobilenet050_c8.tin_r64 47, 57 (64 at twice the rate) and 12.
THUMBNAIL = 64


@dataclass(frozen=True)
class Options:
    """The options of a run, in plain values; equal options continue the same run."""

    data: str
    model: str
    expand: int | None = None
    epochs: int | None = None
    minutes: float | None = None
    freeze: bool = False
    pretrained: bool | None = None
    lr: float | None = None
    batch_size: int | None = None
    img_size: int | None = None
    mirror: bool | None = None
    seed: int = 0

    def check(self) -> None:
        """Raise XzooError for values that mean nothing."""
        for name, low in (("epochs", 1), ("batch_size", 2), ("img_size", 8), ("expand", 1)):
            value = getattr(self, name)
            if value is not None and (value < low or value != int(value)):
                raise XzooError(f"{name}={value}: an integer from {low} on is needed")
        for name in ("minutes", "lr"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise XzooError(f"{name}={value:g}: a positive number is needed")


@dataclass(frozen=True)
class Start:
    """What a model name stands for: the name and arguments to build, its input, and whether to
    begin with pretrained weights.
    """

    name: str
    kwargs: dict[str, Any]
    input_size: int
    fixed: bool
    pretrained: bool


def start(options: Options) -> Start:
    """Look the model up, without building it.

    Raises: ModelError for a name that does not exist, or has no weights where they are asked for.
    """
    name, kwargs = options.model, {}
    folder = name.removeprefix("local-dir:")
    if folder != name:
        try:
            config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
            cfg = config["pretrained_cfg"]
            size, fixed = int(cfg["input_size"][-1]), cfg.get("fixed_input_size", False)
            weights = True
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise ModelError(
                f"{folder} is not a model folder: its config.json cannot be read "
                f"({type(error).__name__}: {error})"
            ) from error
    elif name.startswith("hf-hub:"):
        size, fixed, weights = 224, False, True
    else:
        if not timm.is_model(name.split(".")[0]):
            create_model(name)  # raises, with the nearest names
        ours = weights_table.find(name)
        try:
            found = get_pretrained_cfg(ours.name if ours else name)
        except RuntimeError as error:
            raise ModelError(str(error)) from error
        size = found.input_size[-1] if found else 224
        fixed = bool(found and found.fixed_input_size)
        weights = ours is not None or timm.is_model_pretrained(name)
    if options.expand is not None:
        if name.startswith(("x_", "local-dir:", "hf-hub:")):
            raise ModelError(
                f"expand={options.expand} with {name}: only a dense model of timm, by name, is "
                "expanded"
            )
        kwargs = {"base": name, "compression": options.expand}
        name = "x_timm"
    if fixed and options.img_size:
        kwargs["img_size"] = options.img_size
    if options.pretrained and not weights:
        raise ModelError(
            f"{options.model} has no pretrained weights; leave out pretrained to train from scratch"
        )
    pretrained = weights if options.pretrained is None else options.pretrained
    return Start(name, kwargs, size, fixed, pretrained)


@dataclass(frozen=True)
class Plan:
    """What will be done: arguments of `Classifier` and `ImageModule`, and how long to train."""

    classifier: dict[str, Any]
    img_size: int
    batch_size: int
    crop: float
    mirror: bool
    epochs: int | None
    minutes: float | None


def plan(options: Options, model: Start, data: ImageData) -> Plan:
    """Fill in what was not asked for."""
    n = len(data.train)
    # Small sets need steps more than they need smooth gradients.
    batch_size = options.batch_size or max(
        8, min(64, 1 << (n // 16).bit_length() - 1 if n >= 16 else 8)
    )
    steps = -(-n // batch_size)
    least, most = EPOCHS_PRETRAINED if model.pretrained else EPOCHS_SCRATCH
    epochs = options.epochs
    if epochs is None and options.minutes is None:
        epochs = min(most, max(least, -(-STEPS // steps)))
    gently = model.pretrained and model.input_size > THUMBNAIL
    # Adaptive optimizers: the rate goes with the square root of the batch.
    peak = (1e-3 if gently else 2e-3) * (batch_size / 64) ** 0.5
    classifier = {
        "name": model.name,
        "num_classes": len(data.classes),
        "model_kwargs": model.kwargs,
        "pretrained": model.pretrained,
        "lr": options.lr or peak,
        "weight_decay": 0.05,
        "label_smoothing": 0.1,
        "warmup": 0.1,
        "freeze": options.freeze,
        "seed": options.seed,
    }
    if model.pretrained and not options.freeze:
        body_lr = 0.1 if gently else 1.0
        # its body has lost most of its connections, and has to move to make up for them
        if options.expand:
            body_lr = 0.5
        classifier |= {
            "body_lr": body_lr,
            "head_first": 0.05,
            # Under 16 images, a batch's statistics are worse than those of the weights.
            "freeze_norm": batch_size < 16 and gently and not options.expand,
        }
    return Plan(
        classifier=classifier,
        img_size=options.img_size or _img_size(model, data.side),
        batch_size=batch_size,
        crop=0.5,
        mirror=data.mirror if options.mirror is None else options.mirror,
        epochs=epochs,
        minutes=options.minutes,
    )


def _img_size(model: Start, side: int) -> int:
    """The model's own size with pretrained weights. From scratch, twice the images' side, 128 at
    most.

    Twice, since most stems halve an image twice before anything is learned; more pixels than 128
    cost time and teach nothing that a few thousand images could.
    """
    if model.pretrained or model.fixed:
        return model.input_size
    return min(model.input_size, 32 * -(-min(2 * side, 128) // 32))
