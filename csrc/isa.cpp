// What this CPU can run, asked once.
#include "isa.h"
#include "target.h"

#if defined(STYLEATTN_X86) && !defined(STYLEATTN_EMULATE_AVX512)
#include <cpuid.h>
#ifdef STYLEATTN_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace styleattn {

extern const Isa isa_portable;
#ifdef STYLEATTN_X86
extern const Isa isa_avx2, isa_avx512, isa_avx512_bf16;
#endif
#ifdef STYLEATTN_AMX
extern const Isa isa_amx_bf16;
#endif

namespace {

#if defined(STYLEATTN_X86) && !defined(STYLEATTN_EMULATE_AVX512)
// F16C, which not every compiler's __builtin_cpu_supports knows by name.
bool half_conversion() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}

#ifdef STYLEATTN_AMX
// Tiles and their bf16 products in the CPU, their state among what the system saves, and its leave for this process to use
// them, without which the first tile instruction would end it.
bool tiles() {
  constexpr unsigned TILE_AND_BF16 = 1u << 24 | 1u << 22;  // of leaf 7, edx
  constexpr unsigned TILE_STATE = 1u << 17 | 1u << 18;     // of XCR0: configuration and data
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XTILEDATA = 18;
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & TILE_AND_BF16) != TILE_AND_BF16) return false;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & bit_OSXSAVE)) return false;
  unsigned saved, high;
  __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
  return (saved & TILE_STATE) == TILE_STATE && syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0;
}
#endif
#endif

struct Usable {
  const Isa* isas[5];
  int64_t count = 0;

  Usable() {
#if defined(STYLEATTN_X86) && defined(STYLEATTN_EMULATE_AVX512)
    add(&isa_amx_bf16, true);
    add(&isa_avx512_bf16, true);
    add(&isa_avx512, true);
#elif defined(STYLEATTN_X86)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && half_conversion();
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
#ifdef STYLEATTN_AMX
    add(&isa_amx_bf16, bf16 && tiles());
#endif
    add(&isa_avx512_bf16, bf16);
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
