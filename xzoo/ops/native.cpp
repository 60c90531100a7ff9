// The kernels of the `native` backend: float32, sums in float32, each mirrored by a function of dense.py.
//
// Built by native.py without torch's and without OpenMP's headers; called through the C functions at the end.
// A layer is weight [O][degree][taps] and neighbours [O / share][degree]; an activation is [N][C][H][W], or
// [N][H][W][C] where the flag `last` says so; both orders are read and written as they lie.
//
//   3x3, many samples    lanes = samples; a tile of pixels of one output stays in registers over its whole degree,
//                        and each loaded input vector feeds up to nine products
//   3x3, few samples     lanes = pixels of a row, or of a plane
//   1x1 and linear       lanes = columns (pixels of all samples), copied to panels that fit in the L2 cache; with
//                        share 1 also taken by blocks of channels that fit in L1
//   linear, few samples  lanes = weights of an output
//
// Work is split over threads by samples and outputs, never within a sum: the bits do not depend on the threads.
//
// Loops over arrays of accumulators carry UNROLL: GCC 12 otherwise unrolls them too late, keeps the array in memory
// and stores each product to the stack, at half the speed and without a warning.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <pthread.h>
#include <sys/mman.h>
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

// ---- vectors

#if defined(__AVX512F__)
constexpr long VL = 16;
constexpr bool WIDE = true;  // 32 registers
typedef __m512 V;
INLINE V load(const float* p) { return _mm512_loadu_ps(p); }
INLINE void store(float* p, V v) { _mm512_storeu_ps(p, v); }
INLINE V all(float a) { return _mm512_set1_ps(a); }
INLINE V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
INLINE V clamped(V v, V low, V high) { return _mm512_min_ps(high, _mm512_max_ps(low, v)); }  // NaN stays
INLINE V load_some(const float* p, long n) { return _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p); }
INLINE void store_some(float* p, V v, long n) { _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), v); }
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
    V a = _mm512_shuffle_f32x4(r[k], r[4 + k], 0x88), b = _mm512_shuffle_f32x4(r[k], r[4 + k], 0xdd);
    V c = _mm512_shuffle_f32x4(r[8 + k], r[12 + k], 0x88), d = _mm512_shuffle_f32x4(r[8 + k], r[12 + k], 0xdd);
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

// An address that is computed once: GCC otherwise computes one for each use, and on Intel's CPUs a sum of integers may
// take the place of a multiplication of vectors.
INLINE const float* here(const float* p) {
#if defined(__AVX2__)
  asm("" : "+r"(p));
#endif
  return p;
}

INLINE long least(long a, long b) { return a < b ? a : b; }
INLINE long most(long a, long b) { return a > b ? a : b; }
INLINE long parts(long n, long size) { return (n + size - 1) / size; }

// The sums of VL vectors over their lanes, in one vector: at each step two vectors become one of half sums.
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

// Whether this is one of Intel's servers from Sapphire Rapids on: two multiplications of 16 floats a cycle, 2 MiB of
// L2, and an L3 that gives a core 30 GB/s, a twelfth of what its multiplications would take. Older ones and other
// makes were not measured. A test says by XZOO_FAST which of the two it wants.
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

// ---- threads: OpenMP's pool in this process, which is torch's, if there is one

void (*start)(void (*)(void*), void*, unsigned, unsigned);
int (*thread_number)();
int (*thread_count)();
int (*inside)();
volatile int forked;  // a pool does not survive fork(): a child that enters it hangs, in torch's own operations too

// Whether scratch could not be had since this thread's call, or its part of one, began. No exception, which could not
// leave a thread of the pool: who asked for scratch and got none returns.
thread_local bool no_memory;

template <class F>
struct Task {
  F& f;
  long n;
  bool no_memory_there;
  static void run(void* p) {
    Task& t = *(Task*)p;
    long i = thread_number(), k = thread_count(), begin = t.n * i / k, end = t.n * (i + 1) / k;
    if (begin < end) t.f(begin, end);
    fence();
    if (no_memory) __atomic_store_n(&t.no_memory_there, true, __ATOMIC_RELAXED);
    no_memory = false;  // of a thread of the pool: the one that called is told below
  }
};

// f(begin, end) over pieces of [0, n).
template <class F>
void parallel(long n, long threads, F f) {
  threads = least(threads, n);
  if (threads > 1 && start && !forked && !inside()) {
    Task<F> task{f, n, false};
    start(Task<F>::run, &task, (unsigned)threads, 0);
    no_memory |= task.no_memory_there;
  } else if (n > 0) {
    f(0, n);
    fence();
  }
}

// ---- memory

// Scratch of one thread; it only grows. Pages of 2 MiB: jumps between channels otherwise miss the TLB (2 to 12 %).
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

// Large results are mapped afresh at each call; in pages of 4 KiB that can take longer than computing them.
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

// ---- a layer

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

// The inputs of each output: equal numbers of them, or those of a transposed graph (`begin`), whose share is 1.
struct Edges {
  const int32_t* from;
  const float* weight;
  long degree, share;
  const int32_t* begin;  // [outputs + 1], or null
  const int32_t* inputs(long o) const { return from + (begin ? begin[o] : o / share * degree); }
  const float* weights(long o, long taps) const { return weight + (begin ? begin[o] : o * degree) * taps; }
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

// ---- 3x3, lanes = samples

// How the places of source and result meet. S = 1 and 2: a convolution of that stride with padding 1, source place
// i = S * result - 1 + tap. S = -2: the transpose of stride 2, result place r = 2 * i - 1 + tap, from an even origin.
template <int S>
constexpr int span(int results) { return S > 0 ? (results - 1) * S + 3 : results / 2 + 1; }
template <int S>
constexpr int hit(int i, int tap, int results) {  // the result that source place i reaches through a tap, or -1
  int r = S > 0 ? ((i - tap) % S ? -1 : (i - tap) / S) : 2 * i - 1 + tap;
  return r >= results ? -1 : (S > 0 && i < tap) ? -1 : r;
}

// One tile of R x Q result pixels of one output. x: at the tile's first source place; skipped where it lies outside:
// taps at a border are left out, not multiplied by zero, which at 4x4 saves 44 of 144.
template <int R, int Q, int S, bool LEFT, bool RIGHT>
INLINE void tile(const float* x, long plane, long row, bool top, bool bottom, const int32_t* from, const float* w,
                 long count, const float* start, long start_row, long start_step, const Range& range, float* out,
                 long out_row) {
  constexpr int IR = span<S>(R), IQ = span<S>(Q);
  V sum[R][Q];
  const V first = load(start);  // for all, unless the sums go on: on FAST CPUs alone
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int q = 0; q < Q; q++) sum[r][q] = WIDE ? load(start + r * start_row + q * start_step) : first;
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

// A tile of some outputs, whose results are `step` apart. The sums begin with what is at `start` (the biases, or what
// has been added up so far) and take the part of each list from `begin` to `end`, or all of it.
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
#define TILE(LEFT, RIGHT)                                                                                          \
  for (long i = 0; i < t.outputs; i++) {                                                                           \
    const long begin = t.begin ? t.begin[i] : 0, end = t.begin ? t.end[i] : lists[i].count;                        \
    tile<R, Q, S, LEFT, RIGHT>(t.x, t.plane, t.row, t.top, t.bottom, lists[i].from + begin, lists[i].w + begin * 9, \
                               end - begin, t.start + i * t.start_step, t.start_row, t.start_place, t.range,       \
                               t.out + i * t.step, t.out_row);                                                     \
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
  if (q == 7) return r == 1 ? sided<1, 7, S < 0 ? 1 : S>(t, lists) : sided<TALL7, 7, S < 0 ? 1 : S>(t, lists);
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
void by_samples(const float* x, const Edges& e, const float* bias, float* y, long N, long C, long H, long W, long O,
                long Ho, long Wo, bool x_last, bool y_last, long threads, Range range = Range()) {
  const long edges = e.begin ? e.begin[O] : e.degree * O, reach = S > 0 ? S : 1;  // source rows for a result's, at most
  const bool sevens = S > 0 && Wo % 7 == 0 && (Wo % 4 || (FAST && S == 2));
  const long tall = sevens ? TALL7 : TALL, wide = sevens ? 7 : 4;
  // What the results of so many rows and columns read.
  auto bytes = [&](long rows, long columns) {
    return C * least(H, rows * reach + 2) * least(W, columns * reach + 2) * VL * 4;
  };
  // FAST: all that a window of results reads stays in L2; with stride 2, whose tiles reuse little of what they load,
  // inputs come in blocks of which a tile's places stay in L1, if an output reads some of each.
  long channels = C;
  if (FAST && S == 2) {
    const long places = ((tall - 1) * S + 3) * ((wide - 1) * S + 3), some = FAST_L1 / (places * VL * 4);
    const bool fits = x_last && bytes(tall, wide) <= FAST_L2;
    if (!fits && 2 * edges * some >= (x_last ? 5 : 2) * O * C) channels = most(1, some);
  }
  const bool blocked = channels < C;
  const long blocks = parts(C, channels);
  // A strip of rows: long pieces for each sample to store, and few enough that a strip of all channels fits in L2.
  long strip = tall, across = Wo, strip_limit = x_last ? FAST_L2 : FAST_L2 * 7 / 4;
  if (!FAST || blocked) strip_limit = 1l << 48;  // none
  while (strip * 2 * Wo <= 128 && strip < Ho && bytes(strip * 2, Wo) <= strip_limit) strip *= 2;
  for (long k = 2; FAST && x_last && !blocked && bytes(strip, across) > FAST_L2 && across > wide; k++)
    across = parts(parts(Wo, wide), k) * wide;
  // A window of strips is packed at a time: all rows, unless the images are large.
  const long window_limit = FAST && x_last && !blocked ? FAST_L2 : 12 << 20;
  long window = strip;
  while (window < Ho && across == Wo && bytes(window * 2, Wo) <= window_limit) window += strip;
  // `inner` outputs take a tile one after another; `together` are stored.
  const bool staged = blocked || (FAST && !x_last && bytes(strip, Wo) > FAST_L2 * 5 / 3);
  const long few = y_last ? VL : strip >= Ho && across == Wo ? most(1, 128 / (Ho * Wo)) : 1;
  const long inner = staged ? O : 1, together = staged ? O : few;
  // In channels_last, lines of all channels are written side by side: not at distances of powers of two.
  const long pad = FAST && x_last ? VL : 0, out_pad = FAST && y_last ? VL : 0, each = C * H * W;
  struct Source {  // the places of x that the window of outputs from (top, left) on reads
    long h0, height, w0, width;
  };
  auto source = [&](long top, long left) {
    const long bottom = least(Ho, top + window), right = least(Wo, left + across);
    const long h0 = S > 0 ? most(0, top * S - 1) : top / 2, w0 = S > 0 ? most(0, left * S - 1) : left / 2;
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
        pack(rows(samples + (i / width * W + i % width) * C, each, some), some, C, packed + i * VL, plane);
    else if (height == H && width == W)
      pack(rows(samples + begin * H * W, each, some), some, (end - begin) * H * W, packed + begin * plane, VL);
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
            for (long c = 0, j = 0, b = 0; blocked && b <= blocks; b++, c += channels) {  // where each block begins
              while (j < lists[i].count && (b == blocks || lists[i].from[j] < c)) j++;
              cuts[b * some + i] = (int32_t)j;
            }
          }
          for (long r = 0, R; r < height; r += R) {
            R = next(height - r, tall);
            const long ih = S > 0 ? (oh + r) * S - 1 : (oh + r) / 2, IR = S > 0 ? (R - 1) * S + 3 : R / 2 + 1;
            for (long q = 0, Q; q < width; q += Q) {
              Q = sevens ? 7 : next(width - q, wide);
              const long iw = S > 0 ? (left + q) * S - 1 : (left + q) / 2, IQ = S > 0 ? (Q - 1) * S + 3 : Q / 2 + 1;
              Tile t{packed + ((ih - h0) * source_width + iw - w0) * VL, plane, source_width * VL, ih < 0, ih + IR > H,
                     iw < 0, iw + IQ > W, range, out + k * step + (r * width + q) * VL, width * VL, step, some,
                     biases, VL, 0, 0, nullptr, nullptr};
              for (long b = 0; b < blocks; b++) {
                if (blocked) {
                  t.begin = cuts + b * some, t.end = t.begin + some, t.range = b + 1 < blocks ? Range() : range;
                  if (b) t.start = t.out, t.start_step = t.step, t.start_row = t.out_row, t.start_place = VL;
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
                     y + ((n * Ho + oh + i / width) * Wo + left + i % width) * O + o + k, Ho * Wo * O, some);
        else if (size == Ho * Wo) unpack(out, VL, count * size, y + (n * O + o) * size, O * size, some);
        else
          for (long k = 0; k < count; k++)
            for (long r = 0; r < (width == Wo ? 1 : height); r++)
              unpack(out + (k * size + r * width) * VL, VL, width == Wo ? size : width,
                     y + ((n * O + o + k) * Ho + oh + r) * Wo + left, O * Ho * Wo, some);
      }
    }
  };
  auto some_blocks = [&](long begin, long end, long team) {
    float* packed = scratch[0].floats(C * (least(H, window * reach + 3) * least(W, across * reach + 3) * VL + pad));
    if (no_memory) return;
    for (long n = begin * VL; n < least(N, end * VL); n += VL)
      for (long top = 0; top < Ho; top += window)
        for (long left = 0; left < Wo; left += across) {
          const Source from = source(top, left);
          parallel(x_last ? from.height * from.width : C, team,
                   [&](long begin, long end) { pack_part(n, top, left, begin, end, packed); });
          parallel(O, team, [&](long begin, long end) { outputs(n, top, left, begin, end, packed); });
        }
  };
  in_large_pages(y, N * O * Ho * Wo);
  const long teams = parts(N, VL);
  if (teams >= threads) parallel(teams, threads, [&](long begin, long end) { some_blocks(begin, end, 1); });
  else some_blocks(0, teams, threads);  // threads share a block's outputs: it is packed once for all of them
}

// ---- 3x3, lanes = pixels of a row

// A sample to scratch of zeros. A row there: a zero, the pixels, and a zero at least, `half` floats in all. With stride
// 2 the odd columns after the zero and then, from `half` on, the even ones, so that each tap reads places side by side.
// A row of zeros above and below.
template <int S>
void to_rows(const float* sample, bool last, long C, long H, long W, float* packed, long half, long plane) {
  for (long h = 0; h < H; h++) {
    float* to = packed + (h + 1) * S * half;
    for (long s = 0; s < S; s++) {  // S == 2: s == 0 the odd columns
      const long first = S == 2 && s == 0, put = S == 1 || s == 0 ? 1 : half, count = parts(W - first, S);
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
KERNEL void row_tile(const float* x, long plane, long row, const long* shift, const int32_t* from, const float* w,
                     long degree, const float* bias, const Range& range, float* y, long y_output, long y_row,
                     long height, long some) {
  constexpr int IR = span<S>(R);
  V sum[K][R];
  UNROLL for (int k = 0; k < K; k++) UNROLL for (int r = 0; r < R; r++) sum[k][r] = all(bias ? bias[k] : 0);
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
          if (hit<S>(r, a, R) >= 0) sum[k][hit<S>(r, a, R)] = fma(v, t[k][a], sum[k][hit<S>(r, a, R)]);
      }
    }
  }
  UNROLL for (int k = 0; k < K; k++) UNROLL for (int r = 0; r < R; r++)
    if (r < height) store_some(y + k * y_output + r * y_row, clamped(sum[k][r], range), some);
}

template <int S>
void any_rows(long K, long R, const float* x, long plane, long row, const long* shift, const int32_t* from,
              const float* w, long degree, const float* bias, const Range& range, float* y, long y_output, long y_row,
              long height, long some) {
#define ROWS(k, r) \
  row_tile<k, r, S>(x, plane, row, shift, from, w, degree, bias, range, y, y_output, y_row, height, some)
  if (K == 2) return R == 4 ? ROWS(2, 4) : ROWS(2, WIDE ? 7 : 4);
  if (R == 4) return ROWS(1, 4);
  if (R == 7) return ROWS(1, 7);
  return R == 8 ? ROWS(1, 8) : ROWS(1, WIDE && S == 1 ? 14 : 8);
#undef ROWS
}

template <int S>
void by_rows(const float* x, const Layer& a, const Edges& e, const float* bias, float* y) {
  const long H = a.H, W = a.W, C = a.C, O = a.O, Ho = (H - 1) / S + 1, Wo = (W - 1) / S + 1, vectors = parts(Wo, VL);
  const long K = e.share % 2 ? 1 : 2;
  long R = 4;  // the tallest tile that computes few rows for nothing
  for (long r : {7L, 8L, 14L}) {
    const bool there = K == 2 ? WIDE && r == 7 : r < 14 || (WIDE && S == 1);  // such a tile fits in the registers
    if (there && parts(Ho, r) * r <= parts(Ho, R) * R) R = r;
  }
  // No longer than they have to be, or fewer planes fit in L2: what the last vector reads of the next row is in lanes
  // that are not stored.
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
      const long o_begin = pairs * (unit % shares) / shares * K, o_end = pairs * (unit % shares + 1) / shares * K;
      memset(packed, 0, (C * plane + VL * VL) * sizeof(float));
      const float* sample = x + n * C * H * W;
      to_rows<S>(sample, a.x_last, C, H, W, packed, half, plane);
      for (long oh = 0; oh < Ho; oh += R)
        for (long o = o_begin; o < o_end; o += VL) {
          const long outputs = least(VL, o_end - o), rows_left = least(R, Ho - oh);
          for (long k = 0; k < outputs; k += K)
            for (long q = 0; q < vectors; q++) {
              float* to = a.y_last ? out + (k * R * vectors + q) * VL : y + ((n * O + o + k) * Ho + oh) * Wo + q * VL;
              any_rows<S>(K, R, packed + oh * S * row + q * VL, plane, row, shift, e.inputs(o + k), e.weights(o + k, 9),
                          e.count(o + k), bias ? bias + o + k : nullptr, range(a), to,
                          a.y_last ? R * vectors * VL : Ho * Wo, a.y_last ? vectors * VL : Wo, rows_left,
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

// ---- panels: columns m = sample * pixels + pixel, [channels][P * VL]

// Copies columns [m, m + n) of an activation [N][C][pixels] (or [N][pixels][C]) to a panel of `width` columns.
void to_panel(const float* x, bool last, long C, long pixels, long m, long n, float* panel, long width) {
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

// Asks for channels [c, end) of what to_panel reads, or from_panel writes, next. (Inline: GCC leaves out calls that do
// nothing but ask.)
template <bool WRITE>
INLINE void ask_for(const float* x, bool last, long C, long pixels, long m, long n, long c, long end) {
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
void from_panel(const float* panel, long width, float* y, bool last, long O, long o, long outputs, long pixels, long m,
                long n) {
  if (last || pixels == 1) {
    for (long i = 0; i < n; i += VL) unpack(panel + i, width, outputs, y + (m + i) * O + o, O, least(VL, n - i));
    return;
  }
  for (long i = 0, length; i < n; i += length) {
    const long sample = (m + i) / pixels, pixel = (m + i) % pixels;
    length = least(n - i, pixels - pixel);
    for (long k = 0; k < outputs; k++) copy(y + (sample * O + o + k) * pixels + pixel, panel + k * width + i, length);
  }
}

const long L1 = 40960 / 4;  // floats of a block of rows of a panel that stays in the first level of cache

// The most vectors of the choices, largest first, that leave few lanes of the last panel empty.
long panel_vectors(long columns, std::initializer_list<long> choices) {
  const long vectors = parts(columns, VL);
  for (long p : choices)
    if (parts(vectors, p) * p * 8 <= vectors * 9) return p;
  return 1;
}

// ---- 3x3 of stride 1, few samples and small planes: lanes = pixels of a plane, row after row

// P vectors of pixels of one output. x: three copies of each input's plane, copy b a column further than the last; the
// next row's pixels are `row` floats away. SUMS of each vector side by side, because one waits for itself.
template <int P, int SUMS>
KERNEL void plane_tile(const float* x, long plane, long copied, long row, const int32_t* from, const float* w,
                       long degree, float bias, const Range& range, float* y) {
  V sum[SUMS][P];
  UNROLL for (int i = 0; i < SUMS; i++) UNROLL for (int p = 0; p < P; p++) sum[i][p] = all(i ? 0 : bias);
  for (long j = 0; j < degree; j++, w += 9) {
    const float* in = x + from[j] * plane;
    UNROLL for (int b = 0; b < 3; b++, in += copied) {
#if defined(__AVX512F__)
      if (P == 1 && SUMS == 9) {  // 4x4: whole planes, the rows moved by lanes instead of loads across cache lines
        __m512i middle = _mm512_castps_si512(held(in)), zero = _mm512_setzero_si512();
        sum[b][0] = fma(_mm512_castsi512_ps(_mm512_alignr_epi32(middle, zero, 12)), all(w[b]), sum[b][0]);
        sum[3 % SUMS + b][0] = fma(_mm512_castsi512_ps(middle), all(w[3 + b]), sum[3 % SUMS + b][0]);
        sum[6 % SUMS + b][0] =
            fma(_mm512_castsi512_ps(_mm512_alignr_epi32(zero, middle, 4)), all(w[6 + b]), sum[6 % SUMS + b][0]);
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
  UNROLL for (int i = 1; i < SUMS; i++) UNROLL for (int p = 0; p < P; p++) sum[0][p] = sum[0][p] + sum[i][p];
  UNROLL for (int p = 0; p < P; p++) store(y + p * VL, clamped(sum[0][p], range));
}

#if defined(__AVX512F__)
// 2x2: lane 4 * q + i holds the product for pixel q of an input's pixel i, and every lane counts. x: planes of 4.
KERNEL void four_pixels(const float* x, const int32_t* from, const float* w, long degree, float bias,
                        const Range& range, float* y) {
  const __m512i tap = _mm512_setr_epi32(4, 5, 7, 8, 3, 4, 6, 7, 1, 2, 4, 5, 0, 1, 3, 4);
  V sum[4] = {all(0), all(0), all(0), all(0)};
#define PIXELS(j, s)                                                                                     \
  s = fma(_mm512_permutexvar_ps(tap, _mm512_maskz_loadu_ps(0x1ff, w + (j) * 9)),                         \
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
// In products of vectors, nine taps of one sample. (Loads across cache lines are the slower half of the work.)
long plane_cost(long H, long W) { return is_two(H, W) ? 2 : is_four(H, W) ? 11 : (FAST ? 20 : 14) * parts(H * W, VL); }

void by_planes(const float* x, const Layer& a, const Edges& e, const float* bias, float* y) {
  const long W = a.W, pixels = a.H * W, vectors = parts(pixels, VL);
  const bool two = is_two(a.H, W), four = is_four(a.H, W);
  // A copy is the plane between rows of zeros, if rows are loaded one by one. Lanes past the plane are never stored.
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
        to_panel(x, a.x_last, a.C, pixels, n * pixels, pixels, packed + (two ? 0 : copied + edge), plane);
        for (long c = 0; !two && c < a.C; c++) {
          float *left = packed + c * plane + edge, *middle = left + copied, *right = middle + copied;
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
          else if (four) plane_tile<1, 9>(packed, plane, copied, 0, from, w, degree, b, range(a), to);
          else
#endif
            for (long i = 0, P; i < vectors; i += P, to += P * VL) {
              P = vectors - i >= 4 ? 4 : vectors - i >= 2 ? 2 : 1;
#define PLANE(p, sums) plane_tile<p, sums>(packed + i * VL, plane, copied, W, from, w, degree, b, range(a), to)
              P == 4 ? PLANE(4, WIDE ? 3 : 1) : P == 2 ? PLANE(2, 3) : PLANE(1, 3);
#undef PLANE
            }
        }
        from_panel(out, width, y, a.y_last, a.O, o, some, pixels, n * pixels, pixels);
      }
    }
  });
}

// ---- 3x3: the kernel that takes the fewest products of vectors for a weight's nine taps, or what they cost

long sample_cost(const Layer& a) { return (3 * a.H - 2) * (3 * a.W - 2) * parts(a.N, VL); }
long row_cost(const Layer& a) { return a.N * a.H * parts(a.W, VL) * 9; }

void stride_one(const float* x, const Layer& a, const Edges& e, const float* bias, float* y) {
  const long samples = sample_cost(a), rows = row_cost(a);
  if (a.N * plane_cost(a.H, a.W) < least(samples, rows)) by_planes(x, a, e, bias, y);
  else if (2 * a.N <= VL && rows < samples) by_rows<1>(x, a, e, bias, y);
  else by_samples<1>(x, e, bias, y, a.N, a.C, a.H, a.W, a.O, a.H, a.W, a.x_last, a.y_last, a.threads, range(a));
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
      for (long q = 0; q < Wo; q++, d += each) copy(to + (p * pixels + 2 * r * a.W + 2 * q) * each, d, each);
  return to;
}

// ---- 1x1 and linear

// Share of 2 and more: K outputs with the same inputs x P vectors of columns.
template <int K, int P>
KERNEL void block(const float* panel, const int32_t* from, long degree, const float* w, const float* bias,
                  const Range& range, float* y) {
  V sum[K][P];
  UNROLL for (int k = 0; k < K; k++) UNROLL for (int p = 0; p < P; p++) sum[k][p] = all(bias ? bias[k] : 0);
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

// Share 1, where each product loads its input: outputs one after another, for a block of inputs that stays in L1. A
// list goes on at `at`, as far as its inputs are below `end`: by blocks where it is in order, as graphs are made.
template <int P>
KERNEL void singles(const float* panel, const int32_t* from, const float* w, long degree, long outputs, bool first,
                    long end, int32_t* at, const float* bias, const Range* last, float* y) {
  for (long o = 0; o < outputs; o++, from += degree, w += degree, y += P * VL) {
    const long far = least(o + 4, outputs - 1) - o, next = far * degree + (first ? 0 : at[o + far]);
    for (long i = 0; i < 32; i += 16) __builtin_prefetch(from + next + i), __builtin_prefetch(w + next + i);
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
  const long pixels = a.H * a.W, columns = a.N * pixels, width = P * VL, panels = parts(columns, width);
  const long groups = a.O / a.share, shares = panels >= a.threads ? 1 : least(parts(a.threads, panels), groups);
  const long together = a.share == 1 ? groups : most(1, 64 / a.share);  // groups that are stored together
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
          singles<P>(panel, e.inputs(g), e.weights(g, 1), a.degree, some, c == 0, least(c + channels, a.C), at,
                     bias ? bias + g : nullptr, c + channels >= a.C ? &limits : nullptr, out);
        for (long i = 0; a.share > 1 && i < some; i++) {
          const long c = a.C * (g + i) / groups, c_end = a.C * (g + i + 1) / groups;
          ask_for<false>(x, a.x_last, a.C, pixels, m + width, soon, c, c_end);
          ask_for<true>(y, a.y_last, a.O, pixels, m, n, (g + i) * a.share, (g + i + 1) * a.share);
          for (long k = 0, K; k < a.share; k += K) {
            const long o = (g + i) * a.share + k;
            const float* b = bias ? bias + o : nullptr;
            float* to = out + (i * a.share + k) * width;
            K = a.share - k >= 4 && P <= (WIDE ? 6 : 3) ? 4 : a.share - k >= 2 ? 2 : 1;
            if (K == 4) block<4, (P <= 6 ? P : 1)>(panel, e.inputs(o), a.degree, e.weights(o, 1), b, limits, to);
            else if (K == 2) block<2, P>(panel, e.inputs(o), a.degree, e.weights(o, 1), b, limits, to);
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
KERNEL void edges(const float* outputs, const Entry* entries, const int32_t* at, long inputs, bool first, float* dx) {
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
void by_edges(const float* d, const Layer& a, const int32_t* neighbours, const float* weight, float* dx) {
  const long pixels = a.H * a.W, columns = a.N * pixels, width = P * VL, panels = parts(columns, width);
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
        if (fill) entries[at[from[j]]++] = {weight[o * a.degree + j], (int32_t)(o % outputs * width)};
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
      const long c_begin = a.C * (unit % shares) / shares, c_end = a.C * (unit % shares + 1) / shares;
      if (packed != m) to_panel(d, a.y_last, a.O, pixels, m, n, panel, width);
      packed = m;
      for (long b = 0; b < blocks; b++)
        edges<P>(panel + b * outputs * width, entries, first + b * row + c_begin, c_end - c_begin, b == 0,
                 out + c_begin * width);
      from_panel(out + c_begin * width, width, dx, a.x_last, a.C, c_begin, c_end - c_begin, pixels, m, n);
    }
  });
}

// ---- input gradients of 1x1 and linear, large shares: the gradients of K outputs with the same inputs stay in
// registers and are added to those inputs, a block of which stays in L1

template <int K, int P>
KERNEL void spread(const float* d, const int32_t* at, const int32_t* end, const float* w, long share, float* channels) {
  V g[K][P];
  UNROLL for (int k = 0; k < K; k++) UNROLL for (int p = 0; p < P; p++) g[k][p] = held(d + (k * P + p) * VL);
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
void by_groups(const float* d, const Layer& a, const int32_t* neighbours, const float* weight, float* dx) {
  const long pixels = a.H * a.W, columns = a.N * pixels, width = P * VL, panels = parts(columns, width);
  const long shares = panels >= a.threads ? 1 : least(parts(a.threads, panels), a.C), groups = a.O / a.share;
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
    for (long j = 0; j < a.degree; j++) first[(neighbours[g * a.degree + j] >> shift) * groups + g + 1]++;
  for (long i = 0; i < blocks * groups; i++) first[i + 1] += first[i];
  for (long g = 0; g < groups; g++) {
    for (long j = 0; j < a.degree; j++) {
      const long c = neighbours[g * a.degree + j], b = c >> shift;
      place[j] = first[b * groups + g]++;
      at[place[j]] = (int32_t)((c - (b << shift)) * width);
    }
    for (long k = 0; k < a.share; k++)
      for (long j = 0; j < a.degree; j++) w[place[j] * a.share + k] = weight[(g * a.share + k) * a.degree + j];
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

// The inputs of a list side by side. Eight at once: each store might otherwise be one to the next input.
void pick(const float* x, const int32_t* from, long n, float* to) {
  long i = 0;
  for (; i + 8 <= n; i += 8) {
    float v[8];
    UNROLL for (int k = 0; k < 8; k++) v[k] = x[from[i + k]];
    UNROLL for (int k = 0; k < 8; k++) to[i + k] = v[k];
  }
  for (; i < n; i++) to[i] = x[from[i]];
}

// The inputs of a group side by side once, then dense products of two rows, summed for VL outputs at a time.
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
          UNROLL for (int k = 0; k < 2; k++) two[k] = fma(load(w + j + k * VL), load(in + j + k * VL), two[k]);
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

// The gradient of the inputs: the sums over a group's outputs side by side, then each added to its input.
void inputs_by_dots(const float* d, const Layer& a, const int32_t* neighbours, const float* weight, float* dx) {
  const long groups = a.O / a.share, inputs = a.N * a.C;
  // The groups in pieces with sums of their own, as many whatever the threads, so that the bits stay the same.
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

// The gradient of the weights: the inputs of a group side by side once, times the gradient of each output.
void weights_by_dots(const float* x, const float* d, const Layer& a, const int32_t* neighbours, float* dw) {
  parallel(a.O / a.share, a.threads, [&](long begin, long end) {
    float* in = scratch[0].floats(a.N * a.degree + VL);
    if (no_memory) return;
    for (long g = begin; g < end; g++) {
      const int32_t* from = neighbours + g * a.degree;
      for (long n = 0; n < a.N; n++) pick(x + n * a.C, from, a.degree, in + n * a.degree);
      for (long o = g * a.share; o < (g + 1) * a.share; o++)
        for (long j = 0; j < a.degree; j += VL) {
          V sum = all(0);
          for (long n = 0; n < a.N; n++) sum = fma(load(in + n * a.degree + j), all(d[n * a.O + o]), sum);
          float* to = dw + o * a.degree + j;
          if (j + VL <= a.degree) store(to, sum);
          else store_some(to, sum, a.degree - j);
        }
    }
  });
}

// ---- gradients of weights: the activations packed side by side, then a sum for each weight

const long PACKED = 4 << 20;  // floats of both activations that are packed at a time, unless one step needs more

INLINE void add_sums(const V sum[9], float* dw) {
  UNROLL for (int i = 0; i < 9; i += VL) {
    const long some = least(VL, 9 - i);
    V r[VL];
    UNROLL for (int l = 0; l < VL; l++) r[l] = l < some ? sum[least(i + l, 8)] : all(0);
    store_some(dw + i, load_some(dw + i, some) + sums(r), some);
  }
}

// Sums of one row of an output's gradient with the rows of x above, at and below it, over columns [q0, q0 + Q).
template <int Q, int S>
INLINE void row_sums(const float* x, const float* d, long row, bool top, bool bottom, bool left, bool right, V sum[9]) {
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
KERNEL void weight_sums(const float* x, const float* d, long blocks, long H, long W, long Ho, long Wo, float* dw) {
  V sum[9];
  UNROLL for (int i = 0; i < 9; i++) sum[i] = all(0);
  for (long k = 0; k < blocks; k++, x += H * W * VL)
    for (long r = 0; r < Ho; r++, d += Wo * VL) {
      long q = 0;
#define SUMS(n)                                                                                                \
  row_sums<n, S>(x + ((r * S - 1) * W + q * S - 1) * VL, d + q * VL, W * VL, r == 0, r * S + 1 >= H, q == 0,         \
                 (q + n - 1) * S + 1 >= W, sum)
      for (; q + Q <= Wo; q += Q) SUMS(Q);
      if (Q > 2) for (; q + 2 <= Wo; q += 2) SUMS(2);
      for (; q < Wo; q++) SUMS(1);
#undef SUMS
    }
  add_sums(sum, dw);
}

// [samples][C][pixels] -> [C][blocks][pixels][VL] for the blocks of samples from n on; inputs are `plane` apart.
void pack_blocks(const float* x, bool last, long N, long C, long pixels, long n, long blocks, float* to, long plane,
                 long threads) {
  parallel(blocks * (last ? pixels : C), threads, [&](long begin, long end) {
    for (long unit = begin; unit < end; unit++) {
      const long k = unit % blocks, i = unit / blocks, first = n + k * VL, some = least(VL, N - first);
      const float* sample = x + first * C * pixels;
      if (last) pack(rows(sample + i * C, C * pixels, some), some, C, to + (k * pixels + i) * VL, plane);
      else pack(rows(sample + i * pixels, C * pixels, some), some, pixels, to + i * plane + k * pixels * VL, VL);
    }
  });
}

template <int S>
void weights3(const float* x, const float* d, const Layer& a, const int32_t* neighbours, float* dw) {
  const long Ho = (a.H - 1) / S + 1, Wo = (a.W - 1) / S + 1, pixels = a.H * a.W, d_pixels = Ho * Wo;
  const long each = (a.C * pixels + a.O * d_pixels) * VL, blocks = parts(a.N, VL);
  // FAST: what fits in L2, if that is work enough between two sums over lanes.
  const long fit = FAST ? most(PACKED / 8 / each, parts(64, d_pixels)) : PACKED / each;
  const long at_once = most(1, least(blocks, fit));
  const long pad = FAST ? VL : 0, plane = at_once * pixels * VL + pad, d_plane = at_once * d_pixels * VL + pad;
  float* xs = scratch[2].floats(a.C * plane);
  float* ds = scratch[3].floats(a.O * d_plane);
  // The weights by input: with stride 2 its plane is four times that of an output's gradient, and is read once.
  const long edges = a.O * a.degree;
  int32_t* next = (int32_t*)scratch[0].floats(a.C + 1 + edges);
  int32_t* order = next + a.C + 1;
  if (no_memory) return;
  memset(next, 0, (a.C + 1) * sizeof(int32_t));
  for (long i = 0; i < edges / a.share; i++) next[neighbours[i] + 1] += (int32_t)a.share;
  for (long c = 0; c < a.C; c++) next[c + 1] += next[c];
  for (long o = 0; o < a.O; o++)
    for (long j = 0; j < a.degree; j++) order[next[neighbours[o / a.share * a.degree + j]]++] = o * a.degree + j;
  for (long k = 0; k < blocks; k += at_once) {
    const long some = least(at_once, blocks - k);
    pack_blocks(x, a.x_last, a.N, a.C, pixels, k * VL, some, xs, plane, a.threads);
    pack_blocks(d, a.y_last, a.N, a.O, d_pixels, k * VL, some, ds, d_plane, a.threads);
    parallel(edges, a.threads, [&](long begin, long end) {
      for (long i = begin; i < end; i++) {
        const long e = order[i], o = e / a.degree, c = neighbours[o / a.share * a.degree + e % a.degree];
        const float* from = xs + c * plane;
        const float* grad = ds + o * d_plane;
        if (k == 0) memset(dw + e * 9, 0, 9 * sizeof(float));
        if (WIDE && Wo % 7 == 0) weight_sums<WIDE ? 7 : 4, S>(from, grad, some, a.H, a.W, Ho, Wo, dw + e * 9);
        else if (Wo >= 4) weight_sums<4, S>(from, grad, some, a.H, a.W, Ho, Wo, dw + e * 9);
        else weight_sums<2, S>(from, grad, some, a.H, a.W, Ho, Wo, dw + e * 9);
      }
    });
  }
}

// Few samples: lanes = pixels of a row. R rows of an output's gradient, a vector wide, with the rows of x around them;
// shift as at row_tile.
template <int R, int S>
INLINE void tall_sums(const float* x, long row, const long* shift, const float* d, long d_row, V sum[9]) {
  V g[R];
  UNROLL for (int r = 0; r < R; r++) g[r] = load(d + r * d_row);
  UNROLL for (int i = 0; i < span<S>(R); i++) UNROLL for (int b = 0; b < 3; b++) {
    V v = held(x + i * row + shift[b]);
    UNROLL for (int a = 0; a < 3; a++)
      if (hit<S>(i, a, R) >= 0) sum[a * 3 + b] = fma(v, g[hit<S>(i, a, R)], sum[a * 3 + b]);
  }
}

template <int R, int S>
KERNEL void weight_rows(const float* x, long x_sample, long row, const long* shift, const float* d, long d_sample,
                        long d_row, long samples, long Ho, long vectors, float* dw) {
  V sum[9];
  UNROLL for (int i = 0; i < 9; i++) sum[i] = all(0);
  for (long k = 0; k < samples; k++, x += x_sample, d += d_sample)
    for (long q = 0; q < vectors * VL; q += VL) {
      long r = 0;
      for (; r + R <= Ho; r += R) tall_sums<R, S>(x + r * S * row + q, row, shift, d + r * d_row + q, d_row, sum);
      for (; r + 2 <= Ho; r += 2) tall_sums<2, S>(x + r * S * row + q, row, shift, d + r * d_row + q, d_row, sum);
      for (; r < Ho; r++) tall_sums<1, S>(x + r * S * row + q, row, shift, d + r * d_row + q, d_row, sum);
    }
  add_sums(sum, dw);
}

template <int S>
void weights_by_rows(const float* x, const float* d, const Layer& a, const int32_t* neighbours, float* dw) {
  const long Ho = (a.H - 1) / S + 1, Wo = (a.W - 1) / S + 1, vectors = parts(Wo, VL), half = vectors * VL + 8;
  const long shift[3] = {0, S == 1 ? 1 : half, S == 1 ? 2 : 1};
  const long xs_each = a.C * (Ho * S + 2) * S * half, ds_each = a.O * (Ho + 2) * half, edges = a.O * a.degree;
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
          to_rows<1>(d + i * a.O * Ho * Wo, a.y_last, a.O, Ho, Wo, ds + k * ds_each, half, ds_each / a.O);
        else to_rows<S>(x + i * a.C * a.H * a.W, a.x_last, a.C, a.H, a.W, xs + k * xs_each, half, xs_each / a.C);
      }
    });
    parallel(edges, a.threads, [&](long begin, long end) {
      for (long e = begin; e < end; e++) {
        const float* from = xs + neighbours[e / a.degree / a.share * a.degree + e % a.degree] * (xs_each / a.C);
        const float* grad = ds + e / a.degree * (ds_each / a.O) + half + 1;
        const auto kernel = WIDE && Ho % 7 == 0 ? weight_rows<WIDE ? 7 : 4, S> : weight_rows<4, S>;
        kernel(from, xs_each, S * half, shift, grad, ds_each, half, some, Ho, vectors, dw + e * 9);
      }
    });
  }
}

// K outputs x J inputs, K * J <= VL, over `n` columns.
template <int K, int J>
KERNEL void products(const float* x, const float* d, const int32_t* from, long width, long n, float* dw, long degree) {
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
    UNROLL for (int j = 0; j + 4 <= J; j += 4) *(Four*)(dw + k * degree + j) += *(Four*)(total + k * J + j);
    if (J % 4) for (int j = 0; j < J; j++) dw[k * degree + j] += total[k * J + j];
  }
}

void weights1(const float* x, const float* d, const Layer& a, const int32_t* neighbours, float* dw) {
  const long pixels = a.H * a.W, columns = a.N * pixels, channels = a.C + a.O, edges = a.O * a.degree;
  // Panels of columns of which both activations fit in L2, 4 vectors at least: each weight's sum ends once a panel.
  const long fit = most(4, (WIDE ? 400 : 160) * 1024 / (channels * VL));
  const long width = least(fit, parts(columns, VL)) * VL, panels = parts(columns, width), groups = a.O / a.share;
  // Pieces of the panels have sums of their own, which are added in order: threads wait for each other once, not at
  // each panel, where with other work on the machine one or the other was always late (15 ms for 152).
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
      const long g_begin = groups * (unit % shares) / shares, g_end = groups * (unit % shares + 1) / shares;
      float* sums = piece ? later + (piece - 1) * edges : dw;
      memset(sums + g_begin * a.share * a.degree, 0, (g_end - g_begin) * a.share * a.degree * sizeof(float));
      for (long p = panels * piece / pieces; p < p_end; p++) {
        const long m = p * width, n = least(width, columns - m);
        if (n < width) memset(xs, 0, a.C * width * sizeof(float)), memset(ds, 0, a.O * width * sizeof(float));
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
#define PRODUCTS(K_, J_) (J = J_, products<K_, J_>(xs, ds + o * width, from, width, width, to, a.degree))
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
  const long adders = edges > 1 << 16 ? a.threads : 1;  // where it takes longer than waiting for a thread
  parallel(pieces > 1 ? edges : 0, adders, [&](long begin, long end) {
    for (long p = 0; p < pieces - 1; p++)
      for (long e = begin; e < end; e++) dw[e] += later[p * edges + e];
  });
}

// ---- what is asked of them, before any address is made of it

enum Answer { DONE, BAD_NEIGHBOUR, NO_MEMORY, BAD_SIZES };  // native.py's

// Sizes that are a layer's. None is divided by, or counted to, that was not looked at: edges and inputs are numbered in
// 32 bits, and 2^44 numbers leave room for every product of sizes in 64.
bool is_layer(const Layer& a) {
  const long limit = INT32_MAX;
  if (a.N < 0 || a.H < 0 || a.W < 0 || a.C < 1 || a.O < 1 || a.degree < 1 || a.share < 1 || a.threads < 1) return false;
  if (a.O % a.share || a.stride < 1 || a.stride > 2 || a.activation < 0 || a.activation > 2) return false;
  if (a.C > limit || a.O > limit || a.degree > limit / a.O) return false;
  return (double)a.N * (double)a.H * (double)a.W * (double)most(a.C, a.O) <= 0x1p44;
}

// An index out of range would read memory that is not the input's.
bool in_range(const Layer& a, const int32_t* neighbours) {
  uint32_t bad = 0;
  for (long i = 0; i < a.O / a.share * a.degree; i++) bad |= (uint32_t)neighbours[i] >= (uint32_t)a.C;
  return !bad;
}

Answer begun(const Layer& a, const int32_t* neighbours) {
  no_memory = false;
  if (!is_layer(a)) return BAD_SIZES;
  return in_range(a, neighbours) ? DONE : BAD_NEIGHBOUR;
}
Answer ended() { return no_memory ? NO_MEMORY : DONE; }

// No sample, or no pixel: no sum to make.
bool is_empty(const Layer& a) { return !a.N || !a.H || !a.W; }

}  // namespace

// ---- what native.py calls; each returns an Answer

extern "C" {

void xzoo_init(void* start_, void* thread_number_, void* thread_count_, void* inside_) {
  pthread_atfork(nullptr, nullptr, [] { forked = 1; });
  thread_number = (int (*)())thread_number_;
  thread_count = (int (*)())thread_count_;
  inside = (int (*)())inside_;
  start = (void (*)(void (*)(void*), void*, unsigned, unsigned))start_;
}

int xzoo_lanes() { return VL; }

int xzoo_fast() { return FAST; }

int xzoo_conv3(const Layer* a, const float* x, const float* w, const int32_t* neighbours, const float* bias, float* y) {
  if (Answer no = begun(*a, neighbours)) return no;
  if (is_empty(*a)) return DONE;
  const Edges e{neighbours, w, a->degree, a->share, nullptr};
  const long Ho = (a->H - 1) / 2 + 1, Wo = (a->W - 1) / 2 + 1;
  if (a->stride == 1) stride_one(x, *a, e, bias, y);
  else if (2 * a->N <= VL) by_rows<2>(x, *a, e, bias, y);
  else by_samples<2>(x, e, bias, y, a->N, a->C, a->H, a->W, a->O, Ho, Wo, a->x_last, a->y_last, a->threads, range(*a));
  return ended();
}

int xzoo_conv3_input_grad(const Layer* a, const float* d, const float* w, const int32_t* neighbours, float* dx) {
  if (Answer no = begun(*a, neighbours)) return no;
  if (is_empty(*a)) return DONE;
  const Layer t{a->N, a->O, a->H, a->W, a->C, 0, 1, 1, a->y_last, a->x_last, a->threads, 0};
  // Of stride 2, by_samples leaves out three of four products; the others multiply with zeros.
  const bool spread = a->stride == 2 && 4 * least(row_cost(t), a->N * plane_cost(a->H, a->W)) < sample_cost(t);
  const Edges e = transposed(*a, neighbours, w, a->stride == 1 || spread);
  const float* from = spread ? spread_out(d, *a) : d;
  if (no_memory) return NO_MEMORY;
  if (a->stride == 1 || spread) stride_one(from, t, e, nullptr, dx);
  else
    by_samples<-2>(d, e, nullptr, dx, a->N, a->O, (a->H - 1) / 2 + 1, (a->W - 1) / 2 + 1, a->C, a->H, a->W, a->y_last,
                   a->x_last, a->threads);
  return ended();
}

int xzoo_conv3_weight_grad(const Layer* a, const float* d, const float* x, const int32_t* neighbours, float* dw) {
  if (Answer no = begun(*a, neighbours)) return no;
  if (is_empty(*a)) return memset(dw, 0, a->O * a->degree * 9 * sizeof(float)), DONE;
  const Layer t{a->N, a->C, (a->H - 1) / a->stride + 1, (a->W - 1) / a->stride + 1};
  if (2 * a->N <= VL && row_cost(t) < sample_cost(t))
    a->stride == 1 ? weights_by_rows<1>(x, d, *a, neighbours, dw) : weights_by_rows<2>(x, d, *a, neighbours, dw);
  else a->stride == 1 ? weights3<1>(x, d, *a, neighbours, dw) : weights3<2>(x, d, *a, neighbours, dw);
  return ended();
}

int xzoo_point(const Layer* a, const float* x, const float* w, const int32_t* neighbours, const float* bias, float* y) {
  if (Answer no = begun(*a, neighbours)) return no;
  if (is_empty(*a)) return DONE;
  const Edges e{neighbours, w, a->degree, a->share, nullptr};
  const long columns = a->N * a->H * a->W;
  if (a->H * a->W == 1 && a->N <= FEW) by_dots(x, *a, e, bias, y);
  else if (a->share >= 4) {
    switch (panel_vectors(columns, {WIDE ? 5 : 3, 2})) {
      case 5: by_panels<5>(x, *a, e, bias, y); break;
      case 3: by_panels<3>(x, *a, e, bias, y); break;
      case 2: by_panels<2>(x, *a, e, bias, y); break;
      default: by_panels<1>(x, *a, e, bias, y);
    }
  } else {
    switch (panel_vectors(columns, {WIDE ? 7 : a->share == 1 ? 8 : 5, 4, 2})) {
      case 8: by_panels<8>(x, *a, e, bias, y); break;
      case 7: by_panels<7>(x, *a, e, bias, y); break;
      case 5: by_panels<5>(x, *a, e, bias, y); break;
      case 4: by_panels<4>(x, *a, e, bias, y); break;
      case 2: by_panels<2>(x, *a, e, bias, y); break;
      default: by_panels<1>(x, *a, e, bias, y);
    }
  }
  return ended();
}

int xzoo_point_input_grad(const Layer* a, const float* d, const float* w, const int32_t* neighbours, float* dx) {
  if (Answer no = begun(*a, neighbours)) return no;
  if (is_empty(*a)) return DONE;
  if (a->H * a->W == 1 && a->N <= FEW) {
    inputs_by_dots(d, *a, neighbours, w, dx);
    return ended();
  }
  const long columns = a->N * a->H * a->W;
  if (a->share < (WIDE ? 4 : 2)) {
    switch (panel_vectors(columns, {WIDE ? 7 : 8, 4, 2})) {
      case 8: by_edges<8>(d, *a, neighbours, w, dx); break;
      case 7: by_edges<7>(d, *a, neighbours, w, dx); break;
      case 4: by_edges<4>(d, *a, neighbours, w, dx); break;
      case 2: by_edges<2>(d, *a, neighbours, w, dx); break;
      default: by_edges<1>(d, *a, neighbours, w, dx);
    }
    return ended();
  }
  if (columns > 2 * VL) by_groups<WIDE ? 4 : 3>(d, *a, neighbours, w, dx);
  else if (columns > VL) by_groups<2>(d, *a, neighbours, w, dx);
  else by_groups<1>(d, *a, neighbours, w, dx);
  return ended();
}

int xzoo_point_weight_grad(const Layer* a, const float* d, const float* x, const int32_t* neighbours, float* dw) {
  if (Answer no = begun(*a, neighbours)) return no;
  if (is_empty(*a)) return memset(dw, 0, a->O * a->degree * sizeof(float)), DONE;
  if (a->H * a->W == 1 && a->N <= FEW) weights_by_dots(x, d, *a, neighbours, dw);
  else weights1(x, d, *a, neighbours, dw);
  return ended();
}
}
