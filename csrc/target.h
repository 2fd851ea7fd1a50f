// Where the x86 instruction sets can be compiled: GCC and clang, which let a translation unit set its own target.
#pragma once

#if (defined(__x86_64__) || defined(_M_X64)) && (defined(__GNUC__) || defined(__clang__))
#define STYLEATTN_X86 1
#endif

#define STYLEATTN_INLINE static inline __attribute__((always_inline))
