// x86-64 with AVX-512 and its bf16 dot product. The system headers come first: only our own code is compiled for this target.
#include "target.h"

#ifdef STYLEATTN_X86
#ifndef STYLEATTN_EMULATE_AVX512
#include <immintrin.h>
#endif
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "call.h"
#include "isa.h"

#ifdef STYLEATTN_EMULATE_AVX512
// plain C++, no target
#elif defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")
#endif

#define STYLEATTN_ISA avx512_bf16
#define STYLEATTN_BF16_DOT
#include "vec_avx512.h"

#include "kernels.h"

namespace styleattn {

namespace avx512_bf16 {
static constexpr Kernels kernels_bf16 = kernels<DotBf16>();
}

extern const Isa isa_avx512_bf16;
const Isa isa_avx512_bf16{"avx512_bf16", &avx512_bf16::kernels_bf16, &avx512_single, avx512_stats};

}  // namespace styleattn

#ifdef STYLEATTN_EMULATE_AVX512
#elif defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // STYLEATTN_X86
