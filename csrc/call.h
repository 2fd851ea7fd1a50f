// The call as the kernels see it: plain data, no methods. Everything here is included by the ISA translation units, which
// are compiled for different instruction sets: nothing with external linkage may be defined in this file.
#pragma once

#include <stdint.h>

namespace styleattn {

enum class Dtype : int32_t { f32, f16, bf16 };

// [batch, head, token, channel] with a contiguous last dim; strides in elements.
struct View {
  const void* data;
  int64_t batch, head, token;
};

// A scalar (data == nullptr), [B] (length == 0) or [B, L].
struct Number {
  float value;
  const float* data;
  int64_t batch, length;
};

// [B, H, D] contiguous fp32; every pointer may be null.
struct AffineView {
  const float* scale;
  const float* shift;
  const float* center;
};

// Keys and values that are packed once and shared by every query row and every segment that reads them.
struct Source {
  View key, value, own_key, own_value;  // own_key.data != nullptr: blended, one slot per query row
  const int64_t* key_rows;              // per slot: the row of key/value
  const int64_t* own_rows;              // per slot: the row of own_key/own_value (blended only)
  const float* blend;                   // per slot: lambda (blended only)
  const float* key_bias;                // [slots, padded] in log2 units, -inf where masked or padded; null: no bias
  const float* tail_bias;               // [block_keys]: 0 for the keys of the last block, -inf for its padding
  int64_t length, padded, slots;        // padded: length rounded up to whole vectors
  int64_t key_offset, value_offset;     // into the workspace, in elements
  int64_t key_stride, value_stride;     // per (slot, head), in elements
  int64_t center_offset, center_stride; // a typical key, [dim] fp32; likewise in elements, only where operands are rounded
};

struct SegmentCall {
  int64_t source;
  const int64_t* slots;  // per query row: its slot, -1: the segment is removed for this row
  AffineView key_affine, value_affine;
  Number logit_scale, logit_bias;
};

struct BranchCall {
  View query, content;  // content.data == nullptr: no blend
  AffineView query_affine;
  Number gamma, weight;
  const SegmentCall* segments;
  int64_t segment_count, null_keys;
  bool contributes;  // false: the weight is exactly zero, only the LSE is wanted
};

struct Call {
  Dtype dtype;
  int64_t batch, heads, length, dim;
  float softmax_scale;
  const Source* sources;
  const BranchCall* branches;
  int64_t source_count, branch_count;
  void* out;   // [B, H, L, D] in memory order BLHD
  float* lse;  // [G, B, H, L]
  char* workspace;              // packed keys and values of heads first_head .. first_head + head_count - 1
  int64_t first_head, head_count;
};

// How a kernel wants its operands; see pack.h.
struct Layout {
  int32_t width;         // fp32 lanes of a vector
  int32_t pair;          // 2: neighbours along the reduction are interleaved (bf16 dot products), 1: they are not
  int32_t element_size;  // of a packed element
  int32_t block_keys;    // keys per block
  int32_t tile_rows;     // query rows per tile
};

struct StatsCall {
  Dtype dtype;
  View x;
  int64_t batch, heads, length, dim;
  float eps;
  float* mean;  // [B, H, D]
  float* std;
};

}  // namespace styleattn
