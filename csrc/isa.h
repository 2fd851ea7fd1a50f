// The table of kernels that one instruction set provides, and the choice between them at run time.
#pragma once

#include "call.h"
#include "target.h"

namespace styleattn {

struct Kernels {
  Layout layout;
  // Bytes of scratch one thread needs for a call.
  int64_t (*scratch_bytes)(const Call& call);
  // Packs keys begin..end-1 (begin a multiple of block_keys) of one slot and head.
  void (*pack)(const Call& call, const Source& source, int64_t slot, int64_t head, int64_t begin, int64_t end, char* scratch);
  // The whole operation for query rows first..first+tile_rows-1 of one batch row and head.
  void (*tile)(const Call& call, int64_t row, int64_t head, int64_t first, char* scratch);
};

struct Isa {
  const char* name;
  const Kernels* half;    // for bf16 input
  const Kernels* single;  // for fp32 and fp16 input
  void (*stats)(const StatsCall& call, int64_t row, int64_t head);
};

#ifdef STYLEATTN_X86
// What the instruction sets beyond AVX-512 share with it.
extern const Kernels avx512_single;
void avx512_stats(const StatsCall& call, int64_t row, int64_t head);
#endif

// Best first; only those that were compiled in and that this CPU can run. The portable one is always last.
const Isa* const* usable_isas(int64_t* count);

}  // namespace styleattn
