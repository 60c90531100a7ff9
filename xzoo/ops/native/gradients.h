// Gradients of weights: the activations packed side by side, then a sum for each weight.
#pragma once

#include <cstdint>
#include <cstring>

#include "conv3_pixels.h"
#include "layer.h"
#include "memory.h"
#include "panels.h"
#include "threads.h"
#include "vectors.h"

namespace {

// Floats of both activations that are packed at a time, unless one step needs more.
const long PACKED = 4 << 20;

INLINE void add_sums(const V sum[9], float* dw) {
  UNROLL for (int i = 0; i < 9; i += VL) {
    const long some = least(VL, 9 - i);
    V r[VL];
    UNROLL for (int l = 0; l < VL; l++) r[l] = l < some ? sum[least(i + l, 8)] : all(0);
    store_some(dw + i, load_some(dw + i, some) + sums(r), some);
  }
}

// Sums of one row of an output's gradient with the rows of x above, at and below it, over columns
// [q0, q0 + Q).
template <int Q, int S>
INLINE void row_sums(const float* x, const float* d, long row, bool top, bool bottom, bool left,
                     bool right, V sum[9]) {
  constexpr int IQ = span<S>(Q);
  V g[Q];
  UNROLL for (int q = 0; q < Q; q++) g[q] = load(d + q * VL);
  UNROLL for (int a = 0; a < 3; a++) {
    if ((a == 0 && top) || (a == 2 && bottom)) continue;
    const float* line = here(x + a * row);
    UNROLL for (int i = 0; i < IQ; i++) {
      if ((i == 0 && left) || (i == IQ - 1 && right)) continue;
      V v = held(line + i * VL);
      UNROLL for (int b = 0; b < 3; b++)
        if (hit<S>(i, b, Q) >= 0) sum[a * 3 + b] = fma(v, g[hit<S>(i, b, Q)], sum[a * 3 + b]);
    }
  }
}

template <int Q, int S>
KERNEL void weight_sums(const float* x, const float* d, long blocks, long H, long W, long Ho,
                        long Wo, float* dw) {
  V sum[9];
  UNROLL for (int i = 0; i < 9; i++) sum[i] = all(0);
  for (long k = 0; k < blocks; k++, x += H * W * VL)
    for (long r = 0; r < Ho; r++, d += Wo * VL) {
      long q = 0;
#define SUMS(n)                                                                                    \
  row_sums<n, S>(x + ((r * S - 1) * W + q * S - 1) * VL, d + q * VL, W * VL, r == 0,               \
                 r * S + 1 >= H, q == 0, (q + n - 1) * S + 1 >= W, sum)
      for (; q + Q <= Wo; q += Q) SUMS(Q);
      if (Q > 2) for (; q + 2 <= Wo; q += 2) SUMS(2);
      for (; q < Wo; q++) SUMS(1);
#undef SUMS
    }
  add_sums(sum, dw);
}

// [samples][C][pixels] -> [C][blocks][pixels][VL] for the blocks of samples from n on; inputs are
// `plane` apart.
void pack_blocks(const float* x, bool last, long N, long C, long pixels, long n, long blocks,
                 float* to, long plane, long threads) {
  parallel(blocks * (last ? pixels : C), threads, [&](long begin, long end) {
    for (long unit = begin; unit < end; unit++) {
      const long k = unit % blocks, i = unit / blocks, first = n + k * VL,
                 some = least(VL, N - first);
      const float* sample = x + first * C * pixels;
      if (last)
        pack(rows(sample + i * C, C * pixels, some), some, C, to + (k * pixels + i) * VL, plane);
      else
        pack(rows(sample + i * pixels, C * pixels, some), some, pixels,
             to + i * plane + k * pixels * VL, VL);
    }
  });
}

template <int S>
void weights3(const float* x, const float* d, const Layer& a, const int32_t* neighbours,
              float* dw) {
  const long Ho = (a.H - 1) / S + 1, Wo = (a.W - 1) / S + 1, pixels = a.H * a.W, d_pixels = Ho * Wo;
  const long each = (a.C * pixels + a.O * d_pixels) * VL, blocks = parts(a.N, VL);
  // FAST: what fits in L2, if that is work enough between two sums over lanes.
  const long fit = FAST ? most(PACKED / 8 / each, parts(64, d_pixels)) : PACKED / each;
  const long at_once = most(1, least(blocks, fit));
  const long pad = FAST ? VL : 0, plane = at_once * pixels * VL + pad,
             d_plane = at_once * d_pixels * VL + pad;
  float* xs = scratch[2].floats(a.C * plane);
  float* ds = scratch[3].floats(a.O * d_plane);
  // The weights by input: with stride 2 its plane is four times that of an output's gradient, and
  // is read once.
  const long edges = a.O * a.degree;
  int32_t* next = (int32_t*)scratch[0].floats(a.C + 1 + edges);
  int32_t* order = next + a.C + 1;
  if (no_memory) return;
  memset(next, 0, (a.C + 1) * sizeof(int32_t));
  for (long i = 0; i < edges / a.share; i++) next[neighbours[i] + 1] += (int32_t)a.share;
  for (long c = 0; c < a.C; c++) next[c + 1] += next[c];
  for (long o = 0; o < a.O; o++)
    for (long j = 0; j < a.degree; j++)
      order[next[neighbours[o / a.share * a.degree + j]]++] = o * a.degree + j;
  for (long k = 0; k < blocks; k += at_once) {
    const long some = least(at_once, blocks - k);
    pack_blocks(x, a.x_last, a.N, a.C, pixels, k * VL, some, xs, plane, a.threads);
    pack_blocks(d, a.y_last, a.N, a.O, d_pixels, k * VL, some, ds, d_plane, a.threads);
    parallel(edges, a.threads, [&](long begin, long end) {
      for (long i = begin; i < end; i++) {
        const long e = order[i], o = e / a.degree,
                   c = neighbours[o / a.share * a.degree + e % a.degree];
        const float* from = xs + c * plane;
        const float* grad = ds + o * d_plane;
        if (k == 0) memset(dw + e * 9, 0, 9 * sizeof(float));
        if (WIDE && Wo % 7 == 0)
          weight_sums<WIDE ? 7 : 4, S>(from, grad, some, a.H, a.W, Ho, Wo, dw + e * 9);
        else if (Wo >= 4) weight_sums<4, S>(from, grad, some, a.H, a.W, Ho, Wo, dw + e * 9);
        else weight_sums<2, S>(from, grad, some, a.H, a.W, Ho, Wo, dw + e * 9);
      }
    });
  }
}

// Few samples: lanes = pixels of a row. R rows of an output's gradient, a vector wide, with the
// rows of x around them; shift as at row_tile.
template <int R, int S>
INLINE void tall_sums(const float* x, long row, const long* shift, const float* d, long d_row,
                      V sum[9]) {
  V g[R];
  UNROLL for (int r = 0; r < R; r++) g[r] = load(d + r * d_row);
  UNROLL for (int i = 0; i < span<S>(R); i++) UNROLL for (int b = 0; b < 3; b++) {
    V v = held(x + i * row + shift[b]);
    UNROLL for (int a = 0; a < 3; a++)
      if (hit<S>(i, a, R) >= 0) sum[a * 3 + b] = fma(v, g[hit<S>(i, a, R)], sum[a * 3 + b]);
  }
}

template <int R, int S>
KERNEL void weight_rows(const float* x, long x_sample, long row, const long* shift, const float* d,
                        long d_sample, long d_row, long samples, long Ho, long vectors, float* dw) {
  V sum[9];
  UNROLL for (int i = 0; i < 9; i++) sum[i] = all(0);
  for (long k = 0; k < samples; k++, x += x_sample, d += d_sample)
    for (long q = 0; q < vectors * VL; q += VL) {
      long r = 0;
      for (; r + R <= Ho; r += R)
        tall_sums<R, S>(x + r * S * row + q, row, shift, d + r * d_row + q, d_row, sum);
      for (; r + 2 <= Ho; r += 2)
        tall_sums<2, S>(x + r * S * row + q, row, shift, d + r * d_row + q, d_row, sum);
      for (; r < Ho; r++)
        tall_sums<1, S>(x + r * S * row + q, row, shift, d + r * d_row + q, d_row, sum);
    }
  add_sums(sum, dw);
}

template <int S>
void weights_by_rows(const float* x, const float* d, const Layer& a, const int32_t* neighbours,
                     float* dw) {
  const long Ho = (a.H - 1) / S + 1, Wo = (a.W - 1) / S + 1, vectors = parts(Wo, VL),
             half = vectors * VL + 8;
  const long shift[3] = {0, S == 1 ? 1 : half, S == 1 ? 2 : 1};
  const long xs_each = a.C * (Ho * S + 2) * S * half, ds_each = a.O * (Ho + 2) * half,
             edges = a.O * a.degree;
  const long at_once = most(1, least(a.N, PACKED / (xs_each + ds_each)));
  float* xs = scratch[2].floats(at_once * xs_each);
  float* ds = scratch[3].floats(at_once * ds_each);
  if (no_memory) return;
  memset(xs, 0, at_once * xs_each * sizeof(float));
  memset(ds, 0, at_once * ds_each * sizeof(float));
  memset(dw, 0, edges * 9 * sizeof(float));
  for (long n = 0; n < a.N; n += at_once) {
    const long some = least(at_once, a.N - n);
    parallel(2 * some, a.threads, [&](long begin, long end) {
      for (long unit = begin; unit < end; unit++) {
        const long k = unit / 2, i = n + k;
        if (unit % 2)
          to_rows<1>(d + i * a.O * Ho * Wo, a.y_last, a.O, Ho, Wo, ds + k * ds_each, half,
                     ds_each / a.O);
        else
          to_rows<S>(x + i * a.C * a.H * a.W, a.x_last, a.C, a.H, a.W, xs + k * xs_each, half,
                     xs_each / a.C);
      }
    });
    parallel(edges, a.threads, [&](long begin, long end) {
      for (long e = begin; e < end; e++) {
        const float* from =
            xs + neighbours[e / a.degree / a.share * a.degree + e % a.degree] * (xs_each / a.C);
        const float* grad = ds + e / a.degree * (ds_each / a.O) + half + 1;
        const auto kernel = WIDE && Ho % 7 == 0 ? weight_rows<WIDE ? 7 : 4, S> : weight_rows<4, S>;
        kernel(from, xs_each, S * half, shift, grad, ds_each, half, some, Ho, vectors, dw + e * 9);
      }
    });
  }
}

// K outputs x J inputs, K * J <= VL, over `n` columns.
template <int K, int J>
KERNEL void products(const float* x, const float* d, const int32_t* from, long width, long n,
                     float* dw, long degree) {
  V sum[VL];
  const float* in[J];
  UNROLL for (int i = 0; i < VL; i++) sum[i] = all(0);
  UNROLL for (int j = 0; j < J; j++) in[j] = x + from[j] * width;
  for (long m = 0; m < n; m += VL) {
    V g[K];
    UNROLL for (int k = 0; k < K; k++) g[k] = load(d + k * width + m);
    UNROLL for (int j = 0; j < J; j++) {
      V v = load(in[j] + m);
      UNROLL for (int k = 0; k < K; k++) sum[k * J + j] = fma(v, g[k], sum[k * J + j]);
    }
  }
  float total[VL];
  store(total, sums(sum));
  typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));
  UNROLL for (int k = 0; k < K; k++) {
    UNROLL for (int j = 0; j + 4 <= J; j += 4)
      *(Four*)(dw + k * degree + j) += *(Four*)(total + k * J + j);
    if (J % 4) for (int j = 0; j < J; j++) dw[k * degree + j] += total[k * J + j];
  }
}

void weights1(const float* x, const float* d, const Layer& a, const int32_t* neighbours,
              float* dw) {
  const long pixels = a.H * a.W, columns = a.N * pixels, channels = a.C + a.O,
             edges = a.O * a.degree;
  // Panels of columns of which both activations fit in L2, 4 vectors at least: each weight's sum
  // ends once a panel.
  const long fit = most(4, (WIDE ? 400 : 160) * 1024 / (channels * VL));
  const long width = least(fit, parts(columns, VL)) * VL, panels = parts(columns, width),
             groups = a.O / a.share;
  // Pieces of the panels have sums of their own, which are added in order: threads wait for each
  // other once, not at each panel, where with other work on the machine one or the other was always
  // late (15 ms for 152).
  const long pieces = most(1, least(least(panels, 8), PACKED / edges));
  const long shares = pieces >= a.threads ? 1 : least(parts(a.threads, pieces), groups);
  float* later = scratch[2].floats((pieces - 1) * edges);
  if (no_memory) return;
  constexpr int K4 = VL == 16 ? 4 : VL == 8 ? 2 : 1, J1 = VL >= 8 ? 8 : 4;  // accumulators <= lanes
  parallel(pieces * shares, a.threads, [&](long begin, long end) {
    float* xs = scratch[0].floats(a.C * width);
    float* ds = scratch[1].floats(a.O * width);
    if (no_memory) return;
    for (long unit = begin; unit < end; unit++) {
      const long piece = unit / shares, p_end = panels * (piece + 1) / pieces;
      const long g_begin = groups * (unit % shares) / shares,
                 g_end = groups * (unit % shares + 1) / shares;
      float* sums = piece ? later + (piece - 1) * edges : dw;
      memset(sums + g_begin * a.share * a.degree, 0,
             (g_end - g_begin) * a.share * a.degree * sizeof(float));
      for (long p = panels * piece / pieces; p < p_end; p++) {
        const long m = p * width, n = least(width, columns - m);
        if (n < width)
          memset(xs, 0, a.C * width * sizeof(float)), memset(ds, 0, a.O * width * sizeof(float));
        to_panel(x, a.x_last, a.C, pixels, m, n, xs, width);
        to_panel(d, a.y_last, a.O, pixels, m, n, ds, width);
        for (long g = g_begin; g < g_end; g++)
          for (long k = 0, K; k < a.share; k += K) {
            const long o = g * a.share + k;
            K = least(K4, a.share - k);
            K = K >= 4 ? 4 : K >= 2 ? 2 : 1;
            for (long j = 0, J; j < a.degree; j += J) {
              const int32_t* from = neighbours + g * a.degree + j;
              float* to = sums + o * a.degree + j;
              const long left = a.degree - j;
#define PRODUCTS(K_, J_)                                                                           \
  (J = J_, products<K_, J_>(xs, ds + o * width, from, width, width, to, a.degree))
              if (K == 4 && left >= 4) PRODUCTS(K4, 4);
              else if (K == 4) PRODUCTS(K4, 1);
              else if (K == 2 && left >= 4) PRODUCTS((K4 >= 2 ? 2 : 1), 4);
              else if (K == 2) PRODUCTS((K4 >= 2 ? 2 : 1), 1);
              else if (left >= J1) PRODUCTS(1, J1);
              else PRODUCTS(1, 1);
#undef PRODUCTS
            }
          }
      }
    }
  });
  // Threads where adding takes longer than waiting for one.
  const long adders = edges > 1 << 16 ? a.threads : 1;
  parallel(pieces > 1 ? edges : 0, adders, [&](long begin, long end) {
    for (long p = 0; p < pieces - 1; p++)
      for (long e = begin; e < end; e++) dw[e] += later[p * edges + e];
  });
}

}  // namespace
