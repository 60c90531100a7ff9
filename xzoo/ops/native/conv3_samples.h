// 3x3 with many samples: lanes = samples. A tile of pixels of one output stays in registers over
// its whole degree, and each loaded input vector feeds up to nine products.
#pragma once

#include <cstdint>

#include "layer.h"
#include "memory.h"
#include "threads.h"
#include "vectors.h"

namespace {

// How the places of source and result meet. S = 1 and 2: a convolution of that stride with padding
// 1, source place i = S * result - 1 + tap. S = -2: the transpose of stride 2, result place
// r = 2 * i - 1 + tap, from an even origin.
template <int S>
constexpr int span(int results) { return S > 0 ? (results - 1) * S + 3 : results / 2 + 1; }
// The result that source place i reaches through a tap, or -1.
template <int S>
constexpr int hit(int i, int tap, int results) {
  int r = S > 0 ? ((i - tap) % S ? -1 : (i - tap) / S) : 2 * i - 1 + tap;
  return r >= results ? -1 : (S > 0 && i < tap) ? -1 : r;
}

// One tile of R x Q result pixels of one output. x: at the tile's first source place; skipped where
// it lies outside: taps at a border are left out, not multiplied by zero, which at 4x4 saves 44 of
// 144.
template <int R, int Q, int S, bool LEFT, bool RIGHT>
INLINE void tile(const float* x, long plane, long row, bool top, bool bottom, const int32_t* from,
                 const float* w, long count, const float* start, long start_row, long start_step,
                 const Range& range, float* out, long out_row) {
  constexpr int IR = span<S>(R), IQ = span<S>(Q);
  V sum[R][Q];
  const V first = load(start);  // for all, unless the sums go on: on FAST CPUs alone
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int q = 0; q < Q; q++)
      sum[r][q] = WIDE ? load(start + r * start_row + q * start_step) : first;
  for (long j = 0; j < count; j++, w += 9) {
    const float* p = x + from[j] * plane;
    if (WIDE) {  // 32 registers: all nine weights
      V k[9];
      UNROLL for (int t = 0; t < 9; t++) k[t] = all(w[t]);
      UNROLL for (int r = 0; r < IR; r++) {
        if ((r == 0 && top) || (r == IR - 1 && bottom)) continue;
        const float* line = here(p + r * row);
        UNROLL for (int q = 0; q < IQ; q++) {
          if ((LEFT && q == 0) || (RIGHT && q == IQ - 1)) continue;
          V v = held(line + q * VL);
          UNROLL for (int a = 0; a < 3; a++) {
            if (hit<S>(r, a, R) < 0) continue;
            UNROLL for (int b = 0; b < 3; b++) {
              if (hit<S>(q, b, Q) < 0) continue;
              V& s = sum[hit<S>(r, a, R)][hit<S>(q, b, Q)];
              s = fma(v, k[a * 3 + b], s);
            }
          }
        }
      }
    } else {  // 16 registers: three weights at a time, the source from L1 up to three times
      UNROLL for (int a = 0; a < 3; a++) {
        V k[3];
        UNROLL for (int b = 0; b < 3; b++) k[b] = all(w[a * 3 + b]);
        UNROLL for (int r = 0; r < IR; r++) {
          if (hit<S>(r, a, R) < 0 || (r == 0 && top) || (r == IR - 1 && bottom)) continue;
          const float* line = here(p + r * row);
          UNROLL for (int q = 0; q < IQ; q++) {
            if ((LEFT && q == 0) || (RIGHT && q == IQ - 1)) continue;
            V v = held(line + q * VL);
            UNROLL for (int b = 0; b < 3; b++) {
              if (hit<S>(q, b, Q) < 0) continue;
              V& s = sum[hit<S>(r, a, R)][hit<S>(q, b, Q)];
              s = fma(v, k[b], s);
            }
          }
        }
      }
    }
  }
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int q = 0; q < Q; q++) store(out + r * out_row + q * VL, clamped(sum[r][q], range));
}

struct List {  // what one output reads
  const int32_t* from;
  const float* w;
  long count;
};

// A tile of some outputs, whose results are `step` apart. The sums begin with what is at `start`
// (the biases, or what has been added up so far) and take the part of each list from `begin` to
// `end`, or all of it.
struct Tile {
  const float* x;
  long plane, row;
  bool top, bottom, left, right;
  Range range;
  float* out;
  long out_row, step, outputs;
  const float* start;
  long start_step, start_row, start_place;
  const int32_t *begin, *end;
};

template <int R, int Q, int S>
KERNEL void sided(const Tile& t, const List* lists) {
#define TILE(LEFT, RIGHT)                                                                          \
  for (long i = 0; i < t.outputs; i++) {                                                           \
    const long begin = t.begin ? t.begin[i] : 0, end = t.begin ? t.end[i] : lists[i].count;        \
    tile<R, Q, S, LEFT, RIGHT>(t.x, t.plane, t.row, t.top, t.bottom, lists[i].from + begin,        \
                               lists[i].w + begin * 9, end - begin, t.start + i * t.start_step,    \
                               t.start_row, t.start_place, t.range, t.out + i * t.step,            \
                               t.out_row);                                                         \
  }
  if (t.left && t.right) TILE(true, true)
  else if (t.left) TILE(true, false)
  else if (t.right) TILE(false, true)
  else TILE(false, false)
#undef TILE
}

constexpr int TALL = WIDE ? 4 : 2, TALL7 = WIDE ? 2 : 1;

// Rows and columns that remain beside whole tiles get tiles of 2 and of 1.
template <int S>
void any_tile(long r, long q, const Tile& t, const List* lists) {
  constexpr int S7 = S < 0 ? 1 : S;
  if (q == 7) return r == 1 ? sided<1, 7, S7>(t, lists) : sided<TALL7, 7, S7>(t, lists);
  switch (r * 8 + q) {
    case 36: return sided<TALL, 4, S>(t, lists);
    case 34: return sided<TALL, 2, S>(t, lists);
    case 33: return sided<TALL, 1, S>(t, lists);
    case 20: return sided<2, 4, S>(t, lists);
    case 18: return sided<2, 2, S>(t, lists);
    case 17: return sided<2, 1, S>(t, lists);
    case 12: return sided<1, 4, S>(t, lists);
    case 10: return sided<1, 2, S>(t, lists);
    default: return sided<1, 1, S>(t, lists);
  }
}
INLINE long next(long left, long whole) { return left >= whole ? whole : left >= 2 ? 2 : 1; }

// Bytes of a FAST CPU's caches that a window may take, and the places of a tile.
const long FAST_L2 = 800 << 10;
const long FAST_L1 = 52 << 10;

// y [N][O][Ho][Wo] from x [N][C][H][W]; S as at `hit`.
template <int S>
void by_samples(const float* x, const Edges& e, const float* bias, float* y, long N, long C, long H,
                long W, long O, long Ho, long Wo, bool x_last, bool y_last, long threads,
                Range range = Range()) {
  const long edges = e.begin ? e.begin[O] : e.degree * O;
  const long reach = S > 0 ? S : 1;  // source rows for each of the results, at most
  const bool sevens = S > 0 && Wo % 7 == 0 && (Wo % 4 || (FAST && S == 2));
  const long tall = sevens ? TALL7 : TALL, wide = sevens ? 7 : 4;
  // What the results of so many rows and columns read.
  auto bytes = [&](long rows, long columns) {
    return C * least(H, rows * reach + 2) * least(W, columns * reach + 2) * VL * 4;
  };
  // FAST: all that a window of results reads stays in L2; with stride 2, whose tiles reuse little
  // of what they load, inputs come in blocks of which a tile's places stay in L1, if an output
  // reads some of each.
  long channels = C;
  if (FAST && S == 2) {
    const long places = ((tall - 1) * S + 3) * ((wide - 1) * S + 3),
               some = FAST_L1 / (places * VL * 4);
    const bool fits = x_last && bytes(tall, wide) <= FAST_L2;
    if (!fits && 2 * edges * some >= (x_last ? 5 : 2) * O * C) channels = most(1, some);
  }
  const bool blocked = channels < C;
  const long blocks = parts(C, channels);
  // A strip of rows: long pieces for each sample to store, and few enough that a strip of all
  // channels fits in L2.
  long strip = tall, across = Wo, strip_limit = x_last ? FAST_L2 : FAST_L2 * 7 / 4;
  if (!FAST || blocked) strip_limit = 1l << 48;  // none
  while (strip * 2 * Wo <= 128 && strip < Ho && bytes(strip * 2, Wo) <= strip_limit) strip *= 2;
  for (long k = 2; FAST && x_last && !blocked && bytes(strip, across) > FAST_L2 && across > wide;
       k++)
    across = parts(parts(Wo, wide), k) * wide;
  // A window of strips is packed at a time: all rows, unless the images are large.
  const long window_limit = FAST && x_last && !blocked ? FAST_L2 : 12 << 20;
  long window = strip;
  while (window < Ho && across == Wo && bytes(window * 2, Wo) <= window_limit) window += strip;
  // `inner` outputs take a tile one after another; `together` are stored.
  const bool staged = blocked || (FAST && !x_last && bytes(strip, Wo) > FAST_L2 * 5 / 3);
  const long few = y_last ? VL : strip >= Ho && across == Wo ? most(1, 128 / (Ho * Wo)) : 1;
  const long inner = staged ? O : 1, together = staged ? O : few;
  // In channels_last, lines of all channels are written side by side: not at distances of powers of
  // two.
  const long pad = FAST && x_last ? VL : 0, out_pad = FAST && y_last ? VL : 0, each = C * H * W;
  struct Source {  // the places of x that the window of outputs from (top, left) on reads
    long h0, height, w0, width;
  };
  auto source = [&](long top, long left) {
    const long bottom = least(Ho, top + window), right = least(Wo, left + across);
    const long h0 = S > 0 ? most(0, top * S - 1) : top / 2,
               w0 = S > 0 ? most(0, left * S - 1) : left / 2;
    return Source{h0, (S > 0 ? least(H, (bottom - 1) * S + 2) : least(H, bottom / 2 + 1)) - h0,
                  w0, (S > 0 ? least(W, (right - 1) * S + 2) : least(W, right / 2 + 1)) - w0};
  };
  // Channels or, in channels_last, places [begin, end) of them.
  auto pack_part = [&](long n, long top, long left, long begin, long end, float* packed) {
    const auto [h0, height, w0, width] = source(top, left);
    const float* samples = x + n * each + (h0 * W + w0) * (x_last ? C : 1);
    const long some = least(VL, N - n), plane = height * width * VL + pad;
    if (x_last)
      for (long i = begin; i < end; i++)
        pack(rows(samples + (i / width * W + i % width) * C, each, some), some, C, packed + i * VL,
             plane);
    else if (height == H && width == W)
      pack(rows(samples + begin * H * W, each, some), some, (end - begin) * H * W,
           packed + begin * plane, VL);
    else
      for (long c = begin; c < end; c++)
        for (long h = 0; h < (width == W ? 1 : height); h++)
          pack(rows(samples + (c * H + h) * W, each, some), some, width == W ? height * W : width,
               packed + c * plane + h * width * VL, VL);
  };
  auto outputs = [&](long n, long top, long left, long o_begin, long o_end, const float* packed) {
    const long all_of = least(together, O);
    const long places = strip * across * VL + out_pad, list = sizeof(List) / sizeof(float);
    float* out = scratch[1].floats(all_of * (places + VL + list + blocks + 1));
    if (no_memory) return;
    float* biases = out + all_of * places;
    List* lists = (List*)(biases + all_of * VL);
    int32_t* cuts = (int32_t*)(lists + all_of);
    const auto [h0, source_height, w0, source_width] = source(top, left);
    const long some = least(VL, N - n), plane = source_height * source_width * VL + pad,
               width = least(across, Wo - left);
    for (long oh = top; oh < least(Ho, top + window); oh += strip) {
      const long height = least(strip, Ho - oh), size = height * width, step = size * VL + out_pad;
      for (long o = o_begin; o < o_end; o += together) {
        const long count = least(together, o_end - o);
        for (long k = 0; k < count; k += inner) {
          const long some = least(inner, count - k);
          for (long i = 0; i < some; i++) {
            lists[i] = {e.inputs(o + k + i), e.weights(o + k + i, 9), e.count(o + k + i)};
            store(biases + i * VL, all(bias ? bias[o + k + i] : 0));
            // Where each block begins.
            for (long c = 0, j = 0, b = 0; blocked && b <= blocks; b++, c += channels) {
              while (j < lists[i].count && (b == blocks || lists[i].from[j] < c)) j++;
              cuts[b * some + i] = (int32_t)j;
            }
          }
          for (long r = 0, R; r < height; r += R) {
            R = next(height - r, tall);
            const long ih = S > 0 ? (oh + r) * S - 1 : (oh + r) / 2,
                       IR = S > 0 ? (R - 1) * S + 3 : R / 2 + 1;
            for (long q = 0, Q; q < width; q += Q) {
              Q = sevens ? 7 : next(width - q, wide);
              const long iw = S > 0 ? (left + q) * S - 1 : (left + q) / 2,
                         IQ = S > 0 ? (Q - 1) * S + 3 : Q / 2 + 1;
              const float* places = packed + ((ih - h0) * source_width + iw - w0) * VL;
              const bool above = ih < 0, below = ih + IR > H, before = iw < 0, after = iw + IQ > W;
              float* results = out + k * step + (r * width + q) * VL;
              Tile t{places, plane, source_width * VL, above, below, before, after, range, results,
                     width * VL, step, some, biases, VL, 0, 0, nullptr, nullptr};
              for (long b = 0; b < blocks; b++) {
                if (blocked) {
                  t.begin = cuts + b * some, t.end = t.begin + some;
                  t.range = b + 1 < blocks ? Range() : range;
                  if (b) t.start = t.out, t.start_step = step, t.start_row = t.out_row;
                  if (b) t.start_place = VL;
                }
                any_tile<S>(R == tall && !sevens ? 4 : R, Q, t, lists);
              }
            }
          }
        }
        if (y_last)
          for (long i = 0; i < size; i++)
            for (long k = 0; k < count; k += VL)
              unpack(out + k * step + i * VL, step, least(VL, count - k),
                     y + ((n * Ho + oh + i / width) * Wo + left + i % width) * O + o + k,
                     Ho * Wo * O, some);
        else if (size == Ho * Wo)
          unpack(out, VL, count * size, y + (n * O + o) * size, O * size, some);
        else
          for (long k = 0; k < count; k++)
            for (long r = 0; r < (width == Wo ? 1 : height); r++)
              unpack(out + (k * size + r * width) * VL, VL, width == Wo ? size : width,
                     y + ((n * O + o + k) * Ho + oh + r) * Wo + left, O * Ho * Wo, some);
      }
    }
  };
  auto some_blocks = [&](long begin, long end, long team) {
    float* packed = scratch[0].floats(
        C * (least(H, window * reach + 3) * least(W, across * reach + 3) * VL + pad));
    if (no_memory) return;
    for (long n = begin * VL; n < least(N, end * VL); n += VL)
      for (long top = 0; top < Ho; top += window)
        for (long left = 0; left < Wo; left += across) {
          const Source from = source(top, left);
          parallel(x_last ? from.height * from.width : C, team,
                   [&](long begin, long end) { pack_part(n, top, left, begin, end, packed); });
          parallel(O, team,
                   [&](long begin, long end) { outputs(n, top, left, begin, end, packed); });
        }
  };
  in_large_pages(y, N * O * Ho * Wo);
  const long teams = parts(N, VL);
  // Fewer blocks than threads: they share a block's outputs, and it is packed once for all of them.
  if (teams < threads) some_blocks(0, teams, threads);
  else parallel(teams, threads, [&](long begin, long end) { some_blocks(begin, end, 1); });
}

}  // namespace
