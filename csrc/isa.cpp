// What this CPU can run, asked once.
#include "isa.h"
#include "target.h"

#if defined(STYLEATTN_X86) && !defined(STYLEATTN_EMULATE_AVX512)
#include <cpuid.h>
#endif

namespace styleattn {

extern const Isa isa_portable;
#ifdef STYLEATTN_X86
extern const Isa isa_avx2, isa_avx512, isa_avx512_bf16;
#endif

namespace {

#if defined(STYLEATTN_X86) && !defined(STYLEATTN_EMULATE_AVX512)
// F16C, which not every compiler's __builtin_cpu_supports knows by name.
bool half_conversion() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}
#endif

struct Usable {
  const Isa* isas[4];
  int64_t count = 0;

  Usable() {
#if defined(STYLEATTN_X86) && defined(STYLEATTN_EMULATE_AVX512)
    add(&isa_avx512_bf16, true);
    add(&isa_avx512, true);
#elif defined(STYLEATTN_X86)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && half_conversion();
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    add(&isa_avx512_bf16, avx512 && __builtin_cpu_supports("avx512bf16"));
    add(&isa_avx512, avx512);
    add(&isa_avx2, avx2);
#endif
    add(&isa_portable, true);
  }

  void add(const Isa* isa, bool usable) {
    if (usable) isas[count++] = isa;
  }
};

}  // namespace

const Isa* const* usable_isas(int64_t* count) {
  static const Usable usable;
  *count = usable.count;
  return usable.isas;
}

}  // namespace styleattn
