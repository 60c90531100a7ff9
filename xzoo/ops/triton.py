"""Our own GPU kernels, triton_kernels.py: implicit GEMM on tensor cores for layers whose share is a
multiple of 8.

A block of `share` outputs reads the same inputs, so it is one product [pixels x K] @ [K x share], K
= degree * taps, whose left side is gathered from x while the loop runs: no copy of x is made, and
any strides of it are read as they are. bfloat16 and float16 (summed in float32) and float32, which
goes through TF32 where torch may do so: by torch.backends.cudnn.conv.fp32_precision for
convolutions, torch.backends.cuda.matmul.fp32_precision for linear layers (and the older switches
that set these). All three products give the same bits in every run.

**Not measured on a GPU yet.** What an H100 could reach at most, derived for two-byte types (4096
FLOP a cycle and multiprocessor on tensor cores; a load of 32 lanes takes a cycle for each line of
128 bytes that it touches; L2 5.5 TB/s of 989 TFLOP/s), as the part of its peak that a dense layer
of the same sizes would have to reach to be as fast; it reaches some 0.6. c = inputs / degree.

    gather, channels_last  32 channels of a pixel span c / 2 lines: 64 share FLOP in c / 2 cycles.
                           Share 8: 0.25, share 16: 0.5, whatever c is. The density is paid for in
                           lines that are read for nothing
    gather, contiguous     32 pixels of a channel span 1 to 2 lines: 64 share FLOP in 1 or 2 cycles.
                           Share 8: c / 16 to c / 8; share 16: c / 8 to c / 4
    L2                     share * taps FLOP a byte in the first case for the dense layer, c times
                           that in the second: for 1x1 and share 16, 0.09 and 0.09 c; for 3x3, nine
                           times that if L1 keeps the taps
    tensor cores           share 16: c; share 8: c / 2, as reading the left side of a step from
                           shared memory takes as long as 16 outputs need
    input gradient         all the products of the dense layer, as a tile of 64 channels meets
                           nearly every block: 1, and for share 8 half of it (K is 8 of 16). Less
                           work for `group` and `shuffle` only

So channels_last is not expected to win below share 32, and contiguous 3x3 layers from c = 8 (share
16) or 16 (share 8) on are where a GPU should be asked first. The input gradient will not win.

Not here: small shares, dilation other than 1, float64, GPUs before Ampere, second derivatives
(`missing`).
"""

import contextlib
import importlib.util
import math
import os
from collections.abc import Collection
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .rows import Memory, Pair, checked, remembered

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Tiles: pixels, inputs and input channels of a program. With 8 warps no kernel spills a register
# (ptxas, sm_90).
PIXELS, INPUTS, CHANNELS = 128, 32, 64
SUMMED = 64  # pixels, where the sum goes over them
# Of a weight gradient, at least, where there are pixels enough: some 8 for each multiprocessor.
PROGRAMS = 1024

_readers: Memory = {}


# ---- as backends.Backend says: where it runs

ACTIVATIONS: Collection[str] = ()
CHECKS_NEIGHBOURS = True


def possible() -> bool:
    """Whether there is Triton, and a GPU for it or its interpreter (TRITON_INTERPRET=1). Imports
    nothing."""
    if importlib.util.find_spec("triton") is None:
        return False
    gpu = (
        torch.cuda.is_available()
        and torch.version.hip is None
        and torch.cuda.get_device_capability() >= (8, 0)
    )
    return gpu or _interpreted()


def missing(operation: str, x: Tensor, weight: Tensor, neighbours: Tensor, *geometry: Any) -> str:
    said = _lacking(operation, x, weight, neighbours, *geometry)
    return f"has no kernel for {operation} with {said}" if said else ""


def _lacking(operation: str, x: Tensor, weight: Tensor, neighbours: Tensor, *geometry: Any) -> str:
    """What such a layer has that the kernels do not do, in a few words; empty where they do it."""
    share = len(weight) // len(neighbours)
    if not (x.is_cuda or (x.device.type == "cpu" and _interpreted())):
        return f"tensors on a {x.device.type} device; it needs an NVIDIA GPU"
    if not possible():
        return "Triton and a GPU of compute capability 8.0 or more: this machine lacks one of them"
    if x.dtype not in DTYPES or weight.dtype != x.dtype:
        given = f"x of {x.dtype} and weight of {weight.dtype}"
        return f"{given}; it takes one of bfloat16, float16, float32 for both"
    if share % 8:
        return f"share {share}; it needs a multiple of 8"
    if operation == "conv2d" and tuple(geometry[2]) != (1, 1):
        return f"dilation {tuple(geometry[2])}; it needs 1"
    if len(x) * math.prod(x.shape[2:]) >= 2**31 or weight.numel() >= 2**31:
        given = f"x of {list(x.shape)} and weight of {list(weight.shape)}"
        return f"{given}; it counts pixels and weights in 31 bits"
    return ""


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _kernels() -> ModuleType:
    from . import triton_kernels

    return triton_kernels


# ---- the two operations; `precision` is the switch of torch that float32 follows

_CONV: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]


def conv2d(
    x: Tensor,
    weight: Tensor,
    neighbours: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    precision: Any = _CONV,
) -> Tensor:
    size = [
        (s + 2 * p - k) // t + 1
        for s, p, k, t in zip(x.shape[2:], padding, weight.shape[2:], stride, strict=True)
    ]
    y = _empty([len(x), len(weight), *size], x)
    if not y.numel():
        return y
    weight, rows, share = (
        weight.contiguous(),
        checked(neighbours, x.shape[1]),
        len(weight) // len(neighbours),
    )
    pixels, columns = len(y) * math.prod(size), _power(share, 8, 64)
    programs = _ceil(pixels, PIXELS) * len(rows) * _ceil(share, columns)
    shapes = (*x.shape[1:], *size, pixels, weight.shape[1], len(rows))
    with _on(x):
        _kernels().forward[(programs,)](
            *(x, weight, rows, x if bias is None else bias.contiguous(), y),
            *(*shapes, *x.stride(), *y.stride(), *weight.shape[2:], *stride, *padding, *dilation),
            *(
                share,
                bias is not None,
                _last(x),
                _last(y),
                *_arithmetic(x, precision),
                PIXELS,
                columns,
                INPUTS,
            ),
            num_warps=8,
        )
    return y


def conv2d_input_grad(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    neighbours: Tensor,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    precision: Any = _CONV,
) -> Tensor:
    dx = _empty(x.shape, x)
    if not grad.numel():
        return dx.zero_()
    weight, share = weight.contiguous(), len(weight) // len(neighbours)
    channels = _power(x.shape[1], 16, CHANNELS)
    slots, readers, counts = _transposed(neighbours, x.shape[1], channels)
    # Pixels with one remainder by the stride, and how many remainders there are.
    pixels = len(x) * math.prod(_ceil(s, t) for s, t in zip(x.shape[2:], stride, strict=True))
    programs = _ceil(pixels, PIXELS) * math.prod(stride) * _ceil(x.shape[1], channels)
    shapes = (*x.shape, *grad.shape[2:], weight.shape[1], readers.shape[1])
    with _on(x):
        _kernels().input_grad[(programs,)](
            *(grad, weight, slots, readers, counts, dx),
            *(*shapes, *grad.stride(), *dx.stride(), *weight.shape[2:], *stride, *padding),
            *(
                share,
                _last(grad),
                _last(dx),
                *_arithmetic(x, precision),
                PIXELS,
                channels,
                _power(share, 16, 64),
            ),
            num_warps=8,
        )
    return dx


def conv2d_weight_grad(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    neighbours: Tensor,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    precision: Any = _CONV,
) -> Tensor:
    if not grad.numel():
        return torch.zeros_like(weight, memory_format=torch.contiguous_format)
    rows, share = checked(neighbours, x.shape[1]), len(weight) // len(neighbours)
    pixels, columns = len(grad) * math.prod(grad.shape[2:]), _power(share, 8, 64)
    inputs = _power(weight.shape[1], 16, 64)
    programs = (
        len(rows)
        * _ceil(share, columns)
        * _ceil(weight.shape[1], inputs)
        * math.prod(weight.shape[2:])
    )
    # By the sizes alone, and not by the GPU: the order of a sum is then the same everywhere.
    steps = _ceil(
        pixels, SUMMED * max(1, min(_ceil(PROGRAMS, programs), _ceil(pixels, 4 * SUMMED)))
    )
    splits = _ceil(pixels, SUMMED * steps)
    parts = torch.empty([splits, *weight.shape], dtype=torch.float32, device=x.device)
    shapes = (
        *x.shape[1:],
        *grad.shape[2:],
        pixels,
        weight.shape[1],
        len(rows),
        steps,
        weight.numel(),
    )
    with _on(x):
        _kernels().weight_grad[(programs * splits,)](
            *(grad, x, rows, parts),
            *(
                *shapes,
                *grad.stride(),
                *x.stride(),
                *weight.shape[2:],
                *stride,
                *padding,
                *dilation,
            ),
            *(share, _last(grad), _last(x), *_arithmetic(x, precision), SUMMED, columns, inputs),
        )
    return parts.sum(0).to(weight.dtype)


# A linear layer is a convolution of one pixel, with the precision of a matrix product.
_POINT = ((1, 1), (0, 0), (1, 1), torch.backends.cuda.matmul)


def linear(x: Tensor, weight: Tensor, neighbours: Tensor, bias: Tensor | None) -> Tensor:
    return conv2d(_pixel(x), _pixel(weight), neighbours, bias, *_POINT)[:, :, 0, 0]


def linear_input_grad(grad: Tensor, x: Tensor, weight: Tensor, neighbours: Tensor) -> Tensor:
    return conv2d_input_grad(_pixel(grad), _pixel(x), _pixel(weight), neighbours, *_POINT)[
        :, :, 0, 0
    ]


def linear_weight_grad(grad: Tensor, x: Tensor, weight: Tensor, neighbours: Tensor) -> Tensor:
    return conv2d_weight_grad(_pixel(grad), _pixel(x), _pixel(weight), neighbours, *_POINT)[
        :, :, 0, 0
    ]


def _pixel(x: Tensor) -> Tensor:
    return x[:, :, None, None]


# ---- what a kernel is told


def _arithmetic(x: Tensor, precision: Any) -> tuple[str, bool]:
    """tl.dot's precision for float32, and whether to cast to it before (the interpreter has no
    bfloat16)."""
    tf32 = precision.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee", _interpreted() and x.dtype == torch.bfloat16


def _last(x: Tensor) -> bool:
    """Whether channels lie side by side in memory."""
    return x.stride(1) == 1


def _empty(shape: Any, like: Tensor) -> Tensor:
    last = like.is_contiguous(memory_format=torch.channels_last) and not like.is_contiguous()
    form = torch.channels_last if last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=form)


def _on(x: Tensor) -> contextlib.AbstractContextManager:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _power(n: int, least: int, most: int) -> int:
    """The power of two that holds n, between `least` and `most`."""
    return max(least, min(most, 1 << (n - 1).bit_length()))


# ---- the graph as the kernels read it, made once for each tensor of neighbours


def _transposed(neighbours: Tensor, n_in: int, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """The slots, readers and counts of triton_kernels.input_grad, for tiles of `channels`."""

    def make() -> tuple[Tensor, Tensor, Tensor]:
        rows = checked(neighbours, n_in).long()
        (blocks, degree), tiles = rows.shape, _ceil(n_in, channels)
        slots = torch.full([blocks, tiles * channels], -1, dtype=torch.int32, device=rows.device)
        slots.scatter_(
            1, rows, torch.arange(degree, dtype=torch.int32, device=rows.device).expand_as(rows)
        )
        reads = (slots >= 0).unflatten(1, (tiles, channels)).any(2).t()  # [tiles, blocks]
        counts = reads.sum(1, dtype=torch.int32)
        readers = reads.logical_not().int().argsort(dim=1, stable=True)[:, : int(counts.max())]
        return slots[:, :n_in].contiguous(), readers.int().contiguous(), counts

    return remembered(_readers, neighbours, (n_in, channels), make)
