// Rows of any input type to and from fp32 scratch, and where an operand of the call lies.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "call.h"

namespace styleattn {
namespace STYLEATTN_ISA {

constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;
constexpr float LARGEST = 3.4028234663852886e38f;

struct LoadSingle {
  typedef float Element;
  STYLEATTN_INLINE Vec::F load(const Element* p) { return Vec::load(p); }
  STYLEATTN_INLINE void store(Element* p, Vec::F x) { Vec::store(p, x); }
};
struct LoadHalf {
  typedef uint16_t Element;
  STYLEATTN_INLINE Vec::F load(const Element* p) { return Vec::load_f16(p); }
  STYLEATTN_INLINE void store(Element* p, Vec::F x) { Vec::store_f16(p, x); }
};
struct LoadBfloat {
  typedef uint16_t Element;
  STYLEATTN_INLINE Vec::F load(const Element* p) { return Vec::load_bf16(p); }
  STYLEATTN_INLINE void store(Element* p, Vec::F x) { Vec::store_bf16(p, x); }
};

// The first n < width elements, zeros after them.
template <class Load>
STYLEATTN_INLINE Vec::F load_part(const typename Load::Element* p, int n) {
  typename Load::Element part[Vec::width] = {};
  memcpy(part, p, n * sizeof(*p));
  return Load::load(part);
}

template <class Load>
STYLEATTN_INLINE void load_row_as(const typename Load::Element* p, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + Vec::width <= n; i += Vec::width) Vec::store(out + i, Load::load(p + i));
  if (i < n) Vec::store(out + i, load_part<Load>(p + i, int(n - i)));
}

// n elements to fp32, zero-filled to whole vectors.
static inline void load_row(Dtype dtype, const void* p, int64_t n, float* out) {
  switch (dtype) {
    case Dtype::f32: load_row_as<LoadSingle>((const float*)p, n, out); break;
    case Dtype::f16: load_row_as<LoadHalf>((const uint16_t*)p, n, out); break;
    case Dtype::bf16: load_row_as<LoadBfloat>((const uint16_t*)p, n, out); break;
  }
}

template <class Load>
STYLEATTN_INLINE void store_row_as(typename Load::Element* p, int64_t n, const float* x) {
  int64_t i = 0;
  for (; i + Vec::width <= n; i += Vec::width) Load::store(p + i, Vec::load(x + i));
  if (i < n) {
    typename Load::Element part[Vec::width];
    Load::store(part, Vec::load(x + i));
    memcpy(p + i, part, (n - i) * sizeof(*p));
  }
}

// n elements from fp32; x is readable to whole vectors.
static inline void store_row(Dtype dtype, void* p, int64_t n, const float* x) {
  switch (dtype) {
    case Dtype::f32: store_row_as<LoadSingle>((float*)p, n, x); break;
    case Dtype::f16: store_row_as<LoadHalf>((uint16_t*)p, n, x); break;
    case Dtype::bf16: store_row_as<LoadBfloat>((uint16_t*)p, n, x); break;
  }
}

STYLEATTN_INLINE const char* token_of(const View& view, Dtype dtype, int64_t row, int64_t head, int64_t token) {
  const int64_t size = dtype == Dtype::f32 ? 4 : 2;
  return (const char*)view.data + (row * view.batch + head * view.head + token * view.token) * size;
}

// Rows of one head are far apart: the hardware does not foresee the next one.
STYLEATTN_INLINE void prefetch_row(const Call& call, const View& view, int64_t row, int64_t head, int64_t token) {
  const char* p = token_of(view, call.dtype, row, head, token);
  const int64_t bytes = call.dim * (call.dtype == Dtype::f32 ? 4 : 2);
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(p + at);
}

STYLEATTN_INLINE float number_at(const Number& n, int64_t row, int64_t token) {
  return n.data ? n.data[row * n.batch + token * n.length] : n.value;
}

// A bias in log2 units: what is finite stays finite, and does not remove what it is added to.
STYLEATTN_INLINE float bias_log2(float x) {
  const float y = x * LOG2E;
  return fabsf(y) <= LARGEST || !(fabsf(x) <= LARGEST) ? y : copysignf(LARGEST, x);
}

STYLEATTN_INLINE int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

}  // namespace STYLEATTN_ISA
}  // namespace styleattn
