// A layer as native.py describes it, and the edges of its graph.
#pragma once

#include <cstdint>
#include <cstring>

#include "memory.h"
#include "vectors.h"

namespace {

struct Layer {  // of native.py, in this order
  int64_t N, C, H, W, O, degree, share, stride, x_last, y_last, threads, activation;
};

// The activation that is done in the store of a result: none, relu, relu6.
struct Range {
  float low = -__builtin_inff(), high = __builtin_inff();
};
Range range(const Layer& a) {
  Range r;
  if (a.activation) r.low = 0;
  if (a.activation == 2) r.high = 6;
  return r;
}
INLINE V clamped(V v, const Range& r) { return clamped(v, all(r.low), all(r.high)); }

// The inputs of each output: equal numbers of them, or those of a transposed graph (`begin`), whose
// share is 1.
struct Edges {
  const int32_t* from;
  const float* weight;
  long degree, share;
  const int32_t* begin;  // [outputs + 1], or null
  const int32_t* inputs(long o) const { return from + (begin ? begin[o] : o / share * degree); }
  const float* weights(long o, long taps) const {
    return weight + (begin ? begin[o] : o * degree) * taps;
  }
  long count(long o) const { return begin ? begin[o + 1] - begin[o] : degree; }
};

// The graph and its 3x3 weights transposed: for each input the outputs that read it, in order.
Edges transposed(const Layer& a, const int32_t* neighbours, const float* weight, bool turned) {
  long n = a.O * a.degree;
  int32_t* begin = (int32_t*)scratch[2].floats(a.C + 1 + n);
  int32_t* from = begin + a.C + 1;
  float* w = scratch[3].floats(n * 9);
  if (no_memory) return {};
  memset(begin, 0, (a.C + 1) * sizeof(int32_t));
  for (long o = 0; o < a.O; o++)
    for (long j = 0; j < a.degree; j++) begin[neighbours[o / a.share * a.degree + j] + 1]++;
  for (long c = 0; c < a.C; c++) begin[c + 1] += begin[c];
  for (long o = 0; o < a.O; o++)
    for (long j = 0; j < a.degree; j++) {
      int32_t k = begin[neighbours[o / a.share * a.degree + j]]++;
      from[k] = (int32_t)o;
      const float* taps = weight + (o * a.degree + j) * 9;
      for (int t = 0; t < 9; t++) w[k * 9 + t] = taps[turned ? 8 - t : t];
    }
  memmove(begin + 1, begin, a.C * sizeof(int32_t));  // filling moved each beginning to its end
  begin[0] = 0;
  return Edges{from, w, 0, 1, begin};
}

}  // namespace
