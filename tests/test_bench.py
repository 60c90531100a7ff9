"""What `xzoo bench` measures: that both forms do the same work, and the arithmetic. No time is judged."""

import csv
from math import isfinite
from pathlib import Path

import pytest
import torch

from xzoo import bench
from xzoo.bench import Figure
from xzoo.cli import main
from xzoo.errors import ModelError, XzooError
from xzoo.train import CIFAR10, Classifier, TinyImageNet

TINY = ["--model", "x_mobilenet050_c4", "--batch-size", "8", "--pairs", "2", "--photos", "16"]


def measured(figure: Figure, n: int) -> None:
    assert len(figure.values) == n and all(isfinite(value) and value > 0 for value in figure.values)


def test_ratios_are_of_neighbours():
    # A machine that gets three times slower half-way: the ratio of sums or of medians would be another.
    assert bench.ratios([2.0, 3.0, 12.0], [1.0, 2.0, 6.0]) == (2.0, 1.5, 2.0)
    with pytest.raises(ValueError, match="shorter"):
        bench.ratios([1.0, 2.0], [1.0])


def test_quartiles_and_bars():
    figure = Figure("a", "b", "x", (5.0, 1.0, 2.0, 4.0, 3.0), bar=3.0)
    assert figure.quartiles == (2.0, 3.0, 4.0) and figure.met is True
    assert Figure("a", "b", "x", (1.0, 2.0), bar=1.6).met is False
    assert Figure("a", "b", "x", (1.0, 2.0), bar=1.6, at_least=False).met is True
    assert Figure("a", "b", "x", (1.0, 2.0), bar=1.4, at_least=False).met is False
    assert Figure("a", "", "images/s", (7.0,)).quartiles == (7.0, 7.0, 7.0)
    assert Figure("a", "", "images/s", (7.0,)).met is None


def test_the_file_says_what_the_table_says(tmp_path):
    figures = [
        Figure("step, small", "bare", "x", (1.5, 1.0, 1.25), 1.1, at_least=False),
        Figure("images", "", "images/s", (20_000.4, 30_000.0)),
    ]
    bench.write_csv(figures, tmp_path / "bench.csv")
    with open(tmp_path / "bench.csv", newline="", encoding="utf-8") as file:
        first, second = csv.DictReader(file)
    assert {key: first[key] for key in figures[0].row()} == figures[0].row()
    assert (first["what"], first["median"], first["bar"], first["met"]) == ("step, small", "1.250", "<= 1.100", "no")
    assert (float(first["quartile 1"]), float(first["quartile 3"]), first["n"]) == (1.125, 1.375, "3")
    assert (second["median"], second["bar"], second["met"]) == ("25000", "", "")
    assert second["torch"] == torch.__version__ and "thread" in second["machine"]
    with pytest.raises(XzooError, match="cannot write"):
        bench.write_csv(figures, tmp_path / "nowhere" / "bench.csv")


def test_the_bare_loop_does_the_work_of_the_trainer():
    """Same network and images, so the same weights: nothing is left out of either form, and no step."""
    given = {"name": "x_mobilenet050_c4", "num_classes": 10, "label_smoothing": bench.SMOOTHING}
    ours, theirs = (Classifier(**given, **bench.OPTIMIZER, **bench.SCHEDULE) for _ in range(2))
    before = {name: value.clone() for name, value in ours.net.state_dict().items()}
    turns = bench.alternated(ours, theirs, 8, pairs=1)
    assert len(turns.lightning) == len(turns.bare) == bench.WARM + 1
    after = theirs.net.state_dict()
    assert not torch.equal(before["classifier.weight"], after["classifier.weight"])
    for name, value in ours.net.state_dict().items():
        assert torch.equal(value, after[name]), name


def test_turns_of_several_steps():
    """As on a GPU, where a turn has more than one."""

    class At:
        is_last_batch = False

    steps: list[int] = []
    turns = bench.Turns(lambda: steps.append(1), 3, torch.device("cpu"))
    for i in range(7):
        At.is_last_batch = i == 6
        turns.on_train_batch_start(At, None, None, i)  # type: ignore[arg-type]
    assert len(steps) == 7 and len(turns.bare) == len(turns.lightning) == 2


def test_each_part_measures():
    measured(bench.lightning_loop("x_mobilenet050_c4", 8, 2), 2)
    figure = bench.image_folder(photos=16, pairs=2)
    measured(figure, 2)
    assert figure.bar == 1.0 and figure.met == (figure.quartiles[1] >= 1)


@pytest.mark.parametrize("kind", [CIFAR10, TinyImageNet])
def test_augmentation_measures_on_one_thread(kind, monkeypatch):
    monkeypatch.setattr(bench, "IMAGES", {32: 200, 64: 200})
    before = torch.get_num_threads()
    measured(bench.augmentation(kind, 50, 3), 3)
    assert torch.get_num_threads() == before


def test_photographs_are_of_a_photograph_s_size(tmp_path):
    bench.draw_folder(tmp_path, 3, 2, 2, bench.photo)
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.jpg"))
    assert files == [
        *("train/class000/000000.jpg", "train/class000/000002.jpg", "train/class001/000001.jpg"),
        *("val/class000/000000.jpg", "val/class001/000001.jpg"),
    ]
    # Pure noise has 172 KB, a smooth picture 16.
    assert all(40_000 < (tmp_path / file).stat().st_size < 120_000 for file in files)


def test_mistakes_are_told_before_anything_is_measured():
    with pytest.raises(XzooError, match="pairs=0: 1 or more"):
        bench.loop(pairs=0)
    with pytest.raises(XzooError, match="batch_size=4: 8 or more"):
        bench.loop(batch_size=4)
    with pytest.raises(ModelError, match="did you mean"):
        bench.loop("x_vgg61_c16")


def test_the_command_prints_the_table(capsys, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(bench, "IMAGES", {32: 200, 64: 200})
    table = tmp_path / "bench.csv"
    assert main(["bench", "--loop", *TINY, "--csv", str(table)]) == 0
    out = capsys.readouterr().out
    with open(table, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 and all(row["what"] in out and row["median"] in out for row in rows)
    assert [row["bar"] for row in rows] == ["<= 1.100", ">= 20000", "", ">= 1.000"]
    assert f"torch {torch.__version__}" in out and rows[0]["machine"].split(",")[0] in out

    assert main(["bench"]) == 2
    assert capsys.readouterr().err == "xzoo: error: say what to measure: --loop\n"
