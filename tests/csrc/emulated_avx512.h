// The AVX-512 intrinsics that csrc/vec_avx512.h uses, in plain C++: the same kernels, layouts and lane order run, and can be
// tested, on a CPU without them. Compile csrc/*.cpp with -DSTYLEATTN_EMULATE_AVX512 -Itests/csrc.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

namespace emulated {

typedef float F16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t I16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t U16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t H32 __attribute__((vector_size(64), aligned(2), may_alias));
typedef uint16_t H16 __attribute__((vector_size(32), aligned(2), may_alias));

template <class To, class From>
static inline To as(From x) {
  static_assert(sizeof(To) == sizeof(From), "a reinterpretation");
  To y;
  memcpy(&y, &x, sizeof y);
  return y;
}
template <class To>
static inline To load(const void* p) {
  To x;
  memcpy(&x, p, sizeof x);
  return x;
}

static inline float half_to_float(uint16_t h) {
  const int exponent = h >> 10 & 31;
  const float mantissa = float(h & 1023);
  const float magnitude = exponent == 31  ? (h & 1023 ? NAN : INFINITY)
                          : exponent == 0 ? ldexpf(mantissa, -24)
                                          : ldexpf(1024.0f + mantissa, exponent - 25);
  return h & 0x8000 ? -magnitude : magnitude;
}
static inline uint16_t float_to_half(float f) {
  const uint16_t sign = signbit(f) ? 0x8000 : 0;
  if (f != f) return sign | 0x7e00;
  f = fabsf(f);
  if (f >= 65520.0f) return sign | 0x7c00;
  int exponent;
  frexpf(f, &exponent);
  if (f < 6.103515625e-5f) exponent = -13;
  const int steps = int(nearbyintf(ldexpf(f, 11 - exponent)));  // in units of the last place
  return uint16_t(sign + ((exponent + 13) << 10) + steps);
}
static inline uint16_t float_to_bf16(float f) {  // subnormal numbers become zeros, as in vcvtneps2bf16
  uint32_t u = as<uint32_t>(f);
  if (f != f) return uint16_t(u >> 16 | 64);
  if (fabsf(f) < 1.17549435e-38f) return uint16_t(u >> 16 & 0x8000);
  return uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

}  // namespace emulated

typedef emulated::F16 __m512;
typedef emulated::I16 __m512i;
typedef emulated::H32 __m512bh;
typedef emulated::H16 __m256i;
typedef uint16_t __mmask16;
#define EMULATED static inline __attribute__((always_inline))
#define _MM_FROUND_TO_NEAREST_INT 0
#define _MM_FROUND_NO_EXC 8
#define _MM_FROUND_TO_NEG_INF 1
#define _CMP_UNORD_Q 3
#define _CMP_NLT_UQ 5

EMULATED __m512 _mm512_set1_ps(float x) { return __m512{} + x; }
EMULATED __m512 _mm512_loadu_ps(const void* p) { return emulated::load<__m512>(p); }
EMULATED void _mm512_storeu_ps(void* p, __m512 x) { memcpy(p, &x, sizeof x); }
EMULATED __m512 _mm512_add_ps(__m512 a, __m512 b) { return a + b; }
EMULATED __m512 _mm512_sub_ps(__m512 a, __m512 b) { return a - b; }
EMULATED __m512 _mm512_mul_ps(__m512 a, __m512 b) { return a * b; }
EMULATED __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) { return a * b + c; }
EMULATED __m512 _mm512_max_ps(__m512 a, __m512 b) { return a > b ? a : b; }
EMULATED __m512 _mm512_reduce_ps(__m512 x, int) {  // what rounding down leaves
  for (int i = 0; i < 16; ++i) x[i] -= floorf(x[i]);
  return x;
}
EMULATED float _mm512_reduce_add_ps(__m512 x) {
  float sum = 0.0f;
  for (int i = 0; i < 16; ++i) sum += x[i];
  return sum;
}
EMULATED float _mm512_reduce_max_ps(__m512 x) {
  float top = x[0];
  for (int i = 1; i < 16; ++i) top = !(x[i] <= top) ? x[i] : top;
  return top;
}
EMULATED __m512i _mm512_set1_epi32(int32_t x) { return __m512i{} + x; }
EMULATED __m512i _mm512_loadu_si512(const void* p) { return emulated::load<__m512i>(p); }
EMULATED __m512i _mm512_add_epi32(__m512i a, __m512i b) { return (__m512i)((emulated::U16)a + (emulated::U16)b); }
EMULATED __m512i _mm512_and_si512(__m512i a, __m512i b) { return a & b; }
EMULATED __m512i _mm512_or_si512(__m512i a, __m512i b) { return a | b; }
EMULATED __m512i _mm512_slli_epi32(__m512i x, int n) { return (__m512i)((emulated::U16)x << n); }
EMULATED __m512i _mm512_srli_epi32(__m512i x, int n) { return (__m512i)((emulated::U16)x >> n); }
EMULATED __m512i _mm512_castps_si512(__m512 x) { return (__m512i)x; }
EMULATED __m512 _mm512_castsi512_ps(__m512i x) { return (__m512)x; }
EMULATED __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int what) {
  __mmask16 mask = 0;
  for (int i = 0; i < 16; ++i) {
    const bool unordered = a[i] != a[i] || b[i] != b[i];
    mask |= uint16_t((what == _CMP_UNORD_Q ? unordered : !(a[i] < b[i])) << i);
  }
  return mask;
}
EMULATED __m512 _mm512_maskz_scalef_ps(__mmask16 mask, __m512 a, __m512 b) {
  for (int i = 0; i < 16; ++i) a[i] = mask >> i & 1 ? (b[i] == b[i] ? ldexpf(a[i], int(floorf(b[i]))) : b[i]) : 0.0f;
  return a;
}
EMULATED __m512i _mm512_mask_blend_epi32(__mmask16 mask, __m512i a, __m512i b) {
  for (int i = 0; i < 16; ++i) a[i] = mask >> i & 1 ? b[i] : a[i];
  return a;
}
EMULATED __m256i _mm256_loadu_si256(const void* p) { return emulated::load<__m256i>(p); }
EMULATED void _mm256_storeu_si256(void* p, __m256i x) { memcpy(p, &x, sizeof x); }
EMULATED __m512i _mm512_cvtepu16_epi32(__m256i x) { return __builtin_convertvector(x, __m512i); }
EMULATED __m256i _mm512_cvtepi32_epi16(__m512i x) { return __builtin_convertvector((emulated::U16)x, __m256i); }
EMULATED __m512 _mm512_cvtph_ps(__m256i x) {
  __m512 y;
  for (int i = 0; i < 16; ++i) y[i] = emulated::half_to_float(x[i]);
  return y;
}
EMULATED __m256i _mm512_cvtps_ph(__m512 x, int) {
  __m256i y;
  for (int i = 0; i < 16; ++i) y[i] = emulated::float_to_half(x[i]);
  return y;
}
EMULATED __m256i _mm512_cvtneps_pbh(__m512 x) {
  __m256i y;
  for (int i = 0; i < 16; ++i) y[i] = emulated::float_to_bf16(x[i]);
  return y;
}
EMULATED __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  const emulated::U16 x = (emulated::U16)a, y = (emulated::U16)b;
  const emulated::U16 high = emulated::U16{} + 0xffff0000u;
  sum += (__m512)(x & high) * (__m512)(y & high);
  return sum + (__m512)(x << 16) * (__m512)(y << 16);
}
#undef EMULATED
