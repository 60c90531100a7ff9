"""Recipes: each says what it trains and how it differs, is read by the parser of `xzoo fit`, and trains.

`python tests/test_recipes.py` writes the counts in the recipes and the costs in recipes/QUEUE.md anew.
"""

import functools
import io
import itertools
import math
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import yaml
from PIL import Image

import xzoo
from xzoo.data.augment import Augment
from xzoo.data.imagenet import Contents, Stored
from xzoo.data.memory import InMemory
from xzoo.data.sources import Item
from xzoo.errors import XzooError
from xzoo.results.runs import read
from xzoo.train import queue, recipes
from xzoo.train.callbacks import EMA
from xzoo.train.parse import RecipeCLI
from xzoo.train.queue import counts, size_of
from xzoo.train.run import quiet
from xzoo.train.task import rate

ROOT = Path(xzoo.__file__).parents[1]
FOLDER = ROOT / "recipes"
QUEUE = FOLDER / "QUEUE.md"
NAMES = [name for name in recipes.names() if not name.startswith(recipes.HARDWARE)]
BASES = sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("base*.yaml"))
HARDWARE = ("cpu", "gpu1", "gpu8", "slurm2x8")
# Classes and training images.
SIZES = {"cifar10": (10, 50_000), "cifar100": (100, 50_000), "tiny_imagenet": (200, 100_000)}
SIZES |= {"imagenet": (1000, 1_281_167)}
TITLES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "tiny_imagenet": "Tiny-ImageNet", "imagenet": "ImageNet-1k"}
RIVALS = {
    "dense": {"compression": 1},
    "group": {"graph": "group"},
    "shuffle": {"graph": "shuffle"},
    "random": {"graph": "random"},
}
# A network of each family, each data set, each sort of base; the others train in the slow tests.
QUICK = {
    *("cifar10/x_vgg16_c16_fast", "cifar10/x_vgg16_2_paper", "cifar100/x_densenetbc_40_24_dense"),
    *("tiny_imagenet/x_alexnet_1", "tiny_imagenet/x_resnet18", "tiny_imagenet/x_vgg16_c16"),
    *("imagenet/x_mobilenet050_c16_group_paper", "tiny_imagenet/x_densenet121"),
}


def parse(*arguments: str) -> RecipeCLI:
    with quiet():
        return RecipeCLI(arguments)


@functools.cache
def parsed(name: str) -> RecipeCLI:
    return parse("--config", name)


def own(name: str) -> dict[str, Any]:
    """What the recipe's own file says."""
    return yaml.safe_load(recipes.find(name).read_text(encoding="utf-8"))


def counted_line(name: str) -> str:
    size = size_of(parsed(name))
    found = counts(parsed(name), size)
    return f"# Model: {found.weights:,} weights, {found.macs:,} MACs at {size} px"


# ---- what a recipe says of itself


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_opens_with_what_it_is(name):
    lines = recipes.find(name).read_text(encoding="utf-8").splitlines()
    head = [line for line in lines if line.startswith("#")]
    assert head == lines[: len(head)] and max(map(len, lines)) <= 120
    title, folder = recipes.title(recipes.find(name)), name.partition("/")[0]
    assert f", {TITLES[folder]}, " in title and f" {size_of(parsed(name))} px" in title
    assert ("by the authors' settings" in title) == name.endswith("_paper")
    for label in ("Source: ", "Differs from ", "Results: recipes/results.csv"):
        assert sum(line.startswith(f"# {label}") for line in head) == 1
    assert [line for line in head if line.startswith("# Model: ")] == [counted_line(name)]
    command = f"# Run: xzoo fit --config {name} "
    assert sum(line.startswith(command) for line in head) == 1 and head[-1].startswith(command)


def test_no_two_recipes_have_one_title():
    titles = [recipes.title(recipes.find(name)) for name in recipes.names()]
    assert len(set(titles)) == len(titles) and all(titles)


@pytest.mark.parametrize("name", BASES)
def test_a_base_opens_with_its_source(name):
    text = (FOLDER / name).read_text(encoding="utf-8")
    assert text.startswith("# ") and "\n# Source: " in text
    assert not name.endswith("/base.yaml") or set(yaml.safe_load(text)) == {
        *("seed_everything", "model", "data", "trainer", "ema")
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_read_as_what_it_says(name):
    config, folder = parsed(name).config, name.partition("/")[0]
    data = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "tiny_imagenet": "TinyImageNet", "imagenet": "ImageNet"}
    assert config.data.class_path.rpartition(".")[2] == data[folder] and parsed(name).name == name
    assert recipes.chain(recipes.find(name))[0] == FOLDER / folder / "base.yaml"
    # Neither resumes where it was; and where a recipe runs is said by the files in hardware/.
    trainer = config.trainer
    assert trainer.max_steps == -1 and trainer.max_time is None and trainer.max_epochs >= 1
    assert trainer.devices == 1 and trainer.precision is None and trainer.accelerator == "auto"
    assert name.rpartition("/")[2].startswith(config.model.name.partition("_c")[0])
    unknown = set(own(name)) - {"base", "model", "data", "trainer", "ema"}
    assert not unknown, "what all recipes of a data set share stands in its base"


@pytest.mark.parametrize("name", NAMES)
def test_the_average_looks_back_over_a_part_of_the_run(name):
    config, images = parsed(name).config, SIZES[name.partition("/")[0]][1]
    if config.ema is None:
        assert name.endswith("_paper") or config.model.lookahead
        return
    steps = images // config.data.init_args.batch_size * config.trainer.max_epochs
    # More in a run of few steps, whose average is noisy otherwise.
    assert 0.05 <= 1 / (1 - config.ema) / steps <= (0.13 if name.endswith("_fast") else 0.1)


@pytest.mark.parametrize("name", NAMES)
def test_a_rival_differs_in_one_thing(name):
    folder, _, stem = name.partition("/")
    form = next((form for form in ("_paper", "_short") if stem.endswith(form)), "")
    of, _, kind = stem.removesuffix(form).rpartition("_")
    if kind not in RIVALS:
        assert parsed(name).config.model.graph is None and parsed(name).config.model.compression is None
        return
    mine = own(name)
    # The dense twin of the four MobileNets is one network.
    of = "x_mobilenet050_c2" if of == "x_mobilenet050" else of
    assert mine == {"base": f"{of}{form}.yaml", "model": RIVALS[kind]}
    assert "base" in own(f"{folder}/{of}{form}")
    if kind != "dense":
        rival, x = (counts(parsed(n), size_of(parsed(n))) for n in (name, f"{folder}/{of}{form}"))
        assert (rival.weights, rival.macs) == (x.weights, x.macs)


def test_every_architecture_has_its_recipes():
    lacking = []
    lacking += [f"cifar10/{model}" for model in xzoo.list_models("x_air*") if f"cifar10/{model}" not in NAMES]
    # X-Air is made for small images.
    for model in set(xzoo.list_models("x_*")) - {"x_timm", *xzoo.list_models("x_air*")}:
        if "vgg16" in model:
            homes = {"cifar10"}
        elif "densenetbc" in model:
            homes = {"cifar10", "cifar100"} if "_40_" in model else {"cifar100"}
        else:
            homes = {"imagenet"}
        lacking += [f"{home}/{model}" for home in sorted(homes | {"tiny_imagenet"}) if f"{home}/{model}" not in NAMES]
        x = parsed(f"tiny_imagenet/{model}").config
        assert x.model.name == model and x.model.compression is None and x.model.graph is None
    assert not lacking


def test_mobilenets_rivals_are_all_there():
    rivals = {f"x_mobilenet050_c{c}_group{form}" for c in (2, 4, 8, 16) for form in ("", "_paper")}
    assert {f"imagenet/{name}" for name in rivals} <= set(NAMES)
    rivals = {f"x_mobilenet050_c{c}_{kind}" for c in (2, 4, 8, 16) for kind in ("group", "shuffle", "random")}
    assert {f"tiny_imagenet/{name}" for name in rivals} <= set(NAMES)


# What the authors' logs print: (batch, epochs, decay, rate in an epoch).
AUTHORS = {
    "cifar10/x_vgg16_paper": (128, 300, 5e-4, lambda e: max(0.05 * 0.5 ** (e // 30), 5e-4)),
    "cifar10/x_densenetbc_40_24_paper": (64, 300, 1e-4, lambda e: 0.1 * 0.1 ** ((e >= 150) + (e >= 225))),
    "cifar100/x_densenetbc_70_60_paper": (64, 300, 1e-4, lambda e: 0.1 * 0.1 ** ((e >= 150) + (e >= 225))),
    "imagenet/x_resnet50_paper": (128, 90, 1e-4, lambda e: 0.1 * 0.1 ** (e // 30)),
    "imagenet/x_densenet121_paper": (128, 90, 1e-4, lambda e: 0.1 * 0.1 ** (e // 30)),
    "imagenet/x_mobilenet050_c2_paper": (256, 150, 4e-5, lambda e: max(0.1 * 0.3162 ** (e // 15), 5e-5)),
}


@pytest.mark.parametrize("name", AUTHORS)
def test_the_authors_settings(name):
    batch, epochs, decay, wanted = AUTHORS[name]
    config = parsed(name).config
    hp, data, steps = config.model, config.data.init_args, SIZES[name.partition("/")[0]][1] // batch
    assert (data.batch_size, config.trainer.max_epochs, hp.weight_decay) == (batch, epochs, decay)
    assert (hp.label_smoothing, hp.mixup, hp.cutmix, hp.decay_all, config.ema) == (0, 0, 0, True, None)
    assert hp.optimizer == ("momentum" if "mobilenet" in name else "sgd")
    fall = {"schedule": hp.schedule, "milestones": hp.milestones, "gamma": hp.gamma, "floor": hp.floor}
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
    cli = parse("--config", f"{folder}/{recipe}", "--config", f"{recipes.HARDWARE}/{name}")
    gpu = name != "cpu"
    assert cli.config.data.class_path == alone.config.data.class_path
    assert cli.config.model.channels_last is cli.config.data.init_args.channels_last is gpu
    assert cli.config.trainer.accelerator == ("gpu" if gpu else "cpu")
    batch, devices = cli.config.data.init_args.batch_size, cli.config.trainer.devices * cli.config.trainer.num_nodes
    assert batch == alone.config.data.init_args.batch_size and batch % devices == 0
    assert bool(cli.config.trainer.sync_batchnorm) == (devices > 1)
    assert cli.sha == alone.sha and cli.name == alone.name  # it is the same recipe


def test_slurm_starts_a_task_for_each_gpu():
    text = (FOLDER / "hardware" / "slurm2x8.sbatch").read_text(encoding="utf-8")
    trainer = parse("--config", "cifar10/x_vgg16", "--config", "hardware/slurm2x8").config.trainer
    for option, value in (("nodes", trainer.num_nodes), ("ntasks-per-node", trainer.devices)):
        assert f"#SBATCH --{option}={value}\n" in text
    assert "--config hardware/slurm2x8 " in text
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


# ---- finding and copying


def test_the_folder_of_a_checkout_and_of_a_wheel():
    assert recipes.folder() == FOLDER and {f"{recipes.HARDWARE}/{name}" for name in HARDWARE} <= set(recipes.names())
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert {"xzoo", "recipes"} <= set(wheel["only-include"]) and wheel["sources"]["recipes"] == "xzoo/recipes"


def test_a_recipe_is_found_by_name_and_by_path(monkeypatch):
    monkeypatch.chdir(ROOT)
    wanted = FOLDER / "cifar10" / "x_vgg16_2.yaml"
    for name in ("cifar10/x_vgg16_2", "cifar10/x_vgg16_2.yaml", "recipes/cifar10/x_vgg16_2.yaml", str(wanted)):
        assert recipes.find(name).resolve() == wanted
    with pytest.raises(XzooError, match=r"no recipe cifar10/x_vgg_2; did you mean .*cifar10/x_vgg16_2"):
        recipes.find("cifar10/x_vgg_2")
    with pytest.raises(XzooError, match="no recipe quux; `xzoo recipes` lists them"):
        recipes.find("quux")


def test_a_copy_does_the_same_and_changes_alone(tmp_path):
    name = "cifar10/x_vgg16_2_dense_paper"
    copied = recipes.copy(name, tmp_path / "mine")
    stems = [path.stem for path in copied]
    assert stems == ["base", "base_vgg_paper", "x_vgg16_2_paper", "x_vgg16_2_dense_paper"]
    assert parse("--config", str(copied[-1])).plain() == parsed(name).plain()
    assert recipes.copy(name, tmp_path / "mine") == copied  # the same again is no harm
    copied[0].write_text(copied[0].read_text().replace("max_epochs: 60", "max_epochs: 9"))
    with pytest.raises(XzooError, match=r"base.yaml exists and is another file; choose another folder"):
        recipes.copy(name, tmp_path / "mine")
    with pytest.raises(XzooError, match="choose another folder"):
        recipes.copy(name, FOLDER / "cifar10")
    assert parse("--config", str(copied[-1])).config.trainer.max_epochs == 300


def test_bases_that_are_missing_or_go_in_a_circle(tmp_path):
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text("base: two.yaml\nema: null\n")
    with pytest.raises(XzooError, match=r"one.yaml: its base two.yaml is not beside it; copy it too"):
        recipes.chain(one)
    two.write_text("base: one.yaml\nema: null\n")
    with pytest.raises(XzooError, match=r"its base one.yaml is based on it in turn"):
        recipes.chain(one)
    two.write_text("- a list\n")
    with pytest.raises(XzooError, match=r"two.yaml is no recipe"):
        recipes.chain(one)
    two.write_text("a: [1\n")
    with pytest.raises(XzooError, match=r"two.yaml cannot be read as YAML"):
        recipes.chain(one)


# ---- what is to be trained


def blocks() -> list[tuple[str, str]]:
    """(the line of its cost, the shell) of each block of the queue."""
    return re.findall(r"^(COST|\d[^\n]*MACs)\n```bash\n(.*?)```", QUEUE.read_text(encoding="utf-8"), re.DOTALL | re.M)


def commands(block: str) -> list[tuple[str, ...]]:
    """The arguments of every `xzoo fit` that the block starts."""
    return queue.expand(block, {name: f"/data/{name}" for name in ("CIFAR10", "CIFAR100", "TINY", "IMAGENET")})


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
            options = dict(zip(arguments[::2], arguments[1::2], strict=True))
            assert options["--results"] == "recipes/results.csv" and options["--seed_everything"].isdigit()
            assert options["--data.root"].startswith("/data/") and options["--out"].startswith("runs/")
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
        Image.fromarray(np.random.default_rng(label).integers(0, 256, (240, 260, 3), np.uint8)).save(file, "PNG")
        items.append(Item(f"{label}.png", label, file.getvalue()))
    part = Stored(items), torch.arange(8)
    data._contents = Contents([str(i) for i in range(data.num_classes)], part, part)
    return data


def train_two_steps(name: str) -> None:
    # Batches of two at 224 px and four below: what is learnt does not matter here.
    few = "2" if size_of(parsed(name)) == 224 else "4"
    more = ["--data.workers", "0"] if name.startswith("imagenet/") else []
    cli = parse("--config", name, "--data.batch_size", few, "--data.eval_batch_size", few, *more)
    average = [EMA(cli.config.ema)] if cli.config.ema else []
    limits = {"limit_train_batches": 2, "limit_val_batches": 2, "max_epochs": 1, "log_every_n_steps": 1}
    off = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
    with quiet():
        trainer, task, data = cli.build(callbacks=average, **limits, **off)
        trainer.fit(task, datamodule=with_random_images(cli, data))
    assert trainer.global_step == 2 and task.hparams["num_classes"] == SIZES[name.partition("/")[0]][0]
    found = {key: float(value) for key, value in trainer.callback_metrics.items()}
    assert {"train/loss", "val/loss", "val/acc1", "val/acc5"} <= set(found)
    assert all(math.isfinite(value) for value in found.values())


@pytest.mark.parametrize("name", sorted(QUICK))
def test_two_steps_of_each_family(name):
    train_two_steps(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(NAMES) - QUICK))
def test_two_steps_of_all_others(name):
    train_two_steps(name)


def rewrite() -> None:
    for name in NAMES:
        path = recipes.find(name)
        text = path.read_text(encoding="utf-8")
        path.write_text(re.sub(r"^# Model: .*$", counted_line(name), text, flags=re.M), encoding="utf-8")
    text = QUEUE.read_text(encoding="utf-8")
    for line, block in blocks():
        text = text.replace(f"{line}\n```bash\n{block}", f"{cost(block)}\n```bash\n{block}")
    QUEUE.write_text(text, encoding="utf-8")


@pytest.mark.parametrize("row", read(FOLDER / "results.csv"), ids=lambda row: f"{row.recipe}-{row.seed}")
def test_a_result_is_of_the_recipe_that_it_names(row):
    """A recipe that has results does not change any more: what is better is another file."""
    given = {"model.graph": row.graph, "model.compression": row.compression}
    given |= {"model.share": row.share, "model.spatial_share": row.spatial_share}
    if row.split == "holdout":
        given["data.holdout"] = row.n_val
    given = {key: value for key, value in given.items() if value is not None}
    # What is not the recipe's own was an override, so every choice of them is tried.
    choices = itertools.product(*[((), (f"--{key}={value}",)) for key, value in given.items()])
    shas = {parse("--config", row.recipe, *itertools.chain(*choice)).sha for choice in choices}
    assert row.recipe_sha in shas


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("data: {class_path: evil.Images}", r"class_path is 'evil\.Images', code of others; add --trust"),
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
    for name in recipes.names():
        for file in recipes.chain(recipes.find(name)):
            recipes.check_trusted(file)


if __name__ == "__main__":
    rewrite()
    sys.exit(0)
