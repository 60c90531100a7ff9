"""A model folder is timm's: what is saved is loaded by timm, and what does not fit is refused in a
line.
"""

import hashlib
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file, save_file
from timm.data import resolve_model_data_config

from xzoo import cli
from xzoo.errors import ModelError, XzooError
from xzoo.hub import check, export, load, program, save
from xzoo.hub.folder import EXPORTED, golden_input
from xzoo.models import create_model
from xzoo.weights import fingerprint

NAMES = ["ant", "bee", "cow"]


@pytest.fixture
def saved(tmp_path: Path) -> tuple[torch.nn.Module, Path]:
    model = create_model("x_mobilenet050_c8", num_classes=3, graph="shuffle", seed=5).eval()
    config = resolve_model_data_config(model) | {"input_size": (3, 64, 64)}
    save(model, tmp_path / "model", NAMES, config, {"finetune": {"run": "r"}})
    return model, tmp_path / "model"


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        return torch.equal(one.eval()(x), other.eval()(x))


def test_timm_and_we_load_what_was_saved(saved):
    model, folder = saved
    by_timm = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert same(by_timm, model) and same(load(folder), model)
    assert by_timm.pretrained_cfg["label_names"] == NAMES
    assert resolve_model_data_config(by_timm)["input_size"][1:] == (64, 64)


def test_the_config_tells_how_it_was_drawn_and_nothing_of_this_machine(saved):
    config = json.loads((saved[1] / "config.json").read_text())
    drawn = {"compression": 8, "share": 4, "spatial_share": 1, "graph": "shuffle", "seed": 5}
    assert config["xzoo"] == drawn | {"finetune": {"run": "r"}}
    # transformers passes num_classes itself, and would pass it twice.
    assert "num_classes" not in config["model_args"] and config["num_classes"] == 3
    assert str(saved[1].parent) not in (saved[1] / "config.json").read_text()
    assert sorted(file.name for file in saved[1].iterdir()) == ["config.json", "model.safetensors"]


def test_a_model_of_a_folder_can_be_changed_and_saved_again(saved, tmp_path):
    model = create_model(f"local-dir:{saved[1]}", pretrained=True, num_classes=2)
    save(model, tmp_path / "again", ["x", "y"])
    assert same(load(tmp_path / "again"), model)
    assert str(tmp_path) not in (tmp_path / "again" / "config.json").read_text()


def test_channels_last_is_saved_as_any_other(tmp_path):
    model = (
        create_model("x_mobilenet050_c4", num_classes=3)
        .eval()
        .to(memory_format=torch.channels_last)
    )
    save(model, tmp_path / "m", NAMES)
    loaded = load(tmp_path / "m").state_dict()
    assert all(torch.equal(v, loaded[k]) for k, v in model.state_dict().items())


def test_an_expanded_model_of_timm_is_rebuilt(tmp_path):
    model = create_model("x_timm", base="test_resnet", compression=4, num_classes=3).eval()
    save(model, tmp_path / "m", NAMES)
    assert same(load(tmp_path / "m"), model)
    assert json.loads((tmp_path / "m" / "config.json").read_text())["xzoo"]["compression"] == 4


def test_transformers_wraps_what_was_saved(saved):
    wrapper = pytest.importorskip(
        "transformers", reason="transformers is not installed"
    ).TimmWrapperForImageClassification
    wrapped, x = wrapper.from_pretrained(str(saved[1])).eval(), golden_input((3, 64, 64))
    with torch.no_grad():
        assert torch.equal(wrapped(x).logits, saved[0](x))


def test_a_folder_is_replaced_whole(saved, tmp_path):
    model = create_model("x_mobilenet050_c4", num_classes=2)
    save(model, saved[1], ["a", "b"])
    assert load(saved[1]).num_classes == 2 and [f.name for f in tmp_path.iterdir()] == ["model"]
    with pytest.raises(ModelError, match="1 label names for a model of 2 classes"):
        save(model, saved[1], ["a"])
    (tmp_path / "file").write_text("")
    with pytest.raises(XzooError, match="cannot write"):
        save(model, tmp_path / "file" / "model", ["a", "b"])
    assert load(saved[1]).num_classes == 2


def test_what_does_not_fit_is_refused(saved, tmp_path):
    def refused(match: str, folder: Path = saved[1]) -> None:
        with pytest.raises(ModelError, match=match) as caught:
            load(folder)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400

    weights, config = saved[1] / "model.safetensors", saved[1] / "config.json"
    good, text = load_file(weights), config.read_text()
    refused("is not a model folder: config.json is missing", tmp_path)

    other = create_model("x_resnet18", num_classes=3)
    save_file(other.state_dict(), weights)
    refused("does not hold the weights of x_mobilenet050_c8: .* is missing")
    save_file({k: v for k, v in good.items() if "neighbours" not in k}, weights)
    refused(r"blocks\.1\.0\.conv_pw\.neighbours is missing \(12 such keys\)")
    bad = {k: v.clone() for k, v in good.items()}
    bad["blocks.1.0.conv_pw.neighbours"][0, 0] = 9999
    save_file(bad, weights)
    refused(r"blocks\.1\.0\.conv_pw.*9999")
    save_file(good, weights)

    config.write_text(text.replace('"num_classes": 3', '"num_classes": 7'))
    refused("classifier.weight is .3, 512. there and .7, 512. in the model")
    config.write_text(text.replace('"cow"', '"cow", "dog"'))
    refused("4 label names for 3 classes")
    config.write_text(text.replace("x_mobilenet050_c8", "x_nothing"))
    refused("x_nothing")
    config.write_text("{")
    refused("is not a model folder that can be read")
    config.write_text(text)
    weights.write_bytes(weights.read_bytes()[:1000])
    refused("is not a model folder that can be read")
    shutil.rmtree(saved[1])
    refused("config.json is missing")


RESULT = {
    **{
        "model": "x_mobilenet050_c8",
        "recipe": "recipes/cifar10/net.yaml",
        "recipe_sha": "0" * 16,
        "commit": "abc",
    },
    **{
        "dataset": "cifar10",
        "split": "test",
        "n_val": 100,
        "seed": 0,
        "device": "CPU",
        "epoch_reported": 2,
    },
    **{"top1": 91.25, "top5": None, "loss": 0.3},
}


@pytest.fixture
def run(saved, tmp_path: Path) -> Path:
    """A run folder as `xzoo fit` leaves it."""
    run = tmp_path / "run"
    shutil.copytree(saved[1], run / "model")
    recipe = {
        "seed_everything": 0,
        "data": {"class_path": "X", "init_args": {"root": "/home/ann/photos", "shift": 4}},
    }
    (run / "config.yaml").write_text(yaml.safe_dump(recipe))
    (run / "curves.png").write_bytes(b"png")
    (run / "result.json").write_text(json.dumps(RESULT))
    return run


def test_a_finished_run_is_exported_whole(saved, run, tmp_path):
    to = tmp_path / "cards" / "net.data"
    assert export(run, to) == to == export(run, to)  # over an older one, too
    assert {file.name for file in to.iterdir()} == EXPORTED and len(list(to.parent.iterdir())) == 1
    check(to)
    assert same(load(to), saved[0]) and same(
        timm.create_model(f"local-dir:{to}", pretrained=True), saved[0]
    )
    # Nothing of the machine, and graphs in no more bytes than they need.
    assert yaml.safe_load((to / "recipe.yaml").read_text())["data"] == {
        "class_path": "X",
        "init_args": {"shift": 4},
    }
    assert not any(
        b"/home/ann" in file.read_bytes() or str(tmp_path).encode() in file.read_bytes()
        for file in to.iterdir()
    )
    stored = {
        k: v.dtype
        for k, v in load_file(to / "model.safetensors").items()
        if k.endswith("neighbours")
    }
    assert set(stored.values()) == {torch.uint8, torch.int16}
    block = json.loads((to / "config.json").read_text())["xzoo"]
    assert block["fingerprint"] == fingerprint(saved[0].state_dict()) and block["commit"] == "abc"
    metrics = json.loads((to / "metrics.json").read_text())
    assert (
        metrics["top1"] == 91.25
        and metrics["dense"]["weights"] > metrics["weights"]
        and "thread" in metrics["latency"]["on"]
    )


def test_a_run_of_finetune_is_exported(run, tmp_path):
    result = {
        "run": str(run),
        "model": str(run / "model"),
        "accuracy": 0.75,
        "accuracy5": 1.0,
        "loss": 1.0,
    }
    (run / "result.json").write_text(
        json.dumps({**result, "images": 8, "epochs": 3, "seconds": 1.5})
    )
    check(export(run, tmp_path / "mine"))
    metrics = json.loads((tmp_path / "mine" / "metrics.json").read_text())
    assert (
        metrics["top1"] == 75
        and metrics["top5"] is None
        and metrics["n_val"] == 8
        and "run" not in metrics
    )


def test_what_is_no_finished_run_is_not_exported(run, tmp_path):
    to = export(run, tmp_path / "net.data")
    (to / "notes.txt").write_text("mine")
    with pytest.raises(XzooError, match="holds something else"):
        export(run, to)
    assert (to / "notes.txt").exists()
    (run / "result.json").write_text("{")
    with pytest.raises(XzooError, match="result.json cannot be read"):
        export(run, tmp_path / "new")
    (run / "result.json").unlink()
    with pytest.raises(XzooError, match=r"is not a finished run: result\.json is missing"):
        export(run, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_exported_folder_that_is_not_its_own_is_told(run, tmp_path):
    to = export(run, tmp_path / "net.data")

    def told(file: str, spoil, match: str) -> None:
        kept = (to / file).read_bytes()
        spoil(to / file)
        with pytest.raises(ModelError, match=match) as caught:
            check(to)
        assert "\n" not in str(caught.value)
        (to / file).write_bytes(kept)

    def changed(key: str, by) -> Callable[[Path], None]:
        return lambda path: save_file(
            {k: by(v) if k == key else v for k, v in load_file(path).items()}, path
        )

    graph = "blocks.1.0.conv_pw.neighbours"
    told("model.safetensors", changed(graph, lambda v: v.roll(1, 0)), "its graphs are not those")
    told(
        "model.safetensors",
        changed("classifier.bias", lambda v: v + 1),
        "its outputs are not those of logits",
    )
    told(
        "logits.safetensors",
        changed("logits", lambda v: v[:1]),
        "its outputs are not those of logits",
    )
    told(
        "metrics.json",
        lambda path: path.write_text(path.read_text().replace('"macs": ', '"macs": 1')),
        "macs is 1",
    )
    told(
        "README.md",
        lambda path: path.write_text(path.read_text() + "by hand"),
        "is stale; `xzoo card",
    )
    told(
        "metrics.json",
        lambda path: path.write_text(path.read_text().replace("91.25", "99.25")),
        "is stale",
    )
    told("curves.png", lambda path: path.unlink(), "has no curves.png")
    check(to)
    # Elsewhere it has another name, and another card.
    with pytest.raises(ModelError, match="is stale"):
        check(shutil.copytree(to, tmp_path / "other.name"))


def test_golden_inputs_are_the_same_everywhere():
    x = golden_input((3, 32, 32))
    assert x.shape == (4, 3, 32, 32) and float(x.min()) >= -1 and float(x.max()) < 1
    assert hashlib.sha256(x.numpy().tobytes()).hexdigest()[:16] == "07aee13dac29ecd3"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_a_program_of_torch_computes_what_the_model_does(saved, tmp_path, capsys):
    file = tmp_path / "net.pt2"
    assert cli.main(["export", str(saved[1]), str(file)]) == 0
    told = capsys.readouterr().out
    assert "12 X-layers stay sparse" in told and "any number of images" in told
    x = golden_input((3, 64, 64), 5)
    with torch.no_grad():
        assert torch.equal(torch.export.load(file).module()(x), saved[0](x))
    assert [f.name for f in tmp_path.glob("*.part*")] == []
    with pytest.raises(XzooError, match=r"the ending says which program to write, \.onnx or \.pt2"):
        program.write(saved[0], tmp_path / "net.pt")
    with pytest.raises(XzooError, match="cannot write"):
        program.write(saved[0], tmp_path / "none" / "net.pt2")


def test_onnx_says_that_it_is_dense(saved, tmp_path, capsys, monkeypatch):
    pytest.importorskip("onnx", reason="onnx is not installed")
    file = tmp_path / "net.onnx"
    if not importlib.util.find_spec("onnxruntime"):
        assert cli.main(["export", str(saved[1]), str(file)]) == 2
        assert (
            "onnxruntime is not installed; `pip install 'xzoo[export]'`" in capsys.readouterr().err
        )
        pytest.skip("onnxruntime, which would check the file, is not installed")
    assert cli.main(["export", str(saved[1]), str(file)]) == 0
    assert "the 12 X-layers are dense here" in capsys.readouterr().out and file.is_file()
    monkeypatch.setattr(
        program, "_onnx", lambda net, images, draft: draft.write_bytes(b"") or net(images) + 1
    )
    kept = file.read_bytes()
    with pytest.raises(XzooError, match="is not written: its outputs differ from the model's by 1"):
        program.write(saved[0], file)
    assert file.read_bytes() == kept
