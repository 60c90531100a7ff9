"""Recipes: the product says what it trains, is read by the parser of `xzoo fit`, and trains.

`python tests/test_recipes.py` writes the costs in recipes/QUEUE.md anew.
"""

import copy
import csv
import fnmatch
import functools
import io
import itertools
import json
import math
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image

import xzoo
from xzoo.data.augment import Augment
from xzoo.data.imagenet import Contents, Stored
from xzoo.data.memory import InMemory
from xzoo.data.sources import Item
from xzoo.errors import XzooError
from xzoo.profile import profile
from xzoo.results.runs import read
from xzoo.train import Classifier, queue, recipes
from xzoo.train.callbacks import EMA
from xzoo.train.parse import RecipeCLI
from xzoo.train.queue import size_of
from xzoo.train.run import quiet
from xzoo.train.task import rate

ROOT = Path(xzoo.__file__).parents[1]
FOLDER = ROOT / "recipes"
QUEUE = FOLDER / "QUEUE.md"
# The names and hashes from when each recipe was a file; never written anew.
with open(Path(__file__).parent / "golden" / "recipes.csv", newline="", encoding="utf-8") as file:
    OLD = {row["recipe"]: row["sha"] for row in csv.DictReader(file)}
NAMES = recipes.names()
HARDWARE = ("cpu", "gpu1", "gpu8", "slurm2x8")
# Classes and training images.
SIZES = {"cifar10": (10, 50_000), "cifar100": (100, 50_000), "tiny_imagenet": (200, 100_000)}
SIZES |= {"imagenet": (1000, 1_281_167)}
TITLES = {
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "tiny_imagenet": "Tiny-ImageNet",
    "imagenet": "ImageNet-1k",
}
DATA = {
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "tiny_imagenet": "TinyImageNet",
    "imagenet": "ImageNet",
}
RIVALS = {
    "dense": {"compression": 1},
    "group": {"graph": "group"},
    "shuffle": {"graph": "shuffle"},
    "random": {"graph": "random"},
}
TRAININGS = ("air", "fast", "paper", "short")
# Without a rival's graph: all that the parser has to read, since a rival differs in one value.
PLAIN = [name for name in NAMES if not set(name.split("+")[1:]) & set(RIVALS)]
# A network of each family, each data set, each way of training; the others train in the slow tests.
QUICK = {
    *("cifar10/x_vgg16_c16+fast", "cifar10/x_vgg16_2+paper", "cifar100/x_densenetbc_40_24+dense"),
    *("tiny_imagenet/x_alexnet_1", "tiny_imagenet/x_resnet18", "tiny_imagenet/x_vgg16_c16"),
    *("imagenet/x_mobilenet050_c16+group+paper", "tiny_imagenet/x_densenet121"),
}


def parse(*arguments: str) -> RecipeCLI:
    with quiet():
        return RecipeCLI(arguments)


@functools.cache
def parser() -> RecipeCLI:
    return parse("cifar10/x_vgg16")


def reparsed(*arguments: str) -> RecipeCLI:
    """As `parse`, by a parser that is there already."""
    cli = copy.copy(parser())
    cli.recipe = None
    with quiet():
        cli.config = cli.parser.parse_args(cli._composed(arguments))
    return cli


@functools.cache
def parsed(name: str) -> RecipeCLI:
    return reparsed(name)


def content(name: str) -> dict[str, Any]:
    (layer,) = recipes.compose(name).layers
    return layer.content


def of(name: str) -> tuple[str, str, list[str]]:
    """Data set, model and settings."""
    place, _, rest = name.partition("/")
    model, *settings = rest.split("+")
    return place, model, settings


# ---- what files say of themselves


def test_files_are_few_and_narrow():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert len(files) <= 25
    for path in FOLDER.rglob("*.yaml"):
        assert max(map(len, path.read_text(encoding="utf-8").splitlines())) <= 100, path
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(SIZES)
    assert {path.stem for path in FOLDER.glob("settings/*.yaml")} == {*RIVALS, *TRAININGS}


def test_each_file_opens_with_what_it_is():
    parts = {**recipes.data_sets(), **recipes.settings()}
    heads = {name: part.notes for name, part in parts.items()}
    heads |= {name: recipes.find(name).layers[0].notes for name in recipes.hardware()}
    titles = [notes.partition("\n")[0] for notes in heads.values()]
    assert len(set(titles)) == len(titles) and all(titles)
    for name in (*SIZES, "air", "paper"):
        assert "\nSource: " in heads[name], name
    for name in SIZES:
        assert heads[name].startswith(TITLES[name]) and "\nDiffers from the paper: " in heads[name]
    assert "the authors' settings" in heads["paper"].partition("\n")[0]


def test_a_data_set_says_all_and_a_setting_nothing_that_all_share():
    for name, part in recipes.data_sets().items():
        assert set(part.content) == {"seed_everything", "model", "data", "trainer", "ema"}, name
    for name, part in recipes.settings().items():
        assert part.kind == ("graph" if name in RIVALS else "training")
        for said in (part.content, *part.where.values()):
            assert set(said) <= {"model", "data", "trainer", "ema"}, name
        if name in RIVALS:
            assert part.content == {"model": RIVALS[name]} and not part.where
    # A pattern that nothing matches is a mistake.
    for name, part in recipes.data_sets().items():
        for pattern in (*part.fits, *part.where):
            assert fnmatch.filter(recipes.plain_names(), f"{name}/{pattern}"), pattern
    for part in recipes.settings().values():
        for pattern in (*part.fits, *part.excluded, *part.always, *part.where):
            assert fnmatch.filter(recipes.plain_names(), pattern), pattern


# ---- what the product says


def test_the_product_is_data_sets_models_and_settings():
    assert len(set(NAMES)) == len(NAMES) > 900
    for name in NAMES:
        place, model, settings = of(name)
        assert recipes.compose(name).name == name
        assert recipes.compose(name).run == name.replace("/", "-")
        assert len(set(settings) & set(RIVALS)) <= 1 >= len(set(settings) & set(TRAININGS))
        backwards = "+".join([f"{place}/{model}", *reversed(settings)])
        assert recipes.compose(backwards) == recipes.compose(name)
    # No two are the same.
    assert len({json.dumps(content(name), sort_keys=True) for name in NAMES}) == len(NAMES)


def test_a_recipe_says_what_its_name_says():
    for name in NAMES:
        place, model, settings = of(name)
        said = content(name)
        assert set(said) == {"seed_everything", "model", "data", "trainer", "ema"}
        assert said["data"]["class_path"] == DATA[place] and said["model"]["name"] == model
        rival = {key: value for kind in settings for key, value in RIVALS.get(kind, {}).items()}
        assert {key: said["model"].get(key) for key in ("graph", "compression")} == {
            **{"graph": None, "compression": None},
            **rival,
        }


def test_a_rival_differs_in_one_thing():
    rivals = [name for name in NAMES if name not in PLAIN]
    assert len(rivals) > 700
    for name in rivals:
        kind = next(kind for kind in of(name)[2] if kind in RIVALS)
        of_x = content(name.replace(f"+{kind}", ""))
        assert content(name) == {**of_x, "model": {**of_x["model"], **RIVALS[kind]}}


def check_same_size(model: str, kind: str) -> None:
    size = xzoo.create_model(model, device="meta").pretrained_cfg["input_size"]
    x, rival = (
        profile(xzoo.create_model(model, device="meta", num_classes=10, **given), size)
        for given in ({}, RIVALS[kind])
    )
    assert (rival.weights, rival.macs) == (x.weights, x.macs)


def rivals(names: Any) -> set[tuple[str, str]]:
    found = [(of(name)[1], kind) for name in names for kind in of(name)[2] if kind in RIVALS]
    return {(model, kind) for model, kind in found if kind != "dense"}


OLD_RIVALS = rivals(recipes.compose(name).name for name in OLD)


@pytest.mark.parametrize(("model", "kind"), sorted(OLD_RIVALS))
def test_a_rival_has_the_size_of_the_x_net(model, kind):
    check_same_size(model, kind)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "kind"), sorted(rivals(NAMES) - OLD_RIVALS))
def test_all_other_rivals_have_the_size_of_the_x_net(model, kind):
    check_same_size(model, kind)


def test_the_average_looks_back_over_a_part_of_the_run():
    for name in NAMES:
        place, _, settings = of(name)
        said, images = content(name), SIZES[place][1]
        if said["ema"] is None:
            assert "paper" in settings or said["model"]["lookahead"]
            continue
        steps = images // said["data"]["init_args"]["batch_size"] * said["trainer"]["max_epochs"]
        # More in a run of few steps, whose average is noisy otherwise.
        most = 0.13 if "fast" in settings else 0.1
        assert 0.05 <= 1 / (1 - said["ema"]) / steps <= most, name


@pytest.mark.parametrize("folder", SIZES)
def test_a_recipe_is_read_as_what_it_says(folder):
    for name in PLAIN:
        place, model, settings = of(name)
        if place != folder:
            continue
        config = parsed(name).config
        assert (
            config.data.class_path.rpartition(".")[2] == DATA[folder] and parsed(name).name == name
        )
        assert (
            config.model.name == model
            and config.model.compression is None
            and config.model.graph is None
        )
        # Neither resumes where it was; and where a recipe runs is said by the files in hardware/.
        trainer = config.trainer
        assert trainer.max_steps == -1 and trainer.max_time is None and trainer.max_epochs >= 1
        assert trainer.devices == 1 and trainer.precision is None and trainer.accelerator == "auto"
        said = content(name)
        assert trainer.max_epochs == said["trainer"]["max_epochs"] and config.ema == said["ema"]
        assert {key: config.model[key] for key in said["model"]} == said["model"]
        init = {key: config.data.init_args[key] for key in said["data"]["init_args"]}
        assert json.loads(json.dumps(init)) == said["data"]["init_args"]  # tuples as lists
        base = recipes.data_sets()[folder]
        if not settings and base.of(model) == base.content:
            assert base.notes.partition(":")[0].endswith(f" {size_of(parsed(name))} px")


def test_one_parser_reads_as_many_do():
    for name in ("cifar10/x_air94", "imagenet/x_mobilenet050_c8+group+paper"):
        assert parse(name).plain() == parsed(name).plain() == parse("--config", name).plain()
        assert parse(name).sha == parsed(name).sha and parse(f"--config={name}").name == name


def test_every_way_of_training_makes_its_classifier():
    """One network of each: on the meta device, but where the start is computed from real graphs."""
    seen: dict[str, str] = {}
    for name in PLAIN:
        said = recipes.merged(content(name), {"model": {"name": ""}})
        seen.setdefault(json.dumps(said, sort_keys=True), name)
    assert len(seen) > 25
    for name in seen.values():
        make(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_makes_its_classifier(name):
    make(name)


def make(name: str) -> None:
    config = reparsed(name).config
    with torch.device("cpu" if config.model.identity_start else "meta"):
        task = Classifier(**config.model.as_dict() | {"num_classes": SIZES[of(name)[0]][0]})
    assert task.net.num_classes == SIZES[of(name)[0]][0]


def test_every_architecture_has_its_recipes():
    lacking = [
        f"cifar10/{model}"
        for model in xzoo.list_models("x_air*")
        if f"cifar10/{model}" not in NAMES
    ]
    # X-Air is made for small images.
    for model in set(xzoo.list_models("x_*")) - {"x_timm", *xzoo.list_models("x_air*")}:
        if "vgg16" in model:
            homes = {"cifar10"}
        elif "densenetbc" in model:
            homes = {"cifar10", "cifar100"} if "_40_" in model else {"cifar100"}
        else:
            homes = {"imagenet"}
        lacking += [
            f"{home}/{model}"
            for home in sorted(homes | {"tiny_imagenet"})
            if f"{home}/{model}" not in NAMES
        ]
    assert not lacking


def test_mobilenets_rivals_are_all_there():
    rivals = {f"x_mobilenet050_c{c}+group{form}" for c in (2, 4, 8, 16) for form in ("", "+paper")}
    assert {f"imagenet/{name}" for name in rivals} <= set(NAMES)
    rivals = {
        f"x_mobilenet050_c{c}+{kind}"
        for c in (2, 4, 8, 16)
        for kind in ("group", "shuffle", "random")
    }
    assert {f"tiny_imagenet/{name}" for name in rivals} <= set(NAMES)


# ---- old names


def test_old_names_are_of_the_product():
    assert len(OLD) == 194
    for name in OLD:
        recipe = recipes.compose(name)
        assert recipe.name in NAMES and recipe.run == name.replace("/", "-")
        assert recipes.compose(f"recipes/{name}.yaml") == recipe
    assert len({recipes.compose(name).name for name in OLD}) == len(OLD)
    assert (
        recipes.compose("tiny_imagenet/x_mobilenet050_dense").name
        == "tiny_imagenet/x_mobilenet050_c2+dense"
    )


@pytest.mark.parametrize("folder", SIZES)
def test_an_old_name_is_the_same_recipe_still(folder):
    """Rows, cards and run folders name it; its hash is of what it resolves to."""
    for name, sha in OLD.items():
        if name.startswith(f"{folder}/"):
            assert parsed(recipes.compose(name).name).sha == sha, name


def test_an_old_name_has_its_old_run_folder():
    """So that the same command continues a run that an older version began."""
    old, new = (parse(f"cifar10/x_vgg16_c16{form}") for form in ("_short", "+short"))
    assert old.run_folder == Path("runs/cifar10-x_vgg16_c16_short")
    assert new.run_folder == Path("runs/cifar10-x_vgg16_c16+short")
    assert old.plain() == new.plain() and old.name == new.name == "cifar10/x_vgg16_c16+short"


# ---- what was asked for beside a recipe


def test_overrides_are_what_the_hash_is_of():
    asked = (
        "--trainer.max_epochs",
        "30",
        "--model.grow_sizes",
        "[20]",
        "--data.holdout=5000",
        "--ema",
        "null",
    )
    more = ("--model.whiten", "fixed", "--model.lr", "0.2")  # the rate is the recipe's own
    free = (
        "--seed_everything=3",
        "--model.graph_seed=3",
        "--data.root=x",
        "--out=y",
        "--trainer.precision=bf16-mixed",
    )
    cli = parse("cifar10/x_vgg16_2", *asked, *more, "--config", "hardware/gpu1", *free)
    assert set(cli.overrides) == {
        *(
            "--trainer.max_epochs=30",
            "--model.grow_sizes=[20]",
            "--data.holdout=5000",
            "--ema=null",
        ),
        "--model.whiten=fixed",
    }
    assert parse(cli.name, *cli.overrides).sha == cli.sha != parsed("cifar10/x_vgg16_2").sha
    assert parse("cifar10/x_vgg16_2_group", *free).overrides == []


def test_overrides_may_be_another_data_set_or_all_there_is(tmp_path):
    cli = parse("cifar10/x_vgg16_2", "--data", "CIFAR100", "--data.shift", "3")
    assert {"--data=xzoo.train.CIFAR100", "--data.shift=3"} <= set(cli.overrides)
    assert parse(cli.name, *cli.overrides).sha == cli.sha
    (tmp_path / "part.yaml").write_text("model: {name: x_vgg16_c16}")
    cli = parse(str(tmp_path / "part.yaml"), "--data", "CIFAR10", "--data.batch_size", "7")
    assert {"--model.name=x_vgg16_c16", "--data.batch_size=7"} <= set(cli.overrides)
    assert parse(str(tmp_path / "part.yaml"), *cli.overrides).sha == cli.sha


# What the authors' logs print: (batch, epochs, decay, rate in an epoch).
AUTHORS = {
    "cifar10/x_vgg16+paper": (128, 300, 5e-4, lambda e: max(0.05 * 0.5 ** (e // 30), 5e-4)),
    "cifar10/x_densenetbc_40_24+paper": (
        64,
        300,
        1e-4,
        lambda e: 0.1 * 0.1 ** ((e >= 150) + (e >= 225)),
    ),
    "cifar100/x_densenetbc_70_60+paper": (
        64,
        300,
        1e-4,
        lambda e: 0.1 * 0.1 ** ((e >= 150) + (e >= 225)),
    ),
    "imagenet/x_resnet50+paper": (128, 90, 1e-4, lambda e: 0.1 * 0.1 ** (e // 30)),
    "imagenet/x_densenet121+paper": (128, 90, 1e-4, lambda e: 0.1 * 0.1 ** (e // 30)),
    "imagenet/x_mobilenet050_c2+paper": (
        256,
        150,
        4e-5,
        lambda e: max(0.1 * 0.3162 ** (e // 15), 5e-5),
    ),
}


@pytest.mark.parametrize("name", AUTHORS)
def test_the_authors_settings(name):
    batch, epochs, decay, wanted = AUTHORS[name]
    config = parsed(name).config
    hp, data, steps = config.model, config.data.init_args, SIZES[name.partition("/")[0]][1] // batch
    assert (data.batch_size, config.trainer.max_epochs, hp.weight_decay) == (batch, epochs, decay)
    assert (hp.label_smoothing, hp.mixup, hp.cutmix, hp.decay_all, config.ema) == (
        0,
        0,
        0,
        True,
        None,
    )
    assert hp.optimizer == ("momentum" if "mobilenet" in name else "sgd")
    fall = {
        "schedule": hp.schedule,
        "milestones": hp.milestones,
        "gamma": hp.gamma,
        "floor": hp.floor,
    }
    for epoch in range(epochs):
        for step in (0, steps - 1):  # the first and the last of each epoch
            found = hp.lr * rate((epoch * steps + step) / (epochs * steps), hp.warmup, **fall)
            assert found == pytest.approx(wanted(epoch), rel=1e-9), f"epoch {epoch}, step {step}"


# ---- where they run


@pytest.mark.parametrize("name", HARDWARE)
@pytest.mark.parametrize("folder", SIZES)
def test_hardware_goes_with_every_data_set(folder, name):
    recipe = {"cifar10": "x_vgg16", "cifar100": "x_vgg16_2"}.get(folder, "x_resnet50")
    alone = parsed(f"{folder}/{recipe}")
    cli = reparsed(f"{folder}/{recipe}", "--config", f"{recipes.HARDWARE}/{name}")
    gpu = name != "cpu"
    assert cli.config.data.class_path == alone.config.data.class_path
    assert cli.config.model.channels_last is cli.config.data.init_args.channels_last is gpu
    assert cli.config.trainer.accelerator == ("gpu" if gpu else "cpu")
    batch, devices = (
        cli.config.data.init_args.batch_size,
        cli.config.trainer.devices * cli.config.trainer.num_nodes,
    )
    assert batch == alone.config.data.init_args.batch_size and batch % devices == 0
    assert bool(cli.config.trainer.sync_batchnorm) == (devices > 1)
    assert cli.sha == alone.sha and cli.name == alone.name  # it is the same recipe


def test_slurm_starts_a_task_for_each_gpu():
    text = (FOLDER / "hardware" / "slurm2x8.sbatch").read_text(encoding="utf-8")
    trainer = parse("cifar10/x_vgg16", "--config", "hardware/slurm2x8").config.trainer
    for option, value in (("nodes", trainer.num_nodes), ("ntasks-per-node", trainer.devices)):
        assert f"#SBATCH --{option}={value}\n" in text
    assert "--config hardware/slurm2x8 " in text
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


# ---- finding and copying


def test_the_folder_of_a_checkout_and_of_a_wheel():
    assert recipes.folder() == FOLDER and {
        f"{recipes.HARDWARE}/{name}" for name in HARDWARE
    } == set(recipes.hardware())
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"][
        "targets"
    ]["wheel"]
    assert {"xzoo", "recipes"} <= set(wheel["only-include"]) and wheel["sources"][
        "recipes"
    ] == "xzoo/recipes"


def test_a_recipe_is_found_by_name_and_by_path(tmp_path):
    (tmp_path / "mine.yaml").write_text("# Mine\nmodel: {lr: 1}\n")
    recipe = recipes.find(str(tmp_path / "mine.yaml"))
    assert (recipe.name, recipe.run) == ("mine", "mine")
    assert recipe.layers == (
        recipes.Settings(tmp_path / "mine.yaml", {"model": {"lr": 1}}, "Mine"),
    )
    for name in ("cifar10/x_vgg16_2", "cifar10/x_vgg16_2.yaml", "recipes/cifar10/x_vgg16_2.yaml"):
        assert recipes.find(name) == recipes.compose("cifar10/x_vgg16_2")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("quux", "there is no recipe quux; `xzoo recipes` lists them"),
        (
            "cifar10/x_vgg_2",
            "there is no recipe cifar10/x_vgg_2; did you mean cifar10/x_vgg16_2 or ",
        ),
        (
            "cifr10/x_vgg16_2",
            "there is no recipe cifr10/x_vgg16_2; did you mean cifar10/x_vgg16_2 or ",
        ),
        ("cifar10/x_resnet50", "there is no recipe cifar10/x_resnet50; "),
        (
            "cifar10/x_vgg16_3+air",
            "there is no recipe cifar10/x_vgg16_3+air; did you mean cifar10/x_vgg16",
        ),
        (
            "cifar10/x_vgg16_2+gruop",
            "x_vgg16_2+gruop: no setting is called gruop; did you mean group?",
        ),
        (
            "cifar10/x_vgg16_2+",
            "cifar10/x_vgg16_2+: no setting is called ; there are dense, group, random, shuffle, "
            "air",
        ),
        (
            "cifar10/x_vgg16_2+air+short",
            "x_vgg16_2+air+short: air and short both set the training; take one",
        ),
        (
            "cifar10/x_vgg16_2+group+dense",
            "x_vgg16_2+group+dense: group and dense both set the graph; take one",
        ),
        (
            "cifar10/x_air94+short",
            "cifar10/x_air94+short: air and short both set the training; take one",
        ),
        (
            "cifar10/x_vgg16_c8+paper",
            "c8+paper: paper is not for cifar10/x_vgg16_c8; there are dense, group, random,",
        ),
        (
            "cifar10/x_vgg16_c8_paper",
            "c8_paper: paper is not for cifar10/x_vgg16_c8; there are dense, group, random,",
        ),
        (
            "hardware/gpu2",
            "there is no recipe hardware/gpu2; did you mean hardware/gpu8 or hardware/gpu1",
        ),
    ],
)
def test_what_is_not_of_the_product_is_told(name, told):
    with pytest.raises(XzooError) as caught:
        recipes.find(name)
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_a_setting_may_be_asked_for_that_is_always_there():
    assert recipes.find("cifar10/x_air94+air") == recipes.find("cifar10/x_air94")
    assert recipes.find("cifar10/x_air94+air+random").name == "cifar10/x_air94+random"
    assert recipes.find("cifar10/x_vgg16_2+air+air").name == "cifar10/x_vgg16_2+air"
    assert (
        content("cifar10/x_air94")["model"]["lookahead"]
        == content("cifar10/x_vgg16_2+air")["model"]["lookahead"]
    )


def test_a_copy_does_the_same_and_changes_alone(tmp_path):
    name = "cifar10/x_vgg16_2+dense+paper"
    (copied,) = recipes.copy(name, tmp_path / "mine")
    assert copied == tmp_path / "mine" / "x_vgg16_2+dense+paper.yaml"
    heads = ("cifar10", "dense", "paper")
    parts = recipes.data_sets() | recipes.settings()
    assert recipes.head(copied).splitlines() == [
        line for part in heads for line in parts[part].notes.splitlines()
    ]
    assert parse(str(copied)).plain() == parsed(name).plain()
    assert recipes.copy(name, tmp_path / "mine") == [copied]  # the same again is no harm
    copied.write_text(copied.read_text().replace("max_epochs: 300", "max_epochs: 9"))
    assert parse(str(copied)).config.trainer.max_epochs == 9
    with pytest.raises(
        XzooError, match=r"paper.yaml exists and is another file; choose another folder"
    ):
        recipes.copy(name, tmp_path / "mine")
    # A file goes with those it is based on.
    (tmp_path / "base.yaml").write_text(
        "base: cifar10/x_vgg16_2+air\n# An odd one\ntrainer: {max_epochs: 2}\n"
    )
    (tmp_path / "own.yaml").write_text("base: base.yaml\nmodel: {lr: 0.5}\n")
    files = recipes.copy(str(tmp_path / "own.yaml"), tmp_path / "there")
    assert [file.name for file in files] == ["base.yaml", "own.yaml"]
    assert all(file.read_bytes() == (tmp_path / file.name).read_bytes() for file in files)


def test_a_base_is_a_file_or_a_name(tmp_path):
    (tmp_path / "base.yaml").write_text("base: cifar10/x_vgg16_2+air\ntrainer: {max_epochs: 2}\n")
    (tmp_path / "own.yaml").write_text("base: base.yaml\nmodel: {lr_base: 0.5}\n")
    own = parse(str(tmp_path / "own.yaml"))
    assert (
        own.sha
        == parse("cifar10/x_vgg16_2+air", "--trainer.max_epochs=2", "--model.lr_base=0.5").sha
    )
    assert own.name == "own" and own.run_folder == Path("runs/own")
    # As copies of old recipes say it; a file goes before a recipe.
    (tmp_path / "derived.yaml").write_text("base: x_vgg16_2.yaml\nmodel: {compression: 1}\n")
    (tmp_path / "x_vgg16_2.yaml").write_text("base: recipes/cifar10/x_vgg16_2.yaml\n")
    assert parse(str(tmp_path / "derived.yaml")).sha == parsed("cifar10/x_vgg16_2+dense").sha


def test_bases_that_are_missing_or_go_in_a_circle(tmp_path):
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text("base: two.yaml\nema: null\n")
    with pytest.raises(
        XzooError,
        match=r"one.yaml: its base two.yaml is not beside it; there is no recipe two.yaml",
    ):
        recipes.find(str(one))
    two.write_text("base: one.yaml\nema: null\n")
    with pytest.raises(XzooError, match=r"two.yaml: its base one.yaml is based on it in turn"):
        recipes.find(str(one))
    two.write_text("- a list\n")
    with pytest.raises(XzooError, match=r"two.yaml is not a recipe"):
        recipes.find(str(one))
    two.write_text("a: [1\n")
    with pytest.raises(XzooError, match=r"two.yaml cannot be read as YAML"):
        recipes.find(str(one))


# ---- what is to be trained


def blocks() -> list[tuple[str, str]]:
    """(the line of its cost, the shell) of each block of the queue."""
    return re.findall(
        r"^(COST|\d[^\n]*MACs)\n```bash\n(.*?)```",
        QUEUE.read_text(encoding="utf-8"),
        re.DOTALL | re.M,
    )


def commands(block: str) -> list[tuple[str, ...]]:
    """The arguments of every `xzoo fit` that the block starts."""
    return queue.expand(
        block, {name: f"/data/{name}" for name in ("CIFAR10", "CIFAR100", "TINY", "IMAGENET")}
    )


def cost(block: str) -> str:
    asked = commands(block)
    total = sum(queue.train_macs(arguments)[0] for arguments in asked)
    return f"{len(asked)} runs, {total:.1e} MACs"


def test_the_queue_can_be_run_as_it_stands():
    text = QUEUE.read_text(encoding="utf-8")
    assert len(blocks()) == text.count("\n## ") >= 5
    assert [shell for _, shell in queue.blocks(text)] == [shell for _, shell in blocks()]
    assert [number for number, _ in queue.blocks(text)] == re.findall(r"^## (\d+)", text, re.M)
    for line, block in blocks():
        asked = commands(block)
        outs = [arguments[arguments.index("--out") + 1] for arguments in asked]
        assert len(set(outs)) == len(outs), "two runs in one folder"
        for arguments in asked:
            assert recipes.compose(arguments[0]).name == arguments[0], (
                "a name of today, in its usual order"
            )
            options = dict(zip(arguments[1::2], arguments[2::2], strict=True))
            assert (
                options["--results"] == "recipes/results.csv"
                and options["--seed_everything"].isdigit()
            )
            assert options["--data.root"].startswith("/data/") and options["--out"].startswith(
                "runs/"
            )
        assert cost(block) == line  # which parses them


# ---- two steps of each


def with_random_images(cli: RecipeCLI, data: pl.LightningDataModule) -> pl.LightningDataModule:
    """Eight images of the right shape in place of the data set's."""
    if isinstance(data, InMemory):
        side = min(data.sides[0], data.img_size)
        images = torch.randint(0, 256, (8, 3, side, side), dtype=torch.uint8)
        part = images, torch.arange(8)
        data._parts = {"train": part, "val": part, "test": part}
        data._augment, data._side = Augment(side, data.img_size, **data._knobs), data.sides[0]
        return data
    items = []
    for label in range(8):
        file = io.BytesIO()
        Image.fromarray(
            np.random.default_rng(label).integers(0, 256, (240, 260, 3), np.uint8)
        ).save(file, "PNG")
        items.append(Item(f"{label}.png", label, file.getvalue()))
    part = Stored(items), torch.arange(8)
    data._contents = Contents([str(i) for i in range(data.num_classes)], part, part)
    return data


def train_two_steps(name: str) -> None:
    # Batches of two at 224 px and four below: what is learnt does not matter here.
    few = "2" if size_of(parsed(name)) == 224 else "4"
    more = ["--data.workers", "0"] if name.startswith("imagenet/") else []
    cli = parse(name, "--data.batch_size", few, "--data.eval_batch_size", few, *more)
    average = [EMA(cli.config.ema)] if cli.config.ema else []
    limits = {
        "limit_train_batches": 2,
        "limit_val_batches": 2,
        "max_epochs": 1,
        "log_every_n_steps": 1,
    }
    off = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
    with quiet():
        trainer, task, data = cli.build(callbacks=average, **limits, **off)
        trainer.fit(task, datamodule=with_random_images(cli, data))
    assert (
        trainer.global_step == 2 and task.hparams["num_classes"] == SIZES[name.partition("/")[0]][0]
    )
    found = {key: float(value) for key, value in trainer.callback_metrics.items()}
    assert {"train/loss", "val/loss", "val/acc1", "val/acc5"} <= set(found)
    assert all(math.isfinite(value) for value in found.values())


@pytest.mark.parametrize("name", sorted(QUICK))
def test_two_steps_of_each_family(name):
    train_two_steps(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({recipes.compose(name).name for name in OLD} - QUICK))
def test_two_steps_of_all_others(name):
    train_two_steps(name)


def rewrite() -> None:
    text = QUEUE.read_text(encoding="utf-8")
    for line, block in blocks():
        text = text.replace(f"{line}\n```bash\n{block}", f"{cost(block)}\n```bash\n{block}")
    QUEUE.write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    "row", read(FOLDER / "results.csv"), ids=lambda row: f"{row.recipe}-{row.seed}"
)
def test_a_result_is_of_the_recipe_that_it_names(row):
    """A recipe that has results does not change any more: what is better is another setting."""
    given = {"model.graph": row.graph, "model.compression": row.compression}
    given |= {"model.share": row.share, "model.spatial_share": row.spatial_share}
    if row.split == "holdout":
        given["data.holdout"] = row.n_val
    given = {key: value for key, value in given.items() if value is not None}
    # What is not the recipe's own was an override, so every choice of them is tried.
    choices = itertools.product(*[((), (f"--{key}={value}",)) for key, value in given.items()])
    asked = shlex.split(row.recipe)
    assert any(
        reparsed(*asked, *itertools.chain(*choice)).sha == row.recipe_sha for choice in choices
    )


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (
            "data: {class_path: evil.Images}",
            r"class_path is 'evil\.Images', code of others; add --trust",
        ),
        ("data: evil.Images", "data is 'evil.Images', not written out; add --trust"),
        ("data: data.yaml", "data is 'data.yaml', not written out; add --trust"),
        ("trainer: {callbacks: [evil.Callback]}", r"callbacks is 'evil\.Callback', code of others"),
        (
            "trainer: {callbacks: [{class_path: pytorch_lightning.callbacks.LambdaCallback, "
            "init_args: {on_fit_start: os.system}}]}",
            r"on_fit_start is 'os\.system', code of others",
        ),
    ],
)
def test_a_recipe_of_others_runs_no_code_of_others(text, match, tmp_path, monkeypatch):
    """Nothing is imported that it names: not even to look at it."""
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "base.yaml").write_text(text)
    (tmp_path / "recipe.yaml").write_text("base: base.yaml\nmodel: {name: x_vgg16_2.tag}")
    with pytest.raises(XzooError, match=match):
        RecipeCLI(["--config", str(tmp_path / "recipe.yaml")])
    if "evil" in text:
        with pytest.raises((SystemExit, XzooError), match="imported|evil"):
            RecipeCLI(["--config", str(tmp_path / "recipe.yaml"), "--trust"])


def test_xzoos_own_recipes_need_no_trust():
    for name in (*NAMES, *recipes.hardware()):
        recipes.check_trusted(recipes.find(name))


if __name__ == "__main__":
    rewrite()
    sys.exit(0)
