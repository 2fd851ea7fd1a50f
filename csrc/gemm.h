// The one micro-kernel on vectors: C[rows, vectors * width] (+)= A[rows, depth] * B, with A broadcast and B in packed panels.
#pragma once

namespace styleattn {
namespace STYLEATTN_ISA {

// 2^x for x <= 0 (a few ulp above is fine); 0 below 2^-126; NaN stays NaN. Minimax on [0, 1] with p(0) = 1.
template <int degree>
STYLEATTN_INLINE Vec::F exp2_vec(Vec::F x) {
  static_assert(degree == 4 || degree == 5, "no coefficients");
  x = Vec::in_range(x);
  const Vec::F f = Vec::fraction(x);
  Vec::F p;
  if (degree == 5) {
    p = Vec::fma(Vec::set1(0.00186713005f), f, Vec::set1(0.00901703071f));
    p = Vec::fma(p, f, Vec::set1(0.0557999127f));
    p = Vec::fma(p, f, Vec::set1(0.240164444f));
    p = Vec::fma(p, f, Vec::set1(0.693151295f));
  } else {
    p = Vec::fma(Vec::set1(0.0134266838f), f, Vec::set1(0.0522424728f));
    p = Vec::fma(p, f, Vec::set1(0.241280198f));
    p = Vec::fma(p, f, Vec::set1(0.693044841f));
  }
  return Vec::scale2(Vec::fma(p, f, Vec::set1(1.0f)), x);
}

// Vectors are cut into panels of nearly equal size, at most Vec::tile_vectors wide.
struct Panels {
  int count, base, wider;  // the first `wider` panels have base + 1 vectors
};

STYLEATTN_INLINE Panels cut(int vectors) {
  const int count = (vectors + Vec::tile_vectors - 1) / Vec::tile_vectors;
  return Panels{count, vectors / count, vectors % count};
}

// One micro-tile, summed from zero and then added to c: short chains of additions lose less than one long chain.
// a: [rows, depth * pair], lda in elements; b: [depth][vectors * width][pair]; c: [rows, ..], ldc.
template <class Dot, int vectors, int rows>
STYLEATTN_INLINE void micro_tile(const typename Dot::Element* a, int64_t lda, const typename Dot::Element* b, int depth,
                                 float* c, int64_t ldc, bool accumulate) {
  Vec::F sum[rows][vectors];
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < vectors; ++j) sum[i][j] = Vec::set1(0.0f);
  }
  for (int k = 0; k < depth; ++k) {
    typename Dot::Operand panel[vectors];
#pragma GCC unroll 16
    for (int j = 0; j < vectors; ++j) panel[j] = Dot::load(b + j * Vec::width * Dot::pair);
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
      const typename Dot::Operand x = Dot::broadcast(a + i * lda);
#pragma GCC unroll 16
      for (int j = 0; j < vectors; ++j) sum[i][j] = Dot::dot(x, panel[j], sum[i][j]);
    }
    a += Dot::pair;  // pointers, not an index: each row keeps one address register
    b += vectors * Vec::width * Dot::pair;
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < vectors; ++j) {
      float* at = c + i * ldc + j * Vec::width;
      Vec::store(at, accumulate ? Vec::add(Vec::load(at), sum[i][j]) : sum[i][j]);
    }
  }
}

template <class Dot, int vectors>
static void panel_rows(const typename Dot::Element* a, int64_t lda, int rows, const typename Dot::Element* b, int depth,
                       float* c, int64_t ldc, bool accumulate) {
  constexpr int step = Vec::tile_rows(vectors);
  int i = 0;
  for (; i + step <= rows; i += step) {
    micro_tile<Dot, vectors, step>(a + i * lda, lda, b, depth, c + i * ldc, ldc, accumulate);
  }
  if constexpr (step > Vec::row_multiple) {
    for (; i < rows; i += Vec::row_multiple) {
      micro_tile<Dot, vectors, Vec::row_multiple>(a + i * lda, lda, b, depth, c + i * ldc, ldc, accumulate);
    }
  }
}

// rows is a multiple of Vec::row_multiple; depth counts steps of Dot::pair.
template <class Dot>
static void gemm(const typename Dot::Element* a, int64_t lda, int rows, const typename Dot::Element* b, int depth, int vectors,
                 float* c, int64_t ldc, bool accumulate) {
  const Panels panels = cut(vectors);
  for (int p = 0; p < panels.count; ++p) {
    const int wide = panels.base + (p < panels.wider ? 1 : 0);
    switch (wide) {
      case 1: panel_rows<Dot, 1>(a, lda, rows, b, depth, c, ldc, accumulate); break;
      case 2: panel_rows<Dot, 2>(a, lda, rows, b, depth, c, ldc, accumulate); break;
      case 3:
        if constexpr (Vec::tile_vectors >= 3) panel_rows<Dot, 3>(a, lda, rows, b, depth, c, ldc, accumulate);
        break;
      default:
        if constexpr (Vec::tile_vectors >= 4) panel_rows<Dot, 4>(a, lda, rows, b, depth, c, ldc, accumulate);
        break;
    }
    b += int64_t(wide) * Vec::width * Dot::pair * depth;
    c += wide * Vec::width;
  }
}

// What multiplies for one query tile: the vector unit, unless gemm_amx.h says otherwise.
template <class Dot>
struct Unit {
  static constexpr int row_multiple = Vec::row_multiple;

  STYLEATTN_INLINE void gemm(const typename Dot::Element* a, int64_t lda, int rows, const typename Dot::Element* b, int depth,
                             int vectors, float* c, int64_t ldc, bool accumulate) {
    STYLEATTN_ISA::gemm<Dot>(a, lda, rows, b, depth, vectors, c, ldc, accumulate);
  }
};

}  // namespace STYLEATTN_ISA
}  // namespace styleattn
