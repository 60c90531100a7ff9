"""What the README files say is so: their Python runs, their tables are those of the runs, their
links lead somewhere.

`python .github/readme.py` writes the tables anew.
"""

import csv
import importlib.util
import re
from pathlib import Path

import pytest

from xzoo.train.run import quiet

ROOT = Path(__file__).parent.parent
PAGES = (
    "README.md",
    "recipes/README.md",
    "hub_cards/README.md",
    "xzoo/models/README.md",
    "xzoo/ops/README.md",
    ".github/theory.md",
    ".github/CONTRIBUTING.md",
)


def generator():
    spec = importlib.util.spec_from_file_location("readme", ROOT / ".github" / "readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


READ = generator()
PRINTED = {
    "README.md": ("41M MACs", "313M MACs", " ms\n"),
    "xzoo/models/README.md": ("weights", "1 of 2 layers expanded"),
}


@pytest.mark.parametrize(
    ("page", "name"),
    [
        # builds every model twice
        pytest.param(page, name, marks=[pytest.mark.slow] if name == "models" else [])
        for page, name, _ in READ.TABLES
    ],
)
def test_a_table_is_as_written(page, name):
    (table,) = [table for each in READ.TABLES for table in each[2:] if each[:2] == (page, name)]
    begin, end = READ.marks(name)
    text = (ROOT / page).read_text(encoding="utf-8")
    assert text.split(begin)[1].split(end)[0] == table()


@pytest.mark.parametrize("name", ["speed", "speed_avx2"])
def test_a_table_of_speed_is_the_file_s(name):
    """By a reader of its own, since the one above is the generator's."""
    with open(ROOT / "recipes" / f"{name}.csv", newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["part"] == "model"]
    median = {(row["what"], row["against"]): float(row["median"]) for row in rows}
    begin, end = READ.marks(name)
    page = (ROOT / "xzoo/ops/README.md").read_text(encoding="utf-8")
    lines = page.split(begin)[1].split(end)[0].splitlines()
    head, _, *shown = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in lines[:-2]]
    forms = {
        "dense twin": "dense",
        "dense twin in torch": "dense in torch",
        "masked dense twin": "masked",
        "group convolution": "group",
    }
    cells = {}
    for model, case, _, *times in shown:
        for form, text in zip(head[3:], times, strict=True):
            if text:
                cells[f"{model}, {case}", forms[form]] = float(text.removesuffix("x"))
    assert shown and cells == pytest.approx(median, abs=0.006)


@pytest.mark.parametrize("page", PAGES[:4])  # the others have none
def test_the_python_runs(page, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with quiet():
        for code in re.findall(
            r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL
        ):
            exec(compile(code, page, "exec"), {})
    printed = capsys.readouterr().out
    for expected in PRINTED.get(page, ()):
        assert expected in printed


@pytest.mark.parametrize("page", PAGES)
def test_links_within_the_repository_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)]*)\)", text):
        if not link.startswith("http"):
            target = (ROOT / page).parent / link.partition("#")[0]
            assert target.is_file(), f"{page} links to {link}"
            assert target.suffix != ".png" or target.stat().st_size > 1000
