// Keys and values in the order in which the micro-kernel reads them: done once per (source, slot, head).
//
// keys:   per block of block_keys keys, per panel of the block's key vectors: [dim / pair][keys of the panel][pair]
// values: per block, per panel of the channel vectors: [keys of the block / pair][channels of the panel][pair]
#pragma once

#include "gemm.h"
#include "rows.h"

namespace styleattn {
namespace STYLEATTN_ISA {

constexpr int BLOCK_KEYS = 128;
constexpr int TILE_ROWS = 48;
constexpr int AHEAD = 8;  // rows that are asked for before they are read

// One row of keys or values of the call in fp32: lambda * x + (1 - lambda) * own where blended. out: [padded dim].
static void source_row(const Call& call, const Source& source, const View& view, const View& own, int64_t slot, int64_t head,
                       int64_t token, float* out, float* other) {
  load_row(call.dtype, token_of(view, call.dtype, source.key_rows[slot], head, token), call.dim, out);
  if (!own.data) return;
  load_row(call.dtype, token_of(own, call.dtype, source.own_rows[slot], head, token), call.dim, other);
  const Vec::F share = Vec::set1(source.blend[slot]), rest = Vec::set1(1.0f - source.blend[slot]);
  for (int64_t d = 0; d < call.dim; d += Vec::width) {
    const Vec::F own_part = Vec::mul(rest, Vec::load(other + d));
    Vec::store(out + d, Vec::fma(share, Vec::load(out + d), own_part));
  }
}

// Writes one converted row x[dim] as column `column` of panels that cut `vectors` vectors of keys.
template <class Dot>
static void scatter_key(const typename Dot::Element* x, int64_t depth, int vectors, int column, typename Dot::Element* block) {
  const Panels panels = cut(vectors);
  const int vector = column / Vec::width, wide_part = panels.wider * (panels.base + 1);
  int first, wide;
  if (vector < wide_part) {
    wide = panels.base + 1;
    first = vector / wide * wide;
  } else {
    wide = panels.base;
    first = wide_part + (vector - wide_part) / wide * wide;
  }
  const int64_t step = int64_t(wide) * Vec::width * Dot::pair;
  typename Dot::Element* out = block + first * Vec::width * depth * Dot::pair + (column - first * Vec::width) * Dot::pair;
  for (int64_t k = 0; k < depth; ++k) {
    memcpy(out + k * step, x + k * Dot::pair, sizeof(*x) * Dot::pair);
  }
}

// Writes one converted row x[padded dim] as row `key` of the block's value panels.
template <class Dot>
static void scatter_value(const typename Dot::Element* x, int64_t steps, int vectors, int key, typename Dot::Element* block) {
  const Panels panels = cut(vectors);
  for (int p = 0; p < panels.count; ++p) {
    const int width = (panels.base + (p < panels.wider ? 1 : 0)) * Vec::width;
    typename Dot::Element* out = block + int64_t(key / Dot::pair) * width * Dot::pair + key % Dot::pair;
    for (int d = 0; d < width; ++d) out[d * Dot::pair] = x[d];
    block += steps * width * Dot::pair;
    x += width;
  }
}

template <class Dot>
static void convert_row(const float* x, int64_t n, typename Dot::Element* out) {
  for (int64_t d = 0; d < n; d += Vec::width) Dot::store(out + d, Vec::load(x + d));
}

// Keys and values begin .. end - 1, and from the first of them the mean key (see Tile::add_row_terms); masked ones become
// zeros, so that whatever they hold (NaN too) cannot reach a result.
template <class Dot>
static void pack(const Call& call, const Source& source, int64_t slot, int64_t head, int64_t begin, int64_t end, char* scratch) {
  typedef typename Dot::Element Element;
  const int64_t wide = round_up(call.dim, Vec::width), depth = round_up(call.dim, Dot::pair) / Dot::pair;
  float* row = (float*)scratch;
  float* other = row + wide;
  Element* element = (Element*)(other + wide);
  const int64_t at = slot * call.head_count + head - call.first_head;
  Element* keys = (Element*)call.workspace + source.key_offset + at * source.key_stride;
  Element* values = (Element*)call.workspace + source.value_offset + at * source.value_stride;
  const float* bias = source.key_bias ? source.key_bias + slot * source.padded : nullptr;
  const bool centered = Dot::pair == 2 && begin == 0;
  float* center = (float*)((Element*)call.workspace + source.center_offset + at * source.center_stride);
  int seen = 0;
  if (centered) memset(center, 0, wide * sizeof(float));
  for (int64_t block = begin; block < end; block += BLOCK_KEYS) {
    const int count = int(source.length - block < BLOCK_KEYS ? source.length - block : BLOCK_KEYS);
    const int padded = int(round_up(count, Vec::width)), steps = int(round_up(count, Dot::pair) / Dot::pair);
    Element* key_block = keys + block * depth * Dot::pair;
    Element* value_block = values + block * wide;
    for (int j = 0; j < padded; ++j) {
      if (block + j + AHEAD < source.length) {
        prefetch_row(call, source.key, source.key_rows[slot], head, block + j + AHEAD);
        prefetch_row(call, source.value, source.key_rows[slot], head, block + j + AHEAD);
      }
      const bool live = j < count && !(bias && bias[block + j] == -INFINITY);
      if (live) source_row(call, source, source.key, source.own_key, slot, head, block + j, row, other);
      else memset(row, 0, wide * sizeof(float));
      if (centered && live) {
        for (int64_t d = 0; d < wide; d += Vec::width) Vec::store(center + d, Vec::add(Vec::load(center + d), Vec::load(row + d)));
        ++seen;
      }
      convert_row<Dot>(row, wide, element);
      scatter_key<Dot>(element, depth, padded / Vec::width, j, key_block);
      if (j >= steps * Dot::pair) continue;
      if (live) source_row(call, source, source.value, source.own_value, slot, head, block + j, row, other);
      convert_row<Dot>(row, wide, element);
      scatter_value<Dot>(element, steps, int(wide / Vec::width), j, value_block);
    }
  }
  if (centered && seen) {
    for (int64_t d = 0; d < call.dim; ++d) center[d] /= float(seen);
  }
}

}  // namespace STYLEATTN_ISA
}  // namespace styleattn
