"""`xzoo compare` draws what there is and nothing else, and its table has every row."""

import re

import pytest
from matplotlib.figure import Figure
from PIL import Image
from test_results import DENSE, a_row

from xzoo.errors import XzooError
from xzoo.models import list_models
from xzoo.results import figures, labels, runs, table
from xzoo.results.compare import _of_published, _points, compare, markdown, network
from xzoo.results.runs import aggregate

ALWAYS = ["accuracy_cifar10", "accuracy_cifar100", "accuracy_tiny_imagenet", "accuracy_imagenet"]
ALWAYS += ["rivals_imagenet", "wider_deeper"]
TOP1 = {"biregular": (93.1, 92.5, 91.4), "shuffle": (92.9, 92.0, 90.3), "group": (92.1, 90.4, 87.5)}
KINDS = {"biregular": "expander", "shuffle": "group + shuffle", "group": "group"}


def some_rows():
    """VGG-16 and its rivals on the JPEG form of CIFAR-10, three seeds each; made up."""
    rows = [a_row(**DENSE, seed=seed, top1=93.5 + seed / 10) for seed in range(3)]
    for kind, values in TOP1.items():
        for compression, value in zip((4, 8, 16), values, strict=True):
            facts = {"graph": kind, "compression": compression, "model": f"x_vgg16_c{compression}"}
            size = {"weights": 14_977_728 // compression, "macs": 313_463_808 // compression}
            for seed in range(3):
                rows.append(
                    a_row(**facts, **size, params=15_000_000, seed=seed, top1=value + seed / 10)
                )
    return rows


def write(folder, rows):
    path = folder / "results.csv"
    path.write_text(table.header(runs.Row))
    for row in rows:
        runs.append(path, row)
    return path


def points_of(rows):
    return [*_points(aggregate(rows)), *map(_of_published, runs.published())]


def texts(figure):
    found = figure.findobj(match=lambda artist: hasattr(artist, "get_text"))
    return {text.get_text() for text in found}


# ---- files


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    return compare(write(folder, some_rows()), folder / "new" / "out")


def test_pictures_are_pictures(drawn):
    pictures = [path for path in drawn if path.suffix == ".png"]
    assert sorted(path.stem for path in pictures) == sorted([*ALWAYS, "rivals_cifar10"])
    for path in pictures:
        assert 20_000 < path.stat().st_size < 600_000
        with Image.open(path) as image:
            assert 1000 <= image.width <= 2400
            assert 700 <= image.height <= 1300
    assert {path.name for path in drawn[0].parent.iterdir()} == {path.name for path in drawn}


def test_the_table_has_every_arm_and_every_figure(drawn):
    text = drawn[-1].read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    assert len(lines) == 10 + 110
    assert all(re.sub(r"\\\|", "", line).count("|") == 12 for line in lines)
    (dense,) = (line for line in lines if "| dense | 1 |" in line and "xzoo" in line)
    assert "**93.60** ± 0.10 [93.35, 93.85] | 3 | last, 40 of 40" in dense
    (group,) = (line for line in lines if "| group | 16 |" in line and "xzoo" in line)
    assert group.startswith(
        "| CIFAR-10 as JPEG of quality 75 | VGG-16 (`x_vgg16_c16`) | group | 16 | 4 / 1 | 936 k |"
    )
    assert "3, 1 graph |" in group
    assert "| xzoo, recipes/cifar10/x_vgg16_c8.yaml (01234567), bf16-mixed |" in group
    (published,) = (line for line in lines if "X-VGG16-2" in line)
    assert (
        "| CIFAR-10 | VGG-16, X-VGG16-2 | expander |  |  | 1.14 M (1.15 M) | 110 M | 93.00 | 1 |"
        in published
    )
    (mobile,) = (line for line in lines if "MobileNet-0.5 | group | 16" in line)
    assert "39.03 (error 60.97)" in mobile
    assert "30 runs of ours and 110 published" in text
    notes = {int(n) for n in re.findall(r"<sup>(\d+)</sup>", text)}
    assert (
        notes
        == {int(n) for n in re.findall(r"^(\d+)\. ", text, re.MULTILINE)}
        == set(range(1, len(notes) + 1))
    )


@pytest.mark.slow
def test_an_empty_table_shows_the_published_figures_and_says_so(tmp_path, monkeypatch):
    seen = []

    def draw(points):
        for name, figure in figures.draw(points):
            seen.append(figure)
            yield name, figure

    monkeypatch.setattr("xzoo.results.compare.draw", draw)
    files = compare(write(tmp_path, []), tmp_path / "out")
    assert sorted(path.stem for path in files) == sorted([*ALWAYS, "results"])
    assert "There is no run of ours yet." in files[-1].read_text()
    for figure in seen:
        assert any("no run of ours yet" in text for text in texts(figure))


@pytest.mark.slow
def test_only_the_data_sets_that_were_asked_for(tmp_path):
    files = compare(write(tmp_path, some_rows()), tmp_path, datasets=["cifar10_q75"])
    assert [path.name for path in files] == [
        "accuracy_cifar10.png",
        "rivals_cifar10.png",
        "results.md",
    ]
    text = files[-1].read_text()
    assert "ImageNet" not in text
    with pytest.raises(XzooError, match=r"datasets='cifar': there are cifar10, cifar10_q75"):
        compare(tmp_path / "results.csv", tmp_path, datasets=["cifar"])


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    path = write(tmp_path, [])
    with pytest.raises(XzooError, match=r"cannot write to .*results.csv"):
        compare(path, path)


# ---- what is drawn


def test_what_has_no_data_is_not_drawn():
    assert list(figures.draw([])) == []
    only = list(_points(aggregate(some_rows()[:3])))
    assert [name for name, _ in figures.draw(only)] == ["accuracy_cifar10"]
    assert any(
        "nothing published beside them" in text for text in texts(figures.draw_accuracy(only))
    )


def test_rivals_are_drawn_at_their_means_with_their_intervals():
    rows = some_rows()
    means = {(s.row.graph, s.row.compression): s for s in aggregate(rows)}
    ((title, points),) = figures._rivals(list(_points(aggregate(rows)))).items()
    assert title == "VGG-16 on CIFAR-10 as JPEG of quality 75\n40 epochs at 32 px, batch 512, n = 3"
    axes = figures.draw_rivals({title: points}).axes[0]
    curves = {
        line.get_color(): line
        for line in axes.lines
        if len(line.get_xdata()) == 3 and line.get_linestyle() == "-"
    }
    for kind in TOP1:
        expected = [means[kind, c].mean for c in (4, 8, 16)]
        assert list(curves[figures.COLOURS[kind]].get_ydata()) == pytest.approx(expected)
    ends = sorted(end for c in axes.collections for bar in c.get_segments() for end in bar[:, 1])
    expected = sorted(
        end for (kind, _), s in means.items() if kind != "dense" for end in (s.low, s.high)
    )
    assert ends == pytest.approx(expected)
    assert {*KINDS.values(), "dense 93.60"} <= texts(axes.figure)


def test_other_budgets_and_parts_are_no_rivals():
    rows = some_rows()
    longer = [a_row(graph=g, epochs=200, epoch_reported=200) for g in ("biregular", "group")]
    tuned = [
        a_row(graph=g, split="train_5k", n_val=5000, epochs=7, epoch_reported=7)
        for g in ("biregular", "group")
    ]
    best = [a_row(graph=g, epochs=90, epoch_reported=60) for g in ("biregular", "group")]
    panels = figures._rivals(list(_points(aggregate(rows + longer + tuned + best))))
    assert [title.split("\n")[1] for title in panels] == [
        "40 epochs at 32 px, batch 512, n = 3",
        "200 epochs at 32 px, batch 512, n = 1",
    ]
    text = markdown(aggregate(tuned + best), [])
    assert "part train_5k of 5000" in text
    assert "epoch, 60 of 90" in text


def test_shares_are_curves_of_their_own():
    rows = [a_row(share=s, compression=c) for s in (1, 4) for c in (4, 8)] + [a_row(graph="group")]
    found = texts(figures.draw_rivals(figures._rivals(list(_points(aggregate(rows))))))
    assert {"expander, share 1 / 1", "expander, share 4 / 1", "group"} <= found


def test_jpeg_and_exact_images_are_told_apart():
    points = [
        p
        for p in points_of([*some_rows(), a_row(dataset="cifar10")])
        if figures.exact(p.dataset) == "cifar10"
    ]
    figure = figures.draw_accuracy(points)
    fills = {
        line.get_fillstyle()
        for line in figure.axes[0].lines
        if line.get_marker() not in ("None", "")
    }
    assert fills == {"full", "bottom"}
    for start in (
        "ours on CIFAR-10 as JPEG of quality 75: last epoch, mean and 95 % interval, n = 3",
        "ours on CIFAR-10: last epoch, no interval, n = 1",
        "published on CIFAR-10: best test epoch (12), not stated (10)",
    ):
        assert any(text.startswith(start) for text in texts(figure))
    for chain in figures._chains([p for p in points if p.weights], "weights"):
        assert len({(p.dataset, p.by) for p in chain}) == 1


def test_a_network_with_a_name_of_its_own_is_no_compression_of_another():
    """X-VGG16-2's layers have other degrees each: a line from it to c = 16 would promise what lies
    between.
    """
    rows = [
        a_row(model="x_vgg16_2", compression=None),
        a_row(model="x_vgg16_c16", compression=16),
        a_row(**DENSE),
    ]
    points = list(_points(aggregate(rows)))
    chains = figures._chains(points, "weights")
    assert {tuple(p.label or p.compression for p in chain) for chain in chains} == {
        (1, 16),
        (1, "x_vgg16_2"),
    }
    found = texts(figures.draw_accuracy([p for p in points if p.kind != "dense"]))
    assert {"x_vgg16_2", "VGG-16 c=16"} <= found


def test_wider_and_deeper_are_drawn_with_both_counts():
    points = [p for p in points_of([]) if p.dataset == "cifar100"]
    left, right = figures.draw_wider_deeper(points).axes
    lines = [
        {
            line.get_color(): list(line.get_xdata())
            for line in axes.lines
            if line.get_linestyle() == "--"
        }
        for axes in (left, right)
    ]
    wide = figures._CURVES["40-100"][0]
    assert lines[0][wide] == [1_300_000, 2_600_000, 5_200_000, 47_200_000]
    assert lines[1][wide] == [846_200, 1_581_100, 3_050_400, 11_855_400]
    assert {"wider: 40-200", "deeper: 70-60", "c=80", "40-36"} <= texts(right.figure)


def test_networks_of_the_zoo_are_called_as_published_ones():
    published = {f.model: f.network for f in runs.published() if f.model}
    assert {model: network(model) for model in published} == published
    named = {model: network(model) for model in list_models() if model != "x_timm"}
    assert not any(name.startswith("x_") for name in named.values())
    assert network("x_vgg16_c4") == network("x_vgg16") == "VGG-16"
    assert network("x_timm") == "x_timm"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (171_024, "171 k"),
        (999_600, "1 M"),
        (1_141_440, "1.14 M"),
        (35.9e6, "35.9 M"),
        (2.284e9, "2.28 G"),
        (12, "12"),
    ],
)
def test_counts_are_short(value, text):
    assert figures.count(value) == text


# ---- labels


def test_labels_hide_neither_points_nor_one_another():
    figure = Figure((8, 6), layout="constrained")
    axes = figure.subplots()
    spots = [(x, y) for x in range(5) for y in range(4)]
    axes.plot(*zip(*spots, strict=True), "o", markersize=7)
    axes.set(xlim=(-0.6, 4.6), ylim=(-0.6, 3.6))
    labels.place(axes, [labels.Label(x, y, f"label {x} {y}", "#000000") for x, y in spots], spots)
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == 20
    for number, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:number])
        assert not any(box.contains(*axes.transData.transform(spot)) for spot in spots)
        assert axes.bbox.contains(box.x0, box.y0)
        assert axes.bbox.contains(box.x1, box.y1)


def test_no_labels_are_no_work():
    axes = Figure().subplots()
    labels.place(axes, [], [])
    assert not axes.texts
