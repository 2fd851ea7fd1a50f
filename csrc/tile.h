// The whole operation for one tile of query rows of one (batch row, head): every branch, every segment, one pass.
#pragma once

#include "gemm.h"
#include "pack.h"
#include "rows.h"

namespace styleattn {
namespace STYLEATTN_ISA {

template <class Dot>
struct Scratch {
  typedef typename Dot::Element Element;
  float *query, *other, *acc, *stash, *total;  // [TILE_ROWS, wide]
  float* scores;                               // [TILE_ROWS, BLOCK_KEYS]; the probabilities replace them in place
  float *max, *sum, *shrink, *bias, *stash_max, *stash_sum;  // [TILE_ROWS]
  Element* rounded;                            // [TILE_ROWS, wide]

  static int64_t bytes(int64_t wide) {
    return TILE_ROWS * (wide * (5 * sizeof(float) + sizeof(Element)) + (BLOCK_KEYS + 6) * sizeof(float));
  }

  Scratch(char* memory, int64_t wide) {
    float* next = (float*)memory;
    const auto take = [&next](int64_t n) {
      float* p = next;
      next += n;
      return p;
    };
    scores = take(TILE_ROWS * BLOCK_KEYS);
    query = take(TILE_ROWS * wide);
    other = take(TILE_ROWS * wide);
    acc = take(TILE_ROWS * wide);
    stash = take(TILE_ROWS * wide);
    total = take(TILE_ROWS * wide);
    max = take(TILE_ROWS);
    sum = take(TILE_ROWS);
    shrink = take(TILE_ROWS);
    bias = take(TILE_ROWS);
    stash_max = take(TILE_ROWS);
    stash_sum = take(TILE_ROWS);
    rounded = (Element*)next;
  }
};

template <class Dot>
struct Tile {
  typedef typename Dot::Element Element;
  const Call& call;
  const int64_t row, head, first, wide;
  const int rows, padded;  // query rows of this tile; the same rounded up for the micro-kernel
  Scratch<Dot> s;
  const Element* operand = nullptr;      // the query tile as the micro-kernel reads it
  const BranchCall* loaded = nullptr;    // the branch whose Q' is in s.query
  const float* rounded_scale = nullptr;  // what s.rounded was made with
  float rounded_sign = 0.0f;
  bool filled = false;                   // s.acc holds something; else it counts as zeros
  bool added = false;                    // s.total holds something; likewise
  Unit<Dot> unit;

  Tile(const Call& c, int64_t b, int64_t h, int64_t m, char* scratch)
      : call(c), row(b), head(h), first(m), wide(round_up(c.dim, Vec::width)),
        rows(int(c.length - m < TILE_ROWS ? c.length - m : TILE_ROWS)), padded(int(round_up(rows, Unit<Dot>::row_multiple))),
        s(scratch, wide) {}

  const float* channels(const float* p) const { return p ? p + (row * call.heads + head) * call.dim : nullptr; }

  void run() {
    for (int64_t g = 0; g < call.branch_count; ++g) branch(call.branches[g], g);
    if (!added) memset(s.total, 0, rows * wide * sizeof(float));
    const int64_t size = call.dtype == Dtype::f32 ? 4 : 2;
    char* out = (char*)call.out + (((row * call.length + first) * call.heads + head) * call.dim) * size;
    for (int i = 0; i < rows; ++i) {
      store_row(call.dtype, out + i * call.heads * call.dim * size, call.dim, s.total + i * wide);
    }
  }

  void branch(const BranchCall& b, int64_t g) {
    load_query(b);
    const float nulls = float(b.null_keys);
    for (int i = 0; i < rows; ++i) {
      s.max[i] = b.null_keys ? 0.0f : -INFINITY;
      s.sum[i] = nulls;
    }
    filled = false;
    bool fresh = b.null_keys == 0;
    for (int64_t i = 0; i < b.segment_count; ++i) {
      const SegmentCall& segment = b.segments[i];
      const int64_t slot = segment.slots[row];
      if (slot < 0 || call.sources[segment.source].length == 0) continue;
      if (!prepare(b, segment, slot)) continue;
      const bool mapped = segment.value_affine.scale != nullptr && b.contributes;
      const bool stashed = mapped && !fresh;
      if (stashed) stash();
      attend(call.sources[segment.source], slot, b.contributes, number_at(segment.logit_scale, row, 0));
      if (mapped) map_values(segment.value_affine);
      if (stashed) unstash();
      fresh = false;
    }
    finish(b, g);
  }

  // Q' = gamma * Q_content + (1 - gamma) * (a * Q + b) in fp32; rows up to `padded` are zeros.
  void load_query(const BranchCall& b) {
    const bool plain = !b.content.data && !b.query_affine.scale;
    const bool same = loaded && plain && !loaded->content.data && !loaded->query_affine.scale &&
                      loaded->query.data == b.query.data && loaded->query.batch == b.query.batch &&
                      loaded->query.head == b.query.head && loaded->query.token == b.query.token;
    if (same) return;
    loaded = &b;
    rounded_sign = 0.0f;
    const float* scale = channels(b.query_affine.scale);
    const float* shift = channels(b.query_affine.shift);
    const float gamma = number_at(b.gamma, row, 0);
    for (int i = 0; i < rows; ++i) {
      if (i + AHEAD < rows) prefetch_row(call, b.query, row, head, first + i + AHEAD);
      float* q = s.query + i * wide;
      load_row(call.dtype, token_of(b.query, call.dtype, row, head, first + i), call.dim, q);
      if (scale) {
        for (int64_t d = 0; d < call.dim; ++d) q[d] = scale[d] * q[d] + shift[d];
      }
      if (!b.content.data) continue;
      float* content = s.other;
      load_row(call.dtype, token_of(b.content, call.dtype, row, head, first + i), call.dim, content);
      for (int64_t d = 0; d < call.dim; ++d) q[d] = gamma * content[d] + (1.0f - gamma) * q[d];
    }
    memset(s.query + rows * wide, 0, (padded - rows) * wide * sizeof(float));
  }

  // The operand tile q = round(sign * Q' * a_k) and the bias of every query row in log2 units:
  //   beta + sigma * alpha * (Q'.b_k + (Q' * a_k - sign * q).center), from the rounded q.
  // With a center near the keys, what rounding took from q multiplies only their distance from it.
  // False if no query of the tile sees the segment.
  bool prepare(const BranchCall& b, const SegmentCall& segment, int64_t slot) {
    const float alpha = number_at(segment.logit_scale, row, 0);
    const float factor = call.softmax_scale * alpha * LOG2E;
    const float sign = factor < 0.0f ? -1.0f : 1.0f;
    bool seen = false;
    for (int i = 0; i < rows; ++i) {
      s.bias[i] = bias_log2(number_at(segment.logit_bias, row, first + i));
      seen |= s.bias[i] != -INFINITY;
    }
    if (!seen) return false;
    const float* scale = channels(segment.key_affine.scale);
    round_query(scale, sign);
    const bool lossy = Dot::pair == 2 && (scale || b.query_affine.scale || b.content.data);
    const float* center = channels(segment.key_affine.center);
    if (lossy && !center) center = packed_center(call.sources[segment.source], slot);
    if (scale || lossy) add_row_terms(segment, scale, lossy ? center : nullptr, sign, factor);
    return true;
  }

  void round_query(const float* scale, float sign) {
    if (rounded_sign == sign && rounded_scale == scale) return;
    rounded_sign = sign;
    rounded_scale = scale;
    if (Dot::pair == 1 && !scale && sign > 0.0f) {
      operand = (const Element*)s.query;
      return;
    }
    operand = s.rounded;
    for (int i = 0; i < padded; ++i) {
      const float* q = s.query + i * wide;
      if (scale) {
        memset(s.other + call.dim, 0, (wide - call.dim) * sizeof(float));
        for (int64_t d = 0; d < call.dim; ++d) s.other[d] = sign * q[d] * scale[d];
        q = s.other;
      } else if (sign < 0.0f) {
        for (int64_t d = 0; d < wide; ++d) s.other[d] = -q[d];
        q = s.other;
      }
      convert_row<Dot>(q, wide, s.rounded + i * wide);
    }
  }

  const float* packed_center(const Source& source, int64_t slot) const {
    const int64_t at = slot * call.head_count + head - call.first_head;
    return (const float*)((const Element*)call.workspace + source.center_offset + at * source.center_stride);
  }

  void add_row_terms(const SegmentCall& segment, const float* scale, const float* center, float sign, float factor) {
    const float* shift = channels(segment.key_affine.shift);
    for (int i = 0; i < rows; ++i) {
      if (s.bias[i] == -INFINITY) continue;  // not seen, whatever the term
      const float* q = s.query + i * wide;
      for (int64_t d = 0; d < call.dim; ++d) s.other[d] = shift ? q[d] * shift[d] : 0.0f;
      if (center) {
        float* rounded = s.other + wide;
        for (int64_t d = 0; d < wide; d += Vec::width) Vec::store(rounded + d, Dot::widen(operand + i * wide + d));
        for (int64_t d = 0; d < call.dim; ++d) {
          s.other[d] += ((scale ? q[d] * scale[d] : q[d]) - sign * rounded[d]) * center[d];
        }
      }
      float term = 0.0f;
      for (int64_t d = 0; d < call.dim; ++d) term += s.other[d];
      s.bias[i] += factor * term;
      if (s.bias[i] == -INFINITY) s.bias[i] = NAN;  // an infinite query is not one that sees nothing
    }
  }

  void attend(const Source& source, int64_t slot, bool with_values, float alpha) {
    const int64_t depth = round_up(call.dim, Dot::pair) / Dot::pair;
    const int64_t at = slot * call.head_count + head - call.first_head;
    const Element* keys = (const Element*)call.workspace + source.key_offset + at * source.key_stride;
    const Element* values = (const Element*)call.workspace + source.value_offset + at * source.value_stride;
    const float factor = fabsf(call.softmax_scale * alpha) * LOG2E;
    for (int64_t block = 0; block < source.length; block += BLOCK_KEYS) {
      const int count = int(source.length - block < BLOCK_KEYS ? source.length - block : BLOCK_KEYS);
      const int vectors = (count + Vec::width - 1) / Vec::width;
      unit.gemm(operand, wide, padded, keys + block * depth * Dot::pair, int(depth), vectors, s.scores, BLOCK_KEYS, false);
      const float* bias = source.key_bias ? source.key_bias + slot * source.padded + block
                          : count % Vec::width ? source.tail_bias : nullptr;
      if (bias) soften<true>(vectors, factor, bias);
      else soften<false>(vectors, factor, nullptr);
      if (!with_values) continue;
      unit.gemm((const Element*)s.scores, BLOCK_KEYS * int64_t(sizeof(float) / sizeof(Element)), padded, values + block * wide,
                (count + Dot::pair - 1) / Dot::pair, int(wide / Vec::width), s.acc, wide, filled);
      filled = true;
    }
  }

  // The online softmax of one block: scores become probabilities in place (of the operand type); max, sum and acc follow.
  // Row after row waits for its own maximum; all maxima first, then all exponentials, do not.
  template <bool biased>
  void soften(int vectors, float factor, const float* bias) {
    for (int i = 0; i < rows; ++i) raise_max<biased>(i, vectors, factor, bias);
    for (int i = 0; i < rows; i += Vec::width) Vec::store(s.shrink + i, exp2_vec<5>(Vec::load(s.shrink + i)));
    for (int i = 0; i < rows; ++i) {
      if (filled && s.shrink[i] != 1.0f) {
        const Vec::F factors = Vec::set1(s.shrink[i]);
        float* acc = s.acc + i * wide;
        for (int64_t d = 0; d < wide; d += Vec::width) Vec::store(acc + d, Vec::mul(factors, Vec::load(acc + d)));
      }
    }
    for (int i = 0; i < rows; ++i) s.sum[i] = s.sum[i] * s.shrink[i] + exponentials<biased>(i, vectors, factor, bias);
  }

  // The maximum of row i with this block, and the exponent of what it makes of all that was summed before.
  template <bool biased>
  void raise_max(int i, int vectors, float factor, const float* bias) {
    const float* score = s.scores + i * BLOCK_KEYS;
    const Vec::F scale = Vec::set1(factor);
    Vec::F top = biased ? Vec::fma(Vec::load(score), scale, Vec::load(bias)) : Vec::load(score);
    for (int j = 1; j < vectors; ++j) {
      Vec::F x = Vec::load(score + j * Vec::width);
      if (biased) x = Vec::fma(x, scale, Vec::load(bias + j * Vec::width));
      top = Vec::max(top, x);
    }
    const float highest = (biased ? Vec::reduce_max(top) : Vec::reduce_max(top) * factor) + s.bias[i];
    const float before = s.max[i], now = s.bias[i] == -INFINITY || highest <= before ? before : highest;
    s.shrink[i] = now == before ? 0.0f : before - now;
    s.max[i] = now;
  }

  template <bool biased>
  float exponentials(int i, int vectors, float factor, const float* bias) {
    float* score = s.scores + i * BLOCK_KEYS;
    if (s.bias[i] == -INFINITY) {  // whatever the keys hold, this query does not see them
      memset(score, 0, vectors * Vec::width * sizeof(float));
      return 0.0f;
    }
    const Vec::F scale = Vec::set1(factor), offset = Vec::set1(s.bias[i] - (s.max[i] == -INFINITY ? 0.0f : s.max[i]));
    Vec::F total = Vec::set1(0.0f);
    Element* out = (Element*)score;
#pragma GCC unroll 1
    for (int j = 0; j < vectors; ++j) {
      Vec::F x = Vec::fma(Vec::load(score + j * Vec::width), scale, offset);
      if (biased) x = Vec::add(x, Vec::load(bias + j * Vec::width));
      x = exp2_vec<Dot::exp_degree>(x);
      total = Vec::add(total, x);
      Dot::store(out + j * Vec::width, x);
    }
    return Vec::reduce_add(total);
  }

  // A segment whose values are mapped is accumulated apart, in the frame of the running maximum.
  void stash() {
    if (filled) memcpy(s.stash, s.acc, rows * wide * sizeof(float));
    else memset(s.stash, 0, rows * wide * sizeof(float));
    memcpy(s.stash_max, s.max, rows * sizeof(float));
    memcpy(s.stash_sum, s.sum, rows * sizeof(float));
    filled = false;
    memset(s.sum, 0, rows * sizeof(float));
  }

  void unstash() {
    for (int i = 0; i < rows; ++i) {
      const float shrink = s.max[i] == s.stash_max[i] ? 1.0f : exp2f(s.stash_max[i] - s.max[i]);
      s.sum[i] += shrink * s.stash_sum[i];
      const Vec::F factors = Vec::set1(shrink);
      for (int64_t d = i * wide; d < (i + 1) * wide; d += Vec::width) {
        Vec::store(s.acc + d, Vec::fma(factors, Vec::load(s.stash + d), Vec::load(s.acc + d)));
      }
    }
  }

  // sum p (a * v + b) = a * (sum p v) + b * (sum p)
  void map_values(const AffineView& affine) {
    const float* scale = channels(affine.scale);
    const float* shift = channels(affine.shift);
    for (int i = 0; i < rows; ++i) {
      float* acc = s.acc + i * wide;
      for (int64_t d = 0; d < call.dim; ++d) acc[d] = scale[d] * acc[d] + shift[d] * s.sum[i];
    }
  }

  // total += weight * acc / sum, and the log-sum-exp of the branch. A query without keys adds nothing.
  void finish(const BranchCall& b, int64_t g) {
    if (!filled) memset(s.acc, 0, rows * wide * sizeof(float));
    float* lse = call.lse + ((g * call.batch + row) * call.heads + head) * call.length + first;
    for (int i = 0; i < rows; ++i) {
      lse[i] = (s.max[i] + log2f(s.sum[i])) * LN2;
      if (!b.contributes) continue;
      const bool empty = s.sum[i] == 0.0f;
      if (empty && added) continue;
      if (empty) memset(s.acc + i * wide, 0, wide * sizeof(float));
      const Vec::F share = Vec::set1(empty ? 0.0f : number_at(b.weight, row, first + i) / s.sum[i]);
      for (int64_t d = i * wide; d < (i + 1) * wide; d += Vec::width) {
        const Vec::F x = Vec::load(s.acc + d);
        Vec::store(s.total + d, added ? Vec::fma(share, x, Vec::load(s.total + d)) : Vec::mul(share, x));
      }
    }
    added |= b.contributes;
  }
};

}  // namespace STYLEATTN_ISA
}  // namespace styleattn
