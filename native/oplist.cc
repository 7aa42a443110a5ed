// The table of opcodes of one SIMD path. What is missing is refused when a program is loaded.

#include "ops.h"

namespace lmclock::LMCLOCK_PATH {

extern const Ops kOps;
const Ops kOps = [] {
  Ops ops = {};
  const auto set = [&](isa::Op op, OpFunction function) {
    ops.run[static_cast<int>(op)] = function;
  };
  set(isa::Op::embed, op_embed);
  set(isa::Op::norm, op_norm);
  set(isa::Op::linear, op_linear);
  set(isa::Op::rope, op_rope);
  set(isa::Op::store, op_store);
  set(isa::Op::attend, op_attend);
  set(isa::Op::act, op_act);
  set(isa::Op::binary, op_binary);
  set(isa::Op::pick, op_pick);
  set(isa::Op::pool, op_pool);
  set(isa::Op::softmax, op_softmax);
  set(isa::Op::concat, op_concat);
  set(isa::Op::lstm, op_lstm);
  set(isa::Op::route, op_route);
  set(isa::Op::experts, op_experts);
  set(isa::Op::sample, op_sample);
  set(isa::Op::qkv, op_qkv);
  set(isa::Op::glu, op_glu);
  return ops;
}();

}  // namespace lmclock::LMCLOCK_PATH
