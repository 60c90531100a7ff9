"""What `xzoo bench` measures: that both forms do the same work, and the arithmetic. No time is
judged.
"""

import csv
import inspect
from math import isfinite
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import xzoo
from xzoo import bench, ops
from xzoo.bench import Figure, finetune, layer, model, training
from xzoo.cli import main
from xzoo.errors import GraphError, ModelError, XzooError
from xzoo.norms import FusedBatchNorm2d
from xzoo.ops import native
from xzoo.ops.tune import PRODUCTS, LayerShape, alternate, tensors, tune
from xzoo.train import CIFAR10, Classifier, TinyImageNet

TRAINED = "x_vgg16_c16.cifar10_q75"
TINY = ["--model", "x_mobilenet050_c4", "--batch-size", "8", "--pairs", "2", "--photos", "16"]


def measured(figure: Figure, n: int) -> None:
    assert len(figure.values) == n and all(isfinite(value) and value > 0 for value in figure.values)


def test_ratios_are_of_neighbours():
    # A machine that gets three times slower half-way: the ratio of sums or of medians would be
    # another.
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
    assert (first["what"], first["median"], first["bar"], first["met"]) == (
        "step, small",
        "1.250",
        "<= 1.100",
        "no",
    )
    assert (float(first["quartile 1"]), float(first["quartile 3"]), first["n"]) == (
        1.125,
        1.375,
        "3",
    )
    assert (second["median"], second["bar"], second["met"]) == ("25000", "", "")
    assert second["torch"] == torch.__version__ and "thread" in second["machine"]
    with pytest.raises(XzooError, match="cannot write"):
        bench.write_csv(figures, tmp_path / "nowhere" / "bench.csv")


def test_the_bare_loop_does_the_work_of_the_trainer():
    """Same network and images, so the same weights: nothing is left out of either form, and no
    step.
    """
    given = {"name": "x_mobilenet050_c4", "num_classes": 10, "label_smoothing": training.SMOOTHING}
    ours, theirs = (
        Classifier(**given, **training.OPTIMIZER, **training.SCHEDULE) for _ in range(2)
    )
    before = {name: value.clone() for name, value in ours.net.state_dict().items()}
    turns = training.alternated(ours, theirs, 8, pairs=1)
    assert len(turns.lightning) == len(turns.bare) == training.WARM + 1
    after = theirs.net.state_dict()
    assert not torch.equal(before["classifier.weight"], after["classifier.weight"])
    for name, value in ours.net.state_dict().items():
        assert torch.equal(value, after[name]), name


def test_turns_of_several_steps():
    """As on a GPU, where a turn has more than one."""

    class At:
        is_last_batch = False

    steps: list[int] = []
    turns = training.Turns(lambda: steps.append(1), 3, torch.device("cpu"))
    for i in range(7):
        At.is_last_batch = i == 6
        turns.on_train_batch_start(At, None, None, i)  # type: ignore[arg-type]
    assert len(steps) == 7 and len(turns.bare) == len(turns.lightning) == 2


def test_each_part_measures():
    measured(training.lightning_loop("x_mobilenet050_c4", 8, 2), 2)
    figure = training.image_folder(photos=16, pairs=2)
    measured(figure, 2)
    assert figure.bar == 1.0 and figure.met == (figure.quartiles[1] >= 1)


@pytest.mark.parametrize("kind", [CIFAR10, TinyImageNet])
def test_augmentation_measures_on_one_thread(kind, monkeypatch):
    monkeypatch.setattr(training, "IMAGES", {32: 200, 64: 200})
    before = torch.get_num_threads()
    measured(training.augmentation(kind, 50, 3), 3)
    assert torch.get_num_threads() == before


def test_photographs_are_of_a_photograph_s_size(tmp_path):
    training.draw_folder(tmp_path, 3, 2, 2, training.photo)
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


# ---- the stop-watch

SMALL = LayerShape(3, 16, 24, 6, 1, 4, 1, 16)


def test_all_take_turns_and_the_first_calls_do_not_count():
    said = []
    times = alternate({"a": lambda: said.append("a"), "b": lambda: said.append("b")}, rounds=3)
    turns = "".join(said).replace("a" * 9, "A").replace("b" * 9, "B").lstrip("ab")
    assert said[:4] == ["a", "a", "b", "b"] and turns[0] == "A"
    order = [
        name for name, before in zip(said[4:], ["", *said[4:]], strict=False) if name != before
    ]
    assert order == ["a", "b"] * 3  # each repeated within its turn, as it takes no time
    assert all(len(each.seconds) == 3 and min(each.seconds) >= 0 for each in times.values())


def test_memory_that_is_mapped_afresh_is_counted():
    calls = {"fresh": lambda: torch.zeros(2**24), "none": lambda: None}
    times = alternate(calls, rounds=2)
    # 64 MiB in pages of 4 KiB or, where the system has large ones at hand, of 2 MiB.
    assert times["fresh"].faults >= 16 and times["none"].faults < 1


def test_tune_measures_every_backend_that_can_run_a_layer():
    rows = tune(SMALL, rounds=1)
    # The graph is not one of groups.
    on_cpu = [b for b in ops.available() if b not in ("group", "triton")]
    assert {(row.product, row.backend) for row in rows} == {
        (p, b) for p in PRODUCTS for b in on_cpu
    }
    assert all(len(row.times.seconds) == 1 and row.times.seconds[0] > 0 for row in rows)
    five = tune(SMALL._replace(kernel=5), rounds=1)  # native has no kernel for it
    assert {row.backend for row in five} >= {"dense", "gather"} and "native" not in {
        row.backend for row in five
    }
    assert [row.backend for row in tune(SMALL, ["dense"], rounds=2)] == ["dense"] * 3
    with pytest.raises(XzooError, match="backend 'fast' is not one of"):
        tune(SMALL, ["fast"])


# ---- layers


def test_names_of_layers_go_both_ways():
    for case in layer.CASES:
        assert layer.named(layer.name(case.layer)) == case.layer
    strided = LayerShape(3, 128, 256, 28, 2, 16, 1, 16, True)
    assert (
        layer.name(strided) == "3x3 128->256 28x28/2 b16 d16 s1 last"
        and layer.named(layer.name(strided)) == strided
    )
    for other in (
        "3x3 8->8 b1 d2 s1",
        "linear 8->8 4x4 b1 d2 s1",
        "2x2 8->8 4x4 b1 d2 s1",
        "3x5 8->8 4x4 b1 d2 s1",
    ):
        assert layer.named(other) is None
    with pytest.raises(GraphError, match="degree"):
        layer.named("linear 8->8 b1 d9 s1")


@pytest.mark.parametrize(
    "text", ["3x3 16->24 6x6 b5 d4 s1", "3x3 16->24 6x6/2 b5 d4 s3", "1x1 16->24 6x6 b5 d4 s4"]
)
@pytest.mark.parametrize("form", ["contiguous", "channels_last"])
@pytest.mark.parametrize("product", PRODUCTS)
def test_all_forms_of_a_convolution_compute_one_thing(text, form, product):
    """Ours, dense and masked are equal; the group form has the size of a result."""
    drawn = layer._formats(tensors(layer.named(text)))[form]
    weight = ops.dense.scatter(drawn.weight, drawn.neighbours, 16)
    got, dense = layer.ours(drawn, product)(), layer.library(drawn, product, weight)
    rivals = {
        name: call()
        for name, call in layer.rivals(drawn, layer.LayerCase(layer.named(text), product)).items()
    }
    mask = ops.dense.scatter(torch.ones_like(drawn.weight), drawn.neighbours, 16)
    if product == "weight_grad":
        dense = dense * mask
        got = ops.dense.scatter(got, drawn.neighbours, 16)
    torch.testing.assert_close(got, dense, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rivals["masked"], dense, rtol=1e-4, atol=1e-4)
    assert rivals["group"].shape == (
        drawn.weight.shape if product == "weight_grad" else dense.shape
    )


def test_all_forms_of_a_linear_layer_compute_one_thing():
    case = layer.LayerCase(layer.named("linear 16->24 b5 d4 s2"))
    drawn = tensors(case.layer)
    rivals = {name: call() for name, call in layer.rivals(drawn, case).items()}
    ours = layer.ours(drawn, "forward")()
    torch.testing.assert_close(rivals["masked"], ours)
    torch.testing.assert_close(rivals["gather, multiply, sum"], ours)
    # Groups: output o of group g reads the inputs of g alone.
    torch.manual_seed(0)
    x = drawn._replace(x=torch.zeros(1, 16).index_fill_(1, torch.arange(4, 8), 1.0))
    grouped = layer.library(x, "forward", torch.ones(24, 4), groups=4)
    assert torch.equal(grouped[0].nonzero()[:, 0], torch.arange(6, 12)) and grouped.max() == 4


def test_bars_are_parts_of_the_ideal_for_these_vectors():
    case = layer.LayerCase(layer.named("linear 64->64 b4 d8 s1"), "forward", (0.75, 0.5))
    wanted = {16: 6.0, 8: 4.0}.get(native.lanes()) if native.available() else None
    figures = list(layer._measure(case, pairs=2))
    assert [figure.against for figure in figures] == [
        "dense",
        "masked",
        "group",
        "gather, multiply, sum",
    ]
    assert [figure.bar for figure in figures] == [wanted, None, None, None] and figures[
        0
    ].ideal == 8
    for figure in figures:
        measured(figure, 2)


def test_policy_judges_every_shape_and_their_median():
    cases = [layer.LayerCase(SMALL, product) for product in PRODUCTS]
    figures = list(layer._policy(cases, pairs=2))
    assert len(figures) == 6 and [figure.bar for figure in figures] == [1.1] * 3 + [1.0] * 3
    assert not any(figure.at_least for figure in figures)
    assert [figure.values for figure in figures[3:]] == [
        (figure.quartiles[1],) for figure in figures[:3]
    ]
    # The 20 shapes: several where dense should win.
    assert (
        len(set(layer.POLICY)) == 20
        and sum(each.degree * 2 >= each.n_in for each in layer.POLICY) >= 6
    )


def test_share_tells_the_graph_and_the_speed():
    figures = list(layer._share([layer.named("linear 64->64 b16 d16 s4")], pairs=2))
    assert [figure.what.partition(",")[0] for figure in figures] == [
        "second singular value"
    ] * 2 + [
        "forward",
        "training",
    ]
    drawn = xzoo.graphs.singular_values(xzoo.graphs.sample("biregular", 64, 64, 16, 4), 64)
    assert (
        figures[0].values[0] == pytest.approx(drawn[1] / drawn[0], rel=1e-6)
        and 0.5 < figures[1].values[0] < 1.5
    )
    assert {
        layer.named(f"{text} s{s}") is None for text in layer.CLASSES for s in layer.SHARES
    } == {False}


def test_scaling_compares_gains_and_leaves_the_threads_as_they_were():
    with bench.threads(2):
        figures = list(
            layer._scaling([layer.LayerCase(SMALL, product) for product in PRODUCTS], pairs=3)
        )
        assert torch.get_num_threads() == 2
    for figure in figures:
        measured(figure, 3)
    assert {figure.bar for figure in figures} == {0.95}
    assert [figure.what.partition(" 3x3 16->24")[0] for figure in figures] == [
        f"gain of 2 threads, {product}," for product in ("forward", "input grad", "weight grad")
    ]


# ---- models


def test_every_form_of_a_model_has_the_same_layers_and_the_masked_one_computes_ours():
    forms, masks = model._forms("x_mobilenet050_c8")
    images, labels = model._batch(forms["ours"], 1)
    images = images[:, :, :64, :64].contiguous()
    want = forms["ours"].eval()(images)
    # Weights that the mask has to remove.
    with torch.no_grad():
        for name, mask in masks.items():
            forms["masked"].get_submodule(name).weight.add_(1 - mask)
    assert not torch.allclose(forms["masked"].eval()(images), want, rtol=1e-3, atol=1e-5)
    model._mask(forms["masked"], masks)
    torch.testing.assert_close(forms["masked"](images), want, rtol=1e-3, atol=1e-5)
    counts = {name: xzoo.profile(forms[name]).macs for name in ("ours", "dense", "group")}
    assert counts["group"] == counts["ours"] < counts["dense"] / 2
    # torch's own group convolutions compute what X-layers with graphs of groups do.
    groups = xzoo.create_model("x_mobilenet050_c8", graph="group").eval()
    want = groups(images)
    own = model._with_torchs_groups(groups)
    assert not any(isinstance(layer, xzoo.ExpanderConv2d) for layer in own.modules())
    torch.testing.assert_close(own(images), want, rtol=1e-3, atol=1e-5)
    step = model._step(forms["masked"].train(), forms["masked"], images, labels)
    before = forms["masked"].get_submodule("classifier").weight.clone()
    step()
    step()
    assert not torch.equal(before, forms["masked"].get_submodule("classifier").weight)


def test_every_form_is_trained_with_fused_norms_and_the_dense_twin_without_as_well():
    forms, masks = model._forms("x_vgg16_c16")
    images, labels = model._batch(forms["ours"], 4)
    model._mask(forms["masked"], masks)
    calls, note = model._training_steps(forms, images, labels, compiled=False)
    fused = {}
    for name, step in calls.items():
        trained = inspect.getclosurevars(step).nonlocals["called"]
        fused[name] = any(type(part) is FusedBatchNorm2d for part in trained.modules())
    assert set(calls) == {*forms, "dense in torch"}
    assert not fused.pop("dense in torch")
    # The dense twin's may be torch's own, where that is faster.
    assert fused.pop("dense") == ("fused" in note)
    assert all(fused.values())
    for form in forms.values():  # copies were fused
        assert not any(type(part) is FusedBatchNorm2d for part in form.modules())


def test_bars_of_models_hold_at_their_batches_alone():
    part = {16: 1.0, 8: 0.8}.get(native.lanes()) if native.available() else None
    step = model.ModelCase("x_vgg16_c8", 128, training=True)
    wanted = {"dense": 3.0, "dense in torch": 4.5}
    assert model._bars(step) == ({} if part is None else {k: v * part for k, v in wanted.items()})
    assert model._bars(step._replace(batch=64)) == {}
    assert model._bars(step._replace(batch=64, training=False)).keys() <= {"dense"}
    assert model._bars(step._replace(model="x_vgg16_2")) == {}


def test_training_memory_of_x_vgg16_is_a_fifteenth_of_the_dense_twin_s():
    mine, theirs = model._memories("x_vgg16", 1)[model.STATE]
    assert theirs == 3 * 4 * sum(
        p.numel() for p in xzoo.create_model("x_vgg16", compression=1).parameters()
    )
    assert mine > 3 * 4 * 800_000 and theirs >= 15 * mine


def test_memory_is_counted_as_it_is_held():
    net = torch.nn.Sequential(
        torch.nn.Linear(10, 20), torch.nn.ReLU(), xzoo.ExpanderLinear(20, 5, degree=4)
    )
    held = bench.memory(net, torch.zeros(7, 10), torch.zeros(7, dtype=torch.long))
    numbers = 10 * 20 + 20 + 5 * 4 + 5
    assert held[:4] == (4 * numbers, 4 * numbers, 4 * numbers, 4 * 5 * 4)
    # The images, the output of the ReLU (which both ReLU and the next layer keep),
    # log-probabilities, labels, and a number for the loss.
    assert held.activations == 4 * 7 * 10 + 4 * 7 * 20 + 4 * 7 * 5 + 8 * 7 + 4


def test_memory_on_the_meta_device_is_that_of_the_cpu():
    found = []
    for device in ("cpu", "meta"):
        net = xzoo.create_model("x_vgg16_c16", device=device).train()
        found.append(bench.memory(net, *(t.to(device) for t in model._batch(net, 2))))
    assert found[0] == found[1]


def test_options_of_a_model_are_checked():
    assert model._macs("x_resnet18 compression=8")[0] < model._macs("x_resnet18")[0]
    for name, told in (
        ("x_resnet18 graph=group", "option 'graph=group'"),
        ("x_resnet81", "did you mean"),
    ):
        with pytest.raises(XzooError, match=told):
            bench.models([name])


# ---- the command


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_the_command_measures_models_and_layers_and_draws_them(capsys, tmp_path):
    table, picture = tmp_path / "bench.csv", tmp_path / "bench.png"
    asked = [
        "--models",
        "x_vgg16_c16",
        "--layers",
        "linear 32->16 b2 d4 s1",
        "--batch-size",
        "1",
        "--pairs",
        "1",
    ]
    assert main(["bench", *asked, "--csv", str(table), "--plot", str(picture)]) == 0
    out, err = capsys.readouterr()
    rows = rows_of(table)
    assert all(row["what"] in out and row["median"] in out for row in rows)
    assert (
        "1 of 2: x_vgg16_c16, inference, batch 1 (about " in err
        and "3 of 3: weight grad, linear 32->16" in err
    )
    kinds = [
        (row["part"], row["what"].partition(", ")[2].partition(",")[0], row["against"])
        for row in rows
    ]
    assert kinds[:2] == [
        ("memory", model.STATE, "dense"),
        ("memory", "all memory in training", "dense"),
    ]
    assert kinds[2:5] == [("model", "inference", form) for form in ("dense", "masked", "group")]
    assert sorted(kinds[5:9]) == [
        ("model", "training step", form) for form in ("dense", "dense in torch", "group", "masked")
    ]
    ideals = {(row["what"], row["against"]): row["ideal"] for row in rows[2:9]}
    for (_, against), ideal in ideals.items():
        assert ideal == ("14.75" if against.startswith("dense") else "")
    assert rows[2]["bar"].startswith(">= ")
    assert {row["part"] for row in rows[9:]} == {"layer"} and float(rows[9]["ideal"]) == 8
    assert picture.read_bytes()[:4] == b"\x89PNG" and picture.stat().st_size > 10_000


def test_what_was_measured_is_left_when_it_is_interrupted(capsys, tmp_path, monkeypatch):
    def interrupted(case, pairs):
        yield Figure("first", "dense", "x", (2.0,), part="layer")
        raise KeyboardInterrupt

    monkeypatch.setattr(layer, "_measure", interrupted)
    assert main(["bench", "--layers", "3x3", "--csv", str(tmp_path / "bench.csv")]) == 130
    out, err = capsys.readouterr()
    assert "first" in out and "2.000" in out and err.endswith("xzoo: interrupted\n")
    assert [row["what"] for row in rows_of(tmp_path / "bench.csv")] == ["first"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--models", "x_vgg61"], "unknown model 'x_vgg61'"),
        (["--models", "x_vgg16 colour=3"], "option 'colour=3' of x_vgg16"),
        (
            ["--layers", "5x5"],
            "layer '5x5': no case is called so; give sizes such as '3x3 512->512",
        ),
        (["--layers", "linear 8->8 b1 d9 s1"], "degree=9"),
        (["--layers", "--pairs", "0"], "pairs=0: 1 or more are needed"),
        (["--policy", "--threads", "0"], "threads=0: 1 or more are needed"),
        (["--scaling"], "threads=1: there is nothing to gain"),
        (["--share", "--csv", "/nowhere/at/all.csv"], "cannot write /nowhere/at/all.csv"),
        (["--share", "--plot", "/tmp/x.doc"], "no picture is called .doc"),
        (["--loop", "--photos", "2"], "photos=2: 16 or more are needed"),
        (
            ["--finetune", "digits", "--csv", "/tmp/x.csv"],
            "--finetune needs --model NAME, with weights, and --csv FILE",
        ),
        (
            ["--finetune", "digits", "--model", TRAINED],
            "--finetune needs --model NAME, with weights, and --csv FILE",
        ),
        (
            ["--finetune", "digits", "--model", TRAINED, "--csv", "/nowhere/x.csv"],
            "cannot write /nowhere/x.csv",
        ),
        (
            ["--finetune", "digits", "--model", "x_vgg16", "--csv", "/tmp/x.csv"],
            "model='x_vgg16' has no trained weig",
        ),
        (
            ["--finetune", "digits", "--model", TRAINED, "--csv", "/tmp/x.csv"],
            "digits has no part to validate on",
        ),
        (
            ["--finetune", "x", "--model", TRAINED, "--csv", "/tmp/x.csv", "--seeds", "0"],
            "seeds=0, each=10, minutes=2",
        ),
    ],
)
def test_mistakes_of_the_command_are_one_line(capsys, arguments, told):
    assert main(["bench", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and told in err


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three classes, as 6 and 2 images each; in each file its class, part and number can be read."""
    for part, count in (("train", 6), ("val", 2)):
        for label in range(3):
            folder = tmp_path / "photos" / part / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = np.full((32, 32, 3), 80 * label + 10 * number + (part == "val"), np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path / "photos"


def contents(folder: Path) -> dict[str, set[bytes]]:
    found: dict[str, set[bytes]] = {}
    for file in folder.rglob("*.*"):
        found.setdefault(str(file.relative_to(folder).parent), set()).add(file.read_bytes())
    return found


def test_a_few_images_of_each_class_are_drawn_and_all_that_validate(photos: Path, tmp_path: Path):
    whole = contents(photos)
    few = []
    for seed in (0, 0, 1):
        place = tmp_path / f"few{len(few)}"
        finetune.draw_few(str(photos), place, 4, seed)
        few.append(contents(place))
    for drawn in few:
        assert drawn.keys() == whole.keys()
        for folder, images in drawn.items():
            assert images <= whole[folder] and len(images) == (
                4 if folder.startswith("train") else 2
            )
    assert few[0] == few[1] != few[2]


@pytest.mark.slow
def test_weights_are_compared_with_none_on_the_same_images(photos: Path, tmp_path: Path, capsys):
    table = tmp_path / "table.csv"
    asked = [
        "--finetune",
        photos,
        "--model",
        TRAINED,
        "--csv",
        table,
        "--minutes",
        "0.02",
        "--seeds",
        "1",
        "--each",
        "4",
    ]
    command = ["bench", *map(str, asked)]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = rows_of(table)
    told = [(row["train_images"], row["pretrained"]) for row in rows]
    assert (
        told == [("12", "true"), ("12", "false"), ("18", "true"), ("18", "false")]
        and len(lines) == 4
    )
    assert all(
        row["n_val"] == "6" and row["img_size"] == "32" and 0 <= float(row["top1"]) <= 100
        for row in rows
    )
    # What is interrupted goes on: what the table has is not measured again.
    lost = table.read_text().splitlines(keepends=True)
    table.write_text("".join(lost[:-1]))
    assert main(command) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert rows_of(table)[:3] == rows[:3] and rows_of(table)[3]["pretrained"] == "false"


def test_nothing_to_draw_is_said(tmp_path):
    with pytest.raises(XzooError, match="nothing to draw"):
        bench.draw([Figure("a", "b", "x", (1.0,))], tmp_path / "a.png")


def test_the_command_prints_the_table(capsys, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(training, "IMAGES", {32: 200, 64: 200})
    table = tmp_path / "bench.csv"
    assert main(["bench", "--loop", *TINY, "--csv", str(table)]) == 0
    out = capsys.readouterr().out
    with open(table, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 and all(row["what"] in out and row["median"] in out for row in rows)
    assert [row["bar"] for row in rows] == ["<= 1.100", ">= 20000", "", ">= 1.000"]
    assert f"torch {torch.__version__}" in out and rows[0]["machine"].split(",")[0] in out
