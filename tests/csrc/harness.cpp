// The kernels without torch and Python, on memory of exactly the size they may touch: for sanitizers and valgrind.
// Compile with csrc/{drive,isa,isa_*}.cpp and -Itests/csrc/serial -Icsrc. Prints a checksum per case; exits with 1 where a
// result is not finite, instruction sets disagree, emulated tiles multiply more or less than they must or stay configured,
// or, with -DCOUNT_ALLOCATIONS, more tiles make more allocations.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "drive.h"
#ifdef STYLEATTN_EMULATE_AVX512
#include "emulated_amx.h"
#endif

using namespace styleattn;

static int64_t allocations = 0;
#ifdef COUNT_ALLOCATIONS  // by themselves: the tools have their own
void* operator new(size_t bytes) {
  ++allocations;
  if (void* p = std::malloc(bytes ? bytes : 1)) return p;
  throw std::bad_alloc();
}
void* operator new(size_t bytes, std::align_val_t align) {
  ++allocations;
  void* p = nullptr;
  if (posix_memalign(&p, size_t(align), bytes ? bytes : 1) == 0) return p;
  throw std::bad_alloc();
}
void operator delete(void* p) noexcept { std::free(p); }
void operator delete(void* p, size_t) noexcept { std::free(p); }
void operator delete(void* p, std::align_val_t) noexcept { std::free(p); }
void operator delete(void* p, size_t, std::align_val_t) noexcept { std::free(p); }
#endif

namespace {

int64_t made_by_attend = 0;  // allocations of the last call

uint32_t state = 1;
float draw() {  // uniform in [-1, 1)
  state = state * 1664525u + 1013904223u;
  return float(state >> 8) / 8388608.0f - 1.0f;
}

// Exactly sized heap memory, so that a tool sees every access beyond it.
struct Memory {
  std::vector<std::unique_ptr<char[]>> blocks;

  char* take(size_t bytes) {
    blocks.emplace_back(new char[bytes]);
    return blocks.back().get();
  }
  const float* floats(int64_t n) {
    float* p = reinterpret_cast<float*>(take(n * 4));
    for (int64_t i = 0; i < n; ++i) p[i] = draw();
    return p;
  }
  View feature(Dtype dtype, int64_t rows, int64_t heads, int64_t tokens, int64_t dim) {
    const int64_t n = rows * heads * tokens * dim;
    const View view{nullptr, heads * tokens * dim, tokens * dim, dim};
    View out = view;
    if (dtype == Dtype::f32) {
      out.data = floats(n);
      return out;
    }
    uint16_t* p = reinterpret_cast<uint16_t*>(take(n * 2));
    for (int64_t i = 0; i < n; ++i) {
      const float x = draw();
      uint32_t bits;
      memcpy(&bits, &x, 4);
      p[i] = dtype == Dtype::bf16 ? uint16_t(bits >> 16) : uint16_t((bits >> 16 & 0x8000) | (0x3000 + (bits >> 10 & 0x7ff)));
    }
    out.data = p;
    return out;
  }
};

Number plain(float x) { return Number{x, nullptr, 0, 0}; }

SegmentSpec segment(Memory& m, const Call& c, int64_t keys, int kind) {
  const int64_t channels = c.batch * c.heads * c.dim;
  SegmentSpec s{};
  s.key_rows = kind == 1 ? 1 : c.batch;
  s.length = keys;
  s.key = m.feature(c.dtype, s.key_rows, c.heads, keys, c.dim);
  s.value = m.feature(c.dtype, s.key_rows, c.heads, keys, c.dim);
  s.blend = plain(1.0f);
  s.logit_scale = plain(kind == 2 ? -0.5f : 1.0f);
  s.logit_bias = kind == 0 ? Number{0.0f, m.floats(c.batch * c.length), c.length, 1} : plain(0.25f);
  for (int64_t b = 0; b < c.batch; ++b) s.rows.push_back(kind == 1 ? (b ? 0 : -1) : b);
  if (kind == 0) {
    s.key_affine = AffineView{m.floats(channels), m.floats(channels), nullptr};
    s.value_affine = AffineView{m.floats(channels), m.floats(channels), nullptr};
  }
  if (kind == 1) {
    float* bias = reinterpret_cast<float*>(m.take(keys * 4));
    for (int64_t j = 0; j < keys; ++j) bias[j] = j % 3 == 2 ? -INFINITY : draw();
    s.key_bias = bias;
    s.key_bias_key = 1;
  }
  if (kind == 2) {
    s.own_key = m.feature(c.dtype, c.batch, c.heads, keys, c.dim);
    s.own_value = m.feature(c.dtype, c.batch, c.heads, keys, c.dim);
    s.blend = Number{0.0f, m.floats(c.batch), 1, 0};
  }
  return s;
}

double run(Dtype dtype, int64_t length, int64_t keys, int64_t dim, const Isa& isa) {
  state = 1;
  Memory m;
  Call c{};
  c.dtype = dtype;
  c.batch = 2;
  c.heads = 2;
  c.length = length;
  c.dim = dim;
  c.softmax_scale = 0.5f;
  std::vector<BranchSpec> branches(2);
  for (int g = 0; g < 2; ++g) {
    BranchCall& b = branches[g].call;
    b = BranchCall{};
    b.query = m.feature(dtype, c.batch, c.heads, length, dim);
    b.weight = plain(0.5f);
    b.contributes = true;
    b.null_keys = g;
    if (g) b.content = m.feature(dtype, c.batch, c.heads, length, dim);
    b.gamma = plain(0.3f);
    for (int kind = 0; kind < 3; ++kind) branches[g].segments.push_back(segment(m, c, keys + kind, kind));
  }
  const int64_t size = dtype == Dtype::f32 ? 4 : 2, tokens = c.batch * c.heads * length;
  c.out = m.take(tokens * dim * size);
  c.lse = reinterpret_cast<float*>(m.take(2 * tokens * 4));
  made_by_attend = -allocations;
  attend(isa, c, branches);
  made_by_attend += allocations;
  std::vector<float> mean(c.batch * c.heads * dim), std(mean.size());
  token_stats(isa, StatsCall{dtype, branches[0].call.query, c.batch, c.heads, length, dim, 1e-5f, mean.data(), std.data()});
  double sum = 0.0;
  for (int64_t i = 0; i < 2 * tokens; ++i) sum += c.lse[i];
  for (size_t i = 0; i < mean.size(); ++i) sum += mean[i] + std[i];
  for (int64_t i = 0; i < tokens * dim; ++i) {
    if (dtype == Dtype::f32) sum += static_cast<float*>(c.out)[i];
    else sum += static_cast<uint16_t*>(c.out)[i] & 0x7f80 ? 1e-6 : 0.0;  // every bit is looked at
  }
  return sum;
}

#ifdef STYLEATTN_EMULATE_AVX512
// AMX products of the last `run` that are one too many or too few, plus one where tiles stay configured.
int64_t wrong_tiles(Dtype dtype, int64_t length, int64_t keys, int64_t dim, const Isa& isa) {
  const auto tiles = [](int64_t n) { return (n + 15) / 16; };
  int64_t wanted = 0;
  for (const int kind : {0, 2, 0, 1, 2}) {  // the segments that the first and the second row see
    const int64_t count = keys + kind;
    for (int64_t at = 0; at < count; at += 128) {
      const int64_t seen = std::min<int64_t>(count - at, 128);
      wanted += tiles(seen) * tiles((dim + 1) / 2) + tiles(dim) * tiles((seen + 1) / 2);
    }
  }
  wanted *= 2 * 2 * (length / 48 * 3 + tiles(length % 48));  // branches, heads
  if (dtype != Dtype::bf16 || std::string(isa.name) != "amx_bf16") wanted = 0;
  const int64_t made = emulated::tiles.products;
  emulated::tiles.products = 0;
  return std::llabs(made - wanted) + emulated::tiles.palette;
}
#else
int64_t wrong_tiles(Dtype, int64_t, int64_t, int64_t, const Isa&) { return 0; }
#endif

}  // namespace

int main() {
  int64_t count = 0;
  const Isa* const* isas = usable_isas(&count);
  const int64_t shapes[][3] = {{1, 1, 1}, {7, 5, 8}, {13, 17, 33}, {50, 130, 40}};
  int failures = 0;
  for (const Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::f16}) {
    for (const auto& shape : shapes) {
      double first = 0.0;
      for (int64_t i = 0; i < count; ++i) {
        const double sum = run(dtype, shape[0], shape[1], shape[2], *isas[i]);
        if (i == 0) first = sum;
        const double tolerance = (dtype == Dtype::f32 ? 1e-4 : 2e-3) * (std::fabs(first) + double(shape[0]));
        const bool good = std::isfinite(sum) && std::fabs(sum - first) <= tolerance &&
                          wrong_tiles(dtype, shape[0], shape[1], shape[2], *isas[i]) == 0;
        failures += !good;
        std::printf("%s dtype %d L%ld S%ld D%ld: %.6f%s\n", isas[i]->name, int(dtype), long(shape[0]), long(shape[1]),
                    long(shape[2]), sum, good ? "" : " WRONG");
      }
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    run(Dtype::f32, 40, 30, 16, *isas[i]);
    const int64_t few = made_by_attend;
    run(Dtype::f32, 1000, 30, 16, *isas[i]);
    std::printf("%s: %ld allocations for 1 tile, %ld for 21\n", isas[i]->name, long(few), long(made_by_attend));
    failures += few != made_by_attend;
  }
  return failures != 0;
}
