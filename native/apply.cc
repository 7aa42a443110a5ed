// The functions of mathfun.h over an array.

#include "mathfun.h"
#include "tables.h"

namespace lmclock::LMCLOCK_PATH {

namespace {

LM_INLINE f32x16 value(Function f, f32x16 x) {
  switch (f) {
    case Function::exp: return exp(x);
    case Function::tanh: return tanh(x);
    case Function::sigmoid: return sigmoid(x);
    case Function::normal_cdf: return normal_cdf(x);
    case Function::silu: return silu(x);
    case Function::gelu_tanh: return gelu_tanh(x);
    case Function::gelu: return gelu(x);
    default: return relu(x);
  }
}

}  // namespace

void apply(Function f, const float* x, float* y, int64_t count) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) store(y + i, value(f, load(x + i)));
  const int rest = static_cast<int>(count - i);
  if (rest) store_n(y + i, value(f, load_n(x + i, rest)), rest);
}

}  // namespace lmclock::LMCLOCK_PATH
