// The entry of the compiled extension: operator schemas, and tensors turned into plain data.
//
// Ops live in the namespace `styleattn_cpu`. They are the plain forward functions of styleattn/cpu_backend.py, which flattens
// Affine, Segment and Branch into a list of tensors, a list of integers and a list of numbers (in the order read below).
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <string>
#include <tuple>
#include <vector>

#include "drive.h"

#ifndef STYLEATTN_OPS
#define STYLEATTN_OPS styleattn_cpu
#endif

namespace styleattn {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::Half: return Dtype::f16;
    case ScalarType::BFloat16: return Dtype::bf16;
    default: STD_TORCH_CHECK(false, "the cpu backend takes float32, float16 and bfloat16"); return Dtype::f32;
  }
}

const Isa& isa_named(const std::string& name) {
  int64_t count = 0;
  const Isa* const* isas = usable_isas(&count);
  for (int64_t i = 0; i < count; ++i) {
    if (name.empty() || name == isas[i]->name) return *isas[i];
  }
  STD_TORCH_CHECK(false, "instruction set '", name, "' cannot run here");
  return **isas;
}

// Reads the flattened call in order.
class Reader {
 public:
  Reader(const Tensor& query, const std::vector<Tensor>& tensors, const std::vector<int64_t>& spec,
         const std::vector<double>& numbers)
      : query_(query), tensors_(tensors), spec_(spec), numbers_(numbers) {}

  int64_t integer() {
    STD_TORCH_CHECK(next_ < spec_.size(), "the flattened call ends early");
    return spec_[next_++];
  }

  // An index into the tensors, or -1 for None.
  const Tensor* tensor() {
    const int64_t i = integer();
    if (i == -1) return nullptr;
    STD_TORCH_CHECK(i >= 0 && i < int64_t(tensors_.size()), "no such tensor: ", i);
    STD_TORCH_CHECK(tensors_[i].is_cpu(), "the cpu backend takes CPU tensors");
    return &tensors_[i];
  }

  const Tensor& needed() {
    const Tensor* x = tensor();
    STD_TORCH_CHECK(x != nullptr, "a tensor is missing");
    return *x;
  }

  // [rows, heads, tokens, dim] in the query's dtype.
  View feature(const Tensor* x, int64_t rows, int64_t tokens) const {
    if (!x) return View{nullptr, 0, 0, 0};
    STD_TORCH_CHECK(x->dim() == 4 && x->scalar_type() == query_.scalar_type(), "a feature must be 4-d in the query's dtype");
    STD_TORCH_CHECK(x->size(0) == rows && x->size(1) == query_.size(1) && x->size(2) == tokens && x->size(3) == query_.size(3),
                    "a feature has a wrong shape");
    STD_TORCH_CHECK(x->size(3) <= 1 || x->stride(3) == 1, "a feature needs a contiguous last dim");
    return View{x->const_data_ptr(), x->stride(0), x->stride(1), x->stride(2)};
  }

  const float* floats(const Tensor* x, int64_t count) const {
    if (!x) return nullptr;
    STD_TORCH_CHECK(x->scalar_type() == ScalarType::Float && x->is_contiguous() && x->numel() == count,
                    "expected ", count, " contiguous float32 numbers");
    return static_cast<const float*>(x->const_data_ptr());
  }

  AffineView affine(bool centered) {
    const int64_t count = query_.size(0) * query_.size(1) * query_.size(3);
    AffineView a{};
    a.scale = floats(tensor(), count);
    a.shift = floats(tensor(), count);
    if (centered) a.center = floats(tensor(), count);
    STD_TORCH_CHECK(!a.scale == !a.shift, "an affine needs scale and shift");
    return a;
  }

  // A tensor index, or -2 - i for number i.
  Number number() {
    const int64_t i = integer();
    if (i < 0) {
      STD_TORCH_CHECK(-2 - i >= 0 && -2 - i < int64_t(numbers_.size()), "no such number: ", i);
      return Number{static_cast<float>(numbers_[-2 - i]), nullptr, 0, 0};
    }
    STD_TORCH_CHECK(i < int64_t(tensors_.size()), "no such tensor: ", i);
    const Tensor& x = tensors_[i];
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.is_cpu() && (x.dim() == 1 || x.dim() == 2) &&
                        x.size(0) == query_.size(0) && (x.dim() == 1 || x.size(1) == query_.size(2)),
                    "a number must be float32 [B] or [B, L]");
    return Number{0.0f, static_cast<const float*>(x.const_data_ptr()), x.stride(0), x.dim() == 2 ? x.stride(1) : 0};
  }

  void finish() const { STD_TORCH_CHECK(next_ == spec_.size(), "the flattened call is too long"); }

 private:
  const Tensor& query_;
  const std::vector<Tensor>& tensors_;
  const std::vector<int64_t>& spec_;
  const std::vector<double>& numbers_;
  size_t next_ = 0;
};

// int64 [B], or, where absent: row b itself, or row 0 where there is only one.
std::vector<int64_t> read_rows(const Tensor* x, int64_t batch, int64_t available) {
  std::vector<int64_t> rows(batch);
  if (x) {
    STD_TORCH_CHECK(x->scalar_type() == ScalarType::Long && x->is_contiguous() && x->numel() == batch, "rows must be int64 [B]");
  } else {
    STD_TORCH_CHECK(available == 1 || available == batch, "rows are needed");
  }
  for (int64_t b = 0; b < batch; ++b) {
    rows[b] = x ? static_cast<const int64_t*>(x->const_data_ptr())[b] : available == 1 ? 0 : b;
    STD_TORCH_CHECK(rows[b] >= -1 && rows[b] < available, "rows has ", rows[b], ", the segment has rows 0..", available - 1);
  }
  return rows;
}

SegmentSpec read_segment(Reader& in, const Tensor& query, int64_t& null_keys) {
  SegmentSpec s{};
  const Tensor& key = in.needed();
  const Tensor& value = in.needed();
  s.key_rows = key.size(0);
  s.length = key.size(2);
  s.key = in.feature(&key, s.key_rows, s.length);
  s.value = in.feature(&value, s.key_rows, s.length);
  s.own_key = in.feature(in.tensor(), query.size(0), s.length);
  s.own_value = in.feature(in.tensor(), query.size(0), s.length);
  STD_TORCH_CHECK(!s.own_key.data == !s.own_value.data, "own_key and own_value go together");
  s.blend = in.number();
  s.rows = read_rows(in.tensor(), query.size(0), s.key_rows);
  if (const Tensor* bias = in.tensor()) {
    const bool per_row = bias->dim() == 2;
    STD_TORCH_CHECK(bias->scalar_type() == ScalarType::Float && bias->size(-1) == s.length &&
                        (bias->dim() == 1 || (per_row && bias->size(0) == s.key_rows)),
                    "key_bias must be float32 [S] or [R, S]");
    s.key_bias = static_cast<const float*>(bias->const_data_ptr());
    s.key_bias_row = per_row ? bias->stride(0) : 0;
    s.key_bias_key = bias->stride(-1);
  }
  const int64_t nulls = in.integer();
  STD_TORCH_CHECK(nulls >= 0, "null_keys is negative");
  null_keys += nulls;
  s.key_affine = in.affine(true);
  s.value_affine = in.affine(false);
  s.logit_scale = in.number();
  s.logit_bias = in.number();
  return s;
}

BranchSpec read_branch(Reader& in, const Tensor& query) {
  BranchSpec b{};
  const Tensor* own_query = in.tensor();
  b.call.query = in.feature(own_query ? own_query : &query, query.size(0), query.size(2));
  b.call.content = in.feature(in.tensor(), query.size(0), query.size(2));
  b.call.query_affine = in.affine(false);
  b.call.gamma = in.number();
  b.call.weight = in.number();
  b.call.contributes = b.call.weight.data != nullptr || b.call.weight.value != 0.0f;
  const int64_t segments = in.integer();
  for (int64_t i = 0; i < segments; ++i) b.segments.push_back(read_segment(in, query, b.call.null_keys));
  return b;
}

std::tuple<Tensor, Tensor, int64_t> attention(const Tensor& query, const std::vector<Tensor>& tensors,
                                              const std::vector<int64_t>& spec, const std::vector<double>& numbers,
                                              double softmax_scale, const std::string& isa) {
  STD_TORCH_CHECK(query.dim() == 4 && query.is_cpu(), "query must be a 4-d CPU tensor");
  const int64_t batch = query.size(0), heads = query.size(1), length = query.size(2), dim = query.size(3);
  Reader in(query, tensors, spec, numbers);
  std::vector<BranchSpec> branches;
  const int64_t count = in.integer();
  for (int64_t g = 0; g < count; ++g) branches.push_back(read_branch(in, query));
  in.finish();
  Tensor out = torch::stable::new_empty(query, {batch, length, heads, dim});
  Tensor lse = torch::stable::new_empty(query, {count, batch, heads, length}, ScalarType::Float);
  Call call{};
  call.dtype = dtype_of(query);
  call.batch = batch;
  call.heads = heads;
  call.length = length;
  call.dim = dim;
  call.softmax_scale = static_cast<float>(softmax_scale);
  call.out = out.mutable_data_ptr();
  call.lse = static_cast<float*>(lse.mutable_data_ptr());
  const int64_t packs = query.numel() == 0 ? 0 : attend(isa_named(isa), call, branches);
  return std::make_tuple(torch::stable::transpose(out, 1, 2), lse, packs);
}

std::tuple<Tensor, Tensor> stats(const Tensor& x, double eps, const std::string& isa) {
  STD_TORCH_CHECK(x.dim() == 4 && x.is_cpu() && (x.size(3) <= 1 || x.stride(3) == 1),
                  "x must be a 4-d CPU tensor with a contiguous last dim");
  STD_TORCH_CHECK(x.size(2) > 0, "x has no tokens");
  Tensor mean = torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(3)}, ScalarType::Float);
  Tensor std = torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(3)}, ScalarType::Float);
  StatsCall call{};
  call.dtype = dtype_of(x);
  call.x = View{x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
  call.batch = x.size(0);
  call.heads = x.size(1);
  call.length = x.size(2);
  call.dim = x.size(3);
  call.eps = static_cast<float>(eps);
  call.mean = static_cast<float*>(mean.mutable_data_ptr());
  call.std = static_cast<float*>(std.mutable_data_ptr());
  if (x.numel() != 0) token_stats(isa_named(isa), call);
  return std::make_tuple(mean, std);
}

// The instruction sets that can run here, best first.
std::string isas() {
  int64_t count = 0;
  const Isa* const* usable = usable_isas(&count);
  std::string names;
  for (int64_t i = 0; i < count; ++i) names += (i ? "," : "") + std::string(usable[i]->name);
  return names;
}

}  // namespace
}  // namespace styleattn

// One step more, so that the name is expanded: the macro of torch 2.10 takes its argument as it is written.
#define STYLEATTN_LIBRARY(ns, m) STABLE_TORCH_LIBRARY(ns, m)

STYLEATTN_LIBRARY(STYLEATTN_OPS, m) {
  m.def(
      "attention(Tensor query, Tensor[] tensors, int[] spec, float[] numbers, float softmax_scale, str isa) "
      "-> (Tensor, Tensor, int)");
  m.def("token_stats(Tensor x, float eps, str isa) -> (Tensor, Tensor)");
  m.def("isas() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(STYLEATTN_OPS, CPU, m) {
  m.impl("attention", TORCH_BOX(&styleattn::attention));
  m.impl("token_stats", TORCH_BOX(&styleattn::stats));
}

STABLE_TORCH_LIBRARY_IMPL(STYLEATTN_OPS, CompositeExplicitAutograd, m) { m.impl("isas", TORCH_BOX(&styleattn::isas)); }

// `import styleattn._C` loads the library; the operators register themselves.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
