// The kernels of one instruction set, assembled from its vector layer. Included once per ISA translation unit.
#pragma once

#include "isa.h"
#include "tile.h"

namespace styleattn {
namespace STYLEATTN_ISA {

template <class Dot>
static int64_t scratch_bytes(const Call& call) {
  return Scratch<Dot>::bytes(round_up(call.dim, Vec::width));
}

template <class Dot>
static void tile(const Call& call, int64_t row, int64_t head, int64_t first, char* scratch) {
  Tile<Dot>(call, row, head, first, scratch).run();
}

template <class Dot>
constexpr Kernels kernels() {
  return Kernels{{Vec::width, Dot::pair, int(sizeof(typename Dot::Element)), BLOCK_KEYS, TILE_ROWS},
                 scratch_bytes<Dot>, pack<Dot>, tile<Dot>};
}

}  // namespace STYLEATTN_ISA
}  // namespace styleattn
