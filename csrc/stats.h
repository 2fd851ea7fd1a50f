// Token statistics: mean and sqrt(unbiased variance + eps) per channel, in two passes, each summed in runs of 64 tokens.
#pragma once

#include "rows.h"

namespace styleattn {
namespace STYLEATTN_ISA {

constexpr int STATS_VECTORS = 4, STATS_RUN = 64;

// Sum over the tokens of (x - center) and of (x - center)^2 for `vectors` vectors of channels; the last one may be partial.
template <class Load>
static void moments(const typename Load::Element* x, int64_t length, int64_t stride, int vectors, int last, const Vec::F* center,
                    Vec::F* sum, Vec::F* square) {
  for (int v = 0; v < vectors; ++v) sum[v] = square[v] = Vec::set1(0.0f);
  for (int64_t begin = 0; begin < length; begin += STATS_RUN) {
    const int64_t end = begin + STATS_RUN < length ? begin + STATS_RUN : length;
    for (int v = 0; v < vectors; ++v) {
      const typename Load::Element* p = x + begin * stride + v * Vec::width;
      const bool whole = v + 1 < vectors || last == Vec::width;
      Vec::F run = Vec::set1(0.0f), run_square = Vec::set1(0.0f);
      for (int64_t t = begin; t < end; ++t, p += stride) {
        const Vec::F d = Vec::fma(center[v], Vec::set1(-1.0f), whole ? Load::load(p) : load_part<Load>(p, last));
        run = Vec::add(run, d);
        run_square = Vec::fma(d, d, run_square);
      }
      sum[v] = Vec::add(sum[v], run);
      square[v] = Vec::add(square[v], run_square);
    }
  }
}

template <class Load>
static void stats_as(const StatsCall& call, int64_t row, int64_t head) {
  typedef typename Load::Element Element;
  const Element* x = (const Element*)token_of(call.x, call.dtype, row, head, 0);
  const int64_t at = (row * call.heads + head) * call.dim;
  const float count = float(call.length), free = float(call.length > 1 ? call.length - 1 : 1);
  for (int64_t d = 0; d < call.dim; d += STATS_VECTORS * Vec::width) {
    const int64_t channels = call.dim - d < STATS_VECTORS * Vec::width ? call.dim - d : STATS_VECTORS * Vec::width;
    const int vectors = int((channels + Vec::width - 1) / Vec::width), last = int(channels - (vectors - 1) * Vec::width);
    Vec::F center[STATS_VECTORS], sum[STATS_VECTORS], square[STATS_VECTORS];
    for (int v = 0; v < vectors; ++v) {  // the first token as a provisional mean keeps the sums small
      center[v] = v + 1 < vectors || last == Vec::width ? Load::load(x + d + v * Vec::width)
                                                        : load_part<Load>(x + d + v * Vec::width, last);
    }
    moments<Load>(x + d, call.length, call.x.token, vectors, last, center, sum, square);
    for (int v = 0; v < vectors; ++v) center[v] = Vec::fma(sum[v], Vec::set1(1.0f / count), center[v]);
    moments<Load>(x + d, call.length, call.x.token, vectors, last, center, sum, square);
    float mean[STATS_VECTORS * Vec::width], rest[STATS_VECTORS * Vec::width], spread[STATS_VECTORS * Vec::width];
    for (int v = 0; v < vectors; ++v) {
      Vec::store(mean + v * Vec::width, center[v]);
      Vec::store(rest + v * Vec::width, sum[v]);
      Vec::store(spread + v * Vec::width, square[v]);
    }
    for (int64_t c = 0; c < channels; ++c) {  // `rest` is what rounding left in the mean
      const float variance = (spread[c] - rest[c] * (rest[c] / count)) / free;
      call.mean[at + d + c] = mean[c] + rest[c] / count;
      call.std[at + d + c] = sqrtf((variance > 0.0f || variance != variance ? variance : 0.0f) + call.eps);
    }
  }
}

static void stats(const StatsCall& call, int64_t row, int64_t head) {
  switch (call.dtype) {
    case Dtype::f32: stats_as<LoadSingle>(call, row, head); break;
    case Dtype::f16: stats_as<LoadHalf>(call, row, head); break;
    case Dtype::bf16: stats_as<LoadBfloat>(call, row, head); break;
  }
}

}  // namespace STYLEATTN_ISA
}  // namespace styleattn
