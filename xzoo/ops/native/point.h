// 1x1 and linear: the product and its input gradients. Lanes = columns (pixels of all samples),
// copied to panels; of a few samples of a linear layer lanes = weights of an output.
#pragma once

#include <cstdint>
#include <cstring>

#include "layer.h"
#include "memory.h"
#include "panels.h"
#include "threads.h"
#include "vectors.h"

namespace {

// ---- the product

// Share of 2 and more: K outputs with the same inputs x P vectors of columns.
template <int K, int P>
KERNEL void block(const float* panel, const int32_t* from, long degree, const float* w,
                  const float* bias, const Range& range, float* y) {
  V sum[K][P];
  UNROLL for (int k = 0; k < K; k++)
    UNROLL for (int p = 0; p < P; p++) sum[k][p] = all(bias ? bias[k] : 0);
  for (long j = 0; j < degree; j++) {
    const float* x = panel + (long)from[j] * (P * VL);
    V v[P];
    UNROLL for (int p = 0; p < P; p++) v[p] = load(x + p * VL);
    UNROLL for (int k = 0; k < K; k++) {
      V t = all(w[k * degree + j]);
      UNROLL for (int p = 0; p < P; p++) sum[k][p] = fma(v[p], t, sum[k][p]);
    }
  }
  UNROLL for (int k = 0; k < K; k++) UNROLL for (int p = 0; p < P; p++)
    store(y + (k * P + p) * VL, clamped(sum[k][p], range));
}

// Share 1, where each product loads its input: outputs one after another, for a block of inputs
// that stays in L1. A list goes on at `at`, as far as its inputs are below `end`: by blocks where
// it is in order, as graphs are made.
template <int P>
KERNEL void singles(const float* panel, const int32_t* from, const float* w, long degree,
                    long outputs, bool first, long end, int32_t* at, const float* bias,
                    const Range* last, float* y) {
  for (long o = 0; o < outputs; o++, from += degree, w += degree, y += P * VL) {
    const long far = least(o + 4, outputs - 1) - o, next = far * degree + (first ? 0 : at[o + far]);
    for (long i = 0; i < 32; i += 16)
      __builtin_prefetch(from + next + i), __builtin_prefetch(w + next + i);
    V sum[P];
    UNROLL for (int p = 0; p < P; p++) sum[p] = first ? all(bias ? bias[o] : 0) : load(y + p * VL);
    long j = first ? 0 : at[o];
    for (; j < degree && from[j] < end; j++) {
      const float* x = panel + (long)from[j] * (P * VL);
      V t = all(w[j]);
      UNROLL for (int p = 0; p < P; p++) sum[p] = fma(load(x + p * VL), t, sum[p]);
    }
    at[o] = (int32_t)j;
    if (last) UNROLL for (int p = 0; p < P; p++) sum[p] = clamped(sum[p], *last);
    UNROLL for (int p = 0; p < P; p++) store(y + p * VL, sum[p]);
  }
}

template <int P>
void by_panels(const float* x, const Layer& a, const Edges& e, const float* bias, float* y) {
  const long pixels = a.H * a.W, columns = a.N * pixels, width = P * VL,
             panels = parts(columns, width);
  const long groups = a.O / a.share,
             shares = panels >= a.threads ? 1 : least(parts(a.threads, panels), groups);
  const long together =
      a.share == 1 ? groups : most(1, 64 / a.share);  // groups that are stored together
  const long channels = L1 / width;
  const Range limits = range(a);
  in_large_pages(y, columns * a.O);
  parallel(panels * shares, a.threads, [&](long begin, long end) {
    float* panel = scratch[0].floats(a.C * width);
    float* out = scratch[1].floats(together * a.share * width);
    int32_t* at = (int32_t*)scratch[2].floats(together);
    if (no_memory) return;
    for (long unit = begin, packed = -1; unit < end; unit++) {
      const long m = unit / shares * width, n = least(width, columns - m);
      if (packed != m) to_panel(x, a.x_last, a.C, pixels, m, n, panel, width);
      packed = m;
      const long soon = shares == 1 && unit + 1 < end ? least(width, columns - m - width) : 0;
      const long g_end = groups * (unit % shares + 1) / shares;
      for (long g = groups * (unit % shares) / shares; g < g_end; g += together) {
        const long some = least(together, g_end - g);
        for (long c = 0; a.share == 1 && c < a.C; c += channels)
          singles<P>(panel, e.inputs(g), e.weights(g, 1), a.degree, some, c == 0,
                     least(c + channels, a.C), at, bias ? bias + g : nullptr,
                     c + channels >= a.C ? &limits : nullptr, out);
        for (long i = 0; a.share > 1 && i < some; i++) {
          const long c = a.C * (g + i) / groups, c_end = a.C * (g + i + 1) / groups;
          ask_for<false>(x, a.x_last, a.C, pixels, m + width, soon, c, c_end);
          ask_for<true>(y, a.y_last, a.O, pixels, m, n, (g + i) * a.share, (g + i + 1) * a.share);
          for (long k = 0, K; k < a.share; k += K) {
            const long o = (g + i) * a.share + k;
            const float* b = bias ? bias + o : nullptr;
            float* to = out + (i * a.share + k) * width;
            K = a.share - k >= 4 && P <= (WIDE ? 6 : 3) ? 4 : a.share - k >= 2 ? 2 : 1;
            if (K == 4)
              block<4, (P <= 6 ? P : 1)>(panel, e.inputs(o), a.degree, e.weights(o, 1), b, limits,
                                         to);
            else if (K == 2)
              block<2, P>(panel, e.inputs(o), a.degree, e.weights(o, 1), b, limits, to);
            else block<1, P>(panel, e.inputs(o), a.degree, e.weights(o, 1), b, limits, to);
          }
        }
        from_panel(out, width, y, a.y_last, a.O, g * a.share, some * a.share, pixels, m, n);
      }
    }
  });
}

// ---- input gradients of 1x1 and linear: one load for each product, from L1

struct Entry {
  float w;
  int32_t offset;  // of the output's row within its block of outputs, in floats
};

// A block of outputs for inputs one after another, whose entries begin at `at`.
template <int P>
KERNEL void edges(const float* outputs, const Entry* entries, const int32_t* at, long inputs,
                  bool first, float* dx) {
  for (long c = 0; c < inputs; c++, dx += P * VL) {
    const Entry *e = entries + at[c], *end = entries + at[c + 1];
    V sum[P];
    UNROLL for (int p = 0; p < P; p++) sum[p] = first ? all(0) : load(dx + p * VL);
    for (; e < end; e++) {
      V w = all(e->w);
      const float* d = outputs + e->offset;
      UNROLL for (int p = 0; p < P; p++) sum[p] = fma(load(d + p * VL), w, sum[p]);
    }
    UNROLL for (int p = 0; p < P; p++) store(dx + p * VL, sum[p]);
  }
}

// dx [N][C][pixels] from d [N][O][pixels].
template <int P>
void by_edges(const float* d, const Layer& a, const int32_t* neighbours, const float* weight,
              float* dx) {
  const long pixels = a.H * a.W, columns = a.N * pixels, width = P * VL,
             panels = parts(columns, width);
  const long outputs = L1 / width, blocks = parts(a.O, outputs), row = a.C + 1;
  // Entries by block of outputs, then input: count, add up, fill.
  int32_t* first = (int32_t*)scratch[2].floats(blocks * row + 1);
  Entry* entries = (Entry*)scratch[3].floats(2 * a.O * a.degree);
  if (no_memory) return;
  memset(first, 0, (blocks * row + 1) * sizeof(int32_t));
  for (int fill = 0; fill < 2; fill++) {
    for (long o = 0; o < a.O; o++) {
      const int32_t* from = neighbours + o / a.share * a.degree;
      int32_t* at = first + o / outputs * row;
      for (long j = 0; j < a.degree; j++)
        if (fill)
          entries[at[from[j]]++] = {weight[o * a.degree + j], (int32_t)(o % outputs * width)};
        else at[from[j] + 1]++;
    }
    if (!fill) for (long i = 0; i < blocks * row; i++) first[i + 1] += first[i];
  }
  memmove(first + 1, first, blocks * row * sizeof(int32_t));
  first[0] = 0;
  const long shares = panels >= a.threads ? 1 : least(parts(a.threads, panels), a.C);
  in_large_pages(dx, columns * a.C);
  parallel(panels * shares, a.threads, [&](long begin, long end) {
    float* panel = scratch[0].floats(a.O * width);
    float* out = scratch[1].floats(a.C * width);
    if (no_memory) return;
    for (long unit = begin, packed = -1; unit < end; unit++) {
      const long m = unit / shares * width, n = least(width, columns - m);
      const long c_begin = a.C * (unit % shares) / shares,
                 c_end = a.C * (unit % shares + 1) / shares;
      if (packed != m) to_panel(d, a.y_last, a.O, pixels, m, n, panel, width);
      packed = m;
      for (long b = 0; b < blocks; b++)
        edges<P>(panel + b * outputs * width, entries, first + b * row + c_begin, c_end - c_begin,
                 b == 0, out + c_begin * width);
      from_panel(out + c_begin * width, width, dx, a.x_last, a.C, c_begin, c_end - c_begin, pixels,
                 m, n);
    }
  });
}

// ---- input gradients of 1x1 and linear, large shares: the gradients of K outputs with the same
// inputs stay in registers and are added to those inputs, a block of which stays in L1

template <int K, int P>
KERNEL void spread(const float* d, const int32_t* at, const int32_t* end, const float* w,
                   long share, float* channels) {
  V g[K][P];
  UNROLL for (int k = 0; k < K; k++)
    UNROLL for (int p = 0; p < P; p++) g[k][p] = held(d + (k * P + p) * VL);
  for (; at < end; at++, w += share) {
    float* to = channels + *at;
    V sum[P];
    UNROLL for (int p = 0; p < P; p++) sum[p] = load(to + p * VL);
    UNROLL for (int k = 0; k < K; k++) {
      V t = all(w[k]);
      UNROLL for (int p = 0; p < P; p++) sum[p] = fma(g[k][p], t, sum[p]);
    }
    UNROLL for (int p = 0; p < P; p++) store(to + p * VL, sum[p]);
  }
}

// dx [N][C][pixels] from d [N][O][pixels].
template <int P>
void by_groups(const float* d, const Layer& a, const int32_t* neighbours, const float* weight,
               float* dx) {
  const long pixels = a.H * a.W, columns = a.N * pixels, width = P * VL,
             panels = parts(columns, width);
  const long shares = panels >= a.threads ? 1 : least(parts(a.threads, panels), a.C),
             groups = a.O / a.share;
  long shift = 0;  // a block is of 1 << shift inputs
  while ((2l << shift) * width <= 24576 / 4 && (1l << shift) * shares < a.C) shift++;
  const long channels = 1l << shift, blocks = parts(a.C, channels);
  // Inputs by block, then group: count, add up, fill; their weights [share] beside them.
  int32_t* first = (int32_t*)scratch[2].floats(blocks * groups + 1 + groups * a.degree);
  int32_t* at = first + blocks * groups + 1;
  int32_t* place = (int32_t*)scratch[1].floats(a.degree);
  float* w = scratch[3].floats(a.O * a.degree);
  if (no_memory) return;
  memset(first, 0, (blocks * groups + 1) * sizeof(int32_t));
  for (long g = 0; g < groups; g++)
    for (long j = 0; j < a.degree; j++)
      first[(neighbours[g * a.degree + j] >> shift) * groups + g + 1]++;
  for (long i = 0; i < blocks * groups; i++) first[i + 1] += first[i];
  for (long g = 0; g < groups; g++) {
    for (long j = 0; j < a.degree; j++) {
      const long c = neighbours[g * a.degree + j], b = c >> shift;
      place[j] = first[b * groups + g]++;
      at[place[j]] = (int32_t)((c - (b << shift)) * width);
    }
    for (long k = 0; k < a.share; k++)
      for (long j = 0; j < a.degree; j++)
        w[place[j] * a.share + k] = weight[(g * a.share + k) * a.degree + j];
  }
  memmove(first + 1, first, blocks * groups * sizeof(int32_t));
  first[0] = 0;
  in_large_pages(dx, columns * a.C);
  parallel(panels * shares, a.threads, [&](long begin, long end) {
    float* panel = scratch[0].floats(a.O * width);
    float* out = scratch[1].floats(channels * width);
    if (no_memory) return;
    for (long unit = begin, packed = -1; unit < end; unit++) {
      const long m = unit / shares * width, n = least(width, columns - m);
      if (packed != m) to_panel(d, a.y_last, a.O, pixels, m, n, panel, width);
      packed = m;
      const long b_end = blocks * (unit % shares + 1) / shares;
      for (long b = blocks * (unit % shares) / shares; b < b_end; b++) {
        const long some = least(channels, a.C - b * channels);
        memset(out, 0, some * width * sizeof(float));
        for (long g = 0; g < groups; g++) {
          const int32_t *from = at + first[b * groups + g], *to = at + first[b * groups + g + 1];
          for (long k = 0, K; k < a.share && from < to; k += K) {
            K = a.share - k >= 4 ? 4 : a.share - k >= 2 ? 2 : 1;
            const float *p = panel + (g * a.share + k) * width, *v = w + (from - at) * a.share + k;
            if (K == 4) spread<4, P>(p, from, to, v, a.share, out);
            else if (K == 2) spread<2, P>(p, from, to, v, a.share, out);
            else spread<1, P>(p, from, to, v, a.share, out);
          }
        }
        from_panel(out, width, dx, a.x_last, a.C, b * channels, some, pixels, m, n);
      }
    }
  });
}

// ---- linear, one or a few samples

const long FEW = VL / 4;

// The inputs of a list side by side. Eight at once: each store might otherwise be one to the next
// input.
void pick(const float* x, const int32_t* from, long n, float* to) {
  long i = 0;
  for (; i + 8 <= n; i += 8) {
    float v[8];
    UNROLL for (int k = 0; k < 8; k++) v[k] = x[from[i + k]];
    UNROLL for (int k = 0; k < 8; k++) to[i + k] = v[k];
  }
  for (; i < n; i++) to[i] = x[from[i]];
}

// The inputs of a group side by side once, then dense products of two rows, summed for VL outputs
// at a time.
void by_dots(const float* x, const Layer& a, const Edges& e, const float* bias, float* y) {
  const long d = a.degree, blocks = parts(a.O, VL);
  parallel(a.N * blocks, a.threads, [&](long begin, long end) {
    float* in = scratch[0].floats(d + VL);
    if (no_memory) return;
    for (long unit = begin; unit < end; unit++) {
      const long n = unit / blocks, o = unit % blocks * VL, some = least(VL, a.O - o);
      V r[VL];
      for (long i = 0; i < VL; i++) {
        V two[2] = {all(0), all(0)};
        if (i < some && (i == 0 || (o + i) % a.share == 0)) {
          const int32_t* from = e.inputs(o + i);
          pick(x + n * a.C, from, d, in);
        }
        const float* w = e.weights(o + i, 1);
        long j = i < some ? 0 : d;
        for (; j + 2 * VL <= d; j += 2 * VL)
          UNROLL for (int k = 0; k < 2; k++)
            two[k] = fma(load(w + j + k * VL), load(in + j + k * VL), two[k]);
        for (; j < d; j += VL) {
          const long left = least(VL, d - j);
          two[0] = fma(load_some(w + j, left), load_some(in + j, left), two[0]);
        }
        r[i] = two[0] + two[1];
      }
      const V sum = sums(r) + (bias ? load_some(bias + o, some) : all(0));
      store_some(y + n * a.O + o, clamped(sum, range(a)), some);
    }
  });
}

// The gradient of the inputs: the sums over a group's outputs side by side, then each added to its
// input.
void inputs_by_dots(const float* d, const Layer& a, const int32_t* neighbours, const float* weight,
                    float* dx) {
  const long groups = a.O / a.share, inputs = a.N * a.C;
  // The groups in pieces with sums of their own, as many whatever the threads, so that the bits
  // stay the same.
  const long pieces = most(1, least(16, a.O * a.degree >> 17));
  float* sums = scratch[2].floats(pieces * inputs);
  if (no_memory) return;
  parallel(pieces, a.threads, [&](long begin, long end) {
    float* group = scratch[0].floats(a.degree + VL);
    if (no_memory) return;
    for (long piece = begin; piece < end; piece++) {
      float* to = pieces == 1 ? dx : sums + piece * inputs;
      memset(to, 0, inputs * sizeof(float));
      for (long g = groups * piece / pieces; g < groups * (piece + 1) / pieces; g++)
        for (long n = 0; n < a.N; n++) {
          const float *w = weight + g * a.share * a.degree, *grad = d + n * a.O + g * a.share;
          for (long j = 0; j < a.degree; j += VL) {
            const long some = least(VL, a.degree - j);
            V sum = all(0);
            for (long k = 0; k < a.share; k++) {
              const float* p = w + k * a.degree + j;
              sum = fma(some == VL ? load(p) : load_some(p, some), all(grad[k]), sum);
            }
            store(group + j, sum);
          }
          const int32_t* at = neighbours + g * a.degree;
          for (long j = 0; j < a.degree; j++) to[n * a.C + at[j]] += group[j];
        }
    }
  });
  for (long i = 0; pieces > 1 && i < inputs; i++) {
    float sum = 0;
    for (long piece = 0; piece < pieces; piece++) sum += sums[piece * inputs + i];
    dx[i] = sum;
  }
}

// The gradient of the weights: the inputs of a group side by side once, times the gradient of each
// output.
void weights_by_dots(const float* x, const float* d, const Layer& a, const int32_t* neighbours,
                     float* dw) {
  parallel(a.O / a.share, a.threads, [&](long begin, long end) {
    float* in = scratch[0].floats(a.N * a.degree + VL);
    if (no_memory) return;
    for (long g = begin; g < end; g++) {
      const int32_t* from = neighbours + g * a.degree;
      for (long n = 0; n < a.N; n++) pick(x + n * a.C, from, a.degree, in + n * a.degree);
      for (long o = g * a.share; o < (g + 1) * a.share; o++)
        for (long j = 0; j < a.degree; j += VL) {
          V sum = all(0);
          for (long n = 0; n < a.N; n++)
            sum = fma(load(in + n * a.degree + j), all(d[n * a.O + o]), sum);
          float* to = dw + o * a.degree + j;
          if (j + VL <= a.degree) store(to, sum);
          else store_some(to, sum, a.degree - j);
        }
    }
  });
}

}  // namespace
