// From a described call to its result: which keys and values to pack, in which memory, on which threads.
#pragma once

#include <vector>

#include "call.h"
#include "isa.h"

namespace styleattn {

// One segment of a described call. The pointers live in the tensors of the caller.
struct SegmentSpec {
  View key, value, own_key, own_value;  // own_key.data == nullptr: not blended
  std::vector<int64_t> rows;            // [B]; -1: removed
  int64_t length, key_rows;
  Number blend;
  const float* key_bias;                // [S] or [R, S] natural units, may be null
  int64_t key_bias_row, key_bias_key;   // its strides
  AffineView key_affine, value_affine;
  Number logit_scale, logit_bias;
};

struct BranchSpec {
  BranchCall call;  // without its segments
  std::vector<SegmentSpec> segments;
};

// Runs the call with one instruction set. `call` holds the shapes, the scale and the outputs; the rest is filled in here.
// Returns the number of (source, slot, head) packs that were made.
int64_t attend(const Isa& isa, Call call, const std::vector<BranchSpec>& branches);

void token_stats(const Isa& isa, const StatsCall& call);

}  // namespace styleattn
