"""`xzoo fit`, `validate`, `test` and `predict`: a recipe on Lightning's Trainer, in a run folder of its own.

A recipe is YAML for `Classifier`, a data module and the Trainer, under LightningCLI's names. `base.yaml` beside a
recipe is read before it, so that a recipe says only what differs; later files and flags win, key by key. The
same command continues a run that was interrupted, and tells the result of one that is finished.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI

from ..errors import XzooError
from .run import claimed
from .task import Classifier

PACKAGE = Path(__file__).parent.parent
# Where a run happens may change from one start to the next; what it computes may not.
PLACES = ("trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy", "data.init_args.root")


def recipes_folder() -> Path:
    """The recipes of this installation: inside the wheel, or beside the package in a checkout."""
    inside = PACKAGE / "recipes"
    return inside if inside.is_dir() else PACKAGE.parent / "recipes"


def find_recipe(name: str) -> Path:
    """The file of a recipe given by path, or by name ("cifar10/x_vgg16_2") among those of the installation.

    Raises: XzooError with the nearest names.
    """
    own = recipes_folder()
    for path in (Path(name), own / name, own / f"{name}.yaml", own / name.removeprefix("recipes/")):
        if path.is_file():
            return path
    import difflib

    near = difflib.get_close_matches(name.removesuffix(".yaml").removeprefix("recipes/"), list_recipes(), n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "`xzoo recipes` lists them"
    raise XzooError(f"no recipe {name}; {hint}")


def list_recipes() -> list[str]:
    """Names of the installation's recipes, such as "cifar10/x_vgg16_2"."""
    own = recipes_folder()
    files = (path.relative_to(own).with_suffix("") for path in own.rglob("*.yaml") if path.stem != "base")
    return sorted(path.as_posix() for path in files)


def with_bases(arguments: Sequence[str]) -> list[str]:
    """The arguments with every --config found, and preceded by the base.yaml beside it."""
    result: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        option, equals, value = argument.partition("=")
        if option not in ("--config", "-c"):
            result.append(argument)
            continue
        path = find_recipe(value if equals else next(rest, ""))
        base = path.with_name("base.yaml")
        if base.is_file() and base != path and f"--config={base}" not in result:
            result.append(f"--config={base}")
        result.append(f"--config={path}")
    return result


class RecipeCLI(LightningCLI):
    """LightningCLI over `Classifier` and the data modules; what a run needs beside them is added here.

    `run=False`: it only parses and builds, so that the folder can be claimed before and the run told after.
    """

    def __init__(self, arguments: Sequence[str]):
        super().__init__(
            Classifier,
            pl.LightningDataModule,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_callback=None,
            seed_everything_default=0,
            parser_kwargs={"exit_on_error": False},
            args=with_bases(arguments),
            run=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--ema", type=float | None, default=None, help="decay a step of the averaged weights")
        parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")
        parser.link_arguments("seed_everything", "model.seed")
        parser.link_arguments("seed_everything", "data.init_args.seed")
