// The table of opcodes of one SIMD path. What is missing is refused when a program is loaded.

#include "ops.h"

namespace lmclock::LMCLOCK_PATH {

extern const Ops kOps;
const Ops kOps = [] {
  Ops ops = {};
  const auto set = [&](isa::Op op, OpFunction function, bool simple = false) {
    ops.run[static_cast<int>(op)] = function;
    ops.simple[static_cast<int>(op)] = simple;
  };
  ops.start = start_of;
  ops.ask = ask_for_blocks;
  ops.ask_to_store = ask_to_store;
  set(isa::Op::embed, op_embed, true);
  set(isa::Op::norm, op_norm, true);
  set(isa::Op::linear, op_linear);
  set(isa::Op::rope, op_rope, true);
  set(isa::Op::store, op_store, true);
  set(isa::Op::attend, op_attend);
  set(isa::Op::act, op_act, true);
  set(isa::Op::binary, op_binary, true);
  set(isa::Op::pick, op_pick, true);
  set(isa::Op::pool, op_pool, true);
  set(isa::Op::softmax, op_softmax, true);
  set(isa::Op::concat, op_concat, true);
  set(isa::Op::lstm, op_lstm);
  set(isa::Op::route, op_route);
  set(isa::Op::experts, op_experts);
  set(isa::Op::sample, op_sample);
  set(isa::Op::qkv, op_qkv);
  set(isa::Op::glu, op_glu);
  return ops;
}();

}  // namespace lmclock::LMCLOCK_PATH
