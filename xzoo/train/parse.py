"""Reading a recipe: YAML files and flags become a Trainer, a `Classifier` and a data module.

LightningCLI's parser, with the nearest names in its errors; nothing is built while parsing.
"""

import json
import os
import pydoc
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from ..data.module import DataModule
from ..errors import XzooError
from ..names import to_yaml
from ..options import explain, option_names
from ..results.runs import recipe_sha
from . import recipes
from .callbacks import SyncBatchNorm
from .run import TRAINER
from .task import Classifier

# Where a run happens; it may change from one start to the next.
PLACES = {
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "data.init_args.root",
    "data.init_args.workers",
}
# How it is computed: rounding apart the same recipe, with columns of their own in the results.
MEANS = {
    "trainer.precision",
    "trainer.sync_batchnorm",
    "trainer.benchmark",
    "trainer.deterministic",
    "model.compile",
    "model.channels_last",
    "data.init_args.channels_last",
    "data.init_args.eval_batch_size",
}
# What is drawn; with columns of their own too.
SEEDS = {"seed_everything", "model.graph_seed"}
# The data modules, by the names that recipes use.
DATA = ("CIFAR10", "CIFAR100", "TinyImageNet", "ImageNet", "ImageFolder")
# Of one call; they do not belong to the run.
OF_CALL = ("config", "out", "results", "ckpt_path", "trust")


class RecipeCLI(LightningCLI):
    """LightningCLI's parser over `Classifier` and the data modules; `build` makes what it parsed.

    Apart, because the run folder has to be locked between the two.
    """

    def __init__(self, arguments: Sequence[str], verb: str = "fit") -> None:
        self.recipe: recipes.Recipe | None = None  # what is trained: the first one
        with warnings.catch_warnings():
            # It warns of arguments that are not those of the process.
            warnings.filterwarnings("ignore", message=".*LightningCLI's args parameter")
            super().__init__(
                Classifier,
                pl.LightningDataModule,
                subclass_mode_data=True,
                auto_configure_optimizers=False,
                save_config_callback=None,
                seed_everything_default=0,
                parser_kwargs={
                    "prog": f"xzoo {verb}",
                    "exit_on_error": False,
                    "allow_abbrev": False,
                },
                args=self._composed(arguments),
                run=False,
            )

    def _composed(self, arguments: Sequence[str]) -> list[str]:
        """Each recipe, whether the first argument or after --config, as all that it says."""
        given, found = list(arguments), []
        if given and not given[0].startswith("-"):
            given[0] = f"--config={given[0]}"
        while given:
            flag, _, value = given.pop(0).partition("=")
            if flag not in ("--config", "-c"):
                found.append(f"{flag}={value}" if value else flag)
                continue
            if not (value or given):
                raise XzooError("--config: a recipe is needed after it; `xzoo recipes` lists them")
            recipe = recipes.find(value or given.pop(0))
            if self.recipe is None:
                self.recipe = recipe
            if "--trust" not in arguments:  # before the parser imports what it names
                recipes.check_trusted(recipe)
            found += [f"--config={to_yaml(layer.content)}" for layer in recipe.layers]
        return found

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--ema", type=float | None, default=None, help="decay of averaged weights in a step"
        )
        parser.add_argument(
            "--out", type=str | None, default=None, help="run folder; by default runs/RECIPE"
        )
        parser.add_argument(
            "--results", type=str | None, default=None, help="append the result to this table"
        )
        parser.add_argument(
            "--trust", action="store_true", help="let recipes name classes of any package"
        )
        parser.add_argument(
            "--ckpt_path", type=str | None, default=None, help="weights to judge, not to train"
        )
        parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")
        parser.link_arguments("seed_everything", "model.seed")
        parser.link_arguments("seed_everything", "data.init_args.seed")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        try:
            super().parse_arguments(parser, args)
        except ArgumentError as error:
            text = explain(str(error), option_names(parser), DATA)
            if "are required" in text:
                text += "; `xzoo recipes` lists what goes after --config"
            raise XzooError(text) from None

    def _add_instantiators(self) -> None:
        """None: `build` makes everything, later."""

    def instantiate_classes(self) -> None:
        """See `build`."""

    def build(self, **trainer: Any) -> tuple[pl.Trainer, Classifier, DataModule]:
        """Trainer, classifier and data; `trainer` has arguments over the recipe's, lists of it
        after its lists.
        """
        # Not by the parser: it would report an error in the data's constructor as "None or a data
        # module", and write itself into every checkpoint.
        data = self.data_class(**self.config.data.init_args.as_dict())
        task = Classifier(**self.config.model.as_dict() | {"num_classes": data.num_classes})
        parts = ArgumentParser()
        parts.add_class_arguments(pl.Trainer, "trainer", instantiate=False)
        given = parts.instantiate(Namespace(trainer=self.config.trainer)).trainer.as_dict()
        for name in ("callbacks", "plugins", "logger"):
            asked, ours = given.pop(name) or [], trainer.get(name, [])
            if ours is not False:
                trainer[name] = ours + (asked if isinstance(asked, list) else [asked])
        if given["sync_batchnorm"]:
            trainer |= {"sync_batchnorm": False, "plugins": [*trainer["plugins"], SyncBatchNorm()]}
        try:
            made = pl.Trainer(**given | TRAINER | trainer)
        except (MisconfigurationException, ValueError, TypeError, ModuleNotFoundError) as error:
            # Flags that do not go together, or with this machine.
            raise XzooError(f"trainer: {' '.join(str(error).split())}") from error
        return made, task, data

    def plain(self, changes_only: bool = False, config: Namespace | None = None) -> dict[str, Any]:
        """The configuration, or another one, in plain values, as a recipe that does the same; of
        `changes_only`, without defaults.
        """
        config = self.config if config is None else config
        text = self.parser.dump(config, format="yaml", skip_unset=False, skip_default=changes_only)
        plain = {key: value for key, value in yaml.safe_load(text).items() if key not in OF_CALL}
        # Run folders and hashes of recipes know the data modules by the names that xzoo.train has
        # for them.
        plain["data"]["class_path"] = re.sub(
            r"^xzoo\.data\.", "xzoo.train.", plain["data"]["class_path"]
        )
        return plain

    @property
    def overrides(self) -> list[str]:
        """The options that differ from the recipe, of those that its hash covers:
        ["--trainer.max_epochs=30"].
        """
        layers = () if self.recipe is None else self.recipe.layers
        config = self.plain()
        recipe = [f"--config={to_yaml(layer.content)}" for layer in layers]
        try:
            alone = self.plain(config=self.parser.parse_args(recipe))
        except ArgumentError:
            # the recipe is complete with the rest alone, so that all of it counts
            config, alone = self.plain(changes_only=True), {}
        found, free = [], PLACES | MEANS | SEEDS
        for key, value in _differences(_without(config, free), _without(alone, free)):
            option = key.replace("data.init_args.", "data.").replace("data.class_path", "data")
            text = value if isinstance(value, str) else json.dumps(value)
            found.append(f"--{option}={text}")
        return found

    @property
    def data_class(self) -> Any:
        """The class of the data module."""
        return pydoc.locate(self.config.data.class_path)

    @property
    def name(self) -> str:
        """The recipe's name, such as cifar10/x_vgg16_2+air; of a file, its stem."""
        return self.config.model.name if self.recipe is None else self.recipe.name

    @property
    def run_folder(self) -> Path:
        name = self.name if self.recipe is None else self.recipe.run
        return Path(self.config.out or Path("runs") / name).expanduser()

    @property
    def sha(self) -> str:
        """Hash of what is computed: the recipe with its bases and overrides, wherever and however
        it runs.
        """
        return recipe_sha(_without(self.plain(changes_only=True), PLACES | MEANS))


def _without(config: Any, keys: set[str], prefix: str = "") -> Any:
    if not isinstance(config, dict):
        return config
    kept = {}
    for key, value in config.items():
        if prefix + key not in keys:
            kept[key] = _without(value, keys, f"{prefix}{key}.")
    return kept


def _differences(config: Any, other: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted keys that are different in the other, with the value here."""
    for key, value in config.items():
        theirs = other.get(key)
        if isinstance(value, dict) and isinstance(theirs, dict | None):
            yield from _differences(value, theirs or {}, f"{prefix}{key}.")
        elif value != theirs:
            yield prefix + key, value


def is_first() -> bool:
    """Whether this process is the first of its run, before there is a trainer to ask."""
    ranks = ("RANK", "SLURM_PROCID", "LOCAL_RANK")
    rank = next((int(os.environ[name]) for name in ranks if name in os.environ), 0)
    return rank == 0 and ("RANK" in os.environ or int(os.environ.get("NODE_RANK", 0)) == 0)


def launched() -> dict[str, int]:
    """Under torchrun, the devices and nodes that it started; it knows better than a recipe."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return {}
    local, world = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
    return {"devices": local, "num_nodes": world // local}
