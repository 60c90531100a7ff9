"""What the README says is so: its Python runs and its table is counted.

`python tests/test_readme.py` writes the table anew.
"""

import re
import sys
from pathlib import Path

import pytest

import xzoo

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- models: python tests/test_readme.py -->\n", "<!-- end of models -->"


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


def test_the_table_of_models_is_counted():
    assert README.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0] == table()


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL))
def test_the_python_runs(code, capsys):
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "weights" in printed
    assert "1 of 2 layers expanded" in printed


@pytest.mark.parametrize("path", re.findall(r"\]\((\.github/[^)]*)\)", README.read_text(encoding="utf-8")))
def test_the_pictures_are_there(path):
    assert (README.parent / path).stat().st_size > 1000


if __name__ == "__main__":
    text = README.read_text(encoding="utf-8")
    README.write_text(text.split(BEGIN)[0] + BEGIN + table() + END + text.split(END)[1], encoding="utf-8")
    sys.exit(0)
