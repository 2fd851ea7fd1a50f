#include "drive.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <new>

namespace styleattn {
namespace {

constexpr float LOG2E = 1.4426950408889634f;
constexpr int64_t ALIGN = 64;
// Packed operands held at a time, unless one head needs more: for one thread what stays in its cache; for several more,
// since each round ends in a wait for the slowest.
constexpr int64_t workspace_bytes(int64_t threads) { return threads == 1 ? 1 << 20 : threads * (4 << 20); }
constexpr int64_t PACK_KEYS = 512;        // keys per packing task
constexpr int64_t TASKS_PER_THREAD = 16;  // in a round, so that the last ones leave few threads idle

// What is finite stays finite, and masks nothing.
float bias_log2(float x) {
  const float y = x * LOG2E;
  return std::isfinite(x) && !std::isfinite(y) ? std::copysign(std::numeric_limits<float>::max(), x) : y;
}

int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

struct Free {
  void operator()(char* p) const { ::operator delete[](p, std::align_val_t(ALIGN)); }
};
using Memory = std::unique_ptr<char[], Free>;

Memory allocate(int64_t bytes) { return Memory(new (std::align_val_t(ALIGN)) char[std::max<int64_t>(bytes, 1)]); }

// Runs task(i, thread) for 0 <= i < count on torch's threads; tasks are taken in order, whoever is free takes the next.
template <class Task>
void run_tasks(int64_t count, int64_t threads, const Task& task) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::min(count, threads), 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      for (int64_t i = next++; i < count; i = next++) task(i, thread);
    }
  });
}

bool same(const View& a, const View& b) {
  return a.data == b.data && a.batch == b.batch && a.head == b.head && a.token == b.token;
}

// What one source needs beyond the POD that the kernels see.
struct SourceData {
  const SegmentSpec* spec;
  std::vector<int64_t> key_rows, own_rows, slot_of;  // slot_of: per key row (per query row where blended), -1: not used
  std::vector<float> blend, key_bias, tail_bias;
};

class Plan {
 public:
  Plan(const Layout& layout, const Call& call, const std::vector<BranchSpec>& branches) : layout_(layout), call_(call) {
    int64_t segments = 0;
    for (const BranchSpec& b : branches) segments += int64_t(b.segments.size());
    data_.reserve(segments);
    slots_.reserve(segments);
    segments_.reserve(segments);
    for (const BranchSpec& b : branches) {
      BranchCall branch = b.call;
      branch.segments = segments_.data() + segments_.size();
      branch.segment_count = int64_t(b.segments.size());
      for (const SegmentSpec& s : b.segments) add_segment(s);
      branches_.push_back(branch);
    }
    for (SourceData& d : data_) add_source(d);
  }

  const std::vector<Source>& sources() const { return sources_; }
  const std::vector<BranchCall>& branches() const { return branches_; }
  int64_t bytes_per_head() const { return bytes_per_head_; }

  // Places the packed operands of `heads` heads one after the other; returns the bytes they take.
  int64_t place(int64_t heads) {
    int64_t next = 0;
    for (Source& s : sources_) {
      s.key_offset = next;
      next += s.key_stride * s.slots * heads;
      s.value_offset = next;
      next += s.value_stride * s.slots * heads;
      s.center_offset = next;
      next += s.center_stride * s.slots * heads;
    }
    return next * layout_.element_size;
  }

 private:
  void add_segment(const SegmentSpec& spec) {
    const bool blended = spec.own_key.data != nullptr;
    int64_t index = 0;
    while (index < int64_t(data_.size()) && !shareable(*data_[index].spec, spec)) ++index;
    if (index == int64_t(data_.size())) {
      data_.push_back(SourceData{&spec, {}, {}, {}, {}, {}, {}});
      data_[index].slot_of.assign(blended ? call_.batch : spec.key_rows, -1);
    }
    SourceData& d = data_[index];
    std::vector<int64_t> slots(call_.batch, -1);
    for (int64_t b = 0; b < call_.batch; ++b) {
      if (spec.rows[b] < 0) continue;
      int64_t& slot = d.slot_of[blended ? b : spec.rows[b]];
      if (slot < 0) {
        slot = int64_t(d.key_rows.size());
        d.key_rows.push_back(spec.rows[b]);
        if (blended) {
          d.own_rows.push_back(b);
          d.blend.push_back(spec.blend.data ? spec.blend.data[b * spec.blend.batch] : spec.blend.value);
        }
      }
      slots[b] = slot;
    }
    slots_.push_back(std::move(slots));
    segments_.push_back(SegmentCall{index, slots_.back().data(), spec.key_affine, spec.value_affine, spec.logit_scale,
                                    spec.logit_bias});
  }

  static bool shareable(const SegmentSpec& a, const SegmentSpec& b) {
    return !a.own_key.data && !b.own_key.data && same(a.key, b.key) && same(a.value, b.value) && a.length == b.length &&
           a.key_rows == b.key_rows && a.key_bias == b.key_bias && a.key_bias_row == b.key_bias_row &&
           a.key_bias_key == b.key_bias_key;
  }

  void add_source(SourceData& d) {
    const SegmentSpec& spec = *d.spec;
    Source s{};
    s.key = spec.key;
    s.value = spec.value;
    s.own_key = spec.own_key;
    s.own_value = spec.own_value;
    s.length = spec.length;
    s.padded = round_up(spec.length, layout_.width);
    s.slots = int64_t(d.key_rows.size());
    const int64_t line = ALIGN / layout_.element_size;
    s.key_stride = round_up(s.padded * round_up(call_.dim, layout_.pair), line);
    s.value_stride = round_up(s.padded * round_up(call_.dim, layout_.width), line);
    if (layout_.pair == 2) {
      s.center_stride = round_up(round_up(call_.dim, layout_.width) * int64_t(sizeof(float)) / layout_.element_size, line);
    }
    fill_bias(d, s);
    s.key_rows = d.key_rows.data();
    s.own_rows = d.own_rows.data();
    s.blend = d.blend.data();
    s.key_bias = d.key_bias.empty() ? nullptr : d.key_bias.data();
    s.tail_bias = d.tail_bias.data();
    bytes_per_head_ += (s.key_stride + s.value_stride) * s.slots * layout_.element_size;
    sources_.push_back(s);
  }

  void fill_bias(SourceData& d, const Source& s) const {
    const float gone = -std::numeric_limits<float>::infinity();
    const SegmentSpec& spec = *d.spec;
    d.tail_bias.assign(layout_.block_keys, gone);
    const int64_t tail = s.length % layout_.block_keys;
    std::fill(d.tail_bias.begin(), d.tail_bias.begin() + (tail ? tail : layout_.block_keys), 0.0f);
    if (!spec.key_bias) return;
    d.key_bias.assign(s.slots * s.padded, gone);
    for (int64_t slot = 0; slot < s.slots; ++slot) {
      const float* from = spec.key_bias + d.key_rows[slot] * spec.key_bias_row;
      for (int64_t j = 0; j < s.length; ++j) d.key_bias[slot * s.padded + j] = bias_log2(from[j * spec.key_bias_key]);
    }
  }

  const Layout layout_;
  const Call call_;
  std::vector<SourceData> data_;
  std::vector<Source> sources_;
  std::vector<SegmentCall> segments_;
  std::vector<BranchCall> branches_;
  std::vector<std::vector<int64_t>> slots_;
  int64_t bytes_per_head_ = 0;
};

struct PackTask {
  const Source* source;
  int64_t slot, head, begin, end;
};

std::vector<PackTask> pack_tasks(const Call& call) {
  std::vector<PackTask> tasks;
  for (int64_t head = call.first_head; head < call.first_head + call.head_count; ++head) {
    for (int64_t i = 0; i < call.source_count; ++i) {
      const Source& s = call.sources[i];
      for (int64_t slot = 0; slot < s.slots; ++slot) {
        for (int64_t begin = 0; begin < s.length; begin += PACK_KEYS) {
          tasks.push_back(PackTask{&s, slot, head, begin, std::min(begin + PACK_KEYS, s.length)});
        }
      }
    }
  }
  return tasks;
}

// Heads per round: as many as the workspace holds, and enough to keep every thread busy.
int64_t heads_per_round(const Call& call, int64_t bytes_per_head, int64_t tiles_per_head, int64_t threads) {
  const int64_t fitting = workspace_bytes(threads) / std::max<int64_t>(bytes_per_head, 1);
  const int64_t busy = (threads * TASKS_PER_THREAD + tiles_per_head - 1) / tiles_per_head;
  return std::min(call.heads, std::max({fitting, threads > 1 ? busy : 1, int64_t(1)}));
}

}  // namespace

int64_t attend(const Isa& isa, Call call, const std::vector<BranchSpec>& branches) {
  const Kernels& kernels = call.dtype == Dtype::bf16 ? *isa.half : *isa.single;
  Plan plan(kernels.layout, call, branches);
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t tiles = (call.length + kernels.layout.tile_rows - 1) / kernels.layout.tile_rows;
  const int64_t round = heads_per_round(call, plan.bytes_per_head(), tiles * call.batch, threads);
  const Memory workspace = allocate(plan.place(round));
  const int64_t scratch_bytes = round_up(kernels.scratch_bytes(call), ALIGN);
  const Memory scratch = allocate(scratch_bytes * threads);
  call.sources = plan.sources().data();
  call.source_count = int64_t(plan.sources().size());
  call.branches = plan.branches().data();
  call.branch_count = int64_t(plan.branches().size());
  call.workspace = workspace.get();
  for (call.first_head = 0; call.first_head < call.heads; call.first_head += round) {
    call.head_count = std::min(round, call.heads - call.first_head);
    const std::vector<PackTask> tasks = pack_tasks(call);
    run_tasks(int64_t(tasks.size()), threads, [&](int64_t i, int64_t thread) {
      const PackTask& t = tasks[i];
      kernels.pack(call, *t.source, t.slot, t.head, t.begin, t.end, scratch.get() + thread * scratch_bytes);
    });
    run_tasks(call.head_count * call.batch * tiles, threads, [&](int64_t i, int64_t thread) {
      const int64_t tile = i % tiles, row = i / tiles % call.batch, head = call.first_head + i / tiles / call.batch;
      kernels.tile(call, row, head, tile * kernels.layout.tile_rows, scratch.get() + thread * scratch_bytes);
    });
  }
  int64_t packs = 0;
  for (const Source& s : plan.sources()) packs += s.slots * call.heads;
  return packs;
}

void token_stats(const Isa& isa, const StatsCall& call) {
  run_tasks(call.batch * call.heads, torch::stable::get_num_threads(), [&](int64_t i, int64_t) {
    isa.stats(call, i / call.heads, i % call.heads);
  });
}

}  // namespace styleattn
