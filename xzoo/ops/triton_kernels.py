"""The three kernels of the `triton` backend; importing this file imports Triton, so triton.py does
it on first use.

A linear layer is a convolution of one pixel. The names: x [B, C, H, W], y and its gradient [B, out,
OH, OW], weight [out, degree, KH, KW] and neighbours [blocks, degree], the last two dense in memory.
Strides (`xb`: x along B) are in elements and may be any; X_LAST says that channels, and not pixels,
lie side by side in x, and decides in which order lanes walk over a tile. Sums are float32, in an
order that depends on the sizes alone. Every access is masked: a neighbour that does not exist is
not read. PRECISION is tl.dot's for float32; WIDE casts to float32 before tl.dot, for Triton's
interpreter, which has no bfloat16 there.
"""

import triton
import triton.language as tl


@triton.jit
def _tile(pointer, rows, columns, rows_ok, columns_ok, LAST: tl.constexpr, WIDE: tl.constexpr):
    """[rows, columns] at pointer + row + column, and zero where either is not ok."""
    if LAST:
        tile = tl.load(
            pointer + rows[:, None] + columns[None, :],
            rows_ok[:, None] & columns_ok[None, :],
            other=0.0,
        )
    else:
        turned = tl.load(
            pointer + columns[:, None] + rows[None, :],
            columns_ok[:, None] & rows_ok[None, :],
            other=0.0,
        )
        tile = tl.trans(turned)
    if WIDE:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def _put(pointer, tile, rows, columns, rows_ok, columns_ok, LAST: tl.constexpr):
    tile = tile.to(pointer.dtype.element_ty)
    if LAST:
        tl.store(
            pointer + rows[:, None] + columns[None, :], tile, rows_ok[:, None] & columns_ok[None, :]
        )
    else:
        tl.store(
            pointer + columns[:, None] + rows[None, :],
            tl.trans(tile),
            columns_ok[:, None] & rows_ok[None, :],
        )


@triton.jit
def forward(
    x, weight, neighbours, bias, y,
    C, H, W, OH, OW, M, degree, blocks,
    xb, xc, xh, xw, yb, yc, yh, yw,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    SHARE: tl.constexpr, BIASED: tl.constexpr, X_LAST: tl.constexpr, Y_LAST: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A program: BM output pixels (of M = B * OH * OW) by BN outputs of one block; mirrors
    dense.conv2d.

    The loop goes over the block's inputs, BK at a time, and inside over the taps, which read nearly
    the same pixels again. Programs of one tile of pixels follow each other, so that its inputs stay
    in the L2 cache.
    """
    parts = tl.cdiv(SHARE, BN)
    tile, column = tl.program_id(0) // (blocks * parts), tl.program_id(0) % (blocks * parts)
    block, part = column // parts, column % parts
    m = tile * BM + tl.arange(0, BM)
    b, oh, ow = m // (OH * OW), m // OW % OH, m % OW
    top, left = oh * SH - PH, ow * SW - PW
    pixel = b.to(tl.int64) * xb + top.to(tl.int64) * xh + left.to(tl.int64) * xw
    s = part * BN + tl.arange(0, BN)
    o = block * SHARE + s

    sums = tl.zeros((BM, BN), tl.float32)
    for i in range(tl.cdiv(degree, BK) * KH * KW):
        tap = i % (KH * KW)
        j = i // (KH * KW) * BK + tl.arange(0, BK)
        channel = tl.load(neighbours + block * degree + j, j < degree, other=-1)
        dh, dw = tap // KW * DH, tap % KW * DW
        inside = (m < M) & (top + dh >= 0) & (top + dh < H) & (left + dw >= 0) & (left + dw < W)
        there = (channel >= 0) & (channel < C)
        a = _tile(
            x, pixel + dh * xh + dw * xw, channel.to(tl.int64) * xc, inside, there, X_LAST, WIDE
        )
        f = _tile(
            weight, j * (KH * KW) + tap, o * (degree * KH * KW), j < degree, s < SHARE, True, WIDE
        )
        sums = tl.dot(a, f, sums, input_precision=PRECISION)
    if BIASED:
        sums += tl.load(bias + o, s < SHARE, other=0.0).to(tl.float32)[None, :]
    at = b.to(tl.int64) * yb + oh.to(tl.int64) * yh + ow.to(tl.int64) * yw
    _put(y, sums, at, o.to(tl.int64) * yc, m < M, s < SHARE, Y_LAST)


@triton.jit
def input_grad(
    grad, weight, slots, readers, counts, dx,
    B, C, H, W, OH, OW, degree, width,
    gb, gc, gh, gw, xb, xc, xh, xw,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr,
    SHARE: tl.constexpr, G_LAST: tl.constexpr, X_LAST: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """A program: BM input pixels by BC input channels, which no other program writes; mirrors
    dense.conv2d_input_grad.

    slots [blocks, C] int16: the place of a channel among the inputs of a block, or -1. readers
    [channels / BC, width] int32: the blocks that read a tile of channels, ascending, and counts how
    many they are. The pixels of a program have one remainder by the stride in each direction: only
    the taps that meet them are computed.
    """
    tiles = tl.cdiv(C, BC)
    tile, rest = tl.program_id(0) // (tiles * SH * SW), tl.program_id(0) % (tiles * SH * SW)
    remainder, channels = rest // tiles, rest % tiles
    rh, rw = remainder // SW, remainder % SW
    rows, columns = (H - rh + SH - 1) // SH, (W - rw + SW - 1) // SW  # pixels of these remainders
    m = tile * BM + tl.arange(0, BM)
    ok = m < B * rows * columns
    m = tl.where(ok, m, 0)
    rows, columns = tl.maximum(rows, 1), tl.maximum(columns, 1)
    b, p, q = m // (rows * columns), m // columns % rows, m % columns
    kh, kw = (rh + PH) % SH, (rw + PW) % SW  # the first tap; every SH-th and SW-th follows
    oh, ow = p + (rh + PH) // SH, q + (rw + PW) // SW  # the output that reads through it
    across = (KW - kw + SW - 1) // SW
    steps = tl.cdiv(SHARE, BS)
    pixel = b.to(tl.int64) * gb + oh.to(tl.int64) * gh + ow.to(tl.int64) * gw
    c = channels * BC + tl.arange(0, BC)

    sums = tl.zeros((BM, BC), tl.float32)
    for r in range(tl.load(counts + channels)):
        block = tl.load(readers + channels * width + r)
        j = tl.load(slots + block.to(tl.int64) * C + c, c < C, other=-1).to(tl.int32)
        part = tl.zeros((BM, BC), tl.float32)
        for i in range((KH - kh + SH - 1) // SH * across * steps):
            s = i % steps * BS + tl.arange(0, BS)
            o = block * SHARE + s
            up, back = i // steps // across, i // steps % across
            inside = ok & (oh - up >= 0) & (oh - up < OH) & (ow - back >= 0) & (ow - back < OW)
            g = _tile(
                grad,
                pixel - up * gh - back * gw,
                o.to(tl.int64) * gc,
                inside,
                s < SHARE,
                G_LAST,
                WIDE,
            )
            tap = (kh + up * SH) * KW + kw + back * SW
            f = _tile(
                weight, o * (degree * KH * KW), j * (KH * KW) + tap, s < SHARE, j >= 0, True, WIDE
            )
            part = tl.dot(g, f, part, input_precision=PRECISION)
        # Not all of the tile's channels are read by this block: a NaN of its gradient stays away
        # from the others.
        sums += tl.where(j[None, :] >= 0, part, 0.0)
    h, w = p * SH + rh, q * SW + rw
    at = b.to(tl.int64) * xb + h.to(tl.int64) * xh + w.to(tl.int64) * xw
    _put(dx, sums, at, c.to(tl.int64) * xc, ok, c < C, X_LAST)


@triton.jit
def weight_grad(
    grad, x, neighbours, dw,
    C, H, W, OH, OW, M, degree, blocks, steps, size,
    gb, gc, gh, gw, xb, xc, xh, xw,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    SHARE: tl.constexpr, G_LAST: tl.constexpr, X_LAST: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    """A program: one tap of BJ inputs by BN outputs of one block, over `steps` times BM of the M
    output pixels.

    dw [splits, out, degree, KH, KW] float32: a part of the sum for each range of pixels, `size`
    elements apart. Mirrors dense.conv2d_weight_grad.
    """
    parts = tl.cdiv(SHARE, BN)
    chunks = tl.cdiv(degree, BJ)
    split, rest = tl.program_id(0) // (blocks * parts * chunks * KH * KW), tl.program_id(0)
    tap, rest = rest % (KH * KW), rest // (KH * KW)
    chunk, rest = rest % chunks, rest // chunks
    part, block = rest % parts, rest // parts % blocks
    j = chunk * BJ + tl.arange(0, BJ)
    s = part * BN + tl.arange(0, BN)
    o = block * SHARE + s
    channel = tl.load(neighbours + block * degree + j, j < degree, other=-1)
    there = (channel >= 0) & (channel < C)
    kh, kw = tap // KW, tap % KW

    sums = tl.zeros((BJ, BN), tl.float32)
    for i in range(steps):
        m = (split * steps + i) * BM + tl.arange(0, BM)
        b, oh, ow = m // (OH * OW), m // OW % OH, m % OW
        h, w = oh * SH - PH + kh * DH, ow * SW - PW + kw * DW
        pixel = b.to(tl.int64) * xb + h.to(tl.int64) * xh + w.to(tl.int64) * xw
        inside = (m < M) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        a = _tile(x, pixel, channel.to(tl.int64) * xc, inside, there, X_LAST, WIDE)
        at = b.to(tl.int64) * gb + oh.to(tl.int64) * gh + ow.to(tl.int64) * gw
        g = _tile(grad, at, o.to(tl.int64) * gc, m < M, s < SHARE, G_LAST, WIDE)
        sums = tl.dot(tl.trans(a), g, sums, input_precision=PRECISION)
    out = dw + split.to(tl.int64) * size
    _put(out, sums, j * (KH * KW) + tap, o * (degree * KH * KW), j < degree, s < SHARE, True)
