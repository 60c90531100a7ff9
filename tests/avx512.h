// AVX-512's instructions, those that native.cpp uses, in plain code: its kernels of 16 lanes then run, and are looked
// over, on every CPU. Each touches the memory that the instruction touches, and no other.
#include <cstdint>
#include <cstring>
#include <xmmintrin.h>

typedef float __m512 __attribute__((vector_size(64)));
typedef double __m512d __attribute__((vector_size(64)));
typedef int32_t __m512i __attribute__((vector_size(64)));
typedef uint16_t __mmask16;

#define PLAIN static inline __attribute__((always_inline))

PLAIN __m512 _mm512_loadu_ps(const float* p) {
  __m512 v;
  memcpy(&v, p, sizeof v);
  return v;
}
PLAIN void _mm512_storeu_ps(float* p, __m512 v) { memcpy(p, &v, sizeof v); }
PLAIN void _mm512_stream_ps(float* p, __m512 v) {
  if ((uintptr_t)p & 63) __builtin_trap();
  memcpy(p, &v, sizeof v);
}
PLAIN __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const float* p) {
  __m512 v = {};
  for (int i = 0; i < 16; i++) if (mask >> i & 1) v[i] = p[i];
  return v;
}
PLAIN void _mm512_mask_storeu_ps(float* p, __mmask16 mask, __m512 v) {
  for (int i = 0; i < 16; i++) if (mask >> i & 1) p[i] = v[i];
}
PLAIN __m512 _mm512_set1_ps(float a) { return __m512{a, a, a, a, a, a, a, a, a, a, a, a, a, a, a, a}; }
PLAIN __m512 _mm512_broadcast_f32x4(__m128 a) {
  __m512 v;
  for (int i = 0; i < 16; i++) v[i] = a[i % 4];
  return v;
}
PLAIN __m512i _mm512_setzero_si512() { return __m512i{}; }
PLAIN __m512i _mm512_setr_epi32(int a, int b, int c, int d, int e, int f, int g, int h, int i, int j, int k, int l,
                                int m, int n, int o, int p) {
  return __m512i{a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p};
}
PLAIN __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) { return a * b + c; }
PLAIN __m512 _mm512_max_ps(__m512 a, __m512 b) { return a > b ? a : b; }  // of NaN: b
PLAIN __m512 _mm512_min_ps(__m512 a, __m512 b) { return a < b ? a : b; }
PLAIN __m512d _mm512_castps_pd(__m512 a) { return (__m512d)a; }
PLAIN __m512 _mm512_castpd_ps(__m512d a) { return (__m512)a; }
PLAIN __m512i _mm512_castps_si512(__m512 a) { return (__m512i)a; }
PLAIN __m512 _mm512_castsi512_ps(__m512i a) { return (__m512)a; }
PLAIN __m128 _mm512_castps512_ps128(__m512 a) { return __m128{a[0], a[1], a[2], a[3]}; }

// Within each 128 bits, or of whole 128 bits.
PLAIN __m512 _mm512_unpacklo_ps(__m512 a, __m512 b) {
  __m512 v;
  for (int i = 0; i < 16; i++) v[i] = (i % 2 ? b : a)[i / 4 * 4 + i % 4 / 2];
  return v;
}
PLAIN __m512 _mm512_unpackhi_ps(__m512 a, __m512 b) {
  __m512 v;
  for (int i = 0; i < 16; i++) v[i] = (i % 2 ? b : a)[i / 4 * 4 + 2 + i % 4 / 2];
  return v;
}
PLAIN __m512d _mm512_unpacklo_pd(__m512d a, __m512d b) {
  __m512d v;
  for (int i = 0; i < 8; i++) v[i] = (i % 2 ? b : a)[i / 2 * 2];
  return v;
}
PLAIN __m512d _mm512_unpackhi_pd(__m512d a, __m512d b) {
  __m512d v;
  for (int i = 0; i < 8; i++) v[i] = (i % 2 ? b : a)[i / 2 * 2 + 1];
  return v;
}
PLAIN __m512 _mm512_shuffle_f32x4(__m512 a, __m512 b, int order) {
  __m512 v;
  for (int i = 0; i < 16; i++) v[i] = (i < 8 ? a : b)[(order >> i / 4 * 2 & 3) * 4 + i % 4];
  return v;
}
PLAIN __m512 _mm512_shuffle_ps(__m512 a, __m512 b, int order) {
  __m512 v;
  for (int i = 0; i < 16; i++) v[i] = (i % 4 < 2 ? a : b)[i / 4 * 4 + (order >> i % 4 * 2 & 3)];
  return v;
}
PLAIN __m512 _mm512_permute_ps(__m512 a, int order) { return _mm512_shuffle_ps(a, a, order); }
PLAIN __m512 _mm512_permutexvar_ps(__m512i from, __m512 a) {
  __m512 v;
  for (int i = 0; i < 16; i++) v[i] = a[from[i] & 15];
  return v;
}
PLAIN __m512i _mm512_alignr_epi32(__m512i high, __m512i low, int n) {
  __m512i v;
  for (int i = 0; i < 16; i++) v[i] = i + n < 16 ? low[i + n] : high[i + n - 16];
  return v;
}
PLAIN __m512 _mm512_maskz_compress_ps(__mmask16 mask, __m512 a) {
  __m512 v = {};
  for (int i = 0, k = 0; i < 16; i++) if (mask >> i & 1) v[k++] = a[i];
  return v;
}
