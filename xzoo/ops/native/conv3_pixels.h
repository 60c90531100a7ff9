// 3x3 with few samples: lanes = pixels of a row, or of a plane; and the choice among all kernels
// of 3x3.
#pragma once

#include <cstdint>
#include <cstring>

#include "conv3_samples.h"
#include "layer.h"
#include "memory.h"
#include "panels.h"
#include "threads.h"
#include "vectors.h"

namespace {

// ---- 3x3, lanes = pixels of a row

// A sample to scratch of zeros. A row there: a zero, the pixels, and a zero at least, `half` floats
// in all. With stride 2 the odd columns after the zero and then, from `half` on, the even ones, so
// that each tap reads places side by side. A row of zeros above and below.
template <int S>
void to_rows(const float* sample, bool last, long C, long H, long W, float* packed, long half,
             long plane) {
  for (long h = 0; h < H; h++) {
    float* to = packed + (h + 1) * S * half;
    for (long s = 0; s < S; s++) {  // S == 2: s == 0 the odd columns
      const long first = S == 2 && s == 0, put = S == 1 || s == 0 ? 1 : half,
                 count = parts(W - first, S);
      for (long i = 0; last && i < count; i += VL) {
        const long some = least(VL, count - i);
        pack(rows(sample + (h * W + first + i * S) * C, S * C, some), some, C, to + put + i, plane);
      }
      for (long c = 0; !last && c < C; c++) {
        const float* line = sample + (c * H + h) * W + first;
        if (S == 1) copy(to + c * plane + put, line, W);
        else for (long i = 0; i < count; i++) to[c * plane + put + i] = line[i * S];
      }
    }
  }
}

// R rows of K outputs with the same inputs, one vector of pixels wide. Tap b reads at x + shift[b].
template <int K, int R, int S>
KERNEL void row_tile(const float* x, long plane, long row, const long* shift, const int32_t* from,
                     const float* w, long degree, const float* bias, const Range& range, float* y,
                     long y_output, long y_row, long height, long some) {
  constexpr int IR = span<S>(R);
  V sum[K][R];
  UNROLL for (int k = 0; k < K; k++)
    UNROLL for (int r = 0; r < R; r++) sum[k][r] = all(bias ? bias[k] : 0);
  for (long j = 0; j < degree; j++, w += 9) {
    const float* p = x + from[j] * plane;
    UNROLL for (int b = 0; b < 3; b++) {
      V t[K][3];
      UNROLL for (int k = 0; k < K; k++)
        UNROLL for (int a = 0; a < 3; a++) t[k][a] = all(w[k * degree * 9 + a * 3 + b]);
      const float* line = K == 1 ? here(p + shift[b]) : p;
      UNROLL for (int r = 0; r < IR; r++) {
        if (K == 1 && r && r % 4 == 0) line = here(line + 4 * row);
        V v = held(K == 1 ? line + r % 4 * row : p + r * row + shift[b]);
        UNROLL for (int k = 0; k < K; k++) UNROLL for (int a = 0; a < 3; a++)
            if (hit<S>(r, a, R) >= 0)
              sum[k][hit<S>(r, a, R)] = fma(v, t[k][a], sum[k][hit<S>(r, a, R)]);
      }
    }
  }
  UNROLL for (int k = 0; k < K; k++) UNROLL for (int r = 0; r < R; r++)
    if (r < height) store_some(y + k * y_output + r * y_row, clamped(sum[k][r], range), some);
}

template <int S>
void any_rows(long K, long R, const float* x, long plane, long row, const long* shift,
              const int32_t* from, const float* w, long degree, const float* bias,
              const Range& range, float* y, long y_output, long y_row, long height, long some) {
#define ROWS(k, r)                                                                                 \
  row_tile<k, r, S>(x, plane, row, shift, from, w, degree, bias, range, y, y_output, y_row,        \
                    height, some)
  if (K == 2) return R == 4 ? ROWS(2, 4) : ROWS(2, WIDE ? 7 : 4);
  if (R == 4) return ROWS(1, 4);
  if (R == 7) return ROWS(1, 7);
  return R == 8 ? ROWS(1, 8) : ROWS(1, WIDE && S == 1 ? 14 : 8);
#undef ROWS
}

template <int S>
void by_rows(const float* x, const Layer& a, const Edges& e, const float* bias, float* y) {
  const long H = a.H, W = a.W, C = a.C, O = a.O, Ho = (H - 1) / S + 1, Wo = (W - 1) / S + 1,
             vectors = parts(Wo, VL);
  const long K = e.share % 2 ? 1 : 2;
  long R = 4;  // the tallest tile that computes few rows for nothing
  for (long r : {7L, 8L, 14L}) {
    // Whether such a tile fits in the registers.
    const bool there = K == 2 ? WIDE && r == 7 : r < 14 || (WIDE && S == 1);
    if (there && parts(Ho, r) * r <= parts(Ho, R) * R) R = r;
  }
  // No longer than they have to be, or fewer planes fit in L2: what the last vector reads of the
  // next row is in lanes that are not stored.
  const long half = most(vectors * VL, parts(Wo + 2, 8) * 8), row = S * half;
  const long height = parts(Ho, R) * R * S + 2, plane = height * row;
  const long shift[3] = {0, S == 1 ? 1 : half, S == 1 ? 2 : 1};
  const long shares = a.N >= a.threads ? 1 : least(parts(a.threads, a.N), O / K);
  parallel(a.N * shares, a.threads, [&](long begin, long end) {
    float* packed = scratch[0].floats(C * plane + VL * VL);
    float* out = scratch[1].floats(VL * R * vectors * VL);
    if (no_memory) return;
    for (long unit = begin; unit < end; unit++) {
      const long n = unit / shares, pairs = O / K;
      const long o_begin = pairs * (unit % shares) / shares * K,
                 o_end = pairs * (unit % shares + 1) / shares * K;
      memset(packed, 0, (C * plane + VL * VL) * sizeof(float));
      const float* sample = x + n * C * H * W;
      to_rows<S>(sample, a.x_last, C, H, W, packed, half, plane);
      for (long oh = 0; oh < Ho; oh += R)
        for (long o = o_begin; o < o_end; o += VL) {
          const long outputs = least(VL, o_end - o), rows_left = least(R, Ho - oh);
          for (long k = 0; k < outputs; k += K)
            for (long q = 0; q < vectors; q++) {
              float* to = a.y_last ? out + (k * R * vectors + q) * VL
                                   : y + ((n * O + o + k) * Ho + oh) * Wo + q * VL;
              any_rows<S>(K, R, packed + oh * S * row + q * VL, plane, row, shift, e.inputs(o + k),
                          e.weights(o + k, 9), e.count(o + k), bias ? bias + o + k : nullptr,
                          range(a), to, a.y_last ? R * vectors * VL : Ho * Wo,
                          a.y_last ? vectors * VL : Wo, rows_left,
                          a.y_last ? VL : least(VL, Wo - q * VL));
            }
          for (long r = 0; a.y_last && r < rows_left; r++)
            for (long q = 0; q < vectors; q++)
              unpack(out + (r * vectors + q) * VL, R * vectors * VL, outputs,
                     y + ((n * Ho + oh + r) * Wo + q * VL) * O + o, O, least(VL, Wo - q * VL));
        }
    }
  });
}

// ---- 3x3 of stride 1, few samples and small planes: lanes = pixels of a plane, row after row

// P vectors of pixels of one output. x: three copies of each input's plane, copy b a column further
// than the last; the next row's pixels are `row` floats away. SUMS of each vector side by side,
// because one waits for itself.
template <int P, int SUMS>
KERNEL void plane_tile(const float* x, long plane, long copied, long row, const int32_t* from,
                       const float* w, long degree, float bias, const Range& range, float* y) {
  V sum[SUMS][P];
  UNROLL for (int i = 0; i < SUMS; i++)
    UNROLL for (int p = 0; p < P; p++) sum[i][p] = all(i ? 0 : bias);
  for (long j = 0; j < degree; j++, w += 9) {
    const float* in = x + from[j] * plane;
    UNROLL for (int b = 0; b < 3; b++, in += copied) {
#if defined(__AVX512F__)
      if (P == 1 && SUMS == 9) {
        // 4x4: whole planes, the rows moved by lanes instead of loads across cache lines.
        __m512i middle = _mm512_castps_si512(held(in)), zero = _mm512_setzero_si512();
        sum[b][0] =
            fma(_mm512_castsi512_ps(_mm512_alignr_epi32(middle, zero, 12)), all(w[b]), sum[b][0]);
        sum[3 % SUMS + b][0] =
            fma(_mm512_castsi512_ps(middle), all(w[3 + b]), sum[3 % SUMS + b][0]);
        sum[6 % SUMS + b][0] = fma(_mm512_castsi512_ps(_mm512_alignr_epi32(zero, middle, 4)),
                                   all(w[6 + b]), sum[6 % SUMS + b][0]);
        continue;
      }
#endif
      UNROLL for (int a = 0; a < 3; a++) {
        V k = all(w[a * 3 + b]);
        UNROLL for (int p = 0; p < P; p++) {
          V& s = sum[(a * 3 + b) % SUMS][p];
          s = fma(load(in + a * row + p * VL), k, s);
        }
      }
    }
  }
  UNROLL for (int i = 1; i < SUMS; i++)
    UNROLL for (int p = 0; p < P; p++) sum[0][p] = sum[0][p] + sum[i][p];
  UNROLL for (int p = 0; p < P; p++) store(y + p * VL, clamped(sum[0][p], range));
}

#if defined(__AVX512F__)
// 2x2: lane 4 * q + i holds the product for pixel q of an input's pixel i, and every lane counts.
// x: planes of 4.
KERNEL void four_pixels(const float* x, const int32_t* from, const float* w, long degree,
                        float bias, const Range& range, float* y) {
  const __m512i tap = _mm512_setr_epi32(4, 5, 7, 8, 3, 4, 6, 7, 1, 2, 4, 5, 0, 1, 3, 4);
  V sum[4] = {all(0), all(0), all(0), all(0)};
#define PIXELS(j, s)                                                                               \
  s = fma(_mm512_permutexvar_ps(tap, _mm512_maskz_loadu_ps(0x1ff, w + (j) * 9)),                   \
          _mm512_broadcast_f32x4(_mm_loadu_ps(x + from[j] * 4)), s)
  long j = 0;
  for (; j + 4 <= degree; j += 4) UNROLL for (int i = 0; i < 4; i++) PIXELS(j + i, sum[i]);
  for (; j < degree; j++) PIXELS(j, sum[0]);
#undef PIXELS
  V s = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  s = s + _mm512_permute_ps(s, 0x4e);  // lane i + lane i ^ 2 of each four, then i ^ 1
  s = clamped(s + _mm512_permute_ps(s, 0xb1) + all(bias), range);
  _mm_storeu_ps(y, _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, s)));
}
#endif

bool is_two(long H, long W) { return VL == 16 && H == 2 && W == 2; }
bool is_four(long H, long W) { return VL == 16 && H == 4 && W == 4; }
// In products of vectors, nine taps of one sample. (Loads across cache lines are the slower half of
// the work.)
long plane_cost(long H, long W) {
  return is_two(H, W) ? 2 : is_four(H, W) ? 11 : (FAST ? 20 : 14) * parts(H * W, VL);
}

void by_planes(const float* x, const Layer& a, const Edges& e, const float* bias, float* y) {
  const long W = a.W, pixels = a.H * W, vectors = parts(pixels, VL);
  const bool two = is_two(a.H, W), four = is_four(a.H, W);
  // A copy is the plane between rows of zeros, if rows are loaded one by one. Lanes past the plane
  // are never stored.
  const long edge = four || two ? 0 : W, copied = pixels + 2 * edge, plane = two ? 4 : 3 * copied;
  const long width = two ? 4 : vectors * VL, together = VL, size = a.C * plane + vectors * VL + VL;
  const long shares = a.N >= a.threads ? 1 : least(parts(a.threads, a.N), a.O);
  parallel(a.N * shares, a.threads, [&](long begin, long end) {
    float* packed = scratch[0].floats(size);
    float* out = scratch[1].floats(together * width + VL);
    if (no_memory) return;
    for (long unit = begin, there = -1; unit < end; unit++) {
      const long n = unit / shares, o_end = a.O * (unit % shares + 1) / shares;
      if (there != n) {
        if (edge) memset(packed, 0, size * sizeof(float));
        to_panel(x, a.x_last, a.C, pixels, n * pixels, pixels, packed + (two ? 0 : copied + edge),
                 plane);
        for (long c = 0; !two && c < a.C; c++) {
          float *left = packed + c * plane + edge, *middle = left + copied,
                *right = middle + copied;
          copy(left + 1, middle, pixels - 1);
          copy(right, middle + 1, pixels - 1);
          for (long i = 0; i < pixels; i += W) left[i] = right[i + W - 1] = 0;
        }
      }
      there = n;
      for (long o = a.O * (unit % shares) / shares, some; o < o_end; o += some) {
        some = least(together, o_end - o);
        for (long k = 0; k < some; k++) {
          const int32_t* from = e.inputs(o + k);
          const float* w = e.weights(o + k, 9);
          const long degree = e.count(o + k);
          const float b = bias ? bias[o + k] : 0;
          float* to = out + k * width;
#if defined(__AVX512F__)
          if (two) four_pixels(packed, from, w, degree, b, range(a), to);
          else if (four)
            plane_tile<1, 9>(packed, plane, copied, 0, from, w, degree, b, range(a), to);
          else
#endif
            for (long i = 0, P; i < vectors; i += P, to += P * VL) {
              P = vectors - i >= 4 ? 4 : vectors - i >= 2 ? 2 : 1;
#define PLANE(p, sums)                                                                             \
  plane_tile<p, sums>(packed + i * VL, plane, copied, W, from, w, degree, b, range(a), to)
              P == 4 ? PLANE(4, WIDE ? 3 : 1) : P == 2 ? PLANE(2, 3) : PLANE(1, 3);
#undef PLANE
            }
        }
        from_panel(out, width, y, a.y_last, a.O, o, some, pixels, n * pixels, pixels);
      }
    }
  });
}

// ---- 3x3: the kernel that takes the fewest products of vectors for the nine taps of a weight

long sample_cost(const Layer& a) { return (3 * a.H - 2) * (3 * a.W - 2) * parts(a.N, VL); }
long row_cost(const Layer& a) { return a.N * a.H * parts(a.W, VL) * 9; }

void stride_one(const float* x, const Layer& a, const Edges& e, const float* bias, float* y) {
  const long samples = sample_cost(a), rows = row_cost(a);
  if (a.N * plane_cost(a.H, a.W) < least(samples, rows)) by_planes(x, a, e, bias, y);
  else if (2 * a.N <= VL && rows < samples) by_rows<1>(x, a, e, bias, y);
  else
    by_samples<1>(x, e, bias, y, a.N, a.C, a.H, a.W, a.O, a.H, a.W, a.x_last, a.y_last, a.threads,
                  range(a));
}

// The gradient of stride 2 with zeros between its pixels, as one of stride 1.
float* spread_out(const float* d, const Layer& a) {
  const long Ho = (a.H - 1) / 2 + 1, Wo = (a.W - 1) / 2 + 1, pixels = a.H * a.W;
  const long planes = a.y_last ? a.N : a.N * a.O, each = a.y_last ? a.O : 1;
  float* to = scratch[4].floats(a.N * a.O * pixels);
  if (no_memory) return nullptr;
  memset(to, 0, a.N * a.O * pixels * sizeof(float));
  for (long p = 0; p < planes; p++)
    for (long r = 0; r < Ho; r++)
      for (long q = 0; q < Wo; q++, d += each)
        copy(to + (p * pixels + 2 * r * a.W + 2 * q) * each, d, each);
  return to;
}

}  // namespace
