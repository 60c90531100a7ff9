"""Write the tables of README.md and of the folders' README files: `python .github/readme.py`.

With a folder, `python .github/readme.py .github/images`, draw the pictures there instead.

A table stands between `<!-- name: python .github/readme.py -->` and `<!-- end of name -->`.
tests/test_readme.py fails where one is out of date.
"""

import csv
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

import xzoo
from xzoo import theory, weights
from xzoo.datasets import DATASETS
from xzoo.drawing import (
    COLOUR,
    INK,
    LABEL,
    MARKER,
    draw_growth,
    draw_histogram,
    draw_stacks,
    save,
)
from xzoo.lettering import Picture
from xzoo.results.runs import aggregate, read
from xzoo.theory import Graph

ROOT = Path(__file__).parent.parent


def weights_short() -> list[list[str]]:
    rows = [["model", "data set", "top-1, %", "weights", "MACs", "file"]]
    for name, card in _cards().items():
        architecture, _, tag = name.partition(".")
        if weights.find(architecture).tag != tag:  # what a bare name loads is another one
            continue
        row = [f"`{name}`", DATASETS[card["dataset"]].title, f"{card['top1']:.2f}"]
        rows.append(
            [*row, _millions(card["weights"], 2), _millions(card["macs"]), _megabytes(card)]
        )
    return rows


def weights_full() -> list[list[str]]:
    """What metrics.json in the folders of hub_cards says."""
    rows = [["checkpoint", "evaluated on", "top-1, %", "runs", "weights", "MACs", "file"]]
    rows[0] += ["sigma_2 / bound", "dense twin's time", "recipe"]
    for name, card in _cards().items():
        runs, latency = card["runs"], card["latency"]
        counted = str(runs["n"]) if runs["sd"] is None else f"{runs['n']}: {_spread(runs)}"
        low, *_, high = card["sigma_2"]
        recipe = card["recipe"].removeprefix("recipes/").removesuffix(".yaml")
        row = [
            f"`{name}`",
            f"{card['n_val']:,} {card['split']} images, {DATASETS[card['dataset']].title}",
        ]
        row += [
            f"{card['top1']:.2f}",
            counted,
            _millions(card["weights"], 2),
            _millions(card["macs"]),
        ]
        row += [_megabytes(card), f"{low:.2f} to {high:.2f}"]
        rows.append([*row, f"{latency['dense_times']:.1f}x ({latency['on']})", f"`{recipe}`"])
    return rows


def fine_tuning() -> list[list[str]]:
    """recipes/finetune.csv: a row for a checkpoint, a data set, and a number of its images."""
    # what is compared -> pretrained -> top-1 of each seed
    groups: dict[tuple, dict[str, list[float]]] = {}
    for run in _csv("finetune.csv"):
        key = (
            run["model"],
            run["data"],
            int(run["train_images"]),
            float(run["minutes"]),
            run["n_val"],
            run["on"],
        )
        groups.setdefault(key, {"true": [], "false": []})[run["pretrained"]].append(
            float(run["top1"])
        )
    rows = [
        [
            "checkpoint",
            "training images",
            "fine-tuned, %",
            "from scratch, %",
            "runs",
            "test images",
            "each",
            "on",
        ]
    ]
    for (model, data, images, minutes, n_val, machine), top1 in groups.items():
        row = [f"`{model}`", f"{images:,} of {data}"]
        for pretrained in ("true", "false"):
            row.append(f"{mean(top1[pretrained]):.2f} ± {stdev(top1[pretrained]):.2f}")
        rows.append([*row, str(len(top1["true"])), n_val, f"{minutes:g} min", machine])
    return rows


def models() -> list[list[str]]:
    """Counts of every model at its own image size, beside those of its dense twin."""
    rows = [["model", "px", "weights", "MACs", "fewer weights", "fewer MACs"]]
    for name in xzoo.list_models():
        if name == "x_timm":
            continue
        model = xzoo.create_model(name, device="meta")
        ours, size = xzoo.profile(model), model.pretrained_cfg["input_size"][-1]
        dense = xzoo.profile(xzoo.create_model(name, device="meta", compression=1))
        row = [f"`{name}`", str(size), _millions(ours.weights, 2), _millions(ours.macs)]
        rows.append(
            [*row, f"{dense.weights / ours.weights:.1f}x", f"{dense.macs / ours.macs:.1f}x"]
        )
    return rows


def results() -> list[list[str]]:
    """recipes/results.csv: runs of one recipe together."""
    rows = [["recipe", "data set", "weights", "MACs", "epochs", "top-1, %", "runs", "on"]]
    for each in aggregate(read(ROOT / "recipes" / "results.csv")):
        run = each.row
        top1 = f"{each.mean:.2f}" if each.sd is None else f"{each.mean:.2f} ± {each.sd:.2f}"
        recipe = run.recipe.removeprefix("recipes/").removesuffix(".yaml")
        row = [f"`{recipe}`", f"{DATASETS[run.dataset].title}, {run.split}"]
        row += [_millions(run.weights, 2), _millions(run.macs), str(run.epoch_reported), top1]
        rows.append([*row, str(each.n), run.device])
    return rows


def speed_short(file: str) -> list[list[str]]:
    rows = [
        [
            "model",
            "fewer MACs",
            "inference, batch 1",
            "training step",
            "group convolution, training",
        ]
    ]
    for name, cases in speed_cases(file).items():
        if name in ("x_vgg16_c16", "x_vgg16_2", "x_resnet50_c4", "x_mobilenet050_c8"):
            one, _, training = cases
            rows.append(
                [f"`{name}`", f"{one['ideal']}x", _times(one, "dense"), _times(training, "dense")]
            )
            rows[-1].append(_times(training, "group"))
    return rows


def speed_full(file: str) -> list[list[str]]:
    forms = {
        "dense": "dense twin",
        "dense in torch": "dense twin in torch",
        "masked": "masked dense twin",
        "group": "group convolution",
    }
    models = speed_cases(file)
    if not any("dense in torch" in case for cases in models.values() for case in cases):
        del forms["dense in torch"]
    rows = [["model", "case", "fewer MACs", *forms.values()]]
    for name, cases in models.items():
        for case in cases:
            row = [f"`{name}`", case["case"], f"{case['ideal']}x"]
            rows.append([*row, *(_times(case, form) for form in forms)])
    return rows


def machine(file: str) -> str:
    row = next(row for row in _csv(file) if row["part"] == "model")
    return f"{row['machine'].partition(', load')[0]}; torch {row['torch']}."


def speed_cases(file: str) -> dict[str, list[dict[str, str]]]:
    """Of each model in a file of recipes: inference of one image and of many, and a training step.

    Each has the case by name, the ratio of MACs, and the time of each other form divided by ours.
    """
    found: dict[str, dict[str, dict[str, str]]] = {}
    for row in _csv(file):
        if row["part"] == "model":
            name, _, case = row["what"].partition(", ")
            times = found.setdefault(name, {}).setdefault(case, {"case": case})
            times[row["against"]] = row["median"]
            if row["against"] == "dense":
                times["ideal"] = row["ideal"]
    return {name: sorted(cases.values(), key=_order) for name, cases in found.items()}


def _order(case: dict[str, str]) -> tuple[bool, int]:
    return "training" in case["case"], int(case["case"].split()[-1])


def _csv(name: str) -> list[dict[str, str]]:
    with open(ROOT / "recipes" / name, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _cards() -> dict[str, dict]:
    found = {}
    for name in weights.entries():
        text = (ROOT / "hub_cards" / name / "metrics.json").read_text(encoding="utf-8")
        found[name] = json.loads(text)
    return found


def _times(case: dict[str, str], form: str) -> str:
    return f"{float(case[form]):.2f}x" if form in case else ""


def _millions(count: float, digits: int = 0) -> str:
    return f"{count / 1e6:,.{digits}f}M"


def _megabytes(card: dict) -> str:
    return f"{card['bytes'] / 1e6:.1f} MB"


def _spread(runs: dict) -> str:
    return f"{runs['top1']:.2f} ± {runs['sd']:.2f}"


def _markdown(rows: list[list[str]]) -> str:
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _speed(rows: Callable[[str], list[list[str]]], file: str) -> str:
    return f"{_markdown(rows(file))}\n{machine(file)}\n"


# Where each table stands: page, name of the mark, function.
TABLES = (
    ("README.md", "weights", lambda: _markdown(weights_short())),
    ("README.md", "speed", lambda: _speed(speed_short, "speed.csv")),
    ("hub_cards/README.md", "weights", lambda: _markdown(weights_full())),
    ("hub_cards/README.md", "finetune", lambda: _markdown(fine_tuning())),
    ("recipes/README.md", "results", lambda: _markdown(results())),
    ("xzoo/models/README.md", "models", lambda: _markdown(models())),
    ("xzoo/ops/README.md", "speed", lambda: _speed(speed_full, "speed.csv")),
    ("xzoo/ops/README.md", "speed_avx2", lambda: _speed(speed_full, "speed_avx2.csv")),
)


def marks(name: str) -> tuple[str, str]:
    return f"<!-- {name}: python .github/readme.py -->\n", f"<!-- end of {name} -->"


def write_tables() -> None:
    for page, name, table in TABLES:
        text = (ROOT / page).read_text(encoding="utf-8")
        begin, end = marks(name)
        head, tail = text.split(begin)[0], text.split(end)[1]
        (ROOT / page).write_text(f"{head}{begin}{table()}{end}{tail}", encoding="utf-8")


# ---- pictures


def pictures() -> dict[str, Figure]:
    """The pictures of README.md and theory.md, by name; half a minute."""
    return {
        "graph": _picture_graph(),
        "spectrum": _picture_spectrum(),
        "reach": _picture_reach(),
        "mixing": _picture_mixing(),
    }


def _picture_graph() -> Figure:
    n, degree, layers = 16, 4, 3
    return draw_stacks(
        {
            "dense": list(theory.stack("biregular", n, n, layers)),
            "group": list(theory.stack("group", n, degree, layers)),
            "expander": list(theory.stack("biregular", n, degree, layers)),
        },
        output=6,
    )


def _picture_spectrum() -> Figure:
    """Left: all values of one graph. Right: the second value against compression, for kinds and
    shares.
    """
    n = 512
    figure = Picture(11, 4.4)
    left, right = figure.subplots(1, 2)
    draw_histogram(left, Graph.sample("biregular", n, n, 16))
    left.set_title("One layer, 512 to 512 channels, degree 16", fontsize=12)
    compressions = [2, 4, 8, 16, 32, 64]
    lines = [("group", 1), ("random", 1), ("biregular", 1), ("biregular", 4)]
    for kind, share in lines:
        label = LABEL[kind] if share == 1 else f"{LABEL[kind]}, share {share}"
        if kind == "group":
            label = "group, group + shuffle"
        found = [theory.spectrum(Graph.sample(kind, n, n, n // c, share)) for c in compressions]
        right.plot(
            compressions,
            [each.normalised for each in found],
            color=COLOUR[kind],
            linestyle={"group": "-", "random": "none", "biregular": "-" if share == 1 else "--"}[
                kind
            ],
            marker=MARKER[kind],
            # The random graphs lie under the biregular ones: a larger, hollow marker shows both.
            markerfacecolor="white"
            if (kind, share) in (("random", 1), ("biregular", 4))
            else COLOUR[kind],
            markersize=9 if kind == "random" else 6,
            label=label,
        )
        if kind == "biregular":
            bound = [each.bound / each.first for each in found]
            name = "smaller of the two bounds" if share == 1 else None
            right.plot(compressions, bound, color=INK, linewidth=1.3, linestyle=":", label=name)
    right.set_xscale("log", base=2)
    right.set_xticks(compressions, [str(c) for c in compressions])
    right.set(
        xlabel="compression, inputs / degree",
        ylabel="second / first singular value",
        ylim=(0, 1.05),
    )
    right.set_title("The smaller, the better one layer mixes (512 channels)", fontsize=12)
    right.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(0, 0.93))
    return figure


def _picture_reach() -> Figure:
    """Left: growth for the kinds. Right: sensitivity depth against width, over the least possible."""
    figure = Picture(11, 4.4)
    left, right = figure.subplots(1, 2)
    kinds = ("biregular", "shuffle", "random", "group")
    draw_growth(left, {kind: theory.reach(theory.stack(kind, 512, 4, layers=10)) for kind in kinds})
    left.set_title("512 channels, degree 4", fontsize=12)
    widths = [2**e for e in range(6, 13)]
    for degree, marker, colour in (
        (3, "o", "#08306b"),
        (4, "s", COLOUR["biregular"]),
        (8, "^", "#6baed6"),
    ):
        depths = [theory.sensitivity_depth(theory.stack("biregular", n, degree)) for n in widths]
        line = [depth or math.nan for depth in depths]
        right.plot(widths, line, marker=marker, color=colour, label=f"degree {degree}")
        right.plot(widths, [math.log(n, degree) for n in widths], ":", color=colour, linewidth=1.3)
    right.plot([], [], ":", color=INK, label="least possible, log n / log degree")
    right.set_xscale("log", base=2)
    right.set_xticks(widths, [f"{n:,}" for n in widths])
    right.set(xlabel="channels", ylabel="layers", ylim=(0, None))
    right.set_title("Expander layers until all is connected", fontsize=12)
    right.legend(frameon=False, fontsize=9)
    return figure


def _picture_mixing() -> Figure:
    """How far the edges between two sets of k channels are from expected: random sets, and the
    worst found.
    """
    n, degree = 512, 16
    figure = Picture(7.5, 4.6)
    axes = figure.subplots()
    draw = np.random.default_rng(0)
    sizes = np.arange(degree // 2, n, degree // 2)
    for kind, worst in (
        ("group", "consecutive channels"),
        ("biregular", "sets by singular vectors"),
    ):
        graph = Graph.sample(kind, n, n, degree)
        outputs, inputs = (
            _adverse_order(graph) if kind == "biregular" else (np.arange(n), np.arange(n))
        )
        adverse = [theory.mixing(graph, inputs[:size], outputs[:size]) for size in sizes]
        chance = [
            theory.mixing(graph, draw.permutation(n)[:size], draw.permutation(n)[:size])
            for size in sizes
        ]
        colour, name = COLOUR[kind], LABEL[kind]
        bound = [each.sharp for each in adverse]
        second = theory.spectrum(graph).second
        axes.plot(
            sizes, bound, color=colour, linewidth=1.4, label=f"{name}: bound, lambda = {second:.1f}"
        )
        for found, fill, label in ((adverse, colour, worst), (chance, "white", "random sets")):
            deviation = [abs(each.edges - each.expected) for each in found]
            axes.scatter(
                sizes,
                deviation,
                14,
                fill,
                marker=MARKER[kind],
                edgecolors=colour,
                linewidths=0.8,
                label=label,
            )
    axes.set(
        xlim=(0, n), ylim=(0, None), xlabel="k, channels in each set", ylabel="|edges - expected|"
    )
    axes.set_title("Edges between k inputs and k outputs, 512 channels, degree 16", fontsize=12)
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=2,
        frameon=False,
        fontsize=9,
    )
    return figure


def _adverse_order(graph: Graph) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Outputs and inputs by their entries in the second singular vectors: the first k of each mix
    badly.
    """
    left, _, right = np.linalg.svd(np.repeat(graph.matrix(), graph.share, axis=0))
    return np.argsort(-left[:, 1]), np.argsort(-right[1])


if __name__ == "__main__":
    if len(sys.argv) > 1:
        for path in save(pictures(), sys.argv[1]):
            print(path)
    else:
        write_tables()
