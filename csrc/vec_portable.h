// The vector layer for any CPU: four fp32 lanes in the compiler's own vector type (SSE2, NEON, or plain scalars).
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "target.h"

namespace styleattn {
namespace STYLEATTN_ISA {

struct Vec {
  typedef float F __attribute__((vector_size(16)));
  typedef int32_t I __attribute__((vector_size(16)));
  typedef uint32_t U __attribute__((vector_size(16)));
  static constexpr int width = 4;
  static constexpr int tile_vectors = 2;                                    // widest micro-tile
  static constexpr int tile_rows(int vectors) { return vectors == 1 ? 8 : 4; }
  static constexpr int row_multiple = 4;                                    // common divisor of tile_rows

  STYLEATTN_INLINE F set1(float x) { return F{x, x, x, x}; }
  STYLEATTN_INLINE F load(const float* p) { F x; memcpy(&x, p, sizeof x); return x; }
  STYLEATTN_INLINE void store(float* p, F x) { memcpy(p, &x, sizeof x); }
  STYLEATTN_INLINE F add(F a, F b) { return a + b; }
  STYLEATTN_INLINE F sub(F a, F b) { return a - b; }
  STYLEATTN_INLINE F mul(F a, F b) { return a * b; }
  STYLEATTN_INLINE F fma(F a, F b, F c) { return a * b + c; }
  STYLEATTN_INLINE F max(F a, F b) {  // b where either is NaN, like maxps
    const I greater = a > b;
    return (F)(((I)a & greater) | ((I)b & ~greater));
  }
  STYLEATTN_INLINE F floor(F x) {  // for |x| < 2^22
    const F magic = set1(12582912.0f), near = (x + magic) - magic;
    return near - (F)((I)set1(1.0f) & (near > x));
  }
  STYLEATTN_INLINE F in_range(F x) { return max(set1(-127.0f), x); }  // what scale2 takes
  STYLEATTN_INLINE F fraction(F x) { return sub(x, floor(x)); }
  STYLEATTN_INLINE F scale2(F y, F x) {  // y * 2^floor(x) for -127 <= x <= 0, zero for x < -126
    const F magic = set1(12582912.0f);  // leaves the exponent in the low bits of the sum
    return y * (F)(((U)(floor(x) + magic) + 127u) << 23);
  }
  STYLEATTN_INLINE float reduce_add(F x) { return (x[0] + x[2]) + (x[1] + x[3]); }
  STYLEATTN_INLINE float reduce_max(F x) {
    float m = x[0];
    for (int i = 1; i < width; ++i) m = !(x[i] <= m) ? x[i] : m;
    return m;
  }

  STYLEATTN_INLINE F load_bf16(const uint16_t* p) {
    const U x = {p[0], p[1], p[2], p[3]};
    return (F)(x << 16);
  }
  STYLEATTN_INLINE void store_bf16(uint16_t* p, F x) {
    for (int i = 0; i < width; ++i) {
      uint32_t u;
      const float f = x[i];
      memcpy(&u, &f, sizeof u);
      p[i] = f != f ? uint16_t((u >> 16) | 64) : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
    }
  }
  STYLEATTN_INLINE float half_to_float(uint16_t h) {
    const uint32_t sign = uint32_t(h & 0x8000) << 16, body = h & 0x7fff;
    if (body < 0x400) {  // zero and subnormal: a whole multiple of 2^-24
      const float f = float(body) * 5.9604644775390625e-8f;
      return sign ? -f : f;
    }
    const uint32_t u = sign | (body >= 0x7c00 ? 0x7f800000u | (body & 0x3ff) << 13 : (body << 13) + (112u << 23));
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
  }
  STYLEATTN_INLINE uint16_t float_to_half(float f) {
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    const uint16_t sign = uint16_t(u >> 16 & 0x8000);
    u &= 0x7fffffff;
    if (u > 0x7f800000) return sign | 0x7e00;
    if (u >= 0x477ff000) return sign | 0x7c00;  // 65520 and above round to infinity
    if (u < 0x38800000) {                       // below the smallest normal: adding 0.5 rounds to a multiple of 2^-24
      float magnitude;
      memcpy(&magnitude, &u, sizeof magnitude);
      magnitude += 0.5f;
      uint32_t bits;
      memcpy(&bits, &magnitude, sizeof bits);
      return uint16_t(sign | (bits - 0x3f000000));
    }
    return uint16_t(sign | ((u + 0xfff + ((u >> 13) & 1) - (112u << 23)) >> 13));
  }
  STYLEATTN_INLINE F load_f16(const uint16_t* p) {
    return F{half_to_float(p[0]), half_to_float(p[1]), half_to_float(p[2]), half_to_float(p[3])};
  }
  STYLEATTN_INLINE void store_f16(uint16_t* p, F x) {
    for (int i = 0; i < width; ++i) p[i] = float_to_half(x[i]);
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

}  // namespace STYLEATTN_ISA
}  // namespace styleattn
