// Where the x86 instruction sets can be compiled: GCC and clang, which let a translation unit set its own target.
#pragma once

#if (defined(__x86_64__) || defined(_M_X64)) && (defined(__GNUC__) || defined(__clang__))
#define STYLEATTN_X86 1
#endif

// AMX: compilers that know it, and Linux, which is asked for leave to use it.
#if defined(STYLEATTN_X86) && defined(STYLEATTN_EMULATE_AVX512)
#define STYLEATTN_AMX 1
#elif defined(STYLEATTN_X86) && defined(__linux__) && defined(__clang__)
#if __clang_major__ >= 12
#define STYLEATTN_AMX 1
#endif
#elif defined(STYLEATTN_X86) && defined(__linux__) && __GNUC__ >= 11
#define STYLEATTN_AMX 1
#endif

#define STYLEATTN_INLINE static inline __attribute__((always_inline))
