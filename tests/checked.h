// Before native.cpp under the address sanitizer: GCC checks no access that is an instruction of its own, so a plain one
// goes before each.
#if defined(__AVX2__)
#include <immintrin.h>
static void touch(const float* p, unsigned lanes) {
  for (int i = 0; lanes >> i; i++) if (lanes >> i & 1) (void)*(const volatile float*)(p + i);
}
#define LANES(mask) (unsigned)_mm256_movemask_ps(_mm256_castsi256_ps(mask))
#define _mm512_maskz_loadu_ps(mask, p) (touch(p, mask), _mm512_maskz_loadu_ps(mask, p))
#define _mm512_mask_storeu_ps(p, mask, v) (touch(p, mask), _mm512_mask_storeu_ps(p, mask, v))
#define _mm512_stream_ps(p, v) (touch(p, 0xffff), _mm512_stream_ps(p, v))
#define _mm256_maskload_ps(p, mask) (touch(p, LANES(mask)), _mm256_maskload_ps(p, mask))
#define _mm256_maskstore_ps(p, mask, v) (touch(p, LANES(mask)), _mm256_maskstore_ps(p, mask, v))
#define _mm256_stream_ps(p, v) (touch(p, 0xff), _mm256_stream_ps(p, v))
#endif
