"""What the README says is so: its Python runs, its table of models is counted, its results are those of the runs.

`python tests/test_readme.py` writes the tables anew.
"""

import csv
import json
import re
import sys
from pathlib import Path
from statistics import mean, stdev

import pytest

import xzoo
from xzoo import weights
from xzoo.datasets import DATASETS
from xzoo.results.runs import aggregate, read
from xzoo.train.run import quiet

README = Path(__file__).parent.parent / "README.md"
MODELS = "<!-- models: python tests/test_readme.py -->\n", "<!-- end of models -->"
RESULTS = "<!-- results: python tests/test_readme.py -->\n", "<!-- end of results -->"

TRAINED = "<!-- weights: python tests/test_readme.py -->\n", "<!-- end of weights -->"
SPEED = "<!-- speed: python tests/test_readme.py -->\n", "<!-- end of speed -->"
TUNED = "<!-- finetune: python tests/test_readme.py -->\n", "<!-- end of finetune -->"


def counts(name, **kwargs):
    model = xzoo.create_model(name, device="meta", **kwargs)
    return xzoo.profile(model), model.pretrained_cfg["input_size"][-1]


def table():
    lines = ["| model | px | weights | MACs | fewer weights | fewer MACs |", "| --- | --- | --- | --- | --- | --- |"]
    for name in xzoo.list_models():
        if name != "x_timm":
            (ours, size), (dense, _) = counts(name), counts(name, compression=1)
            times = (f"{dense.weights / ours.weights:.1f}x", f"{dense.macs / ours.macs:.1f}x")
            sizes = (f"{ours.weights / 1e6:.2f}M", f"{ours.macs / 1e6:,.0f}M")
            lines.append(f"| `{name}` | {size} | {' | '.join(sizes + times)} |")
    return "\n".join(lines) + "\n"


def results():
    lines = ["| recipe | data set | weights | MACs | epochs | top-1, % | runs | on |", f"|{' --- |' * 8}"]
    for each in aggregate(read(README.parent / "recipes" / "results.csv")):
        row, spread = each.row, "" if each.sd is None else f" ± {each.sd:.2f}"
        part = DATASETS[row.dataset]
        cells = (
            f"`{row.recipe}`",
            f"{part.title}, {row.split}",
            f"{row.weights / 1e6:.2f}M",
            f"{row.macs / 1e6:,.0f}M",
            str(row.epoch_reported),
            f"{each.mean:.2f}{spread}",
            str(each.n),
            row.device,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def speed():
    """Of recipes/speed.csv, `xzoo bench --csv recipes/speed.csv`: a row a model, a loss like any other figure."""
    with open(README.parent / "recipes" / "speed.csv", newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    models = {}  # name -> what was measured -> against -> row
    for row in found:
        if row["part"] in ("model", "memory"):
            name, _, what = row["what"].partition(", ")
            models.setdefault(name, {}).setdefault(what, {})[row["against"]] = row
    lines = [
        "| model | MACs fall | inference, batch 1 | inference, large batch | training step | memory |",
        f"|{' --- |' * 6}",
    ]
    for name, cases in models.items():
        one, many, training = sorted(
            (what for what in cases if "batch" in what and "memory" not in what),
            key=lambda what: ("training" in what, int(what.split()[-1])),
        )
        cells = []
        for what in (one, many, training):
            ratios = " / ".join(f"{float(cases[what][form]['median']):.2f}x" for form in ("dense", "masked", "group"))
            cells.append(ratios if what == one else f"{ratios} ({what.split()[-1]})")
        (memory,) = (each["dense"]["median"] for what, each in cases.items() if "all memory" in what)
        cells.append(f"{float(memory):.2f}x less")
        lines.append(f"| `{name}` | {cases[one]['dense']['ideal']}x | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"{found[0]['machine'].partition(', load')[0]}; torch {found[0]['torch']}."]) + "\n"


def trained():
    """Of the folders in hub_cards: what their metrics.json say."""
    head = (
        "| checkpoint | data set | top-1, % | weights | MACs | file | sigma_2 / bound | dense twin's time | made by |"
    )
    lines = [head, f"|{' --- |' * 9}"]
    for name in weights.entries():
        told = json.loads((README.parent / "hub_cards" / name / "metrics.json").read_text(encoding="utf-8"))
        runs = told["runs"]
        spread = "" if runs["sd"] is None else f"; {runs['top1']:.2f} \u00b1 {runs['sd']:.2f}"
        cells = (
            f"`{name}`",
            f"{DATASETS[told['dataset']].title}, {told['n_val']:,} {told['split']} images",
            f"{told['top1']:.2f} (n = {runs['n']}{spread})",
            f"{told['weights'] / 1e6:.2f}M",
            f"{told['macs'] / 1e6:,.0f}M",
            f"{told['bytes'] / 1e6:.1f} MB",
            " to ".join(f"{value:.2f}" for value in told["sigma_2"]),
            f"{told['latency']['dense_times']:.1f}x (batch 1, {told['latency']['on']})",
            f"`xzoo fit --config {told['recipe'].removeprefix('recipes/').removesuffix('.yaml')}`",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def tuned():
    """Of recipes/finetune.csv: a row for a checkpoint, a data set and a number of its images; runs are its seeds."""
    with open(README.parent / "recipes" / "finetune.csv", newline="", encoding="utf-8") as file:
        runs = list(csv.DictReader(file))
    found = {}  # what is compared -> pretrained or not -> top-1 of each seed
    for run in runs:
        what = run["model"], run["data"], int(run["train_images"]), float(run["minutes"]), int(run["n_val"]), run["on"]
        found.setdefault(what, {"true": [], "false": []})[run["pretrained"]].append(float(run["top1"]))
    lines = ["| checkpoint | images to learn from | fine-tuned, % | from scratch, % | each | on |", f"|{' --- |' * 6}"]
    for (model, data, images, minutes, judged, on), top1 in found.items():
        told = [f"{mean(top1[key]):.2f} ± {stdev(top1[key]):.2f}" for key in ("true", "false")]
        times = f"{minutes:g} min, {len(top1['true'])} runs, {judged} test images"
        lines.append(f"| `{model}` | {images:,} of {data} | {' | '.join(told)} | {times} | {on} |")
    return "\n".join(lines) + "\n"


def between(text, marks):
    return text.split(marks[0])[1].split(marks[1])[0]


@pytest.mark.slow
def test_the_table_of_models_is_counted():
    assert between(README.read_text(encoding="utf-8"), MODELS) == table()


def test_the_results_are_those_of_the_runs():
    assert between(README.read_text(encoding="utf-8"), RESULTS) == results()


def test_the_checkpoints_are_those_of_the_folders():
    assert between(README.read_text(encoding="utf-8"), TRAINED) == trained()


def test_the_table_of_fine_tuning_is_the_file_s():
    assert between(README.read_text(encoding="utf-8"), TUNED) == tuned()


def test_the_table_of_speed_is_the_file_s():
    lines = speed().splitlines()
    with open(README.parent / "recipes" / "speed.csv", newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["part"] == "model"]
    names = dict.fromkeys(row["what"].partition(", ")[0] for row in rows)
    assert [line.split("`")[1] for line in lines[2:-2]] == list(names)
    for line, name in zip(lines[2:-2], names, strict=True):
        told = re.findall(r"([\d.e+]+)x", line.partition("|")[2].partition("|")[2])
        medians = [float(row["median"]) for row in rows if row["what"].startswith(f"{name}, ")]
        assert len(medians) == 9  # three cases against dense, masked and group
        for text, value in zip(told[1:10], medians, strict=True):
            assert float(text) == pytest.approx(value, abs=0.006)
    readme = README.read_text(encoding="utf-8")
    assert between(readme, SPEED) == speed()


def test_the_python_runs(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    with quiet():
        for code in blocks:
            exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "weights" in printed
    assert "1 of 2 layers expanded" in printed


@pytest.mark.parametrize("path", re.findall(r"\]\((\.github/[^)]*)\)", README.read_text(encoding="utf-8")))
def test_the_pictures_are_there(path):
    assert (README.parent / path).stat().st_size > 1000


if __name__ == "__main__":
    text = README.read_text(encoding="utf-8")
    for (begin, end), new in (
        (MODELS, table()),
        (RESULTS, results()),
        (TRAINED, trained()),
        (SPEED, speed()),
        (TUNED, tuned()),
    ):
        text = text.split(begin)[0] + begin + new + end + text.split(end)[1]
    README.write_text(text, encoding="utf-8")
    sys.exit(0)
