// The micro-kernel on AMX tiles, with all the AMX intrinsics there are: 16 x 16 sums over 16 pairs of bf16 an instruction.
// Operands lie as for Dot::pair == 2 on vectors of 16 lanes: a tile of B is 16 columns of a panel, read row by row.
#pragma once

#ifdef STYLEATTN_EMULATE_AVX512
#include "emulated_amx.h"  // tests only
#else
#include <immintrin.h>
#endif
#include <stdint.h>

namespace styleattn {
namespace STYLEATTN_ISA {

struct DotTiles : DotBf16 {};

constexpr int TILE = 16;  // rows, columns and pairs of a whole tile
constexpr int TILE_BYTES = 64;

// What LDTILECFG reads.
struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes[16];  // of a row, per tile
  uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64, "the format of palette 1");

// Everything written so far is in memory, that at p too: the intrinsics of some compilers do not say that they read.
STYLEATTN_INLINE void written(const void* p) { __asm__ volatile("" : : "r"(p) : "memory"); }

// C[blocks * 16, 16] (+)= A * B. Tiles 0-2: C, 3 and 4: A in turn, 5: B; 6 and 7: A and B of the last pairs, which have
// only as many columns and rows as there are pairs: nothing is padded. ldb in bytes, all others in elements.
template <int blocks>
STYLEATTN_INLINE void amx_tile(const uint16_t* a, int64_t lda, const uint16_t* b, int64_t ldb, int depth, float* c, int64_t ldc,
                               bool accumulate) {
  const int64_t a_bytes = lda * 2, c_bytes = ldc * 4;
  if (accumulate) {
    _tile_loadd(0, c, c_bytes);
    if constexpr (blocks > 1) _tile_loadd(1, c + TILE * ldc, c_bytes);
    if constexpr (blocks > 2) _tile_loadd(2, c + 2 * TILE * ldc, c_bytes);
  } else {
    _tile_zero(0);
    if constexpr (blocks > 1) _tile_zero(1);
    if constexpr (blocks > 2) _tile_zero(2);
  }
  for (; depth >= TILE; depth -= TILE) {
    _tile_loadd(5, b, ldb);
    _tile_loadd(3, a, a_bytes);
    _tile_dpbf16ps(0, 3, 5);
    if constexpr (blocks > 1) {
      _tile_loadd(4, a + TILE * lda, a_bytes);
      _tile_dpbf16ps(1, 4, 5);
    }
    if constexpr (blocks > 2) {
      _tile_loadd(3, a + 2 * TILE * lda, a_bytes);
      _tile_dpbf16ps(2, 3, 5);
    }
    a += 2 * TILE;
    b += TILE * ldb / 2;
  }
  if (depth) {
    _tile_loadd(7, b, ldb);
    _tile_loadd(6, a, a_bytes);
    _tile_dpbf16ps(0, 6, 7);
    if constexpr (blocks > 1) {
      _tile_loadd(6, a + TILE * lda, a_bytes);
      _tile_dpbf16ps(1, 6, 7);
    }
    if constexpr (blocks > 2) {
      _tile_loadd(6, a + 2 * TILE * lda, a_bytes);
      _tile_dpbf16ps(2, 6, 7);
    }
  }
  _tile_stored(0, c, c_bytes);
  if constexpr (blocks > 1) _tile_stored(1, c + TILE * ldc, c_bytes);
  if constexpr (blocks > 2) _tile_stored(2, c + 2 * TILE * ldc, c_bytes);
}

// A panel of B for blocks * 16 rows of A, column after column.
template <int blocks>
__attribute__((noinline)) static void amx_panel(const uint16_t* a, int64_t lda, const uint16_t* b, int wide, int depth, float* c,
                                                int64_t ldc, bool accumulate) {
  for (int j = 0; j < wide; ++j) {
    amx_tile<blocks>(a, lda, b + j * 2 * TILE, wide * TILE_BYTES, depth, c + j * TILE, ldc, accumulate);
  }
}

// The tiles of this thread: configured at the first product of a task, whatever they held before, and released at its end.
template <>
struct Unit<DotTiles> {
  static constexpr int row_multiple = TILE;
  static_assert(TILE_ROWS == 3 * TILE && Vec::width == TILE, "a query tile is one, two or three blocks");

  Unit() = default;
  Unit(const Unit&) = delete;
  ~Unit() {
    if (tail_) _tile_release();
  }

  void gemm(const uint16_t* a, int64_t lda, int rows, const uint16_t* b, int depth, int vectors, float* c, int64_t ldc,
            bool accumulate) {
    if (!tail_ || (depth % TILE && depth % TILE != tail_)) configure(depth % TILE ? depth % TILE : TILE);
    written(c);
    const Panels panels = cut(vectors);
    for (int p = 0; p < panels.count; ++p) {
      const int wide = panels.base + (p < panels.wider ? 1 : 0);
      switch (rows / TILE) {
        case 1: amx_panel<1>(a, lda, b, wide, depth, c, ldc, accumulate); break;
        case 2: amx_panel<2>(a, lda, b, wide, depth, c, ldc, accumulate); break;
        default: amx_panel<3>(a, lda, b, wide, depth, c, ldc, accumulate); break;
      }
      b += int64_t(wide) * 2 * TILE * depth;
      c += wide * TILE;
    }
  }

 private:
  int tail_ = 0;  // pairs of tiles 6 and 7; 0: not configured

  void configure(int tail) {
    TileConfig config{};
    config.palette = 1;
    for (int i = 0; i < 8; ++i) {
      config.bytes[i] = uint16_t(i == 6 ? tail * 4 : TILE_BYTES);
      config.rows[i] = uint8_t(i == 7 ? tail : TILE);
    }
    written(&config);
    _tile_loadconfig(&config);
    tail_ = tail;
  }
};

}  // namespace STYLEATTN_ISA
}  // namespace styleattn
