// The vector layer for AVX2 + FMA + F16C: eight fp32 lanes.
#pragma once

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "target.h"

namespace styleattn {
namespace STYLEATTN_ISA {

struct Vec {
  typedef __m256 F;
  static constexpr int width = 8;
  static constexpr int tile_vectors = 2;                                     // widest micro-tile
  static constexpr int tile_rows(int vectors) { return vectors == 1 ? 12 : 6; }  // 12 accumulators, 16 registers
  static constexpr int row_multiple = 6;                                     // common divisor of tile_rows

  STYLEATTN_INLINE F set1(float x) { return _mm256_set1_ps(x); }
  STYLEATTN_INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
  STYLEATTN_INLINE void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  STYLEATTN_INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
  STYLEATTN_INLINE F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  STYLEATTN_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  STYLEATTN_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  STYLEATTN_INLINE F max(F a, F b) { return _mm256_max_ps(a, b); }  // b where either is NaN
  STYLEATTN_INLINE F floor(F x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
  STYLEATTN_INLINE F in_range(F x) { return max(set1(-127.0f), x); }  // what scale2 takes
  STYLEATTN_INLINE F fraction(F x) { return sub(x, floor(x)); }
  STYLEATTN_INLINE F scale2(F y, F x) {  // y * 2^floor(x) for -127 <= x <= 0, zero for x < -126
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(floor(x)), _mm256_set1_epi32(127));
    return _mm256_mul_ps(y, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
  }
  STYLEATTN_INLINE float reduce_add(F x) {
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
  }
  STYLEATTN_INLINE float reduce_max(F x) {
    __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_max_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
  }

  STYLEATTN_INLINE F load_bf16(const uint16_t* p) {
    const __m256i x = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
  }
  STYLEATTN_INLINE void store_bf16(uint16_t* p, F x) {
    const __m256i u = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    __m256i r = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd), 16);
    const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(64));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    r = _mm256_blendv_epi8(r, quiet, is_nan);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0x08);
    _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
  }
  STYLEATTN_INLINE F load_f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
  STYLEATTN_INLINE void store_f16(uint16_t* p, F x) {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }
};

// c += a * b with b [depth][width] and a broadcast.
struct DotSingle {
  typedef float Element;
  typedef Vec::F Operand;
  static constexpr int pair = 1;
  static constexpr int exp_degree = 5;
  STYLEATTN_INLINE Operand load(const Element* p) { return Vec::load(p); }
  STYLEATTN_INLINE Operand broadcast(const Element* p) { return _mm256_broadcast_ss(p); }
  STYLEATTN_INLINE Vec::F dot(Operand a, Operand b, Vec::F c) { return Vec::fma(a, b, c); }
  STYLEATTN_INLINE void store(Element* p, Vec::F x) { Vec::store(p, x); }
  STYLEATTN_INLINE Vec::F widen(const Element* p) { return Vec::load(p); }
};

}  // namespace STYLEATTN_ISA
}  // namespace styleattn
