"""`xzoo queue`: what a file of shell asks for, how far that is, and that all of it ends, whatever
is killed.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import xzoo
from xzoo.cli import main
from xzoo.errors import XzooError
from xzoo.machine import cores
from xzoo.results.record import RESULT
from xzoo.train import queue
from xzoo.train.fit import fit
from xzoo.train.run import LAST, is_locked, locked_run_folder

RECIPE = """
# A tiny net on tiny data.
model: {name: x_mobilenet050_c4, optimizer: sgd, lr: 0.05, warmup: 0.2}
data: {class_path: CIFAR10, init_args: {batch_size: 16, shift: 2}}
trainer: {max_epochs: 3, accelerator: cpu, devices: 1, log_every_n_steps: 1}
ema: 0.9
"""
FILE = """# A queue

## 0. Two seeds

2 runs
```bash
for seed in 0 1; do
  xzoo fit --config $RECIPE --seed_everything $seed --data.root $DATA --out runs/first/tiny-$seed
done
```

## 1. One more

```bash
xzoo fit --config $RECIPE --trainer.max_epochs=1 --data.root $DATA --out=runs/second/tiny
```
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run in, with a queue, its recipe and its data: 40 training and 20 test images of
    CIFAR-10's form.
    """
    draw = np.random.default_rng(0)
    for part, each in (("train", 4), ("test", 2)):
        for label in range(10):
            folder = tmp_path / "data" / part / f"c{label}"
            folder.mkdir(parents=True)
            for i in range(each):
                pixels = np.clip(label * 25 + draw.integers(-30, 30, (32, 32, 3)), 0, 255).astype(
                    np.uint8
                )
                Image.fromarray(pixels).save(folder / f"{i}.png")
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    (tmp_path / "queue.md").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RECIPE", "tiny.yaml")
    monkeypatch.setenv("DATA", "data")
    return tmp_path


def outs(runs: list[queue.QueuedRun]) -> list[str]:
    return [run.out.as_posix() for run in runs]


# ---- reading


def test_a_block_is_expanded_as_bash_does_it():
    shell = """
for seed in 0 1; do
  for kind in "" _group; do
    # A comment, and a line that goes on.
    xzoo fit --config "my recipes/net$kind" \\
      --out runs/${NET}$kind-$seed
  done
done
xzoo fit --out 'a "b" $c
d' --model.tag ''
"""
    each = [(kind, seed) for seed in (0, 1) for kind in ("", "_group")]
    wanted = [
        ("--config", f"my recipes/net{kind}", "--out", f"runs/vgg{kind}-{seed}")
        for kind, seed in each
    ]
    assert queue.expand(shell, {"NET": "vgg"}) == [
        *wanted,
        ("--out", 'a "b" $c\nd', "--model.tag", ""),
    ]


@pytest.mark.parametrize(
    ("shell", "told"),
    [
        (
            "xzoo fit --data.root $NOWHERE_SET --out a",
            "the variable NOWHERE_SET is not set; set it in the environment",
        ),
        (
            "python train.py\nxzoo fit --out a",
            "python: No such file or directory; a block has `xzoo fit` alone",
        ),
        (
            "for i in $(seq 3); do xzoo fit --out a$i; done",
            "seq: No such file or directory; a block has `xzoo fit` al",
        ),
        ("xzoo fit --out a; exit 3", "bash ends with 3"),
        ("for seed in 0 1; do xzoo fit --out a", "syntax error"),
        ("xzoo fit --config a", "`xzoo fit --config a` is not an `xzoo fit` with an --out"),
        ("xzoo fit --config a --out", "is not an `xzoo fit` with an --out"),
        (
            "xzoo test --config 'a b' --out c",
            "`xzoo test --config 'a b' --out c` is not an `xzoo fit` with an --out",
        ),
        ("xzoo", "`xzoo ` is not an `xzoo fit` with an --out"),
    ],
)
def test_what_is_no_list_of_runs_is_one_line(shell, told):
    with pytest.raises(XzooError) as caught:
        queue.expand(shell, {})
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_nothing_that_a_block_says_is_run(tmp_path):
    (tmp_path / "start.sh").write_text(f"echo > {tmp_path}/started\n")
    with pytest.raises(XzooError, match="touch: No such file"):
        queue.expand(
            f"touch {tmp_path}/touched",
            {"BASH_ENV": str(tmp_path / "start.sh"), "PATH": os.environ["PATH"]},
        )
    assert [file.name for file in tmp_path.iterdir()] == ["start.sh"]


def test_blocks_have_the_numbers_of_their_headings():
    text = (
        "## 3. Title\n```bash\na\n```\ntext\n```bash\nb\n```\n## Other\n```yaml\nx: "
        "1\n```\n```bash\nc\n"
    )
    text += "```\n## 4. Left open\n```bash\nd\n"
    assert queue.blocks(text) == [("3", "a\n"), ("3", "b\n"), ("Other", "c\n"), ("4", "d\n")]


def test_blocks_are_chosen_and_mistakes_are_told(place, capsys, monkeypatch):
    assert outs(queue.read_queue("queue.md")) == [
        "runs/first/tiny-0",
        "runs/first/tiny-1",
        "runs/second/tiny",
    ]
    assert outs(queue.read_queue("queue.md", ["1"])) == ["runs/second/tiny"]
    Path("none.md").write_text("# Nothing\n")
    Path("twice.md").write_text(
        "## 7. Twice\n```bash\nfor s in 0 1; do xzoo fit --seed $s --out a; done\n```\n"
    )
    for arguments, told in (
        (["none.md"], "none.md is not a queue: it has no ```bash block"),
        (["nowhere.md"], "nowhere.md: No such file"),
        (["queue.md", "--blocks", "0,5"], "queue.md has no block 5; "),
        (["queue.md", "--jobs", "0"], "jobs=0: from 1 to"),
        (["queue.md", "--jobs", "100000"], "jobs=100000: from 1 to"),
        (["twice.md"], "twice.md, block 7: two runs have one folder, a; give each its own --out"),
        (["queue.md", "--lst"], "unknown option --lst; did you mean --list"),
    ):
        assert main(["queue", *arguments]) == 2
        err = capsys.readouterr().err
        assert err.startswith("xzoo: error: ") and err.count("\n") == 1 and told in err
    monkeypatch.delenv("DATA")
    assert main(["queue", "queue.md", "--list"]) == 2
    assert "queue.md, block 0: the variable DATA is not set" in capsys.readouterr().err
    assert not Path("runs").exists()


# ---- what is left


def test_macs_are_three_times_those_of_the_images_that_are_learnt_from():
    macs = xzoo.profile(
        xzoo.create_model("x_vgg16_c8", num_classes=10, device="meta"), (3, 32, 32)
    ).macs
    asked = ["--config", "cifar10/x_vgg16_c8", "--trainer.max_epochs", "7", "--out", "runs/a"]
    assert queue.train_macs(asked) == (3 * macs * 50_000 * 7, 7)
    assert queue.train_macs([*asked, "--data.holdout=5000", "--seed_everything=3"]) == (
        3 * macs * 45_000 * 7,
        7,
    )
    dense = xzoo.profile(
        xzoo.create_model("x_vgg16_c8", num_classes=10, device="meta", compression=1), (3, 32, 32)
    )
    assert queue.train_macs([*asked, "--model.compression", "1"])[0] == 3 * dense.macs * 50_000 * 7
    own = [
        "--config",
        "cifar10/x_vgg16_c8",
        "--data",
        "ImageFolder",
        "--data.root",
        "photos",
        "--out",
        "runs/a",
    ]
    assert np.isnan(queue.train_macs(own)[0])  # whose number is not known


def test_the_list_tells_how_far_each_run_is(place, monkeypatch):
    first, second, third = queue.read_queue("queue.md")
    fit(third.arguments)
    interrupted_in_the_second_epoch(second)
    rows = queue.listed([first, second, third])
    assert [(run, state) for run, state, _ in rows] == [
        (first, "open"),
        (second, "1 of 3 epochs"),
        (third, "finished"),
    ]
    (macs, epochs), measured = queue.train_macs(first.arguments), queue.speed([third])
    result = json.loads((third.out / RESULT).read_text())
    assert epochs == 3 and measured == result["train_macs"] / result["wall_s"]
    assert [hours for *_, hours in rows] == pytest.approx(
        [macs / measured / 3600, 2 * macs / measured / 3 / 3600, 0]
    )
    with locked_run_folder(first.out), locked_run_folder(second.out):
        assert [state for _, state, _ in queue.listed([first, second])] == [
            "running",
            "running, 1 of 3 epochs",
        ]
    assert not first.out.exists() and not is_locked(first.out)
    # In a pipe no line is folded.
    asked = [sys.executable, "-m", "xzoo", "queue", "queue.md", "--list"]
    told = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()
    assert told[0].split() == ["block", "run", "state", "core-hours", "left"] and len(told) == 5
    assert told[1].split()[:3] == ["0", "runs/first/tiny-0", "open"]
    assert told[2].split()[:-1] == ["0", "runs/first/tiny-1", "1", "of", "3", "epochs"]
    assert told[3].split() == ["1", "runs/second/tiny", "finished", "0.0"]
    assert told[4].startswith("1 of 3 runs are finished; about ") and told[4].endswith(
        " core-hours are left"
    )


def interrupted_in_the_second_epoch(run: queue.QueuedRun) -> None:
    def interrupt(callback: Any, trainer: Any, module: Any) -> None:
        if trainer.current_epoch == 1:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "xzoo.train.callbacks.ProgressReport.on_train_epoch_start", interrupt, raising=False
        )
        with pytest.raises(KeyboardInterrupt):
            fit(run.arguments)


def test_speed_is_that_of_others_where_no_run_is_finished(place):
    assert 1e8 < queue.speed(queue.read_queue("queue.md")) < 1e12  # on one core


# ---- running


def test_a_run_that_fails_stops_no_other(place, capsys):
    block = FILE.replace("0 1;", "'' nowhere;").replace(
        "--seed_everything $seed --data.root $DATA", "--data.root $DATA$seed"
    )
    Path("queue.md").write_text(block.replace("first/tiny", "f"))
    fit(queue.read_queue("queue.md", ["1"])[0].arguments)
    Path("runs/f-nowhere.log").write_text("of before\n")
    capsys.readouterr()
    assert main(["queue", "queue.md"]) == 2
    *lines, error = capsys.readouterr().err.splitlines()
    told = dict(line.split(": ", 1) for line in lines if "started, " not in line)
    assert [line.split(": ")[0] for line in lines if "started, " in line] == [
        "runs/f-",
        "runs/f-nowhere",
    ]
    assert told.keys() == {"runs/f-", "runs/f-nowhere"} and told["runs/f-"].startswith(
        "finished after 0:"
    )
    assert told["runs/f-nowhere"].startswith(
        "failed with 2: xzoo: error: datanowhere does not exist"
    )
    assert error == "xzoo: error: 1 of 3 runs failed: runs/f-nowhere; their logs say why"
    assert Path("runs/f-nowhere.log").read_text().startswith("of before\nxzoo: error: ")
    assert (
        "everything goes to runs/f-" in Path("runs/f-.log").read_text()
        and Path("runs/f-", RESULT).exists()
    )
    # it is finished
    assert main(["queue", "queue.md", "--blocks", "1"]) == 0 and capsys.readouterr().err == ""


@pytest.mark.slow
def test_a_run_that_another_queue_starts_at_the_same_moment_is_no_failure(
    place, monkeypatch, capsys
):
    pytest.importorskip("fcntl")
    (run,) = queue.read_queue("queue.md", ["1"])
    with ExitStack() as other:
        other.enter_context(locked_run_folder(run.out))
        looked: list[Path] = []

        def look(folder: Path) -> bool:
            """Just before the other queue claims it; and just after the other has given it up."""
            if looked:
                other.close()
            looked.append(folder)
            return False

        monkeypatch.setattr(queue, "is_locked", look)
        queue.run_queue([run])
    told = capsys.readouterr().err
    assert told.count("started, ") == 2 and "failed" not in told and run.is_finished
    assert "xzoo: error: another process is at work in runs/second/tiny; " in run.log.read_text()


LONG = FILE.replace("--out", "--trainer.max_epochs 20 --out", 1)


@contextmanager
def started(file: str = "queue.md") -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "xzoo", "queue", file, "--blocks", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            for child in children(process.pid):  # of a test that failed
                os.kill(child, signal.SIGKILL)
            process.kill()


def children(of: int) -> list[int]:
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # ended meanwhile
            state, parent = file.read_text().rpartition(")")[2].split()[:2]
            if int(parent) == of and state != "Z":
                found.append(int(file.parent.name))
    return found


def wait(process: subprocess.Popen[str], reached: Callable[[], bool]) -> None:
    until = time.monotonic() + 240
    while not reached():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.02)


def stopped(process: subprocess.Popen[str], runs: list[queue.QueuedRun]) -> list[int]:
    """Each run's process, stopped when it has a checkpoint: it is at work for as long as the test
    likes.
    """
    found: list[int] = []

    def all_of_them() -> bool:
        for child in set(children(process.pid)) - set(found):
            asked = Path(f"/proc/{child}/cmdline").read_text().split("\0")
            if any(str(run.out) in asked and (run.out / LAST).exists() for run in runs):
                os.kill(child, signal.SIGSTOP)
                found.append(child)
        return len(found) == len(runs)

    wait(process, all_of_them)
    return found


def uninterrupted(runs: list[queue.QueuedRun]) -> list[bytes]:
    """The weights of the same runs elsewhere."""
    found = []
    for run in runs:
        fit([*run.arguments, "--out", f"whole/{run.out.name}"])
        found.append(weights(Path("whole", run.out.name)))
    return found


def weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/stat").exists() or cores() < 2, reason="needs Linux and two cores"
)
def test_killed_and_started_again_nothing_runs_twice_and_the_bits_are_the_same(place):
    Path("queue.md").write_text(LONG)
    runs = queue.read_queue("queue.md", ["0"])
    with started() as first:
        orphans = stopped(first, runs)
        first.kill()
        first.wait()  # its runs go on without it
    try:
        assert all(is_locked(run.out) for run in runs)
        assert all(state.startswith("running, ") for _, state, _ in queue.listed(runs))
        with started() as second:
            told = sorted(second.stderr.readline() for _ in runs)
            assert told == [f"another process is at work in {run.out}\n" for run in runs]
            time.sleep(3 * queue.LOOK_EVERY)
            assert not children(second.pid)
            for orphan in orphans:
                os.kill(orphan, signal.SIGKILL)
            told = second.stderr.read()
            assert second.wait(240) == 0, told
            assert told.count(": started, ") == told.count(": finished after ") == 2
    finally:
        for orphan in orphans:
            with suppress(ProcessLookupError):
                os.kill(orphan, signal.SIGKILL)
    assert all("going on after" in run.log.read_text() for run in runs)
    assert [weights(run.out) for run in runs] == uninterrupted(runs)


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/stat").exists() or cores() < 2, reason="needs Linux and two cores"
)
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_ends_the_runs_in_order_and_the_same_command_goes_on(place, sent, code):
    Path("queue.md").write_text(LONG)
    runs = queue.read_queue("queue.md", ["0"])
    with started() as process:
        processes = stopped(process, runs)
        assert [os.getpriority(os.PRIO_PROCESS, child) for child in processes] == [19, 19]
        process.send_signal(sent)
        for child in processes:
            os.kill(child, signal.SIGCONT)
        told = process.stderr.read()
        assert process.wait(120) == code
    assert not any(Path(f"/proc/{child}").exists() for child in processes)
    assert ("xzoo: interrupted; the same command resumes\n" in told) == (code == 130)
    assert not any(is_locked(run.out) or run.is_finished for run in runs)
    assert all("xzoo: interrupted; the same command resumes" in run.log.read_text() for run in runs)
    assert main(["queue", "queue.md", "--blocks", "0"]) == 0
    assert [weights(run.out) for run in runs] == uninterrupted(runs)
