// Panels: columns m = sample * pixels + pixel, [channels][P * VL].
#pragma once

#include <cstring>
#include <initializer_list>

#include "memory.h"
#include "vectors.h"

namespace {

// Copies columns [m, m + n) of an activation [N][C][pixels] (or [N][pixels][C]) to a panel of
// `width` columns.
void to_panel(const float* x, bool last, long C, long pixels, long m, long n, float* panel,
              long width) {
  if (last || pixels == 1) {
    for (long i = 0; i < n; i += VL) {
      const long some = least(VL, n - i);
      pack(rows(x + (m + i) * C, C, some), some, C, panel + i, width);
    }
    return;
  }
  for (long i = 0, length; i < n; i += length) {
    const long sample = (m + i) / pixels, pixel = (m + i) % pixels;
    length = least(n - i, pixels - pixel);
    const float* from = x + sample * C * pixels + pixel;
    for (long c = 0; c < C; c++, from += pixels) {
      for (long b = 0; b < length; b += 16) __builtin_prefetch(from + 8 * pixels + b);
      copy(panel + c * width + i, from, length);
    }
  }
}

// Asks for channels [c, end) of what to_panel reads, or from_panel writes, next. (Inline: GCC
// leaves out calls that do nothing but ask.)
template <bool WRITE>
INLINE void ask_for(const float* x, bool last, long C, long pixels, long m, long n, long c,
                    long end) {
  if (last || pixels == 1) {  // columns lie side by side: a part of them
    if (!WRITE && FAST && C <= 256)
      for (long b = n * c; b < n * end; b += 16) __builtin_prefetch(x + m * C + b, 0, 2);
    return;
  }
  for (long i = 0, length; i < n; i += length) {
    const long sample = (m + i) / pixels, pixel = (m + i) % pixels;
    length = least(n - i, pixels - pixel);
    for (long k = c; k < end; k++)
      for (long b = 0; b < length; b += 16)
        __builtin_prefetch(x + (sample * C + k) * pixels + pixel + b, WRITE, WRITE ? 3 : 2);
  }
}

// The way back, for outputs [o, o + outputs) of `O`.
void from_panel(const float* panel, long width, float* y, bool last, long O, long o, long outputs,
                long pixels, long m, long n) {
  if (last || pixels == 1) {
    for (long i = 0; i < n; i += VL)
      unpack(panel + i, width, outputs, y + (m + i) * O + o, O, least(VL, n - i));
    return;
  }
  for (long i = 0, length; i < n; i += length) {
    const long sample = (m + i) / pixels, pixel = (m + i) % pixels;
    length = least(n - i, pixels - pixel);
    for (long k = 0; k < outputs; k++)
      copy(y + (sample * O + o + k) * pixels + pixel, panel + k * width + i, length);
  }
}

// Floats of a block of rows of a panel that stays in the first level of cache.
const long L1 = 40960 / 4;

// The most vectors of the choices, largest first, that leave few lanes of the last panel empty.
long panel_vectors(long columns, std::initializer_list<long> choices) {
  const long vectors = parts(columns, VL);
  for (long p : choices)
    if (parts(vectors, p) * p * 8 <= vectors * 9) return p;
  return 1;
}

}  // namespace
