"""What xzoo finds and builds on an ARM machine, whose kernels run under an emulator.

That they equal torch in float64, test_native.py and test_norms.py show at the levels of emulated.py:

    pytest -n 0 -m slow -k "aarch64 or native_arm"
"""

from pathlib import Path

import pytest
import torch
from emulated import on_arm
from guard import PARTS, difference, drawn, exact, native_result, tolerance
from test_native import random_case

from xzoo import ops
from xzoo.doctor import doctor
from xzoo.ops import native
from xzoo.ops.norms import batch_norm_act

pytestmark = pytest.mark.slow


@pytest.fixture
def arm(monkeypatch):
    """The kernels as a first call on such a machine gets them."""
    monkeypatch.setattr(native, "_loaded", [])
    monkeypatch.setattr(native, "_found", [])
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    on_arm(monkeypatch)
    assert native.available(), native._found
    yield native._loaded[0]
    native._loaded[0].close()
    torch.set_num_threads(1)


def test_the_kernels_are_for_every_arm_and_auto_leaves_them_alone(arm, monkeypatch):
    record = native._found[0].record
    assert not any(flag.startswith("-m") for flag in record["flags"])
    assert (record["level"], record["refused"]) == ("", [])
    assert (native.lanes(), native.fast()) == (4, False)
    assert doctor()["kernels"].startswith("4 floats at a time")
    x, weight, rows, bias, _, geometry = random_case()
    running, called, call = (torch.zeros(24), torch.ones(24)), set(), arm.call

    def spy(name, *arguments):
        called.add(name)
        return call(name, *arguments)

    def both():
        norm = batch_norm_act(x, *running, None, None, False, 0.1, 1e-5, "relu")
        return ops.conv2d(x, weight, rows, bias, *geometry), norm

    monkeypatch.setattr(arm, "call", spy)
    want = both()
    assert not {"xzoo_conv3", "xzoo_norm"} & called
    with ops.backend("native"):
        got = both()
    assert {"xzoo_conv3", "xzoo_norm"} <= called
    torch.testing.assert_close(got, want)


def test_random_layers_equal_dense_in_float64(arm):
    for seed in range(200):
        case = drawn(seed, numbers=(3_000, 20_000, 60_000))
        torch.set_num_threads(case.threads)
        for part in PARTS:
            got = native_result(case, part)
            wrong = difference(got, exact(case, part), tolerance(case, part))
            assert not wrong, f"{case.operation}{part} {wrong}: {case}"


def test_threads_run_there(arm):
    x, weight, rows, bias, _, geometry = random_case()
    torch.set_num_threads(7)
    with ops.backend("native"):
        ops.conv2d(x, weight, rows, bias, *geometry)
    assert len(list(Path(f"/proc/{arm.process.pid}/task").iterdir())) >= 7
