// The vector layer for AVX-512 (F, BW, VL, DQ), and the bf16 dot product of AVX512_BF16: sixteen fp32 lanes.
#pragma once

#ifdef STYLEATTN_EMULATE_AVX512
#include "emulated_avx512.h"  // tests only: the same intrinsics in plain C++, for CPUs without them
#else
#include <immintrin.h>
#endif
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "target.h"

namespace styleattn {
namespace STYLEATTN_ISA {

struct Vec {
  typedef __m512 F;
  static constexpr int width = 16;
  static constexpr int tile_vectors = 4;                                      // widest micro-tile
  static constexpr int tile_rows(int vectors) { return vectors <= 2 ? 12 : 6; }  // at most 24 accumulators, 32 registers
  static constexpr int row_multiple = 6;                                      // common divisor of tile_rows

  STYLEATTN_INLINE F set1(float x) { return _mm512_set1_ps(x); }
  STYLEATTN_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
  STYLEATTN_INLINE void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  STYLEATTN_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
  STYLEATTN_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  STYLEATTN_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  STYLEATTN_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  STYLEATTN_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }  // b where either is NaN
  STYLEATTN_INLINE F in_range(F x) { return x; }
  STYLEATTN_INLINE F fraction(F x) { return _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }  // x - floor(x)
  STYLEATTN_INLINE F scale2(F y, F x) {  // y * 2^floor(x), zero for x < -126
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, set1(-126.0f), _CMP_NLT_UQ), y, x);
  }
  STYLEATTN_INLINE float reduce_add(F x) { return _mm512_reduce_add_ps(x); }
  STYLEATTN_INLINE float reduce_max(F x) { return _mm512_reduce_max_ps(x); }

  STYLEATTN_INLINE F load_bf16(const uint16_t* p) {
    const __m512i x = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
  }
  STYLEATTN_INLINE void store_bf16(uint16_t* p, F x) {
    const __m512i u = _mm512_castps_si512(x);
    const __m512i high = _mm512_srli_epi32(u, 16);
    const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
    const __m512i r = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd), 16);
    const __m512i quiet = _mm512_or_si512(high, _mm512_set1_epi32(64));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_mask_blend_epi32(is_nan, r, quiet)));
  }
  STYLEATTN_INLINE F load_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
  STYLEATTN_INLINE void store_f16(uint16_t* p, F x) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }
};

// c += a * b with b [depth][width] and a broadcast.
struct DotSingle {
  typedef float Element;
  typedef Vec::F Operand;
  static constexpr int pair = 1;
  static constexpr int exp_degree = 5;
  STYLEATTN_INLINE Operand load(const Element* p) { return Vec::load(p); }
  STYLEATTN_INLINE Operand broadcast(const Element* p) { return Vec::set1(*p); }
  STYLEATTN_INLINE Vec::F dot(Operand a, Operand b, Vec::F c) { return Vec::fma(a, b, c); }
  STYLEATTN_INLINE void store(Element* p, Vec::F x) { Vec::store(p, x); }
  STYLEATTN_INLINE Vec::F widen(const Element* p) { return Vec::load(p); }
};

#ifdef STYLEATTN_BF16_DOT
// c += a[0] * b[0] + a[1] * b[1] with b [depth / 2][width][2] in bf16 and the pair a broadcast.
struct DotBf16 {
  typedef uint16_t Element;
  typedef __m512bh Operand;
  static constexpr int pair = 2;
  static constexpr int exp_degree = 4;  // 3e-6, far below the rounding of the probabilities
  STYLEATTN_INLINE Operand load(const Element* p) { return (__m512bh)_mm512_loadu_si512(p); }
  STYLEATTN_INLINE Operand broadcast(const Element* p) {
    int32_t both;
    memcpy(&both, p, sizeof both);
    return (__m512bh)_mm512_set1_epi32(both);
  }
  STYLEATTN_INLINE Vec::F dot(Operand a, Operand b, Vec::F c) { return _mm512_dpbf16_ps(c, a, b); }
  STYLEATTN_INLINE void store(Element* p, Vec::F x) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(x)); }
  STYLEATTN_INLINE Vec::F widen(const Element* p) { return Vec::load_bf16(p); }
};
#endif

}  // namespace STYLEATTN_ISA
}  // namespace styleattn
