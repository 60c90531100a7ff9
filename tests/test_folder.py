"""A model folder is timm's: what is saved is loaded by timm, and what does not fit is refused in a line."""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.data import resolve_model_data_config

from xzoo.errors import ModelError, XzooError
from xzoo.hub import export, load, save
from xzoo.hub.folder import EXPORTED
from xzoo.models import create_model

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
    model = create_model("x_mobilenet050_c4", num_classes=3).eval().to(memory_format=torch.channels_last)
    save(model, tmp_path / "m", NAMES)
    loaded = load(tmp_path / "m").state_dict()
    assert all(torch.equal(v, loaded[k]) for k, v in model.state_dict().items())


def test_an_expanded_model_of_timm_is_rebuilt(tmp_path):
    model = create_model("x_timm", base="test_resnet", compression=4, num_classes=3).eval()
    save(model, tmp_path / "m", NAMES)
    assert same(load(tmp_path / "m"), model)
    assert json.loads((tmp_path / "m" / "config.json").read_text())["xzoo"]["compression"] == 4


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
    refused("is no model folder: it has no config.json", tmp_path)

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
    refused("is no model folder that can be read")
    config.write_text(text)
    weights.write_bytes(weights.read_bytes()[:1000])
    refused("is no model folder that can be read")
    shutil.rmtree(saved[1])
    refused("it has no config.json")


def test_a_finished_run_is_exported_whole(saved, tmp_path):
    run, to = tmp_path / "run", tmp_path / "cards" / "net.data"
    run.mkdir()
    shutil.copytree(saved[1], run / "model")
    for name in ("config.yaml", "curves.png"):
        (run / name).write_text(name)
    with pytest.raises(XzooError, match=r"is no finished run: it has no result\.json"):
        export(run, to)
    (run / "result.json").write_text("{}")
    assert export(run, to) == to == export(run, to)  # over an older one, too
    assert {file.name for file in to.iterdir()} == EXPORTED and len(list(to.parent.iterdir())) == 1
    assert (to / "recipe.yaml").read_text() == "config.yaml"
    assert torch.equal(load(to)(torch.zeros(1, 3, 32, 32)), load(saved[1])(torch.zeros(1, 3, 32, 32)))
    (to / "notes.txt").write_text("mine")
    with pytest.raises(XzooError, match="holds something else"):
        export(run, to)
    assert (to / "notes.txt").exists()
