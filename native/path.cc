// The table of one SIMD path.

#include "tables.h"

namespace lmclock::LMCLOCK_PATH {

#define LM_STRING(x) #x
#define LM_NAME(x) LM_STRING(x)

extern const Kernels kKernels;
const Kernels kKernels = {LM_NAME(LMCLOCK_PATH),
                          pack,
                          unpack_rows,
                          round_row,
                          linear,
                          glu,
                          apply,
                          peak_int8,
                          peak_int16,
                          peak_bf16,
                          peak_f32,
                          stream};

}  // namespace lmclock::LMCLOCK_PATH
