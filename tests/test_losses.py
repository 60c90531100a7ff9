"""Golden losses: the first five steps of three recipes, on drawn images; a change of any number has
to be meant.

`python tests/test_losses.py` writes tests/golden/losses.json anew.
"""

import json
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from xzoo.data.order import keys
from xzoo.data.sources import Item, Listing
from xzoo.train.callbacks import EMA
from xzoo.train.parse import RecipeCLI
from xzoo.train.run import quiet

GOLDEN = Path(__file__).parent / "golden" / "losses.json"
RECIPES = {
    "cifar10/x_vgg16_c8": 32,
    "cifar100/x_densenetbc_40_24": 32,
    "tiny_imagenet/x_resnet18": 64,
}
STEPS, BATCH = 5, 8


def drawn(count: int, side: int, classes: int) -> Listing:
    """Images of 4 x 4 squares whose colours are hashes of where they are, so the same on every
    machine.

    Pixels of noise are too much alike once they are averaged: batch norm then turns rounding into
    other losses.
    """
    squares = keys(0, 0, 1, torch.arange(count * 48)).remainder(256).byte().view(count, 4, 4, 3)
    pixels = squares.repeat_interleave(side // 4, 1).repeat_interleave(side // 4, 2).numpy()
    images = [Item(str(i), i % classes, image) for i, image in enumerate(pixels)]
    return Listing([str(i) for i in range(classes)], images, images)


class Losses(pl.Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.seen.append(float(outputs["loss"]))
        # Of a run of 1000 epochs, whose rate rises slowly enough that rounding stays rounding.
        trainer.should_stop = len(self.seen) == STEPS


def losses(recipe: str, side: int) -> list[float]:
    watch = Losses()
    with quiet():
        cli = RecipeCLI(
            ["--config", recipe, f"--data.batch_size={BATCH}", "--trainer.accelerator=cpu"]
        )
        ours = {
            "callbacks": [EMA(cli.config.ema), watch],
            "logger": False,
            "enable_checkpointing": False,
        }
        trainer, task, data = cli.build(**ours, max_epochs=1000, limit_val_batches=0)
        data._list = lambda: drawn(STEPS * BATCH, side, data.num_classes)
        trainer.fit(task, datamodule=data)
    return watch.seen


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_first_losses_are_what_they_were(recipe):
    wanted = json.loads(GOLDEN.read_text())[recipe]
    assert losses(recipe, RECIPES[recipe]) == pytest.approx(wanted, abs=1e-3)


if __name__ == "__main__":
    torch.set_num_threads(1)
    written = {
        recipe: [round(loss, 5) for loss in losses(recipe, side)]
        for recipe, side in RECIPES.items()
    }
    GOLDEN.write_text(json.dumps(written, indent=2) + "\n")
