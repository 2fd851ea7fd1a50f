// The AMX intrinsics that csrc/gemm_amx.h uses, in plain C++, after Intel's description of the instructions: what would be a
// fault there ends the program here, a use without configuration as well.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

namespace emulated {

struct Tiles {
  struct Shape {
    int rows, bytes;
  };
  int palette = 0;
  Shape shape[8] = {};
  uint8_t data[8][16][64] = {};
  int64_t products = 0;
};
inline thread_local Tiles tiles;  // every thread has its own

static inline void must(bool good, const char* what) {
  if (good) return;
  fprintf(stderr, "emulated AMX: %s\n", what);
  abort();
}

static inline Tiles::Shape shape_of(int tile) {
  must(tiles.palette == 1, "tiles are not configured");
  must(tiles.shape[tile].rows > 0, "this tile is not configured");
  return tiles.shape[tile];
}

// Whether every product of such numbers is exact, and no sum of products subnormal: then fused or not, the bits are the same.
static inline bool moderate(int tile) {
  for (int i = 0; i < tiles.shape[tile].rows; ++i) {
    for (int n = 0; n < tiles.shape[tile].bytes; n += 2) {
      uint16_t half;
      memcpy(&half, tiles.data[tile][i] + n, sizeof half);
      const int exponent = half >> 7 & 255;
      if ((half & 0x7fff) && (exponent < 77 || exponent > 177)) return false;
    }
  }
  return true;
}

// Subnormal numbers count as zeros and become zeros.
static inline float flushed(float x) { return fabsf(x) < 1.17549435e-38f ? copysignf(0.0f, x) : x; }
static inline float fma_flushed(float a, float b, float c) { return flushed(fmaf(a, b, c)); }
static inline float widened(const uint8_t* p) {
  uint16_t half;
  memcpy(&half, p, sizeof half);
  const uint32_t bits = uint32_t(half) << 16;
  float x;
  memcpy(&x, &bits, sizeof x);
  return flushed(x);
}

}  // namespace emulated

static inline void _tile_loadconfig(const void* p) {
  uint8_t config[64];
  memcpy(config, p, sizeof config);
  emulated::must(config[0] == 1 && config[1] == 0, "not palette 1 from its first row");
  for (int i = 2; i < 16; ++i) emulated::must(config[i] == 0, "reserved bytes are not zeros");
  for (int i = 32; i < 48; ++i) emulated::must(config[i] == 0, "there are eight tiles");
  for (int i = 56; i < 64; ++i) emulated::must(config[i] == 0, "there are eight tiles");
  for (int i = 0; i < 8; ++i) {
    const int bytes = config[16 + 2 * i] | config[17 + 2 * i] << 8, rows = config[48 + i];
    emulated::must(rows <= 16 && bytes <= 64 && (rows > 0) == (bytes > 0), "a tile has at most 16 rows of 64 bytes");
    emulated::tiles.shape[i] = {rows, bytes};
  }
  memset(emulated::tiles.data, 0, sizeof emulated::tiles.data);
  emulated::tiles.palette = 1;
}
static inline void _tile_release() {
  const int64_t products = emulated::tiles.products;
  emulated::tiles = emulated::Tiles{};
  emulated::tiles.products = products;
}
static inline void _tile_loadd(int tile, const void* p, int64_t stride) {
  const auto shape = emulated::shape_of(tile);
  memset(emulated::tiles.data[tile], 0, sizeof emulated::tiles.data[tile]);
  for (int i = 0; i < shape.rows; ++i) memcpy(emulated::tiles.data[tile][i], (const char*)p + i * stride, shape.bytes);
}
static inline void _tile_stored(int tile, void* p, int64_t stride) {
  const auto shape = emulated::shape_of(tile);
  for (int i = 0; i < shape.rows; ++i) memcpy((char*)p + i * stride, emulated::tiles.data[tile][i], shape.bytes);
}
static inline void _tile_zero(int tile) {
  emulated::shape_of(tile);
  memset(emulated::tiles.data[tile], 0, sizeof emulated::tiles.data[tile]);
}
// Products of the first of each pair and of the second are summed apart, from zero, then added to C.
static inline void _tile_dpbf16ps(int c, int a, int b) {
  const auto out = emulated::shape_of(c), left = emulated::shape_of(a), right = emulated::shape_of(b);
  emulated::must(a != b && a != c && b != c, "a tile is used twice");
  emulated::must(out.bytes % 4 == 0 && left.bytes % 4 == 0 && right.bytes % 4 == 0, "rows of tiles end within a pair");
  emulated::must(out.rows == left.rows && out.bytes == right.bytes && left.bytes == right.rows * 4, "shapes do not agree");
  const int columns = out.bytes / 4, pairs = right.rows;
  const bool exact = emulated::moderate(a) && emulated::moderate(b);
  float x[16][2], y[16][2][16];
  for (int k = 0; k < pairs; ++k) {
    for (int n = 0; n < 2 * columns; ++n) y[k][n % 2][n / 2] = emulated::widened(emulated::tiles.data[b][k] + 2 * n);
  }
  for (int m = 0; m < out.rows; ++m) {
    for (int k = 0; k < 2 * pairs; ++k) x[k / 2][k % 2] = emulated::widened(emulated::tiles.data[a][m] + 2 * k);
    float sums[16], products[2][16] = {};
    memcpy(sums, emulated::tiles.data[c][m], sizeof sums);
    for (int k = 0; k < pairs; ++k) {
      for (int i = 0; i < 2; ++i) {
        float* sum = products[i];
        const float factor = x[k][i], *row = y[k][i];
        if (exact) {
          for (int n = 0; n < columns; ++n) sum[n] = factor * row[n] + sum[n];
        } else {
          for (int n = 0; n < columns; ++n) sum[n] = emulated::fma_flushed(factor, row[n], sum[n]);
        }
      }
    }
    for (int n = 0; n < columns; ++n) {
      sums[n] = emulated::flushed(emulated::flushed(sums[n]) + emulated::flushed(products[0][n] + products[1][n]));
    }
    memcpy(emulated::tiles.data[c][m], sums, sizeof sums);
  }
  ++emulated::tiles.products;
}
