"""The run folder's files: never half-written, never two processes at work, metrics that go on."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from xzoo import weights
from xzoo.errors import XzooError
from xzoo.files import atomic, check_file, check_folder, write_text
from xzoo.hub import card
from xzoo.train.run import MetricsFile, locked_run_folder, read_metrics


def _fail_writing(target: Path, error: Exception) -> None:
    with atomic(target) as draft:
        draft.write_text("half")
        raise error


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    target = tmp_path / "file"
    write_text(target, "old")
    with pytest.raises(KeyError):
        _fail_writing(target, KeyError())
    assert target.read_text() == "old" and os.listdir(tmp_path) == ["file"]
    with pytest.raises(XzooError, match=r"cannot write .*file: .*what it held before is kept"):
        _fail_writing(target, OSError(28, "No space left on device"))
    assert target.read_text() == "old" and os.listdir(tmp_path) == ["file"]
    write_text(target, "new")
    assert target.read_text() == "new"


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path):
    import torch

    from xzoo.train.run import AtomicCheckpointIO

    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)
    # A file that grows beyond its limit fails as on a full disk; in a child, because the limit is a
    # process's.
    code = (
        "import resource, signal, sys, torch\n"
        "from xzoo.train.run import AtomicCheckpointIO\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: AtomicCheckpointIO().save_checkpoint({'w': torch.zeros(1_000_000)}, sys.argv[1])\n"
        "except ValueError as error: print(type(error).__name__, error)"
    )
    told = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False
    )
    assert told.stdout.startswith("XzooError cannot write"), told.stderr
    assert torch.load(path, weights_only=True) == {"step": 1} and os.listdir(tmp_path) == [
        "last.ckpt"
    ]


FULL = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
from xzoo.hub import save
from xzoo.models import create_model
from xzoo.files import atomic, write_text
from xzoo.train.run import AtomicCheckpointIO
place, weights = Path(sys.argv[1]), {"w": torch.zeros(1_000_000)}
def to_safetensors():
    with atomic(place / "w.safetensors") as draft:
        save_file(weights, draft)
write_text(place / "last.ckpt", "before")
net = create_model("x_mobilenet050_c4", num_classes=3)
for write in (lambda: AtomicCheckpointIO().save_checkpoint(weights, place / "last.ckpt"), to_safetensors,
              lambda: write_text(place / "text", "x" * 3_000_000), lambda: save(net, place / "model", list("abc"))):
    try:
        write()
    except ValueError as error:
        print(f"{type(error).__name__}: {error}")
assert sorted(p.name for p in place.iterdir()) == ["last.ckpt"] and (place / "last.ckpt").read_text() == "before"
"""


@pytest.mark.slow
def test_a_full_disk_is_called_so(tmp_path):
    """A real one, of 1 MB, in a mount namespace of its own; torch calls it "unexpected pos 901760
    vs 901656".
    """
    mount = f'mount -t tmpfs -o size=1m tmpfs "{tmp_path}" && exec "$@"'
    command = ["unshare", "-m", "sh", "-c", mount, "sh"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*command, "true"], capture_output=True).returncode
    ):
        pytest.skip("no mount namespace of its own: it takes root, and unshare")
    run = [*command, sys.executable, "-c", FULL, str(tmp_path)]
    told = subprocess.run(
        run, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    lines = told.stdout.splitlines()
    assert told.returncode == 0 and len(lines) == 4, told.stderr
    full = "the disk is full (No space left on device)"
    names = ("last.ckpt", "w.safetensors", "text", "model")
    for line, name in zip(lines, names, strict=True):
        kept = "what it held before is kept" if name == "last.ckpt" else "no file was written"
        assert line == f"XzooError: cannot write {tmp_path / name}: {full}; {kept}"


def test_an_error_that_is_not_the_disks_stays_what_it_is(tmp_path):
    with pytest.raises(RuntimeError, match="a bug"):
        _fail_writing(tmp_path / "file", RuntimeError("a bug"))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("check", [check_file, check_folder])
def test_what_cannot_be_written_is_found_before(check, tmp_path):
    """And nothing is left of the finding out."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    good = {check_file: ("new", "file", "link"), check_folder: ("new", "folder", "a/b/c")}[check]
    bad = {
        check_file: ("folder", "a/b", "file/x", "n" * 250),
        check_folder: ("file", "file/x", "link", "n" * 300, "a/b/" + "n" * 300),
    }[check]
    for name in good:
        check(tmp_path / name)
    for name in (*bad, "a\0b"):
        with pytest.raises(XzooError, match=r"^cannot write .*; give another .*with --here$"):
            check(tmp_path / name, "--here")
    with pytest.raises(XzooError, match="cannot write"):
        check("/dev/null")  # as root a rename would put a file in its place
    assert sorted(os.listdir(tmp_path)) == ["file", "folder", "link"] and not os.listdir(
        tmp_path / "folder"
    )


def test_one_process_at_a_time(tmp_path):
    pytest.importorskip("fcntl")
    with (
        locked_run_folder(tmp_path / "run"),
        pytest.raises(XzooError, match="another process is at work"),
        locked_run_folder(tmp_path / "run"),
    ):
        pass


def test_a_folder_that_nothing_was_written_to_is_unmade(tmp_path):
    with pytest.raises(KeyError), locked_run_folder(tmp_path / "runs" / "one"):
        raise KeyError
    assert not (tmp_path / "runs").exists()
    with locked_run_folder(tmp_path / "runs" / "one"):
        (tmp_path / "runs" / "one" / "config.yaml").write_text("x")
    assert (tmp_path / "runs" / "one" / "config.yaml").exists()


def test_a_folder_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with (
        pytest.raises(
            XzooError, match="cannot write to the run folder .*choose another with --out"
        ),
        locked_run_folder(tmp_path / "file" / "run"),
    ):
        pass
    if os.geteuid() == 0:
        return  # root may write anywhere
    (tmp_path / "locked").mkdir(mode=0o500)
    with (
        pytest.raises(XzooError, match="Permission denied"),
        locked_run_folder(tmp_path / "locked" / "run"),
    ):
        pass


def test_metrics_go_on_after_a_resume(tmp_path: Path):
    path = tmp_path / "metrics.csv"
    first = MetricsFile(path)
    for step in range(6):
        first.log_metrics({"epoch": step // 3, "train/loss": 1.0 - step / 10}, step)
    first.log_metrics({"epoch": 1, "val/acc1": 0.5}, 5)
    first.finalize("failed")
    resumed = MetricsFile(path, done=3)  # the checkpoint is older than the last rows
    resumed.log_metrics({"epoch": 1, "train/loss": 0.25}, 3)
    resumed.save()
    rows = read_metrics(path)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert rows[3] == {"step": 3, "epoch": 1, "train/loss": 0.25}
    assert rows[2] == {"step": 2, "epoch": 0, "train/loss": pytest.approx(0.8)}


def test_the_table_of_weights_and_a_card_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    """The limit of a file's size ends the write in its middle."""
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(weights, "TABLE", tmp_path / "weights.json")
    for name in ("weights.json", "README.md"):
        (tmp_path / name).write_text("{}")
    row = {"repo": "lab/net", "commit": "0" * 40, "cfg": {"long": "x" * 50_000}, "files": {}}
    row["files"] = {
        name: {"sha256": "0" * 64, "size": 1} for name in (weights.CONFIG, weights.WEIGHTS)
    }
    before, handler = (
        resource.getrlimit(resource.RLIMIT_FSIZE),
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
    )
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        for write in (
            lambda: weights.write("x_vgg16_c16.test_r32", row),
            lambda: card._put(tmp_path / "README.md", "x" * 50_000),
        ):
            with pytest.raises(
                XzooError, match="cannot write .*ulimit -f.*; what it held before is kept"
            ):
                write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {
        "weights.json": "{}",
        "README.md": "{}",
    }
