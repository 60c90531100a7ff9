"""`finetune` from images to a model folder: that it learns, resumes to the same bits, and refuses
in a line.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from xzoo.data.scan import read
from xzoo.errors import DataError, ModelError, XzooError
from xzoo.hub import folder as model_folder
from xzoo.results.runs import COLUMNS
from xzoo.train.classify import classify
from xzoo.train.finetune import finetune
from xzoo.train.plan import Options, plan, start
from xzoo.train.run import read_metrics

# timm's smallest ResNet, expanded: it learns the drawn images in some 40 steps.
TINY = {
    "model": "test_resnet",
    "expand": 4,
    "pretrained": False,
    "img_size": 32,
    "batch_size": 8,
    "device": "cpu",
    "workers": 0,
}
FILES = {
    "config.yaml",
    "metrics.csv",
    "curves.png",
    "confusion.png",
    "samples.png",
    "result.json",
    "checkpoints",
    "model",
}


def weights(run: Path) -> bytes:
    return (run / "model" / "model.safetensors").read_bytes()


def timm_accuracy(run: Path, data: str) -> float:
    """What a user without xzoo's own code measures: timm's model, timm's transform."""
    model = timm.create_model(f"local-dir:{run / 'model'}", pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    val = read(data).val
    with torch.no_grad():
        logits = torch.cat([model(transform(val.image(i))[None]) for i in range(len(val))])
    names = model.pretrained_cfg["label_names"]
    return sum(
        names[p] == read(data).classes[i] for p, i in zip(logits.argmax(1), val.labels, strict=True)
    ) / len(val)


def test_a_run_learns_and_leaves_all_that_a_user_needs(make_folder, tmp_path, capsys, monkeypatch):
    data, run = make_folder(("ant", "bee", "cow"), each=16), tmp_path / "run"
    (data / "ant" / "broken.jpg").write_bytes(b"x")
    result = finetune(str(data), epochs=8, out=str(run), **TINY)
    assert {file.name for file in run.iterdir()} - {".lock"} == FILES | {"skipped.txt"}
    assert {file.name for file in (run / "checkpoints").iterdir()} == {"last.ckpt", "best.ckpt"}
    assert result.top1 >= 80 and result.n_val == 9 and result.epochs == 8
    assert 100 * timm_accuracy(run, str(data)) == pytest.approx(result.top1, abs=1e-4)
    # The keys and columns of `xzoo fit` (test_fit.py).
    assert set(json.loads((run / "result.json").read_text())) == {*COLUMNS, "loss"}
    columns = "step,epoch,train/loss,lr,val/loss,val/acc1,val/acc5"
    assert (run / "metrics.csv").read_text().splitlines()[0] == columns
    facts = result.facts
    assert (facts["split"], facts["epochs"], facts["ema"], facts["dataset"]) == (
        "val",
        8,
        True,
        None,
    )
    # 39 images in batches, three MACs of training for each MAC forward
    steps = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert facts["train_macs"] == 3 * facts["macs"] * facts["global_batch"] * steps
    assert "ant/broken.jpg" in (run / "skipped.txt").read_text()

    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["options"]["epochs"] == 8 and config["data"]["classes"] == ["ant", "bee", "cow"]
    rows = read_metrics(run / "metrics.csv")
    accuracies = [row["val/acc1"] for row in rows if "val/acc1" in row]
    assert len(accuracies) == 8 and 100 * accuracies[-1] == pytest.approx(result.top1, abs=1e-4)
    told = capsys.readouterr().err
    assert "as asked, training from scratch" in told and "ant/broken.jpg" in told
    assert told.count("val accuracy") == 8
    # The same call again: finished, and no image is read; another one: refused, naming what
    # differs.
    monkeypatch.delattr(sys.modules["xzoo.train.finetune"], "read")
    assert finetune(str(data), epochs=8, out=str(run), **TINY) == result
    assert "is finished" in capsys.readouterr().err
    with pytest.raises(XzooError, match="holds another run: epochs is 8 there and 9 here; .*--out"):
        finetune(str(data), epochs=9, out=str(run), **TINY)


CHILD = """
import os, signal, sys, torch
torch.set_num_threads(1)
import xzoo.train
module = sys.modules["xzoo.train.finetune"]
sys.modules["xzoo.train.callbacks"].SAVE_EVERY = float(sys.argv[3])
Checkpoints = sys.modules["xzoo.train.run"].AtomicCheckpointIO
save = Checkpoints.save_checkpoint
def save_and_die(self, checkpoint, path, storage_options=None):
    save(self, checkpoint, path, storage_options)
    if checkpoint["global_step"] == int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)
Checkpoints.save_checkpoint = save_and_die
from tests_tiny import TINY
module.finetune(sys.argv[1], epochs=6, out=sys.argv[2], **TINY)
"""


def start_run(data: Path, run: Path, save_every: float, last_step: int = 0) -> subprocess.Popen:
    """A run in a process of its own; it is killed as soon as a checkpoint of `last_step` is
    written.
    """
    code = CHILD.replace("from tests_tiny import TINY", f"TINY = {TINY!r}")
    return subprocess.Popen(
        [sys.executable, "-c", code, str(data), str(run), str(save_every), str(last_step)],
        stderr=subprocess.PIPE,
        text=True,
    )


def kill_when(child: subprocess.Popen, reached: Callable[[], bool]) -> None:
    until = time.monotonic() + 120
    with child:
        while not reached() and time.monotonic() < until:
            assert child.poll() is None, child.stderr.read()
            time.sleep(0.002)
        child.kill()


def steps_saved(run: Path) -> int:
    path = run / "checkpoints" / "last.ckpt"
    return (
        torch.load(path, map_location="meta", weights_only=True)["global_step"]
        if path.exists()
        else 0
    )


def test_killed_and_resumed_ends_with_the_same_bits(make_folder, tmp_path, capsys):
    data = make_folder(each=20)
    whole = finetune(str(data), epochs=6, out=str(tmp_path / "whole"), **TINY)
    # Saved after every step, so that it is killed within an epoch (of four steps).
    _, errors = (child := start_run(data, tmp_path / "cut", save_every=0, last_step=6)).communicate(
        timeout=120
    )
    assert child.returncode == -signal.SIGKILL, errors
    assert not (tmp_path / "cut" / "result.json").exists()
    assert steps_saved(tmp_path / "cut") == 6
    capsys.readouterr()
    resumed = finetune(str(data), epochs=6, out=str(tmp_path / "cut"), **TINY)
    assert "going on after" in capsys.readouterr().err
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    assert (resumed.top1, resumed.loss) == (whole.top1, whole.loss)
    table = [read_metrics(tmp_path / run / "metrics.csv") for run in ("cut", "whole")]
    assert table[0] == table[1]


@pytest.mark.slow
@pytest.mark.parametrize("save_every", [0.0, 1e9])
@pytest.mark.parametrize("steps", [1, 4, 9, 12, 19])
def test_killed_anywhere_ends_with_the_same_bits(make_folder, tmp_path, save_every, steps):
    data = make_folder(each=20)
    finetune(str(data), epochs=6, out=str(tmp_path / "whole"), **TINY)
    kill_when(
        start_run(data, tmp_path / "cut", save_every),
        lambda: steps_saved(tmp_path / "cut") >= steps,
    )
    finetune(str(data), epochs=6, out=str(tmp_path / "cut"), **TINY)
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


@pytest.mark.slow
def test_two_kills_workers_and_none_are_the_same_run(make_folder, tmp_path):
    data = make_folder(each=20)
    finetune(str(data), epochs=6, out=str(tmp_path / "whole"), **TINY)
    for steps in (5, 14):
        kill_when(
            start_run(data, tmp_path / "cut", 0),
            lambda steps=steps: steps_saved(tmp_path / "cut") >= steps,
        )
    finetune(str(data), epochs=6, out=str(tmp_path / "cut"), **(TINY | {"workers": 2}))
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


def test_ctrl_c_is_a_keyboard_interrupt_and_leaves_ctrl_c_working(
    make_folder, tmp_path, monkeypatch
):
    from xzoo.train.callbacks import Clock

    def press(self, trainer, pl_module, *args):
        if trainer.global_step == 5:
            # os.kill's may reach another thread, and this one a step later
            signal.raise_signal(signal.SIGINT)

    data, before = make_folder(each=12), signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        # or a slow machine saves within the epoch
        patch.setattr("xzoo.train.callbacks.SAVE_EVERY", 1e9)
        patch.setattr(Clock, "on_train_batch_end", press)
        with pytest.raises(KeyboardInterrupt):
            finetune(str(data), epochs=3, out=str(tmp_path / "run"), **TINY)
    assert signal.getsignal(signal.SIGINT) is before
    assert steps_saved(tmp_path / "run") == 3
    assert finetune(str(data), epochs=3, out=str(tmp_path / "run"), **TINY).epochs == 3


@pytest.mark.slow
def test_minutes_end_a_run_and_its_schedule(make_folder, tmp_path):
    data, run = make_folder(each=40), tmp_path / "run"
    result = finetune(str(data), minutes=0.05, out=str(run), **TINY)
    assert 3 <= result.seconds < 20
    rates = [row["lr"] for row in read_metrics(run / "metrics.csv") if "lr" in row]
    assert rates[-1] < 0.3 * max(rates)
    # Killed before its result was written, it does not train again.
    (run / "result.json").unlink()
    again = finetune(str(data), minutes=0.05, out=str(run), **TINY)
    assert (again.top1, again.loss) == (result.top1, result.loss)


def test_from_pretrained_weights_frozen_and_not(make_folder, tmp_path, capsys):
    first = make_folder(("ant", "bee", "cow"), each=12, where="first")
    finetune(str(first), epochs=1, out=str(tmp_path / "run1"), **TINY)
    source = timm.create_model(f"local-dir:{tmp_path / 'run1' / 'model'}", pretrained=True)
    second = make_folder(("dog", "emu"), each=12, where="second")
    options = TINY | {
        "model": f"local-dir:{tmp_path / 'run1' / 'model'}",
        "expand": None,
        "pretrained": None,
    }
    capsys.readouterr()
    for freeze in (True, False):
        run = tmp_path / f"second{freeze}"
        finetune(str(second), epochs=1, freeze=freeze, out=str(run), **options)
        assert "training from scratch" not in capsys.readouterr().err
        tuned = timm.create_model(f"local-dir:{run / 'model'}", pretrained=True)
        assert tuned.num_classes == 2 and tuned.pretrained_cfg["label_names"] == ["dog", "emu"]
        own, theirs = tuned.state_dict(), source.state_dict()
        kept = {
            k for k in own if own[k].shape == theirs[k].shape and torch.equal(own[k], theirs[k])
        }
        body = {k for k in own if not k.startswith("fc")}
        # Frozen, statistics of batch norm included; else only the graph is what it was.
        assert kept == body if freeze else {k for k in kept if "neighbours" not in k} < body


def test_any_dense_model_can_be_expanded_first(make_folder, tmp_path):
    data, run = make_folder(each=8), tmp_path / "run"
    result = finetune(str(data), epochs=1, out=str(run), **TINY)
    config = json.loads((run / "model" / "config.json").read_text())
    assert config["architecture"] == "x_timm" and config["model_args"]["base"] == "test_resnet"
    assert 100 * timm_accuracy(run, str(data)) == pytest.approx(result.top1, abs=1e-4)


def test_what_is_not_asked_for_suits_the_images():
    digits = read("digits")
    model = start(Options("digits", "x_resnet18"))
    scratch = plan(Options("digits", "x_resnet18"), model, digits)
    assert scratch.img_size == 32 and not scratch.mirror and scratch.batch_size == 64
    assert scratch.classifier["body_lr" if "body_lr" in scratch.classifier else "lr"] > 1e-3
    timed = plan(Options("digits", "x_resnet18", minutes=3), model, digits)
    assert timed.epochs is None and timed.minutes == 3
    tuned = plan(
        Options("digits", "resnet18", batch_size=8), start(Options("digits", "resnet18")), digits
    )
    assert (
        tuned.img_size == 224
        and tuned.classifier["body_lr"] == 0.1
        and tuned.classifier["freeze_norm"]
    )
    small = plan(
        Options("digits", "x_vgg16_2", batch_size=8), start(Options("digits", "x_vgg16_2")), digits
    )
    assert (
        small.img_size == 32
        and small.classifier["pretrained"]
        and not small.classifier["freeze_norm"]
    )
    assert (
        small.classifier["body_lr"] == 1.0 and small.classifier["lr"] == 2 * tuned.classifier["lr"]
    )


def test_mistakes_are_one_line_and_leave_nothing(make_folder, tmp_path):
    data = str(make_folder(each=6))
    run = tmp_path / "runs" / "run"

    def refused(kind: type, match: str, **options: object) -> None:
        with pytest.raises(kind, match=match) as caught:
            finetune(**({"data": data, "epochs": 1, "out": str(run)} | TINY | options))
        assert "\n" not in str(caught.value) and not (tmp_path / "runs").exists()

    refused(ModelError, "unknown model 'x_mobilnet050'.*x_mobilenet050", model="x_mobilnet050")
    refused(ModelError, "no_tag", model="resnet18.no_tag")
    refused(ModelError, "is not a model folder", model="local-dir:/nowhere")
    refused(
        ModelError, "has no pretrained weights", pretrained=True, model="x_resnet18", expand=None
    )
    refused(ModelError, "only a dense model of timm", expand=4, model="x_resnet18")
    refused(DataError, "does not exist", data=str(tmp_path / "gone" / "x"))
    refused(XzooError, "epochs=0: an integer from 1", epochs=0)
    refused(XzooError, "minutes=-1: a positive number", minutes=-1.0)
    refused(XzooError, "batch_size=1: an integer from 2", batch_size=1)
    refused(XzooError, "device=warp: give auto", device="warp")
    refused(XzooError, "expand=0: an integer from 1", expand=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(XzooError, match="cannot write to the run folder"):
        finetune(data, epochs=1, out=str(tmp_path / "file" / "run"), **TINY)


def deep(file: Path, value: int, full: int) -> None:
    """Grey of 16 bits, of which `full` is white: bright for ant, dark for bee."""
    noise = np.random.default_rng(value).integers(0, full // 8, (24, 28))
    Image.fromarray((noise + full * value // 8).astype(np.uint16)).save(file)


def test_every_file_is_in_the_line_or_in_skipped_and_the_range_stays_with_the_model(
    make_folder, tmp_path, capsys
):
    data, run = make_folder(("ant", "bee"), each=10), tmp_path / "run"
    for name, value in (("ant", 6), ("bee", 1)):
        for number, file in enumerate(sorted((data / name).iterdir())):
            deep(file, value, 4095)
            if number:  # no two alike
                with Image.open(file) as image:
                    image.putpixel((0, 0), number)
                    image.save(file)
    deep(data / "ant" / "white.png", 7, 4095)
    (data / "ant" / "broken.jpg").write_bytes(b"x")
    (data / "ant" / "notes.txt").write_text("x")
    (data / "__MACOSX").mkdir()
    shutil.copy(data / "ant" / "00.png", data / "__MACOSX" / "x.png")
    shutil.copy(data / "bee" / "00.png", data / "bee" / "copy.png")
    os.mkfifo(data / "bee" / "pipe.png")
    finetune(str(data), epochs=1, out=str(run), **TINY)
    told = [line for line in capsys.readouterr().err.splitlines() if "images of 2 classes" in line]
    assert told == [
        f"{data}: 22 images of 2 classes; 16-bit values from 0 to 4095 (12 bits); 1 of them are "
        "copies of others, and "
        "on the same side as those; left out: 1 cannot be read (ant/broken.jpg), 1 hidden or kept "
        "by a system, "
        f"1 no regular files, 1 not images (.txt); see {run}/skipped.txt"
    ]
    listed = [line.partition("\t")[0] for line in (run / "skipped.txt").read_text().splitlines()]
    assert listed == ["ant/broken.jpg", "__MACOSX/x.png", "bee/pipe.png", "ant/notes.txt"]

    config = json.loads((run / "model" / "config.json").read_text())
    assert config["xzoo"]["grey_range"] == {"16-bit": 4095.0}
    # The same picture in 8 bits and in 12 of 16 is the same to the model; a dark one alone is not
    # stretched.
    with Image.open(data / "bee" / "03.png") as image:
        shown = np.round(np.asarray(image) * (255 / 4095)).astype(np.uint8)
    Image.fromarray(shown).save(tmp_path / "eight.png")
    one, two = classify(str(run), [tmp_path / "eight.png", data / "bee" / "03.png"], device="cpu")
    assert one.classes == two.classes
    assert capsys.readouterr().err == ""
    deep(tmp_path / "full.png", 6, 65535)
    (beyond,) = classify(str(run), [tmp_path / "full.png"], device="cpu")
    assert "the other 16-bit images use 0 to 4095" in beyond.error


def test_classify_opens_regular_files_only_and_finds_a_range_where_the_model_has_none(
    make_folder, tmp_path, capsys
):
    data, net = make_folder(each=2), timm.create_model("test_resnet", num_classes=2)
    model_folder.save(net, tmp_path / "model", ["ant", "bee"])
    os.mkfifo(data / "ant" / "pipe.png")
    deep(data / "ant" / "dark.png", 1, 4095)
    deep(data / "ant" / "white.png", 7, 4095)
    found = list(classify(str(tmp_path / "model"), [data], device="cpu"))
    assert len(found) == 7
    assert [p.error for p in found if p.error] == [
        f"{data}/ant/pipe.png: a named pipe, and no regular file"
    ]
    assert (
        "16-bit values from 0 to 4095 (12 bits), as the largest of these images"
        in capsys.readouterr().err
    )
    with pytest.raises(DataError, match="the name of an image is empty"):
        list(classify(str(tmp_path / "model"), [""], device="cpu"))


def test_a_run_keeps_out_of_its_data(make_folder, tmp_path, monkeypatch):
    data = make_folder(each=6)
    (tmp_path / "link").symlink_to(data)
    (data / "cow").symlink_to(make_folder(("cow",), where="elsewhere") / "cow")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    inside = (
        "photos",
        "photos/run",
        "photos/ant",
        "link/runs/one",
        "photos/.run",
        "elsewhere/cow/run",
    )
    for out in inside:
        with pytest.raises(DataError, match=r"is in the data, .*; choose another --out"):
            finetune(str(data), epochs=1, out=str(tmp_path / out), **TINY)
    monkeypatch.chdir(data)
    with pytest.raises(DataError, match=r"is in the data, \."):
        finetune(".", epochs=1, **TINY)
    # What a run makes would take the place of the images.
    for name in ("model", "checkpoints"):
        shutil.copytree(data, tmp_path / "out" / name)
        with pytest.raises(DataError, match=f"is where the run .* writes its {name}"):
            finetune(str(tmp_path / "out" / name), epochs=1, out=str(tmp_path / "out"), **TINY)
    shutil.rmtree(tmp_path / "out")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("name", ["", " "])
def test_no_name_is_not_the_current_folder(make_folder, tmp_path, monkeypatch, name):
    monkeypatch.chdir(make_folder(each=6))
    with pytest.raises(DataError, match="the name of the data is empty; give a folder"):
        finetune(name, epochs=1, out=str(tmp_path / "run"), **TINY)
    assert not (tmp_path / "run").exists()


def test_a_foreign_folder_and_changed_images_are_refused(make_folder, tmp_path):
    data, run = make_folder(each=6), tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("seed_everything: 0\n")
    with pytest.raises(XzooError, match="is not of a run of xzoo finetune"):
        finetune(str(data), epochs=1, out=str(run), **TINY)
    (run / "config.yaml").unlink()
    finetune(str(data), epochs=1, out=str(run), **TINY)
    (run / "result.json").unlink()
    (data / "ant" / "00.png").unlink()
    with pytest.raises(XzooError, match="holds another run: images is"):
        finetune(str(data), epochs=1, out=str(run), **TINY)


@pytest.mark.slow
def test_digits_with_no_argument(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = finetune()
    assert result.top1 >= 97


@pytest.mark.slow
@pytest.mark.data
def test_sign_digits_killed_resumed_and_loaded_by_timm(real_data, tmp_path):
    data, run = real_data / "sign-digits", tmp_path / "run"
    kill_when(start_run(data, run, 0), lambda: steps_saved(run) >= 300)
    result = finetune(str(data), epochs=6, out=str(run), **TINY)
    assert result.top1 > 30
    code = (
        "import sys, xzoo\nfrom pathlib import Path\nsys.path.insert(0, sys.argv[3])\n"
        "from test_finetune import timm_accuracy\n"
        "print(timm_accuracy(Path(sys.argv[1]), sys.argv[2]))"
    )
    told = subprocess.run(
        [sys.executable, "-c", code, str(run), str(data), str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert 100 * float(told.stdout) == pytest.approx(result.top1, abs=1e-4)
