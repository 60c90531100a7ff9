// Batch norm and the activation after it, forward and backward, in as few passes over memory as
// there can be: one to learn the statistics, one to use them. No mask is kept: the backward pass
// computes the sign that the forward pass saw, by the same operations.
//
// Sums are made in float32 over NEAR numbers, and of these sums in float64; the pieces depend on
// the sizes alone, so the bits do not depend on the threads.
#pragma once

#include <cmath>

#include "memory.h"
#include "threads.h"
#include "vectors.h"

#define ALWAYS __attribute__((always_inline))

namespace {

struct Norm {  // of norms.py, in this order; P pixels a channel and sample
  int64_t N, C, P, last, threads, activation, training;
  double eps, momentum;
};

enum { NONE, RELU, RELU6, GELU };

// ---- activations

// e^v for v <= 0, to 2 units in the last place: 2^n times a polynomial of what is left.
INLINE V exp_negative(V v) {
  typedef int32_t Integers __attribute__((vector_size(VL * 4)));
  const V magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  v = clamped(v, all(-87.0f), all(0.0f));
  V t = fma(v, all(1.44269504f), magic), n = t - magic;
  V r = fma(n, all(-0.693359375f), v);
  r = fma(n, all(2.12194440e-4f), r);
  V p = all(1.9875691500e-4f);
  p = fma(p, r, all(1.3981999507e-3f));
  p = fma(p, r, all(8.3334519073e-3f));
  p = fma(p, r, all(4.1665795894e-2f));
  p = fma(p, r, all(1.6666665459e-1f));
  p = fma(p, r, all(5.0000001201e-1f));
  p = fma(p, r * r, r + all(1.0f));
  Integers exponent;
  memcpy(&exponent, &t, sizeof t);
  exponent = (exponent << 23) + (127 << 23);  // the magic's own bits fall off on the left
  V power;
  memcpy(&power, &exponent, sizeof power);
  return p * power;
}

// The normal distribution up to v, to 1e-7 (Abramowitz and Stegun 1964, 7.1.26), and e^(-v^2 / 2).
INLINE V normal(V v, V& bell) {
  const V a = clamped(v < all(0) ? -v : v, all(0), all(1e9f)) * all(0.70710678f);
  const V t = all(1.0f) / fma(a, all(0.3275911f), all(1.0f));
  bell = exp_negative(-a * a);
  V p = all(1.061405429f);
  p = fma(p, t, all(-1.453152027f));
  p = fma(p, t, all(1.421413741f));
  p = fma(p, t, all(-0.284496736f));
  p = fma(p, t, all(0.254829592f));
  const V tail = all(0.5f) * p * t * bell;
  return v < all(0) ? tail : all(1.0f) - tail;
}

template <int A>
INLINE V activated(V v) {
  V bell;
  if (A == RELU) return clamped(v, all(0), all(__builtin_inff()));
  if (A == RELU6) return clamped(v, all(0), all(6));
  if (A == GELU) return v * normal(v, bell);
  return v;
}

// The gradient by v, where d is that by activated(v).
template <int A>
INLINE V through(V d, V v) {
  V bell;
  if (A == RELU) return v <= all(0) ? all(0) : d;
  if (A == RELU6) return ((v <= all(0)) | (v >= all(6))) ? all(0) : d;
  if (A == GELU) {
    const V under = normal(v, bell);
    return d * fma(v * all(0.39894228f), bell, under);
  }
  return d;
}

// ---- walks over the elements, a vector at a time

// What is known of each channel, for the channels that a vector holds.
struct Same {  // a vector of one channel
  long c;
  V of(const float* p) const { return all(p[c]); }
};
struct Each {  // one of n neighboring channels
  long c, n;
  V of(const float* p) const { return n == VL ? load(p + c) : load_some(p + c, n); }
};

INLINE V some(const float* p, long n) { return n == VL ? load(p) : load_some(p, n); }
INLINE void put(float* p, V v, long n, bool past_caches) {
  if (n < VL) store_some(p, v, n);
  else if (past_caches) stream(p, v);
  else store(p, v);
}
// Whether what lies together is whole lines of the cache: lines that are written in part past the
// caches, and in part not, cost more than is gained (14x14 and 7x7 pixels).
INLINE bool whole_lines(const Norm& a) { return (a.last ? a.C : a.P) * sizeof(float) % 64 == 0; }
INLINE V first(V v, long n) {  // the others zero
  static const float kPlace[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return n == VL ? v : load(kPlace) < all((float)n) ? v : all(0);
}

// f(place, floats in the vector) for each vector of channel c; [N][C][P].
template <class F>
INLINE void over_channel(const Norm& a, long c, F f) {
  for (long n = 0; n < a.N; n++) {
    const long from = (n * a.C + c) * a.P;
    long i = 0;
    for (; i + VL <= a.P; i += VL) f(from + i, VL);
    if (i < a.P) f(from + i, a.P - i);
  }
}

// f(channel, place, floats in the vector) for each vector of pixel p; [pixels][C].
template <class F>
INLINE void over_pixel(const Norm& a, long p, F f) {
  long c = 0;
  for (; c + VL <= a.C; c += VL) f(c, p * a.C + c, VL);
  if (c < a.C) f(c, p * a.C + c, a.C - c);
}

// use(constants, place, floats) for each vector of the tensor.
template <class K, class F>
INLINE void over_all(const Norm& a, K constants, F use) {
  if (!a.last)
    return parallel(a.C, a.threads, [&](long begin, long end) {
      for (long c = begin; c < end; c++) {
        const auto k = constants(Same{c});
        over_channel(a, c, [&](long i, long n) ALWAYS { use(k, i, n); });
      }
    });
  parallel(a.N * a.P, a.threads, [&](long begin, long end) {
    // Copies that no store can reach: they stay in registers.
    const K at = constants;
    const F each = use;
    const Norm size = a;
    for (long p = begin; p < end; p++)
      over_pixel(size, p, [&](long c, long i, long n) ALWAYS { each(at(Each{c, n}), i, n); });
  });
}

struct Pair {
  V a, b;
};

constexpr long NEAR = 32;  // numbers that are added in float32

// Two sums of one channel.
struct Channel {
  Pair near{all(0), all(0)};
  long count = 0;
  double a[VL] = {}, b[VL] = {};
  void add(Pair v) {
    near.a += v.a, near.b += v.b;
    if (++count == NEAR) flush();
  }
  void flush() {
    float f[2 * VL];
    store(f, near.a), store(f + VL, near.b);
    for (long l = 0; l < VL; l++) a[l] += f[l], b[l] += f[VL + l];
    near = {all(0), all(0)}, count = 0;
  }
  static double total(const double* p) {
    double sum = 0;
    for (long l = 0; l < VL; l++) sum += p[l];
    return sum;
  }
};

// Adds up, for each channel, the pairs that f(constants, place, floats) gives; calls
// then(channel, a, b) with the sums; then `use` on every vector as over_all does, while a channel
// that lies together is still in the cache. scratch[0] holds what the pieces of others add up to.
template <class K, class F, class Then, class L, class G>
INLINE void two_passes(const Norm& a, K constants, F f, Then then, L learnt, G use) {
  if (!a.last)
    return parallel(a.C, a.threads, [&](long begin, long end) {
      for (long c = begin; c < end; c++) {
        const auto k = constants(Same{c});
        Channel s;
        over_channel(a, c, [&](long i, long n) ALWAYS { s.add(f(k, i, n)); });
        s.flush();
        then(c, s.total(s.a), s.total(s.b));
        const auto l = learnt(Same{c});
        over_channel(a, c, [&](long i, long n) ALWAYS { use(l, i, n); });
      }
    });
  // Of each piece: sums in float64 [2][C], sums of NEAR pixels in float32 [2][C up to a vector].
  const long pixels = a.N * a.P, piece = NEAR * parts(pixels, NEAR * 64),
             pieces = parts(pixels, piece), wide = parts(a.C, VL) * VL, room = 4 * a.C + 2 * wide;
  float* sums = scratch[0].floats(pieces * room);
  if (no_memory) return;
  parallel(pieces, a.threads, [&](long begin, long end) {
    const K at = constants;  // copies, as above
    const F each = f;
    const Norm size = a;
    for (long b = begin; b < end; b++) {
      double* far = (double*)(sums + b * room);
      float *near = (float*)(far + 2 * a.C), *near_b = near + wide;
      memset(far, 0, room * sizeof(float));
      const long stop = least(pixels, (b + 1) * piece);
      for (long q = b * piece; q < stop; q += NEAR) {
        for (long p = q; p < least(stop, q + NEAR); p++)
          over_pixel(size, p, [&](long c, long i, long n) ALWAYS {
            const Pair v = each(at(Each{c, n}), i, n);
            store(near + c, load(near + c) + v.a);
            store(near_b + c, load(near_b + c) + v.b);
          });
        for (long c = 0; c < a.C; c++) far[c] += near[c], far[a.C + c] += near_b[c];
        memset(near, 0, 2 * wide * sizeof(float));
      }
    }
  });
  for (long c = 0; c < a.C; c++) {
    double first = 0, second = 0;
    for (long b = 0; b < pieces; b++) {
      const double* far = (const double*)(sums + b * room);
      first += far[c], second += far[a.C + c];
    }
    then(c, first, second);
  }
  over_all(a, learnt, use);
}

// ---- forward and backward

// The norm as one multiplication and one addition: what both passes compute y from.
struct Line {
  V scale, shift;
};

// What a channel's statistics give: mean, 1 / sqrt(var + eps), and with gamma and beta (either may
// be null) scale and shift.
struct Statistics {
  float *mean, *inverse, *scale, *shift;
  void set(long c, double m, double variance, double eps, const float* gamma,
           const float* beta) const {
    const double i = 1 / std::sqrt(variance + eps), s = gamma ? gamma[c] * i : i;
    mean[c] = (float)m, inverse[c] = (float)i, scale[c] = (float)s;
    shift[c] = (float)((beta ? beta[c] : 0) - m * s);
  }
};

// y by fixed statistics.
template <int A>
void normed(const Norm& a, const float* x, const Statistics& by, float* y) {
  const float *scale = by.scale, *shift = by.shift;
  const bool past_caches = whole_lines(a);
  over_all(
      a, [=](auto at) { return Line{at.of(scale), at.of(shift)}; },
      [=](const Line& k, long i, long n) ALWAYS {
        put(y + i, activated<A>(fma(some(x + i, n), k.scale, k.shift)), n, past_caches);
      });
}

// A number near each channel's mean, for sums of squares that lose no digits: the mean of up to
// NEAR of its numbers.
void near_means(const Norm& a, const float* x, float* to) {
  for (long c = 0; c < a.C; c++) {
    double sum = 0;
    const long samples = least(a.N, NEAR);
    for (long n = 0; n < samples; n++)
      sum += x[a.last ? n * a.P * a.C + c : (n * a.C + c) * a.P];
    to[c] = (float)(sum / samples);
  }
}

// y by the statistics of x, which move the running ones (null: there are none).
template <int A>
void normed_by_batch(const Norm& a, const float* x, const float* gamma, const float* beta,
                     float* running_mean, float* running_var, const Statistics& to, float* y) {
  const double count = (double)a.N * (double)a.P, m = a.momentum;
  const float *scale = to.scale, *shift = to.shift, *pivot = to.mean;
  const bool past_caches = whole_lines(a);
  near_means(a, x, to.mean);
  two_passes(
      a, [=](auto at) { return at.of(pivot); },
      [=](V k, long i, long n) ALWAYS {
        const V v = first(some(x + i, n) - k, n);
        return Pair{v, v * v};
      },
      [=](long c, double sum, double squares) {
        const double away = sum / count, mean = pivot[c] + away,
                     raw = squares / count - away * away, variance = raw < 0 ? 0 : raw;  // NaN stays
        to.set(c, mean, variance, a.eps, gamma, beta);
        if (!running_mean) return;
        running_mean[c] = (float)((1 - m) * running_mean[c] + m * mean);
        running_var[c] = (float)((1 - m) * running_var[c] + m * variance * (count / (count - 1)));
      },
      [=](auto at) { return Line{at.of(scale), at.of(shift)}; },
      [=](const Line& k, long i, long n) ALWAYS {
        put(y + i, activated<A>(fma(some(x + i, n), k.scale, k.shift)), n, past_caches);
      });
}

// dx = scale * d + slope * (x - mean) + level, where d is the gradient before the activation.
struct Way {
  V scale, shift, mean, slope, level;
};

// dgamma and dbeta, and dx; `slope` and `level` are room for a.C floats each. By fixed statistics,
// dx = scale * d.
template <int A, bool BY_BATCH>
void norm_gradients(const Norm& a, const float* dy, const float* x, const Statistics& by,
                    float* slope, float* level, float* dx, float* dgamma, float* dbeta) {
  const double count = (double)a.N * (double)a.P;
  const float *scale = by.scale, *shift = by.shift, *mean = by.mean, *inverse = by.inverse;
  const bool past_caches = whole_lines(a);
  two_passes(
      a, [=](auto at) { return Way{at.of(scale), at.of(shift), at.of(mean), all(0), all(0)}; },
      [=](const Way& k, long i, long n) ALWAYS {
        const V v = some(x + i, n), d = through<A>(some(dy + i, n), fma(v, k.scale, k.shift));
        return Pair{d, d * (v - k.mean)};
      },
      [=](long c, double sum, double along) {
        const double i = inverse[c];
        dgamma[c] = (float)(along * i);
        dbeta[c] = (float)sum;
        slope[c] = (float)(-scale[c] * i * i * along / count);
        level[c] = (float)(-scale[c] * sum / count);
      },
      [=](auto at) {
        return Way{at.of(scale), at.of(shift), at.of(mean), at.of(slope), at.of(level)};
      },
      [=](const Way& k, long i, long n) ALWAYS {
        const V v = some(x + i, n), d = through<A>(some(dy + i, n), fma(v, k.scale, k.shift));
        const V along = BY_BATCH ? fma(v - k.mean, k.slope, k.level) : all(0);
        put(dx + i, fma(d, k.scale, along), n, past_caches);
      });
}

}  // namespace
