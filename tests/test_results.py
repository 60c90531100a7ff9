"""The table of results only grows, refuses what cannot be true, and is averaged as one does by
hand.
"""

import multiprocessing
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from xzoo.datasets import DATASETS
from xzoo.errors import XzooError
from xzoo.models import create_model, x_densenet
from xzoo.profile import profile
from xzoo.results import runs, table
from xzoo.results.runs import COLUMNS, Row, aggregate, append, read, recipe_sha


def a_row(**changes):
    facts = {
        "model": "x_vgg16_c8",
        "recipe": "recipes/cifar10/x_vgg16_c8.yaml",
        "recipe_sha": "0123456789abcdef",
        "dataset": "cifar10_q75",
        "split": "test",
        "n_val": 10_000,
        "img_size": 32,
        "graph": "biregular",
        "compression": 8,
        "share": 4,
        "spatial_share": 1,
        "graph_seed": 0,
        "seed": 0,
        "epochs": 40,
        "global_batch": 512,
        "top1": 92.5,
        "top5": 99.7,
        "ema": False,
        "epoch_reported": 40,
        "params": 1_891_402,
        "weights": 1_878_208,
        "macs": 40_735_744,
        "wall_s": 312.5,
        "device": "NVIDIA H100, 1",
        "precision": "bf16-mixed",
        "torch": "2.14.1",
        "xzoo": "0.1.0",
        "commit": "abcdef1",
        "date": "2026-08-01T12:00:00",
    }
    return Row(**facts | changes)


DENSE = {
    "graph": "dense",
    "compression": 1,
    "share": None,
    "spatial_share": None,
    "graph_seed": None,
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "recipes" / "results.csv"


# ---- appending


def test_rows_come_back_as_they_were(path):
    rows = [
        a_row(),
        a_row(
            seed=1,
            top1=92.125,
            top5=None,
            train_macs=10**15,
            crop_pct=0.875,
            interpolation="bicubic",
            ema=True,
        ),
        a_row(**DENSE, model='x, "y" é'),
        a_row(compression=None, commit="0123456789abcdef-dirty"),
    ]
    for row in rows:
        assert append(path, row)
    assert read(path) == rows
    assert path.read_text(encoding="utf-8").splitlines()[0] == ",".join(COLUMNS)


def test_what_is_there_is_never_touched(path):
    append(path, a_row())
    # by another hand: equal, and not as we write it
    before = path.read_bytes().replace(b"92.5,", b"92.500,")
    path.write_bytes(before)
    append(path, a_row(seed=1))
    assert path.read_bytes().startswith(before)
    assert path.read_bytes().count(b"\n") == 3


def test_the_same_row_is_there_once_and_another_of_the_run_is_refused(path):
    assert append(path, a_row())
    assert not append(path, a_row())
    before = path.read_bytes()
    with pytest.raises(
        XzooError, match=r"line 2, tells of the same run with top1=92\.5 where this has 93\.0.*seed"
    ):
        append(path, a_row(top1=93.0))
    assert path.read_bytes() == before
    for other in (
        {"seed": 1},
        {"graph_seed": 1},
        {"commit": "abcdef2"},
        {"recipe_sha": "f" * 16},
        {"graph": "group"},
    ):
        assert append(path, a_row(**other))


def in_processes(*calls):
    """Run the calls at once, each in a fork of this process (a fresh one imports torch first);
    their exit codes.
    """
    forks = [multiprocessing.get_context("fork").Process(target=call) for call in calls]
    for fork in forks:
        fork.start()
    for fork in forks:
        fork.join()
    return [fork.exitcode for fork in forks]


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_two_processes_lose_nothing(path):
    def write(first):
        for seed in range(first, first + 25):
            append(path, a_row(seed=seed))

    assert in_processes(lambda: write(0), lambda: write(100)) == [0, 0]
    assert sorted(row.seed for row in read(path)) == [*range(25), *range(100, 125)]


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_full_disk_leaves_what_was_there(path):
    append(path, a_row())
    before = path.read_bytes()

    def write():
        # The limit cuts a write in two as a full disk does.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, resource.RLIM_INFINITY))
        with pytest.raises(
            XzooError, match=r"cannot write .*ulimit -f.*; what it held before is kept"
        ):
            append(path, a_row(seed=1))

    assert in_processes(write) == [0]
    assert path.read_bytes() == before


def test_a_writer_takes_the_file_that_is_there_when_its_turn_comes(path, monkeypatch):
    append(path, a_row())

    class ReplacedMeanwhile(table.FileLock):
        def acquire(self, *args, **kwargs):
            new = path.with_name("new")
            new.write_text(table.header(runs.Row))
            append_there(new, a_row(seed=2))
            new.replace(path)
            return super().acquire(*args, **kwargs)

    def append_there(place, row):
        with monkeypatch.context() as patch:
            patch.setattr(table, "FileLock", lock)
            append(place, row)

    lock = table.FileLock
    monkeypatch.setattr(table, "FileLock", ReplacedMeanwhile)
    append(path, a_row(seed=1))
    assert [row.seed for row in read(path)] == [2, 1]


def test_a_table_behind_a_link_is_written_where_it_is(path):
    append(path, a_row())
    link = path.with_name("link.csv")
    link.symlink_to(path)
    append(link, a_row(seed=1))
    assert link.is_symlink() and len(read(path)) == 2


# ---- refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top1": 0.925}, r"column top1: 0\.925; .*0\.93 would be a fraction"),
        ({"top1": float("nan")}, r"column top1: nan is not a finite number"),
        ({"top1": "92.5"}, r"column top1: '92\.5' is not a finite number"),
        ({"top5": 90.0}, r"column top5: 90\.0; it is per cent, from top1=92\.5"),
        ({"dataset": "cifar-10"}, r"column dataset: 'cifar-10'.*did you mean cifar10\?"),
        ({"n_val": 10_240}, r"column n_val: 10240; it is 10000 in the part 'test' of cifar10_q75"),
        ({"graph": "biregula"}, r"column graph: .*did you mean biregular"),
        ({"graph": "dense"}, r"column compression: 8; it is 1 where graph=dense"),
        (DENSE | {"share": 4}, r"column share: 4; it is empty where graph=dense"),
        ({"compression": 1}, r"column graph: 'biregular'; it is dense where compression=1"),
        ({"graph_seed": None}, r"column graph_seed: None; it is given where graph=biregular"),
        ({"seed": -1}, r"column seed: -1; it is 0 or more"),
        ({"epochs": 0}, r"column epochs: 0; it is 1 or more"),
        ({"seed": True}, r"column seed: True is not a whole number"),
        ({"ema": 1}, r"column ema: 1 is not true or false"),
        ({"epoch_reported": 41}, r"column epoch_reported: 41; it is up to epochs=40"),
        ({"weights": 1_891_403}, r"column weights: .*up to params=1891402"),
        ({"crop_pct": 87.5}, r"column crop_pct: 87\.5; it is a share"),
        ({"wall_s": -1.0}, r"column wall_s: -1\.0; it is 0 or more"),
        ({"recipe_sha": "abc"}, r"column recipe_sha: 'abc'; it is 16 hexadecimal digits"),
        ({"commit": "HEAD"}, r"column commit: 'HEAD'"),
        ({"date": "1 Aug"}, r"column date: '1 Aug' is not a date; write 2026-08-01"),
        ({"device": ""}, r"column device: ''; a text is one line, not empty"),
        ({"device": "a\nb"}, r"column device: 'a\\nb'; a text is one line"),
    ],
)
def test_a_row_that_cannot_be_names_its_column(change, message):
    with pytest.raises(XzooError, match=message):
        a_row(**change)


def test_a_part_that_is_not_the_reported_one_may_have_any_size():
    assert a_row(split="exact", n_val=1017).n_val == 1017


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("92.5,", "much,", r"line 3: column top1: 'much' is not a finite number"),
        ("92.5,", "9_2.5,", r"line 3: column top1: '9_2\.5' is not a finite number"),
        ("92.5,", "0.925,", r"line 3: column top1: 0\.925; it is per cent"),
        (",512,", ",512.0,", r"line 3: column global_batch: '512\.0' is not a whole number"),
        (",512,", ",,", r"line 3: column global_batch: '' is not a whole number"),
        (",false,", ",no,", r"line 3: column ema: 'no' is not true or false"),
        (",512,", ",512,7,", r"line 3: 33 values for 32 columns"),
        ('"NVIDIA', '"N"VIDIA', r"line 3: "),
        (",1,40,", ",0,40,", r"line 3: tells of the run of line 2 again"),
    ],
)
def test_a_malformed_line_is_named(path, old, new, message):
    append(path, a_row())
    append(path, a_row(seed=1))
    head, first, second = path.read_text().splitlines(keepends=True)
    assert old in second
    path.write_text(head + first + second.replace(old, new))
    for act in (read, lambda where: append(where, a_row(seed=2))):
        with pytest.raises(XzooError, match=f"results.csv, {message}"):
            act(path)


def test_what_keeps_a_row_out_is_told_in_words_and_nothing_is_lost(path):
    resource = pytest.importorskip("resource")
    append(path, a_row())
    held = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(held), hard))
    try:
        with pytest.raises(
            XzooError, match=r"cannot write .*ulimit -f.*; what it held before is kept"
        ):
            append(path, a_row(seed=1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == held


def test_a_table_that_is_none_is_named(path):
    with pytest.raises(XzooError, match=r"cannot read .*results.csv: No such file"):
        read(path)
    append(path, a_row())
    good = path.read_text()
    for text, message in (
        ("", r"results.csv is empty; its first line must name the columns: model, recipe"),
        (good.replace("top1", "acc1", 1), r"line 1: column 18 is 'acc1' and must be 'top1'"),
        (good.replace(",date", "", 1), r"line 1: 31 columns for 32"),
        (good[:-5], r"line 2, is cut short"),
        (good + "\n", r"line 3: 0 values for 32 columns"),
    ):
        path.write_text(text)
        with pytest.raises(XzooError, match=message):
            read(path)
    path.write_bytes(good.encode() + b"\xff\n")
    with pytest.raises(XzooError, match=r"line 3: byte 0xff is not UTF-8"):
        read(path)


def test_a_header_alone_is_an_empty_table(path):
    path.parent.mkdir()
    path.write_text(table.header(Row))
    assert read(path) == []
    assert aggregate([]) == []


# ---- averages


def test_the_mean_and_its_interval_are_scipys():
    values = [92.5, 92.71, 92.33, 92.6, 92.44]
    (found,) = aggregate([a_row(seed=i, graph_seed=i, top1=v) for i, v in enumerate(values)])
    assert found.n == found.graphs == 5
    assert found.mean == pytest.approx(sum(values) / 5)
    assert found.sd == pytest.approx((sum((v - found.mean) ** 2 for v in values) / 4) ** 0.5)
    low, high = stats.t.interval(0.95, 4, loc=np.mean(values), scale=stats.sem(values))
    assert (found.low, found.high) == pytest.approx((low, high))
    # The factor that the literature prints for five seeds.
    assert found.high - found.mean == pytest.approx(2.776 * found.sd / 5**0.5, rel=1e-3)
    (wider,) = aggregate(found.rows, confidence=0.99)
    assert wider.high - wider.mean == pytest.approx(4.604 * found.sd / 5**0.5, rel=1e-3)


def test_a_single_run_has_no_interval():
    (found,) = aggregate([a_row()])
    assert (found.mean, found.sd, found.low, found.high, found.n) == (92.5, None, None, None, 1)


@pytest.mark.parametrize(
    "change",
    [
        {"recipe_sha": "f" * 16},
        {"graph": "group"},
        {"share": 1},
        {"dataset": "cifar10"},
        {"split": "exact", "n_val": 1017},
        {"epochs": 80},
        {"epoch_reported": 39},
        {"ema": True},
        {"precision": "32-true"},
    ],
)
def test_what_is_not_the_same_is_not_averaged(change):
    assert [s.n for s in aggregate([a_row(), a_row(seed=1, **change), a_row(seed=2)])] == [2, 1]


def test_a_repetition_is_no_new_draw():
    again = a_row(commit="abcdef2", top1=92.0, date="2026-09-01", wall_s=1.0, device="cpu")
    (found,) = aggregate([a_row(), a_row(seed=1, top1=93.0), again])
    assert (found.n, found.graphs, found.mean) == (2, 1, 92.5)


def test_interleaved_arms_keep_the_order_of_their_first_rows():
    rows = [a_row(seed=s, graph=g) for s in (0, 1) for g in ("shuffle", "biregular", "group")]
    assert [s.row.graph for s in aggregate(rows)] == ["shuffle", "biregular", "group"]


# ---- the hash of a recipe


def test_the_hash_of_a_recipe_is_of_what_it_says():
    recipe = {
        "model": {"name": "x_vgg16", "lr": 0.1, "betas": [0.9, 0.99]},
        "trainer": {"max_epochs": 40},
    }
    # sha256 of {"model":{"betas":[0.9,0.99],"lr":0.1,"name":"x_vgg16"},"trainer":{"max_epochs":40}}
    assert recipe_sha(recipe) == "ff67e49e4374fed5"
    other_order = {
        "trainer": {"max_epochs": 40},
        "model": {"betas": (0.9, 0.99), "lr": 0.1, "name": "x_vgg16"},
    }
    assert recipe_sha(other_order) == recipe_sha(recipe)
    seeded = {"seed_everything": 7, **recipe, "model": recipe["model"] | {"seed": 3}}
    assert recipe_sha(seeded) == recipe_sha(recipe)
    assert recipe_sha(recipe | {"trainer": {"max_epochs": 41}}) != recipe_sha(recipe)


@pytest.mark.parametrize("value", [float("nan"), {1: 2}, {3}, torch.tensor(1)])
def test_only_plain_data_has_a_hash(value):
    with pytest.raises(XzooError, match="a recipe is plain data"):
        recipe_sha({"model": value})


# ---- published figures


def built(figure):
    """The zoo's network of a published figure, without weights."""
    arguments = {} if figure.compression is None else {"compression": figure.compression}
    if figure.graph == "dense":
        arguments["compression"] = 1
    if figure.graph == "group":
        arguments["graph"] = "group"
    classes = {"cifar10": 10, "cifar100": 100, "imagenet": 1000}[figure.dataset]
    with torch.device("meta"):
        return create_model(figure.model, num_classes=classes, share=1, **arguments)


def identity(figure):
    return (figure.model, figure.dataset, figure.graph, figure.compression)


FIGURES = runs.published()
OF_THE_ZOO = {identity(f): f for f in FIGURES if f.model}


# A second or two each, where hundreds of graphs are drawn.
LARGE = (
    "x_resnet101",
    "x_resnet152",
    "x_densenet1",
    "x_densenet2",
    "x_densenetbc_58_60",
    "x_densenetbc_70_60",
)


@pytest.mark.parametrize(
    "which",
    [
        pytest.param(w, marks=[pytest.mark.slow] * w[0].startswith(LARGE), id="-".join(map(str, w)))
        for w in OF_THE_ZOO
    ],
)
def test_counts_of_published_networks_are_those_of_the_zoo(which):
    counts = profile(built(OF_THE_ZOO[which]))
    for figure in FIGURES:
        if identity(figure) == which:
            assert (figure.weights, figure.params, figure.macs) == (
                counts.weights,
                counts.params,
                counts.macs,
            )


def test_counts_of_the_wide_networks_are_those_of_the_same_class():
    wide = [f for f in FIGURES if f.network in ("DenseNet-BC 40-100", "DenseNet-BC 40-200")]
    assert len(wide) == 11
    for figure in wide[::4]:
        growth = int(figure.network.split("-")[-1])
        with torch.device("meta"):
            model = x_densenet._x_densenetbc(
                "x_densenetbc_40_24",
                False,
                40,
                growth,
                num_classes=100,
                compression=figure.compression,
            )
        counts = profile(model)
        assert (figure.weights, figure.params, figure.macs) == (
            counts.weights,
            counts.params,
            counts.macs,
        )


def test_published_figures_say_what_they_are():
    assert len(FIGURES) == 110
    assert not any(f.dataset == "cifar10_q75" for f in FIGURES)
    assert all(f.source and f.by and f.protocol for f in FIGURES)
    assert all((f.weights is None) == (f.macs is None) == (f.params is None) for f in FIGURES)
    errors = [f for f in FIGURES if f.metric == "error"]
    assert all(f.top1 == pytest.approx(100 - f.value) for f in errors)
    assert {f.by for f in errors} == {"X-Nets", "pytorchcv"}
    assert {f.dataset for f in FIGURES} <= set(DATASETS)
    assert all(f.last is None or f.last <= f.value for f in FIGURES)
    assert all(f.compression is None for f in FIGURES if f.label and f.graph == "expander")


def test_the_repositorys_own_table_is_sound():
    read(Path(__file__).parent.parent / "recipes" / "results.csv")
