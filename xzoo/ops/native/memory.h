// Scratch, large pages, and activations packed into vectors and back.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <sys/mman.h>

#include "threads.h"
#include "vectors.h"

namespace {

// Scratch of one thread; it only grows. Pages of 2 MiB: jumps between channels otherwise miss the
// TLB (2 to 12 %).
struct Scratch {
  float* p = nullptr;
  size_t bytes = 0;
  ~Scratch() { free(p); }
  float* floats(long n) {  // null, and no_memory, where there is none
    size_t need = ((size_t)n * sizeof(float) + (2 << 20)) >> 21 << 21;
    if (need > bytes) {
      free(p);
      p = n < 1l << 48 ? (float*)aligned_alloc(2 << 20, need) : nullptr;
      bytes = p ? need : 0;
      if (!p) {
        no_memory = true;
        return nullptr;
      }
#ifdef MADV_HUGEPAGE
      madvise(p, need, MADV_HUGEPAGE);
#endif
      memset(p, 0, need);  // lanes that no sample fills are computed with, and never stored
    }
    return p;
  }
};
thread_local Scratch scratch[5];

// Large results are mapped afresh at each call; in pages of 4 KiB that can take longer than
// computing them.
void in_large_pages(float* p, long n) {
#ifdef MADV_HUGEPAGE
  const uintptr_t page = 2 << 20;
  uintptr_t begin = ((uintptr_t)p + page - 1) & ~(page - 1), end = (uintptr_t)(p + n) & ~(page - 1);
  if (end >= begin + 2 * page) madvise((void*)begin, end - begin, MADV_HUGEPAGE);
#endif
}

// Addresses of up to VL rows.
struct Rows {
  const float* at[VL];
};
INLINE Rows rows(const float* p, long step, long n) {
  Rows r;
  UNROLL for (int l = 0; l < VL; l++) r.at[l] = p + (l < n ? l : 0) * step;
  return r;
}

// n rows of `length` floats -> [length][VL], `step` apart; lanes without a row are zero.
KERNEL void pack(Rows from, long n, long length, float* to, long step) {
  V r[VL];
  for (long i = 0; i < length; i += VL) {
    long some = least(VL, length - i);
    UNROLL for (int l = 0; l < VL; l++) {
      const float* p = from.at[l] + i;
      r[l] = l >= n ? all(0) : some == VL ? load(p) : load_some(p, some);
    }
    transpose(r);
    if (some == VL) UNROLL for (int l = 0; l < VL; l++) store(to + (i + l) * step, r[l]);
    else for (int l = 0; l < some; l++) store(to + (i + l) * step, r[l]);
  }
}

// The way back: [length][VL], `step` apart, to n rows of `length` floats that are `row` apart.
KERNEL void unpack(const float* from, long step, long length, float* to, long row, long n) {
  V r[VL];
  for (long i = 0; i < length; i += VL) {
    long some = least(VL, length - i);
    UNROLL for (int l = 0; l < VL; l++) r[l] = l < some ? load(from + (i + l) * step) : all(0);
    transpose(r);
    if (some == VL && n == VL) UNROLL for (int l = 0; l < VL; l++) stream(to + l * row + i, r[l]);
    else UNROLL for (int l = 0; l < VL; l++) if (l < n) store_some(to + l * row + i, r[l], some);
  }
}

INLINE void copy(float* to, const float* from, long n) {
  long i = 0;
  for (; i + VL <= n; i += VL) store(to + i, load(from + i));
  if (i < n) store_some(to + i, load_some(from + i, n - i), n - i);
}

}  // namespace
