"""Cards: complete, written from the data alone, and their snippets run as they stand."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file

import xzoo
from xzoo import cli, weights
from xzoo.errors import XzooError
from xzoo.hub import check, export, publish, save
from xzoo.models import create_model
from xzoo.results import append, read

NAME = "x_vgg16_c16.test_r32"
RESULT = {
    **{
        "model": "x_vgg16_c16",
        "recipe": "recipes/cifar100/net.yaml",
        "recipe_sha": "0" * 16,
        "commit": "abc",
    },
    **{
        "dataset": "cifar100",
        "split": "test",
        "n_val": 100,
        "seed": 0,
        "top1": 61.25,
        "top5": 89.5,
        "loss": 0.3,
    },
    **{"epoch_reported": 3, "device": "CPU"},
}
FOLDERS = publish.folders()


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "run"
    save(
        create_model("x_vgg16_c16", seed=3, num_classes=100).eval(),
        run / "model",
        [f"class {i}" for i in range(100)],
    )
    (run / "config.yaml").write_text("{}")
    (run / "curves.png").write_bytes(b"png")
    (run / "result.json").write_text(json.dumps(RESULT))
    return run


@pytest.fixture(scope="session")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(run, tmp_path_factory.mktemp("exported") / NAME)


def snippets(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_folder_of_the_repository_is_its_own(folder):
    """It loads, has its golden outputs and its counts, its card is not stale, and the table has its
    files.
    """
    check(folder)
    assert weights.find(folder.name) is not None


def test_what_rides_in_the_wheel_is_small():
    """8 MB each, 40 MB in all; larger folders are named in pyproject.toml, and all of them are 150
    MB.
    """
    project = Path(xzoo.__file__).parents[1] / "pyproject.toml"
    left_out = tomllib.loads(project.read_text())["tool"]["hatch"]["build"]["targets"]["wheel"][
        "exclude"
    ]
    sizes = {folder.name: (folder / weights.WEIGHTS).stat().st_size for folder in FOLDERS}
    embedded = {name: size for name, size in sizes.items() if f"hub_cards/{name}" not in left_out}
    assert not [name for name, size in embedded.items() if size > 8e6]
    assert sum(embedded.values()) <= 40e6 and sum(sizes.values()) <= 150e6


def test_the_head_is_what_the_hub_knows(exported):
    found = ModelCard.load(exported / "README.md")
    head = found.data.to_dict()
    assert head["library_name"] == "timm" and head["pipeline_tag"] == "image-classification"
    assert (
        head["license"] == "other"
        and head["license_name"]
        and head["license_link"].startswith("https://")
    )
    assert head["datasets"] == ["uoft-cs/cifar100"] and {"xzoo", "timm"} <= set(head["tags"])
    results = {r.metric_name: r.metric_value for r in found.data.eval_results}
    assert results == {"top-1": 61.25, "top-5": 89.5} and found.data.model_name == NAME
    # The file is what its own parser would write.
    assert yaml.safe_load((exported / "README.md").read_text().split("---")[1]) == head


def test_the_text_says_what_the_data_say(exported):
    text, measured = (
        (exported / "README.md").read_text(),
        json.loads((exported / "metrics.json").read_text()),
    )
    for said in (
        *(
            "top-1 61.25 %, top-5 89.50 % of 100 test images of CIFAR-100",
            "recipes/cifar100/net.yaml (0000",
            "xzoo abc",
        ),
        *(
            "biregular, compression 16, share 4, 1 for larger kernels, seed 3",
            "spectrum.png",
            "curves.png",
        ),
        *(
            "CIFAR-100 was published without a licence",
            "## Intended use and limits",
            "prabhu2018deep",
        ),
        *(
            f"{measured['weights'] / 1e6:.2f} M",
            f"{measured['dense']['macs'] / 1e6:.2f} M",
            "its dense twin",
        ),
    ):
        assert said in text, said
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    assert "{" not in prose and "None" not in prose
    assert (
        all(code.startswith("import xzoo\n") for code in snippets(text))
        and len(snippets(text)) == 3
    )


def test_a_card_is_written_anew_where_it_is_stale(exported, tmp_path, capsys):
    folder = tmp_path / NAME
    shutil.copytree(exported, folder)
    metrics = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps(metrics | {"top1": 62.5}))
    with pytest.raises(XzooError, match="is stale"):
        check(folder)
    assert cli.main(["card", str(folder)]) == 0 and "rewritten" in capsys.readouterr().out
    check(folder)
    assert "62.50 %" in (folder / "README.md").read_text()
    assert cli.main(["card", str(folder)]) == 0 and "up to date" in capsys.readouterr().out
    (folder / "metrics.json").unlink()
    assert cli.main(["card", str(folder)]) == 2
    assert "is not an exported model" in capsys.readouterr().err


def test_other_seeds_and_rivals_of_the_recipe_stand_beside_it(exported, tmp_path, monkeypatch):
    """As recipes/results.csv has them now: after another run of them the card is stale."""
    folder, results = tmp_path / "hub_cards" / NAME, tmp_path / "recipes" / "results.csv"
    shutil.copytree(exported, folder)
    assert "| 61.25 (n = 1) |" in (folder / "README.md").read_text()
    monkeypatch.setattr(
        weights, "homes", lambda: (tmp_path / "wheel" / "hub_cards", tmp_path / "hub_cards")
    )
    monkeypatch.setattr(weights, "TABLE", tmp_path / "weights.json")
    (tmp_path / "weights.json").write_text("{}")
    assert cli.main(["card", str(folder)]) == 0  # it has another name to be loaded by in hub_cards
    check(folder)
    row = read(Path(xzoo.__file__).parents[1] / "recipes" / "results.csv")[0]
    dense = {
        "graph": "dense",
        "compression": 1,
        "share": None,
        "spatial_share": None,
        "graph_seed": None,
    }
    rows = [
        *(
            {"recipe_sha": "0" * 16, "seed": seed, "top1": top1}
            for seed, top1 in enumerate((61.25, 62.25, 63.25))
        ),
        {"recipe_sha": "1" * 16, **dense, "top1": 64.0},
        *(
            {"recipe_sha": "2" * 16, "graph": "group", "seed": seed, "top1": 50.0 + seed}
            for seed in range(2)
        ),
        # Neither the same epochs nor the same part of the data: no rivals.
        {"recipe_sha": "3" * 16, "graph": "random", "epochs": 9, "epoch_reported": 9, "top1": 70.0},
        {"recipe_sha": "4" * 16, "graph": "random", "split": "train", "n_val": 5000, "top1": 70.0},
    ]
    for change in rows:
        append(results, replace(row, **change))
    with pytest.raises(XzooError, match="is stale"):
        check(folder)
    assert cli.main(["card", str(folder)]) == 0
    check(folder)
    text = (folder / "README.md").read_text()
    assert "62.25 \u00b1 1.00 % is the mean of 3 runs" in text and f"| {NAME} |" in text
    dense, group = (
        "| 64.00 (n = 1) |",
        "| with graphs of kind group | 1.14 M | 110.07 M | 4.62 MB | 50.50 \u00b1 0.71 (n = 2) |",
    )
    assert (
        text.count("| its dense twin |") == 1
        and dense in text
        and group in text
        and "random" not in text
    )


def test_images_of_ones_own_have_no_hub_data_set(run, tmp_path):
    other = tmp_path / "run"
    shutil.copytree(run, other)
    result = {
        "accuracy": 0.5,
        "accuracy5": 1.0,
        "images": 8,
        "seconds": 1.0,
        "epochs": 1,
        "loss": 1.0,
    }
    (other / "result.json").write_text(json.dumps({"run": "r", "model": "m", **result}))
    text = (export(other, tmp_path / "mine", "ann/flowers") / "README.md").read_text()
    assert "datasets:" not in text and "as the publisher of the training images allows" in text
    assert 'create_model("hf-hub:ann/flowers"' in text and "This route verifies nothing" in text


def test_a_dense_twin_has_no_picture_of_graphs(run, tmp_path):
    dense = tmp_path / "run"
    shutil.copytree(run, dense)
    save(
        create_model("x_vgg16_c16", compression=1).eval(),
        dense / "model",
        [str(i) for i in range(10)],
    )
    folder = export(dense, tmp_path / "dense")
    check(folder)
    assert (
        not (folder / "spectrum.png").exists()
        and "spectrum" not in (folder / "README.md").read_text()
    )


@pytest.mark.slow
def test_the_snippets_run_as_they_stand(run, tmp_path):
    """In a copy of the package where the folder is embedded: by its own name, with no network and
    no cache.
    """
    package = tmp_path / "xzoo"
    shutil.copytree(
        Path(xzoo.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__")
    )
    code = f"""
from pathlib import Path
from xzoo.hub import card, export, publish
folder = export({str(run)!r}, {str(tmp_path / "hub_cards" / NAME)!r})
assert not card.write(folder) and publish.register(Path(folder))
"""
    text = ""
    for number in range(4):
        environment = {
            "PATH": "",
            "PYTHONPATH": str(tmp_path),
            "HF_HUB_OFFLINE": "1",
            "HOME": str(tmp_path / "none"),
        }
        told = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert told.returncode == 0, told.stderr
        if number == 0:
            text = (tmp_path / "hub_cards" / NAME / "README.md").read_text()
            assert f'create_model("{NAME}", pretrained=True)' in text
        elif number == 1:
            assert "class " in told.stdout and told.stdout.count("%") == 5
        elif number == 2:
            assert told.stdout.count("(1, ") == 6
        code = snippets(text)[min(number, 2)]
    assert set(load_file(tmp_path / "hub_cards" / NAME / "model.safetensors"))
