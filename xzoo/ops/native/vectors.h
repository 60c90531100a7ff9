// Vectors of floats: what this CPU's level has, in one set of functions.
//
// Loops over arrays of accumulators carry UNROLL: GCC 12 otherwise unrolls them too late, keeps the
// array in memory and stores each product to the stack, at half the speed and without a warning.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define UNROLL _Pragma("GCC unroll 32")
#define INLINE static inline __attribute__((always_inline))
#define KERNEL static __attribute__((noinline))

namespace {

#if defined(__AVX512F__)
constexpr long VL = 16;
constexpr bool WIDE = true;  // 32 registers
typedef __m512 V;
INLINE V load(const float* p) { return _mm512_loadu_ps(p); }
INLINE void store(float* p, V v) { _mm512_storeu_ps(p, v); }
INLINE V all(float a) { return _mm512_set1_ps(a); }
INLINE V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
INLINE V clamped(V v, V low, V high) {  // NaN stays
  return _mm512_min_ps(high, _mm512_max_ps(low, v));
}
INLINE V load_some(const float* p, long n) {
  return _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
}
INLINE void store_some(float* p, V v, long n) {
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), v);
}
// Past the caches where the address allows: the line is then not read before it is overwritten.
INLINE void stream(float* p, V v) {
  if (((uintptr_t)p & 63) == 0) _mm512_stream_ps(p, v);
  else store(p, v);
}
INLINE void transpose(V r[16]) {
  V t[16];
  UNROLL for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  UNROLL for (int i = 0; i < 16; i += 4) UNROLL for (int k = 0; k < 2; k++) {
    __m512d a = _mm512_castps_pd(t[i + k]), b = _mm512_castps_pd(t[i + k + 2]);
    r[i + 2 * k] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
    r[i + 2 * k + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
  }
  // r[4g + k] now holds column 4L + k of rows 4g to 4g + 3 in its 128-bit lane L.
  UNROLL for (int k = 0; k < 4; k++) {
    V a = _mm512_shuffle_f32x4(r[k], r[4 + k], 0x88),
      b = _mm512_shuffle_f32x4(r[k], r[4 + k], 0xdd);
    V c = _mm512_shuffle_f32x4(r[8 + k], r[12 + k], 0x88),
      d = _mm512_shuffle_f32x4(r[8 + k], r[12 + k], 0xdd);
    t[k] = _mm512_shuffle_f32x4(a, c, 0x88);
    t[8 + k] = _mm512_shuffle_f32x4(a, c, 0xdd);
    t[4 + k] = _mm512_shuffle_f32x4(b, d, 0x88);
    t[12 + k] = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
  UNROLL for (int i = 0; i < 16; i++) r[i] = t[i];
}
INLINE void fence() { _mm_sfence(); }
#elif defined(__AVX2__) && defined(__FMA__)
constexpr long VL = 8;
constexpr bool WIDE = false;
typedef __m256 V;
const int32_t kMask[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
INLINE __m256i mask(long n) { return _mm256_loadu_si256((const __m256i*)(kMask + 8 - n)); }
INLINE V load(const float* p) { return _mm256_loadu_ps(p); }
INLINE void store(float* p, V v) { _mm256_storeu_ps(p, v); }
INLINE V all(float a) { return _mm256_set1_ps(a); }
INLINE V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
INLINE V clamped(V v, V low, V high) { return _mm256_min_ps(high, _mm256_max_ps(low, v)); }
INLINE V load_some(const float* p, long n) { return _mm256_maskload_ps(p, mask(n)); }
INLINE void store_some(float* p, V v, long n) { _mm256_maskstore_ps(p, mask(n), v); }
INLINE void stream(float* p, V v) {
  if (((uintptr_t)p & 31) == 0) _mm256_stream_ps(p, v);
  else store(p, v);
}
INLINE void transpose(V r[8]) {
  V t[8], s[8];
  UNROLL for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  UNROLL for (int i = 0; i < 8; i += 4) UNROLL for (int k = 0; k < 2; k++) {
    s[i + 2 * k] = _mm256_shuffle_ps(t[i + k], t[i + k + 2], 0x44);
    s[i + 2 * k + 1] = _mm256_shuffle_ps(t[i + k], t[i + k + 2], 0xee);
  }
  UNROLL for (int k = 0; k < 4; k++) {
    r[k] = _mm256_permute2f128_ps(s[k], s[4 + k], 0x20);
    r[4 + k] = _mm256_permute2f128_ps(s[k], s[4 + k], 0x31);
  }
}
INLINE void fence() { _mm_sfence(); }
#else
// GCC's and Clang's own vectors, for every other CPU: NEON, SSE2.
constexpr long VL = 4;
constexpr bool WIDE = false;
typedef float V __attribute__((vector_size(16)));
INLINE V load(const float* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
INLINE void store(float* p, V v) { memcpy(p, &v, sizeof v); }
INLINE V all(float a) { return V{a, a, a, a}; }
INLINE V fma(V a, V b, V c) { return a * b + c; }
INLINE V clamped(V v, V low, V high) {
  v = v < low ? low : v;
  return v > high ? high : v;
}
INLINE V load_some(const float* p, long n) {
  V v = all(0);
  memcpy(&v, p, n * sizeof(float));
  return v;
}
INLINE void store_some(float* p, V v, long n) { memcpy(p, &v, n * sizeof(float)); }
INLINE void stream(float* p, V v) { store(p, v); }
INLINE void transpose(V r[4]) {
  V t[4];
  for (int i = 0; i < 4; i++) t[i] = V{r[0][i], r[1][i], r[2][i], r[3][i]};
  for (int i = 0; i < 4; i++) r[i] = t[i];
}
INLINE void fence() {}
#endif

// A value that is used several times, loaded once: GCC otherwise reads it from memory at each use.
INLINE V held(const float* p) {
  V v = load(p);
#if defined(__AVX2__)
  asm("" : "+v"(v));
#endif
  return v;
}

// An address that is computed once: GCC otherwise computes one for each use, and on Intel's CPUs a
// sum of integers may take the place of a multiplication of vectors.
INLINE const float* here(const float* p) {
#if defined(__AVX2__)
  asm("" : "+r"(p));
#endif
  return p;
}

INLINE long least(long a, long b) { return a < b ? a : b; }
INLINE long most(long a, long b) { return a > b ? a : b; }
INLINE long parts(long n, long size) { return (n + size - 1) / size; }

// The sums of VL vectors over their lanes, in one vector: at each step two vectors become one of
// half sums.
INLINE V sums(V r[VL]) {
#if defined(__AVX512F__)
#define HALVES(i, k, shuffle, low, high) r[i] = shuffle(r[i], r[k], low) + shuffle(r[i], r[k], high)
  UNROLL for (int i = 0; i < 4; i++) {
    HALVES(i, i + 4, _mm512_shuffle_f32x4, 0x44, 0xee);
    HALVES(i + 8, i + 12, _mm512_shuffle_f32x4, 0x44, 0xee);
    HALVES(i, i + 8, _mm512_shuffle_f32x4, 0x88, 0xdd);
  }
  HALVES(0, 1, _mm512_shuffle_ps, 0x88, 0xdd);
  HALVES(2, 3, _mm512_shuffle_ps, 0x88, 0xdd);
  HALVES(0, 2, _mm512_shuffle_ps, 0x88, 0xdd);
  return r[0];
#elif defined(__AVX2__) && defined(__FMA__)
#define HALVES(i, k, shuffle, low, high) r[i] = shuffle(r[i], r[k], low) + shuffle(r[i], r[k], high)
  UNROLL for (int i = 0; i < 4; i++) HALVES(i, i + 4, _mm256_permute2f128_ps, 0x20, 0x31);
  HALVES(0, 1, _mm256_shuffle_ps, 0x88, 0xdd);
  HALVES(2, 3, _mm256_shuffle_ps, 0x88, 0xdd);
  HALVES(0, 2, _mm256_shuffle_ps, 0x88, 0xdd);
  return r[0];
#else
  transpose(r);
  return (r[0] + r[2]) + (r[1] + r[3]);
#endif
}

// Whether this is one of Intel's servers from Sapphire Rapids on: two multiplications of 16 floats
// a cycle, 2 MiB of L2, and an L3 that gives a core 30 GB/s, a twelfth of what its multiplications
// would take. Older ones and other makes were not measured. A test says by XZOO_FAST which of the
// two it wants.
const bool FAST = [] {
#if !defined(__AVX512F__)
  return false;  // sums that go on from memory (`tile`) are for wide vectors alone
#elif defined(XZOO_FAST)
  return bool(XZOO_FAST);
#elif defined(__x86_64__)
  unsigned a, b, c, d;
  if (!__get_cpuid(0, &a, &b, &c, &d) || b != signature_INTEL_ebx) return false;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 23 & 1);  // AVX512-FP16
#else
  return false;
#endif
}();

}  // namespace
