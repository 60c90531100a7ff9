"""The `triton` backend: its kernels by Triton's interpreter (and on a GPU where there is one), and
compiled for GPUs.

What the kernels must do stands in triton_cases.py, which runs here in processes of its own.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from xzoo import ops
from xzoo.errors import XzooError

CASES = Path(__file__).with_name("triton_cases.py")
PLACES = ["interpreter", *(["gpu"] if ops.triton.possible() and torch.cuda.is_available() else [])]

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


def run_cases(place, *options):
    environment = {**os.environ, "TRITON_INTERPRET": "1"} if place == "interpreter" else os.environ
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        *options,
        str(CASES),
    ]
    run = subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=CASES.parents[1]
    )
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    assert " passed" in run.stdout and "skipped" not in run.stdout


@needs_triton
@pytest.mark.parametrize("place", PLACES)
def test_kernels(place):
    run_cases(place)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_kernels_on_many_layers(place):
    run_cases(place, "-m", "slow")


def test_importing_xzoo_makes_no_kernels():
    """Other packages may import Triton by themselves."""
    code = (
        "import sys, xzoo, xzoo.layers, xzoo.ops; print('xzoo.ops.triton_kernels' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (run.stdout.strip(), run.returncode) == ("False", 0), run.stderr


def test_a_cpu_is_refused_in_one_line(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x, weight, rows = torch.ones(2, 4), torch.ones(8, 2), torch.tensor([[0, 1]])
    said = (
        "backend 'triton' has no kernel for linear with tensors on a cpu device; it needs an "
        "NVIDIA GPU; use 'auto'"
    )
    with ops.backend("triton"), pytest.raises(XzooError) as error:
        ops.linear(x, weight, rows)
    assert str(error.value) == said
    if not torch.cuda.is_available():
        assert "triton" not in ops.available()


# ---- compiled for GPUs that need not be here

SIZES = {
    "KH": 3,
    "KW": 3,
    "SH": 1,
    "SW": 1,
    "PH": 1,
    "PW": 1,
    "DH": 1,
    "DW": 1,
    "BIASED": True,
    "WIDE": False,
}
TILES = {
    "forward": {"BM": 128, "BK": 32},
    "input_grad": {"BM": 128, "BC": 64, "BS": 16},
    "weight_grad": {"BM": 64},
}
DOT = {80: "mma.sync.aligned", 90: "wgmma.mma_async"}


def compiled(name, arch, dtype, share, last, precision="tf32"):
    """The PTX of a kernel as the backend would launch it on a dense tensor."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from xzoo.ops import triton_kernels

    kernel = getattr(triton_kernels, name)
    fixed = {**SIZES, "SHARE": share, "BN": share, "BJ": 64, "PRECISION": precision, **TILES[name]}
    fixed |= {f"{tensor}_LAST": last for tensor in "XYG"}
    # Triton's own specialization
    fixed |= {f"{tensor}{'c' if last else 'w'}": 1 for tensor in "xyg"}
    pointers = {
        "neighbours": "*i32",
        "slots": "*i32",
        "readers": "*i32",
        "counts": "*i32",
        "dw": "*fp32",
    }
    pointers |= dict.fromkeys(("x", "weight", "bias", "y", "grad", "dx"), f"*{dtype}")
    signature = {n: "constexpr" if n in fixed else pointers.get(n, "i32") for n in kernel.arg_names}
    constants = {(i,): fixed[n] for i, n in enumerate(kernel.arg_names) if n in fixed}
    warps = 4 if name == "weight_grad" else 8
    return compile(
        ASTSource(kernel, signature, constants), GPUTarget("cuda", arch, 32), {"num_warps": warps}
    ).asm["ptx"]


@needs_triton
@pytest.mark.parametrize("name", TILES)
def test_kernels_compile_to_tensor_cores(name):
    ptx = compiled(name, 90, "bf16", 8, True)
    assert DOT[90] in ptx and "bf16.bf16" in ptx and "fma.rn.f32" not in ptx


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("share", [8, 16])
@pytest.mark.parametrize("arch", DOT)
@pytest.mark.parametrize("name", TILES)
def test_all_kernels_compile(name, arch, share, last):
    for dtype, found in (("fp16", "f16.f16"), ("fp32", "tf32.tf32"), ("bf16", "bf16.bf16")):
        ptx = compiled(name, arch, dtype, share, last)
        assert DOT[arch] in ptx and found in ptx
    assert DOT[arch] not in compiled(name, arch, "fp32", share, last, "ieee")
