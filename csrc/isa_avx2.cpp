// x86-64 with AVX2, FMA and F16C. The system headers come first: only our own code is compiled for this target.
#include "target.h"

#ifdef STYLEATTN_X86
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "call.h"
#include "isa.h"

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#define STYLEATTN_ISA avx2
#include "vec_avx2.h"

#include "kernels.h"
#include "stats.h"

namespace styleattn {

namespace avx2 {
static constexpr Kernels kernels_single = kernels<DotSingle>();
}

extern const Isa isa_avx2;
const Isa isa_avx2{"avx2", &avx2::kernels_single, &avx2::kernels_single, avx2::stats};

}  // namespace styleattn

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // STYLEATTN_X86
