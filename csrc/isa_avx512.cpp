// x86-64 with AVX-512. The system headers come first: only our own code is compiled for this target.
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
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")
#endif

#define STYLEATTN_ISA avx512
#include "vec_avx512.h"

#include "kernels.h"
#include "stats.h"

namespace styleattn {

extern const Kernels avx512_single;
const Kernels avx512_single = avx512::kernels<avx512::DotSingle>();

void avx512_stats(const StatsCall& call, int64_t row, int64_t head) { avx512::stats(call, row, head); }

extern const Isa isa_avx512;
const Isa isa_avx512{"avx512", &avx512_single, &avx512_single, avx512_stats};

}  // namespace styleattn

#ifdef STYLEATTN_EMULATE_AVX512
#elif defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // STYLEATTN_X86
