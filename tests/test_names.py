"""Names in any script and any encoding: in lines, in files, in pictures, on any terminal, in cards."""

import csv
import errno
import io
import json
import os
import re
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from rich.console import Console

from xzoo import cli, drawing, theory
from xzoo.data.photos import ImageFolder
from xzoo.data.scan import ImageData, Images, read, split_by_name
from xzoo.data.sources import Item
from xzoo.doctor import doctor
from xzoo.errors import DataError, XzooError
from xzoo.hub import check, export, save
from xzoo.models import create_model
from xzoo.names import code, encoded, escaped, markdown, say, shown, to_yaml
from xzoo.results import figures
from xzoo.results.compare import compare
from xzoo.results.runs import COLUMNS
from xzoo.train import pictures
from xzoo.train.classify import Prediction, write_csv
from xzoo.train.finetune import _run_name, finetune

# No font has these two (private use), on any machine.
UNKNOWN = ("\U0010fff0", "\U0010fff1")
HARD = [
    *(
        "cat",
        "c\u0430t",
        "caf\u00e9",
        "cafe\u0301",
        "dog",
        "dog ",
        "",
        " ",
        "#3",
        '"#3"',
        "a_$x^$",
        "$5$_",
        r"\frac{",
    ),
    *(
        "a\nb",
        r"a\nb",
        "tab\there",
        "\x1b[31mred",
        "a\u200bb",
        "ab",
        "a\u2028b",
        "\ufeffbom",
        "x" * 40 + "1",
    ),
    *(
        "x" * 40 + "2",
        "x" * 30 + "1" + "x" * 30,
        "x" * 30 + "2" + "x" * 30,
        "\u732b",
        "\u72ac",
        "\U0001f436",
    ),
    *(
        "\u05e9\u05dc\u05d5\u05dd",
        "\u0939\u093f\u0928\u094d\u0926\u0940",
        *UNKNOWN,
        "caf\udce9",
        "half \ud83d",
    ),
    *(
        "yes",
        "null",
        "1e3",
        "0o17",
        "12:30:45",
        "con",
        "-rf",
        "[red]x[/]",
        ":cat:",
        "~",
        "_x",
        "a|b",
        "con.",
    ),
]
TINY = {
    "model": "test_resnet",
    "expand": 4,
    "pretrained": False,
    "img_size": 32,
    "batch_size": 8,
    "device": "cpu",
}


@pytest.fixture
def drawn(monkeypatch):
    """All figures that are written, as they were drawn."""
    figures = []
    write = pictures._write

    def keep(figure, path):
        write(figure, path)
        figures.append(figure)

    monkeypatch.setattr(pictures, "_write", keep)
    return figures


def texts(figure) -> list[str]:
    return [
        text.get_text() for text in figure.findobj(match=lambda artist: hasattr(artist, "get_text"))
    ]


def squares(count: int) -> list[Image.Image]:
    return [Image.new("RGB", (8, 8), (i * 5 % 256, 90, 200)) for i in range(count)]


# ---- in a line, in a file


@pytest.mark.parametrize("name", HARD)
def test_a_name_is_one_line_of_what_can_be_seen_and_no_two_are_one(name):
    for line in (shown(name), escaped(name), shown(name, "ascii"), shown(name, "cp1252")):
        assert len(f"<{line}>".splitlines()) == 1 and not any(
            unicodedata.category(c) in ("Cc", "Cs") for c in line
        )
    assert shown(name, "ascii").isascii()
    assert escaped(name).encode("latin-1", "backslashreplace").decode("unicode_escape") == name
    assert len({escaped(other) for other in HARD}) == len(HARD)


def test_what_is_ordinary_stays_as_it_is():
    for name in (
        "photo 1.jpg",
        "caf\u00e9",
        "\u732b",
        "C:\\photos\\a.png",
        "\u05e9\u05dc\u05d5\u05dd",
        "a\u200db",
    ):
        assert shown(name) == name
    assert shown("caf\udce9.png") == r"caf\udce9.png" and escaped("a\\n\n") == r"a\\n\n"


def test_bytes_that_are_no_utf8_survive():
    name = os.fsdecode(b"caf\xe9.png")
    assert encoded(name) == b"caf\xe9.png" and encoded("caf\u00e9") == "caf\u00e9".encode()
    assert encoded("half \ud83d") != encoded("half ?")


@pytest.mark.slow
def test_a_locale_of_ascii_reads_the_same_names(tmp_path, make_folder):
    root = make_folder(("\u732b", "caf\u00e9"), each=3)
    ask = (
        "import sys; from xzoo.data.scan import read; d = read(sys.argv[1]); print(d.classes, "
        "d.fingerprint())"
    )
    bare = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", ask, os.fsencode(root)]
    told = subprocess.run(
        command, env=bare | {"PYTHONIOENCODING": "utf-8"}, capture_output=True, check=True
    )
    data = read(root)
    assert told.stdout.decode() == f"{data.classes} {data.fingerprint()}\n"
    assert shown("\udce7\udc8c\udcab") == "\u732b" and shown("half \ud83d") == r"half \ud83d"


def test_yaml_and_csv_and_json_give_names_back(tmp_path):
    values = {"classes": HARD, "numbers": [1, 1e3, 1e16, -0.5, 2e-7, None, True, float("inf")]}
    text = to_yaml(values)
    assert yaml.safe_load(text) == values
    text.encode()
    # As another reader, of YAML 1.2, takes them: what it would take for a number is in quotes.
    plain = [line[2:] for line in to_yaml(["1e3", "0o17", ".5E2", "-3.e+4", "1_000"]).splitlines()]
    assert all(word[0] in "'\"" for word in plain[:4])
    predictions = [
        Prediction(f"{name}.png", [(name, 0.5)], f"not {name}")
        for name in HARD
        if name != "half \ud83d"
    ]
    write_csv(predictions, tmp_path / "p.csv", 1)
    with open(tmp_path / "p.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    assert [row["class1"] for row in rows] == [p.classes[0][0] for p in predictions]
    assert [row["image"] for row in rows] == [p.image for p in predictions]
    assert b"caf\xe9.png" in (tmp_path / "p.csv").read_bytes()


def test_the_hash_of_the_images_is_that_of_before_and_takes_any_name():
    def data(names):
        images = Images([Item(name, 0, b"") for name in names])
        return ImageData(["ant", "caf\u00e9"], images, images, True, [], [], False, 8)

    assert data(["ant/1.png", "caf\u00e9/2.png"]).fingerprint() == "fd127432e6fafce0"
    assert data(["ant/caf\udce9.png"]).fingerprint() != data(["ant/caf\udce8.png"]).fingerprint()
    assert data(["half \ud83d"]).fingerprint() != data(["half "]).fingerprint()
    train, val = split_by_name([Item(name, 0, b"") for name in HARD])
    assert len(train) + len(val) == len(HARD)


def test_run_folders_of_data_without_letters():
    names = [
        _run_name(data, "x_resnet18", None)
        for data in ("\U0001f431", "\U0001f436", "...", "\u732b", "my photos")
    ]
    assert len(set(names)) == 5 and all(name[0] not in ".-_" for name in names)
    assert names[3:] == ["\u732b-x_resnet18", "my_photos-x_resnet18"]
    assert len(encoded(_run_name("\u732b" * 80, "m" * 250, 4))) < 200


def test_the_same_letters_in_two_forms_of_unicode_are_told(make_folder):
    nfc, nfd = "caf\u00e9", "cafe\u0301"
    (remark,) = read(make_folder((nfc, nfd, "tea"), each=3)).remarks
    assert (
        ascii(nfc) in remark
        and ascii(nfd) in remark
        and "put their images into one folder" in remark
    )
    assert read(make_folder((nfc, "tea"), each=3, where="one")).remarks == []
    make_folder((nfc, "tea"), each=3, where="parts/train")
    root = make_folder((nfd, "tea"), each=3, where="parts/val").parent
    with pytest.raises(DataError, match="same letters in two forms of Unicode; rename") as caught:
        read(root)
    assert ascii(nfc) in str(caught.value) and ascii(nfd) in str(caught.value)


# ---- on terminals


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_a_console_says_any_name_in_one_line(encoding):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, errors="strict", newline="\n")
    console = Console(file=stream)
    for name in HARD:
        say(console, f"class {name} found")
    stream.flush()
    lines = raw.getvalue().decode(encoding).split("\n")
    assert len(lines) == len(HARD) + 1
    assert (
        "class [red]x[/] found" in lines
        and "class :cat: found" in lines
        and r"class \x1b[31mred found" in lines
    )
    assert (r"class \u732b found" in lines) == (encoding != "utf-8")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_every_stream_takes_what_commands_print(encoding, tmp_path, monkeypatch):
    """With an error handler that raises, as Python's own for standard output."""
    names = ["caf\u00e9", "\u732b", "a\nb"]
    save(
        create_model("x_mobilenet050_c4", num_classes=3),
        tmp_path / "model",
        names,
        {"input_size": (3, 32, 32)},
    )
    photos = tmp_path / "photos \u72ac"
    photos.mkdir()
    Image.new("RGB", (9, 9)).save(photos / "\u732b\n.png")
    Image.new("RGB", (9, 9)).save(os.fsencode(photos) + b"/caf\xe9.png")
    (photos / "broken\n\u732b.png").write_bytes(b"x")
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="\n") for _ in range(2))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        assert cli.main(["classify", str(tmp_path / "model"), str(photos)]) == 0
        assert (
            cli.main(
                [
                    "classify",
                    str(tmp_path / "model"),
                    str(photos),
                    "--csv",
                    f"{tmp_path}/\u732b.csv",
                ]
            )
            == 0
        )
        assert cli.main(["classify", str(tmp_path / "model"), f"{tmp_path}/no\n\u732b.png"]) == 2
    out.flush()
    err.flush()
    printed, told = (stream.buffer.getvalue().decode(encoding) for stream in (out, err))
    assert printed.count("\n") == 3 and r"caf\udce9.png: " in printed and r"a\nb " in printed
    assert told.count("\n") == 3 and told.startswith("xzoo: not read: ") and r"broken\n" in told
    assert (tmp_path / "\u732b.csv").read_bytes().count(b"caf\xe9.png") == 1


def test_behind_two_dashes_are_names(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["classify", "x_resnet18", "--", "--no-such-file.png"]) == 2
    assert "--no-such-file.png does not exist" in capsys.readouterr().err
    (tmp_path / "-rf.png").write_bytes(b"x")
    assert cli.main(["classify", "x_resnet18", "-rf.png"]) == 2
    assert (
        "-rf.png is taken for an option; write ./-rf.png, or -- before the names"
        in capsys.readouterr().err
    )


# ---- in pictures


@pytest.mark.slow
def test_no_two_classes_look_the_same(tmp_path, drawn):
    """And nothing warns: a warning is an error here."""
    n = len(HARD)
    pictures.confusion(
        np.eye(n, dtype=np.int64), HARD, tmp_path / "confusion.png", f"a_$x^$ {UNKNOWN[0]}: 50.00 %"
    )
    order = list(range(n))
    pictures.samples(
        squares(n),
        order,
        [*order[1:], 0],
        [0.5] * n,
        HARD,
        tmp_path / "samples.png",
        "$x^$: 50.00 %",
    )
    names = [label.get_text() for label in drawn[0].axes[0].get_yticklabels()]
    assert len(names) == n == len(set(names)) and all(name.strip() for name in names)
    assert {"a_$x^$", "$5$_", r"\frac{", r"\x1b[31mred", '"dog "', '""', "_x", "[red]x[/]"} <= set(
        names
    )
    assert names[0] == "#1 cat" and names[1] == "#2 c\u0430t"
    assert [f"#{HARD.index(name) + 1}" for name in UNKNOWN] == [
        names[HARD.index(name)] for name in UNKNOWN
    ]
    assert max(map(len, names)) <= 22 + len("#99 ")
    listed = (tmp_path / "classes.txt").read_text(encoding="utf-8").splitlines()
    assert [line.partition("\t")[0] for line in listed] == [f"#{i}" for i in range(1, n + 1)]
    back = [
        line.partition("\t")[2].encode("latin-1", "backslashreplace").decode("unicode_escape")
        for line in listed
    ]
    assert back == HARD
    assert any("classes.txt" in text for text in texts(drawn[0])) and any(
        "classes.txt" in t for t in texts(drawn[1])
    )
    assert "a_$x^$ \\U0010fff0: 50.00 %" in texts(drawn[0])


def test_ordinary_classes_are_their_names_alone(tmp_path, drawn):
    classes = ["ant", "bee", "caf\u00e9", "42", "Stra\u00dfe"]
    pictures.confusion(
        np.eye(5, dtype=np.int64), classes, tmp_path / "confusion.png", "run: 50.00 %"
    )
    assert [label.get_text() for label in drawn[0].axes[0].get_yticklabels()] == classes
    assert [path.name for path in tmp_path.iterdir()] == ["confusion.png"]


def test_dollars_are_drawn(tmp_path):
    """Not read as TeX, which draws "5_" for the second."""
    for number, name in enumerate(("5_", "$5$_", r"\$5\$_")):
        pictures.curves(
            [{"step": 0.0, "epoch": 0.0, "val/loss": 1.0}], tmp_path / f"{number}.png", name
        )
    seen = {(tmp_path / f"{number}.png").read_bytes() for number in range(3)}
    assert len(seen) == 3


def test_a_long_name_of_a_run_leaves_room_for_its_result(tmp_path, drawn):
    pictures.curves(
        [{"step": 0.0, "epoch": 0.0, "val/loss": 1.0}],
        tmp_path / "c.png",
        "r" * 250 + ": 50.00 % of 8",
    )
    title = next(text for text in texts(drawn[0]) if "50.00" in text)
    assert title.endswith(": 50.00 % of 8") and len(title) <= 112


FONT = """
import sys
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
pen = TTGlyphPen(None)
for x in (0, 400):
    pen.moveTo((x, 0)); pen.lineTo((x, 700)); pen.lineTo((x + 300, 700)); pen.closePath()
names = [".notdef", "cat", "dog"]
other = TTGlyphPen(None)
other.moveTo((0, 0)); other.lineTo((500, 900)); other.lineTo((900, 0)); other.closePath()
font = FontBuilder(1000, isTTF=True)
font.setupGlyphOrder(names)
font.setupCharacterMap({0x732B: "cat", 0x72AC: "dog"})
font.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "cat": pen.glyph(), "dog": other.glyph()})
font.setupHorizontalMetrics({name: (1000, 0) for name in names})
font.setupHorizontalHeader(ascent=800, descent=-200)
font.setupNameTable({"familyName": "Two Pets", "styleName": "Regular"})
font.setupOS2()
font.setupPost()
font.save(sys.argv[1])
"""
DRAW = """
import sys, warnings
warnings.simplefilter("error")
import numpy as np
from xzoo.lettering import class_labels
from xzoo.train import pictures
classes = ["\\u732b", "\\u72ac", "ant"]
pictures.confusion(np.eye(3, dtype=int), classes, __import__("pathlib").Path(sys.argv[1]), "\\u732b: 1 %")
print(ascii(class_labels(classes, 18)))
"""


@pytest.mark.slow
def test_a_font_that_is_installed_later_is_found(tmp_path):
    """matplotlib keeps a list of fonts, in which the new one is not."""
    place = tmp_path / "data" / "fonts"
    place.mkdir(parents=True)
    (place / "broken.ttf").write_bytes(b"x")
    subprocess.run([sys.executable, "-c", FONT, str(place / "pets.ttf")], check=True)
    environment = os.environ | {"XDG_DATA_HOME": str(tmp_path / "data"), "MPLBACKEND": "agg"}
    if sys.platform != "linux":
        pytest.skip("where a user's fonts are on this system is not known here")
    command = [sys.executable, "-c", DRAW, str(tmp_path / "confusion.png")]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert told.stdout == "['\\u732b', '\\u72ac', 'ant']\n", told.stderr
    assert told.stderr == "" and not (tmp_path / "classes.txt").exists()


def test_pictures_of_models_take_any_names(tmp_path):
    graph = theory.Graph.sample("biregular", 8, 8, 4)
    name = f"a_$x^$ {UNKNOWN[0]}"
    figure = drawing.draw_layers(
        {name: theory.spectrum(graph), "b\n": theory.spectrum(graph)}, name
    )
    figure.savefig(tmp_path / "layers.png")
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert labels == ["a_$x^$ \\U0010fff0", "b\\n"] and labels[0] in texts(figure)
    # What begins with an underscore, as attributes of modules do, is in the legend, too.
    figure = drawing.draw_reach(
        {"_conv1": theory.reach(theory.stack("biregular", 8, 4, layers=2))}, name
    )
    figure.savefig(tmp_path / "reach.png")
    assert " _conv1" in [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    drawing.draw_adjacency(graph, name).savefig(tmp_path / "graph.png")
    drawing.draw_stacks({name: [graph]}).savefig(tmp_path / "stacks.png")


def test_labels_of_results_are_measured_as_they_are_drawn():
    point = figures.Point(
        "cifar10", "a_$x^$", "dense", 1, None, 1000, 2000, 90.0, "xzoo", "last", n=1
    )
    figure = figures.draw_accuracy(
        [point, figures.Point(**{**vars(point), "network": UNKNOWN[1], "weights": 9000})]
    )
    figure.draw_without_rendering()
    assert {"a_$x^$", "\\U0010fff1"} <= set(texts(figure))


def test_a_users_matplotlibrc_changes_no_text(tmp_path):
    import matplotlib

    rows = [{"step": 0.0, "epoch": 0.0, "val/loss": 1.0}]
    pictures.curves(rows, tmp_path / "as_ever.png", "a_$x^$: 1 %")
    with matplotlib.rc_context({"text.usetex": True, "font.family": "No Such Font"}):
        pictures.curves(rows, tmp_path / "with_tex.png", "a_$x^$: 1 %")
    assert (tmp_path / "with_tex.png").stat().st_size > 5000


# ---- a run


def test_a_run_on_hard_names_and_pictures_that_cannot_be_drawn(make_folder, tmp_path, capsys):
    names = ["a_$x^$", "a\nb", "caf\udce9", "\u732b"]
    data, run = make_folder(tuple(names), each=8), tmp_path / "run $x^$"
    (data / "a\nb" / "broken\t\n.png").write_bytes(b"x")
    (run / "confusion.png").mkdir(parents=True)  # nothing can be written there
    result = finetune(str(data), epochs=1, out=str(run), workers=0, **TINY)
    told = capsys.readouterr().err.splitlines()
    assert sum("is not drawn" in line for line in told) == 1 and any(
        r"broken\t\n.png" in line for line in told
    )
    assert (run / "curves.png").is_file() and (run / "samples.png").is_file()
    assert (run / "skipped.txt").read_text().startswith("a\\nb/broken\\t\\n.png\t")
    assert len((run / "skipped.txt").read_text().splitlines()) == 1
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    assert config["data"]["classes"] == sorted(names)
    assert json.loads((run / "model" / "config.json").read_text())["label_names"] == sorted(names)
    assert finetune(str(data), epochs=1, out=str(run), workers=0, **TINY) == result
    (run / "result.json").unlink()  # killed before: the same command ends it
    assert finetune(str(data), epochs=1, out=str(run), workers=0, **TINY).top1 == result.top1
    # It can be published without the picture that is not there.
    (run / "curves.png").unlink()
    folder = export(run, tmp_path / "out", timed=False)
    check(folder)
    assert (
        "curves.png" not in (folder / "README.md").read_text()
        and not (folder / "curves.png").exists()
    )


def test_what_a_data_module_tells_is_as_it_is(make_folder, tmp_path, capsys):
    data = make_folder(("a", "a/:cat: \x1b[31m", "b"), each=4)
    ImageFolder(str(data), img_size=32, workers=0)
    told = capsys.readouterr().err
    assert r"a/:cat: \x1b[31m" in told and "\x1b" not in told


def test_errors_and_facts_of_the_machine_are_lines(tmp_path, capsys, monkeypatch):
    """Names of files that the operating system refuses, and of folders that the environment names."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a\nb\x1b[31m")

    monkeypatch.setattr(cli, "_run", full)
    assert cli.main(["list"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.undo()
    monkeypatch.setenv("XZOO_HOME", str(tmp_path / "a\nb\x1b[31m"))
    assert cli.main(["doctor"]) == 0
    told = capsys.readouterr().out
    assert (
        r"a\nb\x1b[31m" in told and "\x1b" not in told and len(told.splitlines()) == len(doctor())
    )


def test_a_table_of_results_is_written_whatever_becomes_of_the_pictures(tmp_path, capsys):
    (tmp_path / "empty.csv").write_text(",".join(COLUMNS) + "\n")
    (tmp_path / "out" / "accuracy_cifar10.png").mkdir(parents=True)
    files = compare(tmp_path / "empty.csv", tmp_path / "out", ["cifar10"])
    assert files[-1].name == "results.md" and files[-1].is_file()
    assert "is not drawn" in capsys.readouterr().err


# ---- in cards


def test_markdown_has_no_meaning_in_a_name():
    assert (
        markdown("x_vgg16_2.cifar10_q75, recipes/a-b.yaml (1)")
        == "x_vgg16_2.cifar10_q75, recipes/a-b.yaml (1)"
    )
    assert (
        markdown("<script>|`*_a_*`[b](c)$x$\n") == r"&lt;script&gt;\|\`\*\_a\_\*\`\[b\](c)\$x\$\\n"
    )
    assert code("a") == "`a`" and code("a`b``c") == "``` a`b``c ```"


def test_a_card_of_a_folder_with_a_hard_name(tmp_path):
    run, name = tmp_path / "run", 'a|b `c` <script>"$x^$"\n\u732b'
    save(create_model("x_mobilenet050_c4", num_classes=3).eval(), run / "model", ["a", "b", "c"])
    (run / "config.yaml").write_text("{}")
    result = {
        "accuracy": 0.5,
        "accuracy5": 1.0,
        "images": 8,
        "seconds": 1.0,
        "epochs": 1,
        "loss": 1.0,
    }
    result |= {"recipe": "<b>|x", "recipe_sha": "0" * 16}
    (run / "result.json").write_text(json.dumps({"run": "r", "model": "m", **result}))
    folder = export(run, tmp_path / name, timed=False)
    check(folder)
    text = (folder / "README.md").read_text(encoding="utf-8")
    prose = re.sub("```python.*?```", "", text.split("---\n", 2)[2], flags=re.DOTALL)
    # what stands in code is not HTML
    prose = re.sub(r"(?<![\\`])(`+)(?!`).*?(?<!`)\1(?!`)", "", prose)
    assert "<script>" not in prose and "&lt;script&gt;" in prose and "<b>" not in prose
    head = yaml.safe_load(text.split("---")[1])
    assert head["model-index"][0]["name"] == shown(name)
    ModelCard.load(folder / "README.md")
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 6 for row in rows)
    loaded = []
    for snippet in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        compile(snippet, "card", "exec")
        loaded += re.findall(r'create_model\((".*")', snippet.split(", pretrained")[0])
    assert [json.loads(each) for each in loaded] == [f"hf-hub:xzoo/{name}"] * 3
    with pytest.raises(XzooError):
        check(tmp_path)
