"""`xzoo tune`: from times to a rule, its file, and `auto`, which follows it on this machine alone."""

import itertools
import json
import logging
import os
import re
import subprocess
import sys

import pytest
import torch

from xzoo import doctor, ops, tuning
from xzoo.cli import main
from xzoo.errors import XzooError
from xzoo.ops import auto, native, operations, rules
from xzoo.ops.rules import NEVER, LeastCompression, NativeRule
from xzoo.ops.tune import PRODUCTS, LayerShape, Times, tensors
from xzoo.tuning import BANDS, COMPRESSIONS, Measured, derived

KINDS = LeastCompression._fields
needs_kernels = pytest.mark.skipif(not native.possible(), reason="no C++ compiler")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The file of a machine on which nobody has run `xzoo tune`, its folder with our kernels."""
    native.available()
    monkeypatch.setenv("XZOO_HOME", str(tmp_path))
    forget()
    yield tmp_path / "tune.json"
    forget()


def forget():
    """As a new process, which has read no table and chosen nothing."""
    auto._rules.cache_clear()
    operations._CHOSEN.clear()


def every(least):
    """A rule that is the same for all layers."""
    return (NativeRule(0, *[LeastCompression(*[least] * len(KINDS))] * len(PRODUCTS)),)


# ---- from times to a rule


def rows(ratio):
    """Two layers of each class, as fast as `ratio` tells of a class: product, kind, lanes,
    compression."""
    places = itertools.product(PRODUCTS, KINDS, (1, 3, 8, 15, 16, 99), COMPRESSIONS)
    return [Measured(*place, value) for place in places for value in ratio(*place)]


@pytest.mark.parametrize(
    ("ratio", "least"),
    [
        (lambda *_: (0.3, 0.7), NEVER),
        (lambda *_: (1.1, 9.0), 2),
        (lambda *_: (1.09, 9.0), NEVER),  # in one memory format and not in the other
        (lambda *place: (0.3 * place[3], 0.5 * place[3]), 4),
        (lambda *place: (0.14 * place[3],), 8),
        # One slow layer costs what is at most as sparse, and nothing that is sparser.
        (lambda *place: (2.0, 0.9) if place[3] == 4 else (2.0,), 8),
        (lambda *place: (2.0, 0.9) if place[3] == 16 else (2.0,), NEVER),
    ],
)
def test_the_rule_of_layers_that_are_all_alike(ratio, least):
    assert derived(rows(ratio)) == tuple(
        NativeRule(band, *every(least)[0][1:]) for band in (16, 2, 0)
    )


@pytest.mark.parametrize("lanes", [1, 8, 16])
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("kind", ["conv3", "conv1", "linear_shared"])
def test_one_slow_class_is_one_number_of_the_rule(product, kind, lanes):
    slow = (product, kind, lanes, 2)
    made = derived(rows(lambda *place: (0.5,) if place == slow else (1.5,)))
    different = [
        (band, part, field)
        for band, part, field in itertools.product(range(len(BANDS)), PRODUCTS, KINDS)
        if getattr(getattr(made[band], part), field) != 2
    ]
    band = {16: 0, 8: 1, 1: 2}[lanes]
    assert different == [(band, product, kind)]
    assert getattr(getattr(made[band], product), kind) == 4


def test_what_was_not_measured_is_never_taken():
    made = derived([Measured("forward", "linear", 16, 2, 5.0)])
    taken = LeastCompression(*[2 if kind == "linear" else NEVER for kind in KINDS])
    nothing = LeastCompression(*[NEVER] * len(KINDS))
    assert made[0] == NativeRule(16, taken, nothing, nothing)
    assert [rule[1:] for rule in made[1:]] == [(nothing,) * 3] * 2


def test_a_loss_counts_where_it_is_seen_twice(monkeypatch):
    """What a machine does for a moment is no property of its kernels."""
    fast, noisy, slow = (
        tuning.Case("linear", n, LayerShape(0, 8, 8, 1, 1, 4, 1, n)) for n in (1, 2, 3)
    )
    looks = {fast: [5.0], noisy: [0.5, 4.0], slow: [0.7, 0.6]}

    def measured(case, seconds):
        ratio = looks[case].pop(0)
        return [Measured(product, case.kind, case.lanes, 2, ratio) for product in PRODUCTS]

    monkeypatch.setattr(tuning, "_measured", measured)
    found = tuning.measure([fast, noisy, slow], 1.0)
    assert [one.ratio for one in found] == [5.0] * 3 + [4.0] * 3 + [0.7] * 3
    assert not any(looks.values())


# ---- what is measured


@needs_kernels
def test_every_layer_is_of_the_class_that_it_is_measured_for(monkeypatch):
    """By `auto` itself: with a rule for one class alone, it takes our kernels for that class's."""
    chosen = {
        (case.kind, next(least for least in BANDS if case.lanes >= least), part): case
        for case in tuning.cases()
        for part in [case.layer.n_in // case.layer.degree]
    }
    assert set(chosen) == set(itertools.product(KINDS, BANDS, COMPRESSIONS))
    for (kind, band, part), case in chosen.items():
        kernel, n_in, n_out, size, stride, degree, share, batch, _ = case.layer
        x = torch.empty([batch, n_in, *([size, size] if kernel else [])])
        weight = torch.empty([n_out, degree, *([kernel, kernel] if kernel else [])])
        graph = torch.empty([n_out // share, degree], dtype=torch.int32)
        geometry = ([stride] * 2, [kernel // 2] * 2, [1, 1]) if kernel else ()
        name = "conv2d" if kernel else "linear"
        for least, others, want in ((part, NEVER, True), (2 * part, 1, False)):
            own = LeastCompression(*[least if each == kind else others for each in KINDS])
            rest = LeastCompression(*[others] * len(KINDS))
            made = tuple(NativeRule(b, *[own if b == band else rest] * 3) for b in BANDS)
            monkeypatch.setattr(auto, "_rules", lambda lanes, fast, made=made: made)
            taken = auto.choose(name, x, weight, graph, *geometry) == "native"
            assert taken == want, (case, least)


@needs_kernels
def test_a_layer_is_measured_against_what_the_library_would_take(monkeypatch):
    """And what counts is the median of neighbors' ratios, which is not the ratio of medians."""
    results = []

    def alternate(calls, *_):
        assert list(calls) == ["gather", "native"]
        results.append([call() for call in calls.values()])
        taken = {"gather": [2.0, 8.0, 3.0], "native": [1.0, 2.0, 3.0]}
        return {name: Times(seconds, 0.0) for name, seconds in taken.items()}

    monkeypatch.setattr(tuning, "alternate", alternate)
    case = tuning.Case("linear_shared", 4, LayerShape(0, 64, 64, 1, 1, 2, 8, 4))
    assert list(tuning._measured(case, 0.0)) == [
        Measured(product, "linear_shared", 4, 32, 2.0) for product in PRODUCTS
    ]
    assert [tuple(y.shape) for y, _ in results] == [(4, 64), (4, 64), (64, 2)]
    for theirs, ours in results:
        torch.testing.assert_close(ours, theirs)


# ---- the file


@needs_kernels
def test_a_rule_comes_back_as_it_was_written(place):
    made = derived(rows(lambda product, kind, lanes, part: (part * lanes / len(kind + product),)))
    assert len({*made[0].forward, *made[1].input_grad, *made[2].weight_grad}) > 3
    rules.write(made)
    table = rules.read()
    assert table.rules == made and re.fullmatch(r"\d{4}-\d\d-\d\d", table.date)
    assert rules.difference(table) == ""
    assert json.loads(place.read_text())["machine"]["torch"] == torch.__version__
    assert os.listdir(place.parent) == ["tune.json"]


def test_no_file_is_no_table(place, monkeypatch):
    assert rules.read() is None
    place.parent.joinpath("file").touch()
    monkeypatch.setenv("XZOO_HOME", str(place.parent / "file"))
    assert rules.read() is None


def changed(place, key, value):
    data = json.loads(place.read_text())
    (data if key in data else data["machine"])[key] = value
    place.write_text(json.dumps(data))


STALE = [
    ("cpu", "Another CPU", "of another CPU, Another CPU, model "),
    ("model", "6.85", ", model 6.85"),
    ("torch", "1.0", "of torch 1.0"),
    ("kernels", "0", "of another version of the kernels"),
    ("lanes", 32, "of vectors of 32 floats"),
    ("fast", None, "of another class of CPU"),
]


@needs_kernels
@pytest.mark.parametrize(("key", "value", "told"), STALE)
def test_a_table_of_something_else_is_out_of_date(place, key, value, told, caplog):
    monkeys = layer()
    before = [chosen(monkeys, product) for product in PRODUCTS]
    rules.write(every(1 if before[0] == "dense" else NEVER))
    forget()
    assert [chosen(monkeys, product) for product in PRODUCTS] != before
    changed(place, key, value)
    forget()
    assert [chosen(monkeys, product) for product in PRODUCTS] == before
    assert not caplog.records
    fact = doctor.doctor()["rule of auto"]
    assert f"; {place} is of " in fact and told in fact and "\n" not in fact
    assert fact.endswith(": `xzoo tune` replaces it")


BROKEN = {
    "": "Expecting value",
    "[]": "",
    "{}": "it lacks 'format'",
    "null": "",
    '{"format": 2}': "its format is 2, not 1",
    '{"format": 1, "machine": []}': "its machine is no object",
    '{"format": 1, "machine": {}, "rules": 3}': "",
    '{"format": 1, "machine": {}, "rules": [], "date": ""}': "its rules are for [] lanes",
    '{"format": 1, "machine": {}, "rules": [{}], "date": ""}': "it lacks 'forward'",
    "[" * 100_000: "recursion",
}


@needs_kernels
@pytest.mark.parametrize("text", BROKEN, ids=[text[:40] for text in BROKEN])
def test_a_broken_file_is_said_once_and_the_built_in_rule_used(place, text, caplog):
    monkeys = layer()
    before = chosen(monkeys)
    place.write_text(text)
    forget()
    with caplog.at_level(logging.WARNING):
        for kernel in (0, 1, 3):
            run(layer(kernel))
    assert chosen(monkeys) == before
    (record,) = caplog.records
    said = record.getMessage()
    assert said.startswith(f"{place} cannot be used (") and BROKEN[text] in said
    assert "\n" not in said and "run `xzoo tune` to replace it" in said
    assert str(place) in doctor.doctor()["rule of auto"]
    rules.write(every(2))
    assert rules.read().rules == every(2)


@needs_kernels
@pytest.mark.parametrize("value", [-1, 2.0, True, "2", None])
def test_what_is_no_count_is_refused(place, value):
    rules.write(every(2))
    data = json.loads(place.read_text())
    data["rules"][0]["input_grad"]["conv1"] = value
    place.write_text(json.dumps(data))
    with pytest.raises(XzooError, match=f"{re.escape(repr(value))} is no count"):
        rules.read()


@needs_kernels
def test_rules_whose_lanes_do_not_fall_are_refused(place):
    ((_, *parts),) = every(2)
    for lanes in ((0, 16), (16, 16, 0), (16, 2)):
        rules.write(tuple(NativeRule(least, *parts) for least in lanes))
        with pytest.raises(XzooError, match="which do not fall to 0"):
            rules.read()


def test_a_file_that_may_not_be_read_is_refused(place):
    place.mkdir()
    with pytest.raises(XzooError, match="cannot be used .*irectory"):
        rules.read()
    place.rmdir()
    place.write_bytes(b"\xff\xfe")
    with pytest.raises(XzooError, match="cannot be used .*utf-8"):
        rules.read()


# ---- `auto` follows it


def layer(kernel=3):
    return tensors(LayerShape(kernel, 32, 32, 4 if kernel else 1, 1, 8, 1, 16))


def chosen(drawn, product="forward"):
    name = drawn.operation + PRODUCTS[product]
    return auto.choose(name, drawn.x, drawn.weight, drawn.neighbours, *drawn.geometry)


def run(drawn):
    function = ops.conv2d if drawn.geometry else ops.linear
    return function(*drawn.arguments("forward"))


@needs_kernels
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("kernel", [0, 1, 3])
def test_auto_follows_the_table(place, kernel, product):
    drawn = layer(kernel)
    for made, taken in ((every(NEVER), "dense"), (every(1), "native"), (every(4), "native")):
        rules.write(made)
        forget()
        assert chosen(drawn, product) == taken
    rules.write(every(5))
    forget()
    assert chosen(drawn, product) == "dense"  # 32 inputs over a degree of 8


@needs_kernels
def test_each_band_of_lanes_has_its_own_rule(place):
    always, never = every(1)[0][1:], every(NEVER)[0][1:]
    rules.write((NativeRule(16, *never), NativeRule(2, *always), NativeRule(0, *never)))
    forget()
    taken = {n: chosen(tensors(LayerShape(3, 32, 32, 4, 1, 8, 1, n))) for n in (1, 2, 15, 16, 17)}
    assert taken == {1: "dense", 2: "native", 15: "native", 16: "dense", 17: "dense"}


@needs_kernels
def test_the_table_is_read_once(place, monkeypatch):
    looked = []
    read = rules.read
    monkeypatch.setattr(rules, "read", lambda: looked.append(1) or read())
    for kernel, _ in itertools.product((0, 1, 3), range(3)):
        run(layer(kernel))
    assert looked == [1]


@needs_kernels
def test_another_kernel_is_another_rounding_of_the_same(place):
    drawn, found = layer(), []
    for made in (every(1), every(NEVER)):
        rules.write(made)
        forget()
        found.append(run(drawn))
    with ops.backend("native"):
        assert torch.equal(found[0], run(drawn))
    with ops.backend("dense"):
        assert torch.equal(found[1], run(drawn))
    torch.testing.assert_close(*found)


# ---- what is said


CPUS = {
    "Zen 4": ("vendor_id: AuthenticAMD|cpu family: 25", ["v4", "v3"], True),
    "Zen 3": ("vendor_id: AuthenticAMD|cpu family: 25", ["v3"], True),
    "Zen 5": ("vendor_id: AuthenticAMD|cpu family: 26", ["v4", "v3"], False),
    "Emerald Rapids": (
        "vendor_id: GenuineIntel|flags: avx2 avx512_fp16 amx",
        ["v4", "v3"],
        True,
    ),
    "Emerald Rapids held to AVX2": (
        "vendor_id: GenuineIntel|flags: avx512_fp16",
        ["v3"],
        False,
    ),
    "Ice Lake": ("vendor_id: GenuineIntel|flags: avx512f avx512_vnni", ["v4", "v3"], False),
    "Haswell": ("vendor_id: GenuineIntel|flags: avx2", ["v3"], False),
    "old AMD": ("vendor_id: AuthenticAMD|cpu family: 25", [], False),
    "ARM": ("CPU implementer: 0x41|CPU part: 0xd0c", [], False),
    "Apple": ("", [], False),
}


@pytest.mark.parametrize("name", CPUS)
def test_inspect_advises_a_cpu_that_was_not_measured(name, place, monkeypatch, capsys):
    told, levels, measured = CPUS[name]
    facts = dict(fact.split(": ") for fact in told.split("|") if fact)
    monkeypatch.setattr(auto, "cpuinfo", lambda: facts)
    monkeypatch.setattr(native, "levels", lambda: levels)
    monkeypatch.setattr(native, "possible", lambda: True)
    assert main(["inspect", "x_mobilenet050_c8"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "xzoo tune" in line]
    assert len(lines) == (0 if measured else 1)
    assert ("not measured" in doctor._rule()) == (not measured)


@needs_kernels
def test_inspect_advises_nobody_whom_it_would_not_help(place, monkeypatch):
    monkeypatch.setattr(auto, "is_measured", lambda: False)
    assert "`xzoo tune`" in doctor.advice()
    with ops.backend("dense"):
        assert doctor.advice() == ""
    rules.write(every(2))
    assert doctor.advice() == ""
    assert doctor.doctor()["rule of auto"] == f"tuned on {rules.read().date}: {place}"
    changed(place, "torch", "1.0")
    assert "`xzoo tune`" in doctor.advice()
    place.write_text("{}")
    assert "`xzoo tune`" in doctor.advice()
    monkeypatch.setattr(native, "possible", lambda: False)
    assert doctor.advice() == ""


def test_inspect_of_a_dense_model_advises_nothing(monkeypatch, capsys):
    monkeypatch.setattr(auto, "is_measured", lambda: False)
    import timm

    name = "resnet18"
    assert timm.is_model(name)
    assert main(["inspect", name]) == 0
    assert "xzoo tune" not in capsys.readouterr().out


# ---- the command


FEW = [
    tuning.Case("linear", 3, LayerShape(0, 64, 64, 1, 1, 8, 1, 3)),
    tuning.Case("conv3", 16, LayerShape(3, 16, 16, 5, 1, 4, 1, 16, True)),
]


@needs_kernels
def test_tune_writes_the_table_of_this_machine(place, monkeypatch, capsys):
    monkeypatch.setattr(tuning, "cases", lambda: FEW)
    torch.set_num_threads(2)
    try:
        assert main(["tune", "--seconds", "0.2"]) == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    out, err = capsys.readouterr()
    table = rules.read()
    assert rules.difference(table) == "" and [rule.least_lanes for rule in table.rules] == [
        16,
        2,
        0,
    ]
    assert table.rules[2] == NativeRule(0, *every(NEVER)[0][1:])  # no layer of one lane
    lines = out.splitlines()
    assert str(place) in lines[-2] and "Delete that file" in lines[-1]
    row = next(line for line in lines if re.match(r"weight grad +1 ", line))
    assert row.count("never") == len(KINDS)
    assert err.count("\n") == 1 and "measuring for 0.2 s" in err


@needs_kernels
def test_what_is_interrupted_leaves_the_old_table(place, monkeypatch, capsys):
    rules.write(every(7))
    before = place.read_bytes()

    def interrupted(case, seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning, "_measured", interrupted)
    assert main(["tune"]) == 130
    assert place.read_bytes() == before and os.listdir(place.parent) == ["tune.json"]


@needs_kernels
def test_changes_are_told_beside_the_built_in_rule(monkeypatch):
    built_in = (NativeRule(8, *every(4)[0][1:]), NativeRule(0, *every(2)[0][1:]))
    monkeypatch.setattr(tuning, "NATIVE", {(native.lanes(), native.fast()): built_in})
    made = (NativeRule(16, *every(4)[0][1:]), NativeRule(0, *every(NEVER)[0][1:]))
    told = tuning.changes(made)
    assert [row[:2] for row in told] == [
        [product.replace("_", " "), lanes] for product in PRODUCTS for lanes in ("16", "1")
    ]
    assert [set(row[2:]) for row in told] == [{"4"}, {"never, was 2"}] * 3
    monkeypatch.setattr(tuning, "NATIVE", {})
    assert {*tuning.changes(made)[0][2:]} == {"4, was never"}


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf"])
def test_times_that_are_none_are_refused(seconds, capsys):
    assert main(["tune", "--seconds", seconds]) == 2
    err = capsys.readouterr().err
    assert "more than 0 are needed" in err or "expected float" in err


@needs_kernels
def test_nothing_is_measured_that_could_not_be_kept(place, monkeypatch, capsys):
    monkeypatch.setattr(tuning, "measure", lambda *_: pytest.fail("it measures"))
    place.mkdir()
    assert main(["tune"]) == 2
    err = capsys.readouterr().err
    assert f"cannot write {place}: it is a folder" in err and "XZOO_HOME" in err


def test_without_kernels_there_is_nothing_to_tune(place, monkeypatch, capsys):
    monkeypatch.setattr(native, "_loaded", [])
    monkeypatch.setattr(native, "_found", [])
    monkeypatch.setenv("CXX", "/nowhere/g++")
    assert main(["tune"]) == 2
    err = capsys.readouterr().err
    assert "no kernels of xzoo's to measure here: CXX='/nowhere/g++'" in err
    assert not place.exists()


@needs_kernels
@pytest.mark.slow
def test_a_real_run_is_followed_by_the_next_process(tmp_path):
    """Two minutes on a busy machine: every layer is measured, however short the time."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "native").symlink_to(os.path.realpath(os.environ["XZOO_HOME"] + "/native"))
    variables = os.environ | {"XZOO_HOME": str(home)}
    command = [sys.executable, "-m", "xzoo"]
    done = subprocess.run(
        [*command, "tune", "--seconds", "1"], env=variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    data = json.loads((home / "tune.json").read_text())
    numbers = [
        number
        for rule in data["rules"]
        for product in PRODUCTS
        for number in rule[product].values()
    ]
    assert len(numbers) == 3 * 3 * 6 and set(numbers) <= {*COMPRESSIONS, NEVER}
    told = subprocess.run([*command, "doctor"], env=variables, capture_output=True, text=True)
    assert f"tuned on {data['date']}: {home / 'tune.json'}" in told.stdout
