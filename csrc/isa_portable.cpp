// Any CPU.
#define STYLEATTN_ISA portable
#include "vec_portable.h"

#include "kernels.h"
#include "stats.h"

namespace styleattn {

namespace portable {
static constexpr Kernels kernels_single = kernels<DotSingle>();
}

extern const Isa isa_portable;
const Isa isa_portable{"portable", &portable::kernels_single, &portable::kernels_single, portable::stats};

}  // namespace styleattn
