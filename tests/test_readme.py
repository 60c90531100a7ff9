"""What the README says is so: its Python runs, its table of models is counted, its results are those of the runs.

`python tests/test_readme.py` writes the tables anew.
"""

import re
import sys
from pathlib import Path

import pytest

import xzoo
from xzoo.train.results import DATASETS, aggregate, read
from xzoo.train.run import quiet

README = Path(__file__).parent.parent / "README.md"
MODELS = "<!-- models: python tests/test_readme.py -->\n", "<!-- end of models -->"
RESULTS = "<!-- results: python tests/test_readme.py -->\n", "<!-- end of results -->"


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


def between(text, marks):
    return text.split(marks[0])[1].split(marks[1])[0]


def test_the_table_of_models_is_counted():
    assert between(README.read_text(encoding="utf-8"), MODELS) == table()


def test_the_results_are_those_of_the_runs():
    assert between(README.read_text(encoding="utf-8"), RESULTS) == results()


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
    for (begin, end), new in ((MODELS, table()), (RESULTS, results())):
        text = text.split(begin)[0] + begin + new + end + text.split(end)[1]
    README.write_text(text, encoding="utf-8")
    sys.exit(0)
