"""`xzoo fit`: a recipe from the command line to a finished run folder, interrupted, divided,
refused.
"""

import csv
import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from xzoo.cli import main
from xzoo.datasets import DATASETS
from xzoo.errors import XzooError
from xzoo.hub import check
from xzoo.results.runs import COLUMNS, read, recipe_sha
from xzoo.train.evaluate import evaluate, predict
from xzoo.train.fit import fit
from xzoo.train.outcome import commit
from xzoo.train.parse import RecipeCLI
from xzoo.train.run import AtomicCheckpointIO, read_metrics

RECIPE = """
# A tiny net on tiny data.
seed_everything: 0
model: {name: x_mobilenet050_c4, optimizer: sgd, lr: 0.05, weight_decay: 5.0e-4, warmup: 0.2}
data: {class_path: CIFAR10, init_args: {batch_size: 16, shift: 2}}
trainer: {max_epochs: 3, accelerator: cpu, devices: 1, log_every_n_steps: 1}
ema: 0.9
"""
FILES = {"config.yaml", "metrics.csv", "curves.png", "result.json", "checkpoints", "model"}


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE)
    return str(path)


@pytest.fixture
def data(tmp_path):
    """In CIFAR-10's form: 80 training images, and 31 to test on, a number that two ranks cannot
    share equally.
    """
    draw = np.random.default_rng(0)
    for part, each in (("train", 8), ("test", 3)):
        for label in range(10):
            folder = tmp_path / "data" / part / f"c{label}"
            folder.mkdir(parents=True)
            for i in range(each + (part == "test" and label == 0)):
                noise = draw.integers(-30, 30, (32, 32, 3))
                color = np.array([label * 25, 255 - label * 25, (label * 97) % 256])
                Image.fromarray(np.clip(color + noise, 0, 255).astype(np.uint8)).save(
                    folder / f"{i}.png"
                )
    return str(tmp_path / "data")


def arguments(recipe: str, data: str, run: Path, **more: object) -> list[str]:
    options = {"config": recipe, "data.root": data, "out": run} | {
        k.replace("__", "."): v for k, v in more.items()
    }
    return [part for key, value in options.items() for part in (f"--{key}", str(value))]


def steps_saved(run: Path) -> int:
    path = run / "checkpoints" / "last.ckpt"
    return (
        torch.load(path, map_location="meta", weights_only=True)["global_step"]
        if path.exists()
        else 0
    )


# ---- one run


def test_a_run_leaves_all_that_is_needed(recipe, data, tmp_path, capsys):
    run = tmp_path / "run"
    asked = arguments(recipe, data, run)
    result = fit(asked).facts
    assert {file.name for file in run.iterdir()} - {".lock"} == FILES
    assert json.loads((run / "result.json").read_text()) == result
    # The keys and columns of `xzoo finetune` (test_finetune.py).
    assert set(result) == {*COLUMNS, "loss"}
    columns = "step,epoch,train/loss,lr,val/loss,val/acc1,val/acc5"
    assert (run / "metrics.csv").read_text().splitlines()[0] == columns
    assert result["dataset"] is None  # a sample is not called cifar10
    assert result["n_val"] == 31 and result["epoch_reported"] == 3
    assert result["train_macs"] == 3 * result["macs"] * 80 * 3
    rows = read_metrics(run / "metrics.csv")
    assert [row["step"] for row in rows] == list(range(15)) and all(
        "train/loss" in row for row in rows
    )
    # The figure is the last epoch's average, and timm computes the same from the folder.
    assert [row["val/acc1"] for row in rows if "val/acc1" in row][-1] == pytest.approx(
        result["top1"] / 100, abs=1e-6
    )
    last = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["epoch"] == 2 and last["global_step"] == 15
    saved = load_file(run / "model" / "model.safetensors")
    assert all(
        torch.equal(value, last["state_dict"][f"net.{name}"]) for name, value in saved.items()
    )
    assert any(
        not torch.equal(v, last["current_model_state"][k]) for k, v in last["state_dict"].items()
    )
    assert timm.create_model(f"local-dir:{run / 'model'}", pretrained=True).num_classes == 10
    told = capsys.readouterr().err
    assert told.count("val accuracy") == 3 and f"{result['top1']:.2f} % of 31 val images" in told
    # The same again is told, another one refused; where it runs may change, what it computes may
    # not.
    assert fit(asked).facts == result and "is finished" in capsys.readouterr().err
    with pytest.raises(
        XzooError, match=r"holds another run: model.lr is 0.05 there and 0.1 here; .*--out"
    ):
        fit([*asked, "--model.lr", "0.1"])
    assert fit([*asked, "--trainer.strategy", "ddp", "--data.root", "/elsewhere"]).facts == result
    # Folders know the data modules by the names of xzoo.train, where they once were, whatever name
    # a recipe uses.
    assert "class_path: xzoo.train.CIFAR10\n" in (run / "config.yaml").read_text()
    assert fit([*asked, "--data", "xzoo.data.CIFAR10"]).facts == result
    assert RecipeCLI(["--config", str(run / "config.yaml")]).sha == result["recipe_sha"]


def test_the_folder_is_a_recipe_that_does_the_same(recipe, data, tmp_path):
    one = fit(arguments(recipe, data, tmp_path / "one", model__lr=0.03)).facts
    other = fit(
        ["--config", str(tmp_path / "one" / "config.yaml"), "--out", str(tmp_path / "other")]
    ).facts
    assert {k: v for k, v in one.items() if k not in ("wall_s", "recipe")} == {
        k: v for k, v in other.items() if k not in ("wall_s", "recipe")
    }


@pytest.mark.slow
def test_a_run_is_exported_in_half_precision_if_it_stays_as_good(
    recipe, data, tmp_path, capsys, monkeypatch
):
    run, to = tmp_path / "run", tmp_path / "x_mobilenet050_c4.tiny"
    result = fit(arguments(recipe, data, run, trainer__max_epochs=1)).facts
    assert main(["export", str(run), str(to), "--half"]) == 0
    check(to)
    kinds = {
        (value.dim() > 1, value.dtype) for value in load_file(to / "model.safetensors").values()
    }
    graphs = {(True, torch.uint8), (True, torch.int16)}
    assert kinds - graphs == {(True, torch.float16), (False, torch.float32), (False, torch.int64)}
    assert json.loads((to / "metrics.json").read_text())["top1"] == pytest.approx(result["top1"])
    kept = (to / "model.safetensors").read_bytes()
    monkeypatch.setattr("xzoo.hub.folder.HALF_MOVES", -1.0)
    assert main(["export", str(run), str(to), "--half"]) == 2
    assert "float16 moves the accuracy" in capsys.readouterr().err
    assert (to / "model.safetensors").read_bytes() == kept and {
        f.name for f in tmp_path.glob(".*.part")
    } == set()


def test_rivals_under_the_same_recipe(recipe, data, tmp_path):
    kinds = {"graph": "dense", "compression": 1}, {"graph": "group", "compression": 4}
    for wanted, override in zip(
        kinds, ({"model__compression": 1}, {"model__graph": "group"}), strict=True
    ):
        result = fit(
            arguments(recipe, data, tmp_path / wanted["graph"], trainer__max_epochs=1, **override)
        ).facts
        assert {name: result[name] for name in wanted} == wanted


def test_the_result_becomes_a_row(recipe, data, tmp_path, monkeypatch):
    table = tmp_path / "results.csv"
    asked = arguments(
        recipe, data, tmp_path / "run", results=table, trainer__max_epochs=1, model__lr=0.002
    )
    # told before any training
    with pytest.raises(XzooError, match="table cannot take this run .*none of cifar10"):
        fit(asked)
    assert not table.exists() and not (tmp_path / "run" / "checkpoints").exists()
    tiny = {"cifar10": dataclasses.replace(DATASETS["cifar10"], n=31, train=80)}
    for module in ("results.runs", "train.outcome", "data.memory"):
        monkeypatch.setattr(f"xzoo.{module}.DATASETS", tiny)
    result = fit(asked).facts
    row = read(table)[0]
    assert row.top1 == result["top1"] and row.recipe_sha == RecipeCLI(asked).sha and row.ema


def test_a_row_names_a_clean_commit_while_other_runs_add_theirs(tmp_path, monkeypatch):
    def git(*asked: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        return subprocess.run(
            ["git", "-C", tmp_path, *who, *asked], capture_output=True, text=True, check=True
        ).stdout

    for name in ("recipes/results.csv", "recipes/base.yaml", "xzoo/train/fit.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1\n")
    monkeypatch.setattr(
        "xzoo.train.outcome.__file__", str(tmp_path / "xzoo" / "train" / "outcome.py")
    )
    assert commit() is None
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    head = git("rev-parse", "HEAD")[:12]
    assert commit() == head
    (tmp_path / "recipes" / "results.csv").write_text("1\n2\n")
    (tmp_path / "untracked").write_text("x")
    assert commit() == head
    (tmp_path / "recipes" / "base.yaml").write_text("2\n")
    assert commit() == f"{head}-dirty"


def test_images_of_ones_own(make_folder, tmp_path):
    """The DATA forms of finetune under a recipe; and no row of theirs in the table of results."""
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(RECIPE.replace("CIFAR10", "ImageFolder").replace("shift: 2", "img_size: 32"))
    photos = str(make_folder(("ant", "bee", "cow"), each=12))
    result = fit(arguments(str(recipe), photos, tmp_path / "run")).facts
    assert result["dataset"] is None and result["n_val"] == 6 and result["epoch_reported"] == 3
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert config["label_names"] == ["ant", "bee", "cow"] and config["pretrained_cfg"][
        "input_size"
    ] == [3, 32, 32]
    with pytest.raises(XzooError, match="the table cannot take this run"):
        fit(arguments(str(recipe), photos, tmp_path / "other", results=tmp_path / "results.csv"))


def test_the_hash_is_of_what_is_computed(recipe, tmp_path):
    def sha(*more: str) -> str:
        return RecipeCLI(["--config", recipe, *more]).sha

    same = sha()
    for more in (
        ("--seed_everything", "5", "--model.graph_seed", "3"),
        ("--trainer.devices", "4", "--trainer.strategy", "ddp"),
        ("--trainer.precision", "bf16-mixed", "--model.compile", "true", "--data.root", "x"),
        ("--out", "x"),
    ):
        assert sha(*more) == same
    assert (
        len(
            {
                same,
                sha("--model.lr", "0.2"),
                sha("--trainer.max_epochs", "4"),
                sha("--model.graph", "group"),
            }
        )
        == 4
    )
    # Written otherwise, with a base: the same.
    (tmp_path / "base.yaml").write_text(RECIPE)
    (tmp_path / "derived.yaml").write_text("base: base.yaml\nmodel: {lr: 0.05}\n")
    assert RecipeCLI(["--config", str(tmp_path / "derived.yaml")]).sha == same
    assert recipe_sha({}) != same


def test_later_configurations_win_key_by_key(recipe, tmp_path):
    (tmp_path / "hardware.yaml").write_text(
        "trainer: {precision: bf16-mixed}\ndata: {init_args: {channels_last: true}}\n"
    )
    cli = RecipeCLI(
        ["--config", recipe, "--config", str(tmp_path / "hardware.yaml"), "--model.lr=0.7"]
    )
    config = cli.plain()
    assert config["trainer"]["precision"] == "bf16-mixed" and config["trainer"]["max_epochs"] == 3
    own = config["data"]["init_args"]
    assert own["channels_last"] is True and own["batch_size"] == 16 and config["model"]["lr"] == 0.7
    assert cli.config.data.init_args.seed == cli.config.model.seed == 0
    assert cli.recipe is not None and cli.recipe.layers[0].path == Path(
        recipe
    )  # the first one says what is trained


@pytest.mark.slow
def test_a_batch_in_two_parts_is_one_batch(recipe, data, tmp_path):
    """Accumulated gradients: the same images in each step, at the same rate, and the same figure of
    the batch.
    """
    frozen = {"model__freeze_norm": True, "model__lr": 0.01}
    whole = fit(arguments(recipe, data, tmp_path / "whole", **frozen)).facts
    parts = {"data__batch_size": 8, "trainer__accumulate_grad_batches": 2}
    halves = fit(arguments(recipe, data, tmp_path / "halves", **frozen, **parts)).facts
    assert (
        halves["global_batch"] == whole["global_batch"] == 16
        and halves["train_macs"] == whole["train_macs"]
    )
    assert halves["loss"] == pytest.approx(whole["loss"], rel=1e-4)
    rates = [
        {row["step"]: row["lr"] for row in read_metrics(tmp_path / run / "metrics.csv")}
        for run in ("whole", "halves")
    ]
    assert rates[0] == pytest.approx(rates[1]) and len(rates[0]) == 15


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        {"trainer__precision": "bf16-mixed", "trainer__gradient_clip_val": 1.0},
        {"model__channels_last": True, "data__channels_last": True},
        {
            "model__optimizer": "adamw",
            "model__mixup": 0.2,
            "model__cutmix": 1.0,
            "model__layer_decay": 0.9,
        },
    ],
    ids=lambda flags: "-".join(key.partition("__")[2] for key in flags),
)
def test_flags(recipe, data, tmp_path, flags):
    result = fit(arguments(recipe, data, tmp_path / "run", trainer__max_epochs=1, **flags)).facts
    assert result["epoch_reported"] == 1 and 0 < result["loss"] < 10
    assert result["precision"] == flags.get("trainer__precision", "32-true")


# ---- judged


def test_validate_test_and_predict_judge_the_run(recipe, data, tmp_path, capsys):
    run = tmp_path / "run"
    with pytest.raises(XzooError, match=r"no weights to judge: .*last.ckpt is not there"):
        evaluate("validate", arguments(recipe, data, run))
    result = fit(arguments(recipe, data, run)).facts
    capsys.readouterr()
    found = evaluate("validate", arguments(recipe, data, run))
    assert 100 * found["val/acc1"] == pytest.approx(result["top1"], abs=1e-4)
    assert found["val/loss"] == pytest.approx(result["loss"], abs=1e-4)
    assert f"{result['top1']:.2f} % of 31 images" in capsys.readouterr().out
    # Weights of elsewhere, as they are published; and the test part beside held out images.
    weights = run / "model" / "model.safetensors"
    tested = evaluate(
        "test", arguments(recipe, data, tmp_path / "no", ckpt_path=weights, data__holdout=20)
    )
    assert 100 * tested["test/acc1"] == pytest.approx(result["top1"], abs=1e-4)
    with open(predict(arguments(recipe, data, run)), newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 31 and [int(row["image"]) for row in rows] == list(range(31))
    right = sum(row["label"] == row["predicted"] for row in rows)
    assert 100 * right / 31 == pytest.approx(result["top1"], abs=1e-3)
    with pytest.raises(
        XzooError,
        match=r"of this recipe: net.blocks.1.0.conv_pw.neighbours: has shape.*\(12 such keys\)",
    ):
        evaluate("test", arguments(recipe, data, run, model__graph="group", model__compression=2))
    (tmp_path / "broken.ckpt").write_bytes(b"x" * 100)
    with pytest.raises(XzooError, match="broken.ckpt does not hold"):
        evaluate("test", arguments(recipe, data, run, ckpt_path=tmp_path / "broken.ckpt"))


# ---- refused


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--model.widht", "3"], "unknown option --model.widht; did you mean --model"),
        (["--data.rot", "x"], "CIFAR10 has no option rot; did you mean root"),
        (
            ["--trainer.max_epoch", "3"],
            "unknown option --trainer.max_epoch; did you mean --trainer.max_epochs",
        ),
        (["--model.lr", "fast"], "model.lr=fast: expected float"),
        (["--data.batch_size", "x"], "data.batch_size=x: expected int"),
        (["--data", "CIFAR11"], "no class is called CIFAR11; did you mean CIFAR10"),
        (["--model.schedule", "cosin"], "model.schedule=cosin: expected cosine or linear or step"),
        (["--model.name", "x_vgg17"], "unknown model 'x_vgg17'; did you mean"),
        (["--trainer.max_steps", "7"], "max_steps and max_time do not resume"),
        (["--trainer.max_epochs", "-1"], "max_epochs=-1: a recipe says how many"),
        (["--trainer.max_time", "00:00:10:00"], "max_steps and max_time do not resume"),
        (
            ["--trainer.overfit_batches", "2"],
            "trainer.overfit_batches=2: it takes the recipe's own order away; use",
        ),
        (
            ["--trainer.val_check_interval", "00:00:00:05"],
            "trainer.val_check_interval=00:00:00:05: by the clock, no two",
        ),
        (
            ["--trainer.num_sanity_val_steps", "2"],
            "trainer.num_sanity_val_steps=2: a resumed run has none",
        ),
        (
            ["--trainer.enable_checkpointing", "false"],
            "trainer.enable_checkpointing=False: a run is resumed from its",
        ),
        (
            ["--trainer.precision", "bf16-true"],
            "trainer.precision=bf16-true: weights, images and their average are",
        ),
        (
            ["--trainer.precision", "64"],
            "trainer.precision=64: weights, images and their average are",
        ),
        (["--trainer.barebones", "true"], "trainer.barebones=True: a run is nothing without"),
        (
            ["--trainer.limit_train_batches", "0"],
            "trainer.limit_train_batches=0 leaves none of an epoch's 5 steps",
        ),
        (
            ["--trainer.limit_train_batches", "0.1"],
            "limit_train_batches=0.1 leaves none of an epoch's 5 steps",
        ),
        (
            ["--trainer.limit_train_batches", "1.5"],
            "trainer: You have passed invalid value 1.5 for limit_train_batches",
        ),
        (
            ["--trainer.val_check_interval", "7"],
            "trainer.val_check_interval=7: an epoch has 5 steps",
        ),
        (
            ["--trainer.gradient_clip_algorithm", "x"],
            "trainer: `gradient_clip_algorithm` x is invalid",
        ),
        (["--trainer.devices", "0"], "trainer: "),
        (["--data.batch_size", "7", "--trainer.max_epochs", "0"], "max_epochs=0"),
        (["--data.root", "/nowhere/at/all"], "/nowhere/at/all does not exist"),
        (["--config", "cifar10/x_vgg16_3"], "there is no recipe cifar10/x_vgg16_3; "),
        (["--config"], "--config: a recipe is needed"),
        (["stray"], "unexpected argument stray"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(recipe, data, tmp_path, capsys, more, told):
    code = main(["fit", *arguments(recipe, data, tmp_path / "run"), *more])
    err = capsys.readouterr().err
    assert code == 2 and err.startswith("xzoo: error: ") and err.count("\n") == 1 and told in err
    assert not (tmp_path / "run").exists()


def test_without_a_recipe_it_says_where_they_are(capsys):
    assert main(["fit"]) == 2
    assert (
        "are required: model.name, data; `xzoo recipes` lists what goes after --config"
        in capsys.readouterr().err
    )


def test_unknown_keys_in_a_file_are_told(recipe, tmp_path, capsys):
    for text, told in (
        ("model: {wieght_decay: 3}", "model has no option wieght_decay; did you mean weight_decay"),
        ("modle: {lr: 3}", "unknown key modle"),
        (
            "data: {init_args: {batchsize: 3}}",
            "CIFAR10 has no option batchsize; did you mean batch_size",
        ),
        ("- 1", "is not a recipe: it has no keys"),
        ("a: [", "cannot be read as YAML"),
    ):
        (tmp_path / "bad.yaml").write_text(text)
        code, err = (
            main(["fit", "--config", recipe, "--config", str(tmp_path / "bad.yaml")]),
            capsys.readouterr().err,
        )
        assert code == 2 and told in err and err.count("\n") == 1


def test_a_rate_that_diverges_is_told_and_keeps_what_was(recipe, data, tmp_path, capsys):
    run = tmp_path / "run"
    code = main(["fit", *arguments(recipe, data, run, model__lr=1e12, ema="null")])
    err = capsys.readouterr().err
    assert (
        code == 2
        and "training has diverged; use a lower rate than lr=1e+12" in err
        and "Traceback" not in err
    )
    assert not (run / "result.json").exists()


def test_fast_dev_run_leaves_nothing(recipe, data, tmp_path, capsys):
    assert fit(arguments(recipe, data, tmp_path / "run", trainer__fast_dev_run=2)) is None
    assert "tiny: 2 steps and a validation went well; nothing is kept" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# ---- killed, in the way, and out of room: processes of their own

CHILD = """
import sys, torch
torch.set_num_threads(1)
from xzoo.train import callbacks
from xzoo.cli import main
callbacks.SAVE_EVERY = float(sys.argv[1])
sys.exit(main(["fit", *sys.argv[2:]]))
"""


def start(asked: list[str], save_every: float = 0.0, **how: object) -> subprocess.Popen:
    command = [sys.executable, "-c", CHILD, str(save_every), *asked]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **how
    )


def wait(child: subprocess.Popen, reached: Callable[[], bool]) -> None:
    until = time.monotonic() + 240
    while not reached():
        assert child.poll() is None, child.stderr.read()
        assert time.monotonic() < until
        time.sleep(0.003)


def same_bits(one: Path, other: Path, kills: int = 1) -> None:
    """Weights (and their averages), optimizer, and the loss of every step, which tells the order of
    the images.

    Lightning hands a step's figures on after it has saved the step: a kill in between loses their
    row, and no more.
    """
    first, second = (
        torch.load(r / "checkpoints" / "last.ckpt", weights_only=True) for r in (one, other)
    )
    assert first.keys() == second.keys()
    for key in {"state_dict", "current_model_state", "lookahead"} & first.keys():
        assert all(torch.equal(value, second[key][name]) for name, value in first[key].items()), key
    torch.testing.assert_close(
        first["optimizer_states"], second["optimizer_states"], rtol=0, atol=0
    )
    assert (one / "model" / "model.safetensors").read_bytes() == (
        other / "model" / "model.safetensors"
    ).read_bytes()
    rows, found = (
        {row["step"]: row for row in read_metrics(run / "metrics.csv")} for run in (one, other)
    )
    assert all(rows[step] == row for step, row in found.items()) and len(rows) - len(found) <= kills


@pytest.mark.slow
def test_killed_within_an_epoch_and_resumed_ends_with_the_same_bits(recipe, data, tmp_path, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    fit(arguments(recipe, data, whole))
    child = start(arguments(recipe, data, cut))
    with child:
        wait(child, lambda: steps_saved(cut) >= 7)
        child.kill()
    capsys.readouterr()
    fit(arguments(recipe, data, cut))
    assert "going on after" in capsys.readouterr().err
    same_bits(whole, cut)


# ---- resumed under the Trainer's own flags

LIMITED = "--trainer.limit_train_batches 3"
WITHIN = "--trainer.val_check_interval 2"
FLAGS = [
    "--trainer.limit_train_batches 0.5",
    "--trainer.limit_train_batches 4 --trainer.reload_dataloaders_every_n_epochs 2",
    "--trainer.val_check_interval 0.4",
    "--trainer.val_check_interval 4 --trainer.check_val_every_n_epoch null",
    "--trainer.val_check_interval 7 --trainer.check_val_every_n_epoch null",
    "--trainer.accumulate_grad_batches 2",
    f"--trainer.accumulate_grad_batches 2 {LIMITED} {WITHIN}",
    "--trainer.accumulate_grad_batches 2 --trainer.log_every_n_steps 3",
    "--trainer.check_val_every_n_epoch 2",
    "--trainer.limit_val_batches 0",
    "--trainer.limit_val_batches 0.5 --data.eval_batch_size 10",
    "--trainer.reload_dataloaders_every_n_epochs 1",
    "--trainer.gradient_clip_val 0.5 --trainer.gradient_clip_algorithm value",
    "--trainer.precision bf16-mixed",
    "--trainer.deterministic true --trainer.benchmark true",
    "--trainer.min_epochs 2 --trainer.min_steps 7",
    "--trainer.detect_anomaly true",
    "--trainer.inference_mode false",
    "--trainer.sync_batchnorm true",
    "--trainer.profiler simple",
    "--trainer.strategy ddp",
]


@pytest.fixture
def saved_by_step(monkeypatch, tmp_path):
    """The run folder as a kill would leave it, copied after each checkpoint; one is written after
    each step.
    """
    monkeypatch.setattr("xzoo.train.callbacks.SAVE_EVERY", 0)
    save, copies = AtomicCheckpointIO.save_checkpoint, []

    def save_and_copy(self, checkpoint, path, storage_options=None):
        save(self, checkpoint, path, storage_options)
        copies.append(
            tmp_path / f"{len(copies):02d}-{Path(path).stem}-after-{checkpoint['global_step']}"
        )
        shutil.copytree(Path(path).parents[1], copies[-1])

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", save_and_copy)
    return copies


def resumed_are_the_same(
    asked: list[str], run: Path, copies: list[Path], chosen: Callable[[int], list[int]]
) -> None:
    """A run that nobody touched against those that go on from its copies: all that they leave, bit
    for bit.
    """
    fit(asked)
    whole, kept = run.with_name("whole"), list(copies)
    run.rename(whole)
    for copy in [
        kept[i] for i in chosen(len(kept)) if (kept[i] / "checkpoints" / "last.ckpt").exists()
    ]:
        copy.rename(run)  # where it was
        fit(asked)
        same_bits(whole, run, kills=0)
        best = [r / "checkpoints" / "best.ckpt" for r in (whole, run)]
        assert best[0].exists() == best[1].exists(), copy.name
        if best[0].exists():
            one, other = (torch.load(path, weights_only=True)["state_dict"] for path in best)
            assert all(torch.equal(value, other[name]) for name, value in one.items()), copy.name
        shutil.rmtree(run)


@pytest.mark.parametrize(
    "flags", [LIMITED, WITHIN], ids=["limit_train_batches", "val_check_interval"]
)
def test_resumed_under_limits_and_validation_within_the_epoch(
    recipe, data, tmp_path, saved_by_step, flags
):
    run = tmp_path / "run"
    asked = [*arguments(recipe, data, run, trainer__max_epochs=2), *flags.split()]
    resumed_are_the_same(asked, run, saved_by_step, lambda n: [1, n // 2])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # some flags are Lightning's to warn of
@pytest.mark.parametrize("flags", [LIMITED, WITHIN, *FLAGS])
def test_resumed_under_any_flag_ends_with_the_same_bits(
    recipe, data, tmp_path, saved_by_step, flags
):
    run = tmp_path / "run"
    asked = [*arguments(recipe, data, run), *flags.split()]
    resumed_are_the_same(asked, run, saved_by_step, lambda n: sorted({1, n // 3, n // 2, n - 3}))


def test_the_schedule_ends_with_the_steps_that_are_taken(recipe, data, tmp_path):
    """Under a limit on batches the rate falls to nothing at the run's end, not at that of whole
    epochs.
    """
    result = fit(arguments(recipe, data, tmp_path / "run", trainer__limit_train_batches=2)).facts
    rates = [row["lr"] for row in read_metrics(tmp_path / "run" / "metrics.csv") if "lr" in row]
    assert len(rates) == 6 and rates[-1] < 0.2 * max(rates)
    assert result["train_macs"] == 3 * result["macs"] * 16 * 2 * 3


@pytest.mark.slow
def test_the_best_is_remembered_where_the_folder_was_moved(recipe, data, tmp_path, saved_by_step):
    run, moved = tmp_path / "run", tmp_path / "moved"
    fit(arguments(recipe, data, run))
    copy = next(c for c in saved_by_step if c.name.endswith("last-after-10"))
    copy.rename(moved)
    fit(arguments(recipe, data, moved))
    one, other = (
        torch.load(r / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
        for r in (run, moved)
    )
    assert all(torch.equal(value, other[name]) for name, value in one.items())


IMAGENET = """
seed_everything: 0
model: {name: x_mobilenet050_c4, optimizer: sgd, lr: 0.05, warmup: 0.2, mixup: 0.2, model_kwargs: {drop_rate: 0.2}}
data: {class_path: ImageNet, init_args: {num_classes: 10, batch_size: 8, img_size: 32, re_prob: 0.25,
       auto_augment: rand-m5}}
trainer: {max_epochs: 4, accelerator: cpu, devices: 1, log_every_n_steps: 1}
ema: 0.9
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_at_ten_moments(data, tmp_path, workers):
    """One run, killed and started again ten times, against one that nobody touched."""
    recipe = tmp_path / "imagenet.yaml"
    recipe.write_text(IMAGENET)
    (tmp_path / "data" / "test").rename(tmp_path / "data" / "val")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = start(arguments(str(recipe), data, whole, data__workers=workers), save_every=1e9)
    told = done.communicate()[1]
    assert done.returncode == 0, told
    asked = arguments(str(recipe), data, cut, data__workers=workers)
    # of 40 steps, ends of epochs (of 10) among them
    moments = [1, 3, 9, 10, 11, 17, 20, 28, 30, 39]
    for number, moment in enumerate(moments):
        child = start(asked, start_new_session=True)
        wait(child, lambda at=moment: steps_saved(cut) >= at)
        time.sleep(0.05 * (number % 3))  # not always just after a checkpoint
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)  # its workers too
        child.communicate()
    last = start(asked, save_every=1e9)
    told = last.communicate()[1]
    assert last.returncode == 0, told
    same_bits(whole, cut, kills=len(moments))


@pytest.mark.slow
def test_two_at_work_in_one_folder(recipe, data, tmp_path, capsys):
    pytest.importorskip("fcntl")
    run = tmp_path / "run"
    with start(arguments(recipe, data, run, trainer__max_epochs=400)) as child:
        wait(child, lambda: steps_saved(run) >= 1)
        code = main(["fit", *arguments(recipe, data, run, trainer__max_epochs=400)])
        assert code == 2 and "another process is at work in" in capsys.readouterr().err
        assert child.poll() is None
        child.send_signal(signal.SIGTERM)
        assert child.wait(60) == 143  # not 0, as of a run that is finished
    assert not (run / "result.json").exists()


@pytest.mark.slow
def test_a_full_disk_loses_nothing(recipe, data, tmp_path):
    run = tmp_path / "run"
    with start(arguments(recipe, data, run, trainer__max_epochs=5)) as child:
        wait(child, lambda: steps_saved(run) >= 6)
        child.kill()
    before = steps_saved(run)
    # A file cannot grow beyond the limit, as on a full disk.
    code = "import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    code += "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n" + CHILD
    asked = [sys.executable, "-c", code, "0", *arguments(recipe, data, run, trainer__max_epochs=5)]
    told = subprocess.run(asked, capture_output=True, text=True, check=False)
    assert (
        told.returncode == 2
        and "xzoo: error: cannot write" in told.stderr
        and "Traceback" not in told.stderr
    )
    assert steps_saved(run) == before
    assert fit(arguments(recipe, data, run, trainer__max_epochs=5))["epoch_reported"] == 5


@pytest.mark.slow
def test_the_temporary_folder_is_not_used(recipe, data, tmp_path):
    elsewhere = Path("/dev/shm")
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system at /dev/shm")
    place = elsewhere / f"xzoo-test-{os.getpid()}"
    place.mkdir()
    before = place.stat().st_mtime_ns
    try:
        child = start(
            arguments(recipe, data, tmp_path / "run", trainer__max_epochs=1),
            env=os.environ | {"TMPDIR": str(place)},
        )
        told = child.communicate()[1]
        assert child.returncode == 0, told
        made = {entry.name for entry in place.iterdir()}
        assert not made and (steps_saved(tmp_path / "run") == 5), (made, before)
    finally:
        for entry in place.iterdir():
            entry.unlink()
        place.rmdir()


# ---- several processes


def torchrun(asked: list[str], *how: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", *how, "-m", "xzoo", "fit", *asked]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def same_but_for_rounding(one: Path, other: Path) -> None:
    first, second = (read_metrics(run / "metrics.csv") for run in (one, other))
    assert len(first) == len(second) == 15
    for a, b in zip(first, second, strict=True):
        assert a["lr"] == b["lr"] if "lr" in a else True
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
    results = [json.loads((run / "result.json").read_text()) for run in (one, other)]
    assert results[0]["n_val"] == results[1]["n_val"] == 31
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], rel=1e-4)


@pytest.mark.slow
def test_two_processes_are_one(recipe, data, tmp_path):
    """With frozen batch statistics the same samples at the same rate give the same losses,
    validation included.
    """
    frozen = {"model__freeze_norm": True, "model__lr": 0.01}
    fit(arguments(recipe, data, tmp_path / "one", **frozen))
    child = torchrun(
        arguments(recipe, data, tmp_path / "two", **frozen),
        "--nproc_per_node=2",
        f"--master_port={free_port()}",
    )
    told = child.communicate()[1]
    assert child.returncode == 0, told
    same_but_for_rounding(tmp_path / "one", tmp_path / "two")
    # By Lightning's own launcher, which starts the command again.
    asked = arguments(
        recipe, data, tmp_path / "three", **frozen, trainer__devices=2, trainer__strategy="ddp"
    )
    told = subprocess.run(
        [sys.executable, "-m", "xzoo", "fit", *asked], capture_output=True, text=True, check=False
    )
    assert told.returncode == 0, told.stderr
    same_but_for_rounding(tmp_path / "one", tmp_path / "three")


@pytest.mark.slow
def test_two_nodes_are_one(recipe, data, tmp_path):
    frozen = {"model__freeze_norm": True, "model__lr": 0.01}
    fit(arguments(recipe, data, tmp_path / "one", **frozen))
    how = [
        "--nnodes=2",
        "--nproc_per_node=1",
        "--master_addr=127.0.0.1",
        f"--master_port={free_port()}",
    ]
    asked = arguments(recipe, data, tmp_path / "two", **frozen)
    nodes = [torchrun(asked, *how, f"--node_rank={rank}") for rank in (0, 1)]
    told = [node.communicate()[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], told
    same_but_for_rounding(tmp_path / "one", tmp_path / "two")


def two_processes_killed_and_resumed(recipe: str, data: str, tmp_path: Path) -> None:
    """A run of two processes that nobody touched, and one that was killed and begun again: the same
    bits.
    """
    how = "--nproc_per_node=2", f"--master_port={free_port()}"
    for run in ("whole", "cut"):
        child = torchrun(arguments(recipe, data, tmp_path / run), *how)
        if run == "cut":
            wait(child, lambda: steps_saved(tmp_path / "cut") >= 5)
            child.kill()
            child.communicate()
            time.sleep(3)  # the workers notice
            child = torchrun(arguments(recipe, data, tmp_path / run), *how)
        told = child.communicate()[1]
        assert child.returncode == 0, told
    same_bits(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.slow
def test_two_processes_killed_and_resumed_end_with_the_same_bits(recipe, data, tmp_path):
    """Running batch statistics and the average among them."""
    two_processes_killed_and_resumed(recipe, data, tmp_path)
