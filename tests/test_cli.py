"""The command line: what it prints, and what it exits with. In this process, but for one run of the
real thing.
"""

import csv
import errno
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from xzoo.cli import COMMANDS, _one_line, main
from xzoo.errors import XzooError
from xzoo.hub import save
from xzoo.models import create_model
from xzoo.results.runs import COLUMNS


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("saved") / "model"
    save(
        create_model("x_mobilenet050_c4", num_classes=3),
        place,
        ["ant", "bee", "cow"],
        {"input_size": (3, 32, 32)},
    )
    return place


def test_help_of_all_and_of_each(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0 and all(f"  {name} " in out for name in COMMANDS) and run(capsys)[1] == out
    for name, (_, example) in COMMANDS.items():
        code, out, _ = run(capsys, name, "--help")
        assert code == 0 and f"usage: xzoo {name}" in out and example in " ".join(out.split())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["fintune"], "unknown command 'fintune'; did you mean finetune"),
        (["finetune", "--modle", "x"], "unknown option --modle; did you mean --model"),
        (["finetune", "--epochs", "many"], "epochs=many: expected int"),
        (["finetune", "--epochs"], "expected one argument"),
        (["finetune", "a", "b"], "unexpected argument b; options begin with --"),
        (["finetune", "/nowhere/at/all"], "/nowhere/at/all does not exist"),
        (
            ["finetune", "--model", "x_resnet5"],
            "unknown model 'x_resnet5'; did you mean x_resnet50",
        ),
        (["list", "y_*"], "no model is called y_*"),
        (["inspect", "x_resnet5"], "unknown model"),
        (["recipes", "lsit"], "recipes lsit: did you mean list?"),
        (
            ["recipes", "list", "cifar10/x_vgg99"],
            "no recipe is called cifar10/x_vgg99; did you mean cifar10/x_vgg",
        ),
        (["recipes", "x_vgg*"], "no recipe is called x_vgg*; `xzoo recipes` lists them"),
        (["fit", "cifar10/x_vgg16_2+gruop"], "no setting is called gruop; did you mean group?"),
        (["fit", "cifar10/x_vgg16_2+air+short"], "air and short both set the training; take one"),
        (["recipes", "copy"], "copy needs the name of a recipe"),
        (
            ["recipes", "copy", "cifar10/x_vgg99"],
            "there is no recipe cifar10/x_vgg99; did you mean cifar10/x_vgg",
        ),
        (
            ["export", "/nowhere", "/tmp/x"],
            "/nowhere is not a finished run: model/config.json is missing",
        ),
        (["compare", "/nowhere.csv"], "/nowhere.csv"),
        (["bench", "--layers", "5x5"], "layer '5x5': no case is called so"),
        (["classify", "/nowhere", "x.png"], "does not exist"),
        (["classify", "x_resnet18"], "images"),
        (["classify", "", __file__], "'' is not a model; give a run folder"),
        (["classify", "runs/photos", __file__], "runs/photos: there is no such folder"),
        (["classify", __file__, __file__], "is a file; give the folder that it is in"),
        (["classify", "x_vgg16_2.cifar10_q75/", __file__], "there is no such folder"),
        (
            ["classify", "x_vgg16_2.cifar11", __file__],
            "x_vgg16_2 has no tag 'cifar11'; it has cifar10, cifar10_q75",
        ),
        (
            ["classify", "x_vgg16_2", __file__, "--top", "-3"],
            "top=-3, batch_size=32: 1 or more are needed",
        ),
        (["classify", "x_vgg16_2", __file__, "--top", "nan"], "top=nan: expected int"),
        (["finetune", "--workers", "-1"], "workers=-1: an integer from 0 on is needed"),
        (["finetune", "--lr", "nan"], "lr=nan: expected float"),
        (["finetune", "--model", "local-dir:/nowhere"], "/nowhere is not a model folder"),
        (["inspect", ""], "'' is not a model"),
    ],
)
def test_a_mistake_is_one_line_and_exits_with_2(capsys, arguments, told):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("xzoo: error: ") and err.count("\n") == 1 and told in err


def test_a_mistake_of_ours_exits_with_1_and_its_traceback(capsys, monkeypatch):
    monkeypatch.setattr("xzoo.models.list_models", lambda pattern: 1 / 0)
    code, _, err = run(capsys, "list")
    assert code == 1 and "ZeroDivisionError" in err and "please report it" in err


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), "the disk is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "/x/y"), "/x/y: the disk quota is used up"),
        (OSError(errno.EROFS, "Read-only file system", "/x/y"), "/x/y: the disk is read-only"),
        (PermissionError(errno.EACCES, "Permission denied", "/x/y"), "/x/y: Permission denied"),
        (OSError(errno.EMFILE, "Too many open files"), "raise ulimit -n"),
        (OSError(errno.EIO, "Input/output error", "/x/y"), "/x/y: Input/output error"),
        (MemoryError(), "there is not enough memory"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
            "a smaller batch (--batch-size)",
        ),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            "not enough memory",
        ),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
            "use fewer --workers, or 0",
        ),
        (
            RuntimeError("unable to open shared memory object </torch_7> in read-write mode"),
            "use fewer --workers",
        ),
        (RuntimeError("can't start new thread"), "no more threads can be started here"),
        (RuntimeError("The NVIDIA driver on your system is too old"), "try --device cpu"),
        (
            ImportError("libGL.so.1: cannot open shared object file", name="cv2"),
            "cv2 cannot be imported",
        ),
        (
            ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib"),
            "matplotlib cannot be imported",
        ),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "set PYTHONUTF8=1"),
        (
            ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
            "Connection reset by peer",
        ),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else type(value).__name__,
)
def test_what_the_machine_does_is_one_line_and_no_bug(capsys, monkeypatch, error, told):
    def fails(pattern: str) -> None:
        raise error

    monkeypatch.setattr("xzoo.models.list_models", fails)
    code, _, err = run(capsys, "list")
    assert code == 2 and err.startswith("xzoo: error: ") and err.count("\n") == 1 and told in err


@pytest.mark.parametrize(
    "error",
    [ImportError("cannot import name 'x'", name="xzoo.x"), RuntimeError("shape"), KeyError()],
)
def test_what_it_does_not_is_a_bug(capsys, monkeypatch, error):
    def fails(pattern: str) -> None:
        raise error

    monkeypatch.setattr("xzoo.models.list_models", fails)
    code, _, err = run(capsys, "list")
    assert (
        code == 1
        and "Traceback" in err
        and err.endswith("xzoo: this is a bug in xzoo; please report it with the lines above\n")
    )


def test_a_full_disk_as_standard_output(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    command = ["sh", "-c", '"$0" -m xzoo recipes > /dev/full', sys.executable]
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (told.returncode, told.stderr) == (
        2,
        "xzoo: error: the disk is full ([Errno 28] No space left on device)\n",
    )


def test_a_folder_that_is_gone(capsys, monkeypatch, tmp_path):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    code, _, err = run(capsys, "finetune", "digits")
    assert (code, err) == (
        2,
        "xzoo: error: the folder that xzoo was started in is gone; change to another one\n",
    )


@pytest.mark.parametrize("name", ["dens", ""])
def test_a_backend_that_does_not_exist_is_refused_at_once(capsys, monkeypatch, name, tmp_path):
    monkeypatch.setenv("XZOO_BACKEND", name)
    code, out, err = run(capsys, "finetune", "digits", "--out", tmp_path / "run")
    assert (code, out) == (2, "") and not (tmp_path / "run").exists()
    assert err.startswith(
        f"xzoo: error: XZOO_BACKEND={name}: backend {name!r} is not one of auto, dense"
    )
    monkeypatch.setenv("XZOO_BACKEND", "dense")
    assert run(capsys, "list", "x_vgg16_c8")[0] == 0
    assert run(capsys, "--help")[0] == 0


@pytest.mark.parametrize("place", ["no such folder", "a folder", "a file for a folder"])
def test_outputs_are_refused_before_the_work(capsys, monkeypatch, folder, tmp_path, place):
    """Of every command: not one of them builds a model, reads an image or measures anything first."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "void").mkdir()
    (tmp_path / "a.png").write_bytes(b"x")
    file = {"no such folder": "no/x.csv", "a folder": "void", "a file for a folder": "file/x.csv"}[
        place
    ]
    written, below = tmp_path / file, tmp_path / "file" / "x"

    def work(*_: object, **__: object) -> None:
        raise AssertionError("the work began")

    module = importlib.import_module("xzoo.train.classify")  # whose name is a function's too
    monkeypatch.setattr(module, "load_any", work)
    monkeypatch.setattr(module, "classify", work)
    monkeypatch.setattr("xzoo.hub.folder.load_any", work)
    monkeypatch.setattr("xzoo.models.create_model", work)
    for name in (
        "xzoo.bench.layers",
        "xzoo.bench.models",
        "xzoo.drawing.draw_model",
        "xzoo.results.compare.draw",
    ):
        monkeypatch.setattr(name, work)
    (tmp_path / "results.csv").write_text(",".join(COLUMNS) + "\n")
    ending = written if place == "a folder" else written.with_suffix(".pt2")
    for arguments in (
        ["classify", folder, tmp_path / "a.png", "--csv", written],
        ["inspect", "x_vgg16_c8", "--pictures", below],
        ["bench", "--layers", "--csv", written],
        [
            "bench",
            "--layers",
            "--plot",
            written if place == "a folder" else written.with_suffix(".png"),
        ],
        *([["export", folder, ending]] if place != "a folder" else []),
        ["compare", tmp_path / "results.csv", "--out", below],
        ["recipes", "copy", "cifar10/x_vgg16_2", below],
        ["finetune", "digits", "--out", below],
    ):
        code, _, err = run(capsys, *arguments)
        assert code == 2 and err.startswith("xzoo: error: cannot "), (arguments, err)
        assert err.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "file", "results.csv", "void"]


def test_predictions_outlive_a_disk_that_becomes_full(capsys, folder, make_folder, tmp_path):
    resource = pytest.importorskip("resource")
    photos, table = make_folder(each=3), tmp_path / "found.csv"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))
    try:
        code, out, err = run(capsys, "classify", folder, photos, "--csv", table)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2 and "cannot write" in err and "ulimit -f" in err and not table.exists()
    assert len(out.splitlines()) == 6 and all(
        "ant" in line and "%" in line for line in out.splitlines()
    )


def test_ctrl_c_leaves_what_was_found(capsys, monkeypatch, folder, tmp_path):
    from xzoo.train.classify import Prediction

    def some(*_: object) -> object:
        yield Prediction("a.png", [("ant", 0.9)])
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module("xzoo.train.classify"), "classify", some)
    code, _, _ = run(
        capsys, "classify", folder, "a.png", "--csv", tmp_path / "found.csv", "--top", 1
    )
    assert code == 130 and (tmp_path / "found.csv").read_text().splitlines()[1:] == [
        "a.png,ant,0.9000,"
    ]


def test_ctrl_c_exits_with_130(capsys, monkeypatch):
    def interrupted(**options):
        raise KeyboardInterrupt

    monkeypatch.setattr("xzoo.cli._finetune", interrupted)
    code, _, err = run(capsys, "finetune")
    assert code == 130 and err == "xzoo: interrupted; the same command resumes\n"


def test_list_and_inspect(capsys, tmp_path):
    code, out, _ = run(capsys, "list", "x_mobilenet050*")
    lines = out.strip().splitlines()
    assert (
        code == 0
        and len(lines) == 5
        and lines[2].split()[:4] == ["x_mobilenet050_c4", "224", "0.73", "M"]
    )
    code, out, _ = run(capsys, "inspect", "x_mobilenet050_c4", "--pictures", tmp_path / "pictures")
    assert code == 0 and "731,360 weights" in out and "sensitivity depth" in out
    row = next(line.split() for line in out.splitlines() if line.startswith("blocks.4.1.conv_pw"))
    assert row[1:6] == ["512", "512", "1", "128", "4"]  # in, out, kernel, degree, share
    assert 0 < float(row[6]) <= 1.05 * float(row[8]) < float(row[7]) < 1
    assert {"spectrum.png", "reach.png"} <= {
        file.name for file in (tmp_path / "pictures").iterdir()
    }


def test_classify_folders_files_and_broken_ones(capsys, folder, make_folder, tmp_path):
    photos = make_folder(each=3)
    (photos / "ant" / "broken.png").write_bytes(b"x")
    code, out, err = run(
        capsys, "classify", folder, photos, photos / "ant" / "00.png", "--batch-size", 2
    )
    lines = out.strip().splitlines()
    assert code == 0 and len(lines) == 7 and lines[0].startswith(f"{photos}/ant/00.png: ")
    assert lines[0].split(": ")[1] == lines[6].split(": ")[1]  # whatever batch it was in
    assert all(name in lines[0] for name in ("ant", "bee", "cow")) and lines[0].count("%") == 3
    assert err.count("\n") == 1 and "not read" in err and "broken.png" in err

    table = tmp_path / "found.csv"
    code, out, _ = run(capsys, "classify", folder, photos, "--csv", table, "--top", 2)
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert (
        code == 0
        and len(rows) == 7
        and list(rows[0]) == ["image", "class1", "p1", "class2", "p2", "error"]
    )
    assert float(rows[0]["p1"]) >= float(rows[0]["p2"]) and rows[0]["class1"] in (
        "ant",
        "bee",
        "cow",
    )
    assert [Path(row["image"]).name for row in rows if row["error"]] == ["broken.png"]


def test_classify_what_cannot_be(capsys, folder, tmp_path):
    def told(*arguments: object) -> str:
        code, _, err = run(capsys, "classify", *arguments)
        assert code == 2
        return err

    (tmp_path / "x.png").write_bytes(b"x")
    assert "none of the 1 images can be read" in told(folder, tmp_path / "x.png")
    Image.new("RGB", (9, 9)).save(tmp_path / "y.png")
    (tmp_path / "void").mkdir()
    assert "holds no image" in told(folder, tmp_path / "void")
    assert "does not exist" in told(folder, tmp_path / "z.png")
    assert "neither a run nor a model folder" in told(tmp_path, tmp_path / "y.png")
    (tmp_path / "config.yaml").write_text("")
    assert "is a run that is not finished" in told(tmp_path, tmp_path / "y.png")
    assert "has no trained weights" in told("x_resnet18", tmp_path / "y.png")
    assert "give auto, cpu, cuda or mps" in told(folder, tmp_path / "y.png", "--device", "warp")


def test_the_real_command_finetunes(make_folder, tmp_path):
    data = make_folder(each=6)
    options = [
        "--epochs",
        "1",
        "--img-size",
        "32",
        "--batch-size",
        "4",
        "--device",
        "cpu",
        "--freeze",
    ]
    model = ["finetune", str(data), "--model", "x_mobilenet050_c4"]
    command = [sys.executable, "-m", "xzoo", *model, *options]
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    assert told.stdout.endswith("runs/photos-x_mobilenet050_c4\n")
    assert "Traceback" not in told.stderr and "random features" in told.stderr
    assert (tmp_path / "runs" / "photos-x_mobilenet050_c4" / "model" / "model.safetensors").exists()


def test_recipes_are_listed_and_copied(capsys, tmp_path):
    code, out, _ = run(capsys, "recipes", "list", "cifar10/x_vgg16_[12]")
    lines = out.strip().splitlines()
    assert code == 0 and lines[0].split() == [
        "recipe",
        "px",
        "epochs",
        "weights",
        "MACs",
        "settings",
    ]
    counts = ["32", "60", "1.14", "M", "110", "M"]
    settings = ["+dense", "+group", "+random", "+shuffle", "+air", "+fast", "+paper", "+short"]
    assert [line.split()[0] for line in lines[1:]] == ["cifar10/x_vgg16_1", "cifar10/x_vgg16_2"]
    assert lines[2].split()[1:] == [*counts, *settings]
    # With a plus, the product; and of one recipe all that it says.
    code, out, _ = run(capsys, "recipes", "cifar10/x_vgg16_2+dense+p*")
    lines = out.splitlines()
    assert code == 0 and lines[1].split() == [
        "cifar10/x_vgg16_2+dense+paper",
        "32",
        "300",
        "14.98",
        "M",
        "313",
        "M",
    ]
    assert (
        lines[3] == "xzoo fit cifar10/x_vgg16_2+dense+paper --data.root DATA"
        and "  compression: 1" in lines
    )
    code, out, _ = run(capsys, "recipes", "hardware/*")
    assert code == 0 and [line.split()[0] for line in out.splitlines()][1] == "hardware/gpu1"
    code, out, _ = run(capsys, "recipes", "copy", "cifar10/x_vgg16_2_dense", tmp_path / "mine")
    assert code == 0 and [Path(line).name for line in out.split()] == ["x_vgg16_2+dense.yaml"]


def test_compare_draws_the_published_figures(capsys, tmp_path):
    (tmp_path / "empty.csv").write_text(",".join(COLUMNS) + "\n")
    code, out, _ = run(
        capsys,
        "compare",
        tmp_path / "empty.csv",
        "--out",
        tmp_path / "figures",
        "--datasets",
        '["cifar10"]',
    )
    assert (
        code == 0
        and (tmp_path / "figures" / "results.md").exists()
        and "accuracy_cifar10.png" in out
    )


def test_an_error_of_a_worker_is_its_last_line():
    text = (
        "Caught DataError in DataLoader worker process 0.\nOriginal Traceback (most recent call "
        "last):\n"
    )
    text += (
        '  File "x.py", line 1, in f\nxzoo.errors.DataError: a.jpg cannot be read: it is cut off\n'
    )
    assert _one_line(XzooError(text)) == "a.jpg cannot be read: it is cut off"
    assert _one_line(XzooError("a\n  b")) == "a b"
