// store, and the number formats of the attention cache. Rounding is that of GGUF: f16 to nearest
// even, q8_0 in blocks of 32 elements of a head with a scale in f16.

#include "cache.h"

namespace lmclock::LMCLOCK_PATH {

namespace {

// x to the nearest f16, ties to even, as the low 16 bits of each lane; NaN stays NaN.
LM_INLINE i32x16 to_f16(f32x16 x) {
  const i32x16 u = as_i32(x), sign = shr<16>(u) & splat_i(0x8000);
  const i32x16 magnitude = u & splat_i(0x7fffffff);
  const f32x16 a = as_f32(magnitude);
  // The exponent moves from bias 127 to bias 15; half a unit of the last place, or one less on
  // even, rounds.
  const i32x16 odd = shr<13>(magnitude) & splat_i(1);
  const i32x16 normal = shr<13>(magnitude + splat_i(0xfff - (112 << 23)) + odd);
  // Adding 1/2 puts the last place of a subnormal f16 where that of the sum is, so that the
  // addition rounds.
  const i32x16 small = as_i32(a + splat(0.5f)) - splat_i(0x3f000000);
  i32x16 h = select(a < splat(0x1p-14f), small, normal);
  h = select(a < splat(65520.0f), h, splat_i(0x7c00));
  h = select(a == a, h, splat_i(0x7e00));
  return h | sign;
}

// q8_0 of 32 elements: codes, and the scale as f16 bits.
uint16_t quantise(const float* x, int8_t* codes) {
  const f32x16 a = load(x), b = load(x + 16);
  const float most = reduce_max(max(abs(a), abs(b)));
  uint16_t bits[16];
  store_u16(bits, to_f16(splat(most / 127.0f)));
  float scale[16];
  store(scale, load_f16(bits));
  const bool usable = scale[0] != 0.0f;
  const f32x16 d = splat(usable ? scale[0] : 1.0f), zero = splat(0.0f);
  for (int half = 0; half < 2; ++half) {
    const f32x16 q = min(splat(127.0f), max(splat(-127.0f), (half ? b : a) / d));
    store_i8(codes + 16 * half, round_i(usable ? q : zero));
  }
  return bits[0];
}

LM_INLINE float from_f16(uint16_t bits) {
  uint16_t lanes[16] = {bits};
  float out[16];
  store(out, load_f16(lanes));
  return out[0];
}

// Calls put(k, bits) for each element of a row of f16.
template <class F>
LM_INLINE void each_f16(const float* x, int count, F&& put) {
  for (int k = 0; k < count; k += 16) {
    uint16_t bits[16];
    const int n = count - k < 16 ? count - k : 16;
    store_u16(bits, to_f16(load_part(x + k, n)));
    for (int j = 0; j < n; ++j) put(k + j, bits[j]);
  }
}

}  // namespace

void write_key(const PageLayout& l, const float* x, int offset, uint8_t* head) {
  uint8_t* group = head + offset / kGroup * l.group_bytes;
  const int lane = offset % kGroup;
  if (l.format == CacheFormat::f32) {
    float* to = reinterpret_cast<float*>(group) + lane;
    for (int d = 0; d < l.key; ++d) to[kGroup * d] = x[d];
  } else if (l.format == CacheFormat::f16) {
    uint16_t* to = reinterpret_cast<uint16_t*>(group) + lane;
    each_f16(x, l.key, [&](int d, uint16_t bits) LM_LAMBDA { to[kGroup * d] = bits; });
  } else {
    int8_t* codes = reinterpret_cast<int8_t*>(group) + lane;
    uint16_t* scales = reinterpret_cast<uint16_t*>(group + l.key * kGroup) + lane;
    for (int d = 0; d < l.key; d += kScaleBlock) {
      int8_t part[kScaleBlock];
      scales[d / kScaleBlock * kGroup] = quantise(x + d, part);
      for (int j = 0; j < kScaleBlock; ++j) codes[(d + j) * kGroup] = part[j];
    }
  }
}

void write_value(const PageLayout& l, const float* x, int offset, uint8_t* head) {
  uint8_t* row = head + l.values_at + int64_t{offset} * l.row_bytes;
  if (l.format == CacheFormat::f32) {
    std::memcpy(row, x, 4 * static_cast<size_t>(l.value));
  } else if (l.format == CacheFormat::f16) {
    uint16_t* to = reinterpret_cast<uint16_t*>(row);
    each_f16(x, l.value, [&](int d, uint16_t bits) LM_LAMBDA { to[d] = bits; });
  } else {
    for (int d = 0; d < l.value; d += kScaleBlock) {
      const uint16_t scale = quantise(x + d, reinterpret_cast<int8_t*>(row) + d);
      std::memcpy(row + l.value + d / kScaleBlock * 2, &scale, 2);
    }
  }
}

namespace {

// 16 codes times one scale each.
LM_INLINE void scale_codes(const int8_t* codes, f32x16 scale, float* out) {
  store(out, scale * to_f32(load_i8(codes)));
}

LM_INLINE float key_at(const PageLayout& l, const uint8_t* group, int d, int lane) {
  const int at = kGroup * d + lane;
  if (l.format == CacheFormat::f32) return reinterpret_cast<const float*>(group)[at];
  if (l.format == CacheFormat::f16) return from_f16(reinterpret_cast<const uint16_t*>(group)[at]);
  const uint16_t* scales = reinterpret_cast<const uint16_t*>(group + l.key * kGroup);
  const float code = reinterpret_cast<const int8_t*>(group)[at];
  return from_f16(scales[d / kScaleBlock * kGroup + lane]) * code;
}

// A whole group of q8_0.
void read_codes(const PageLayout& l, const uint8_t* group, float* out) {
  const uint16_t* scales = reinterpret_cast<const uint16_t*>(group + l.key * kGroup);
  for (int d = 0; d < l.key; d += kScaleBlock, scales += kGroup) {
    const f32x16 scale = load_f16(scales);
    for (int j = d; j < d + kScaleBlock; ++j)
      scale_codes(reinterpret_cast<const int8_t*>(group) + kGroup * j, scale, out + kGroup * j);
  }
}

}  // namespace

void read_keys(const PageLayout& l, const uint8_t* head, int offset, int count, int lane,
               float* out) {
  const bool whole = offset % kGroup == 0 && lane == 0;
  if (whole && l.format == CacheFormat::q8_0)
    return read_codes(l, head + offset / kGroup * l.group_bytes, out);
  for (int j = 0; j < count; ++j) {
    const uint8_t* group = head + (offset + j) / kGroup * l.group_bytes;
    for (int d = 0; d < l.key; ++d)
      out[kGroup * d + lane + j] = key_at(l, group, d, (offset + j) % kGroup);
  }
}

void read_values(const PageLayout& l, const uint8_t* head, int offset, int count, float* out) {
  const int padded = (l.value + 15) / 16 * 16;
  for (int j = 0; j < count; ++j, out += padded) {
    const uint8_t* row = head + l.values_at + int64_t{offset + j} * l.row_bytes;
    float scales[16];
    for (int d = 0; d < padded; d += 16) {
      if (l.format == CacheFormat::f32) {
        store(out + d, load(reinterpret_cast<const float*>(row) + d));
      } else if (l.format == CacheFormat::f16) {
        store(out + d, load_f16(reinterpret_cast<const uint16_t*>(row) + d));
      } else {
        const int block = d / kScaleBlock;
        // Up to 16 scales at once; what lies past the last one is memory of the arena.
        if (d % (16 * kScaleBlock) == 0) store(scales, load_f16(row + l.value + 2 * block));
        scale_codes(reinterpret_cast<const int8_t*>(row) + d, splat(scales[block % 16]), out + d);
      }
    }
  }
}

void round_to(CacheFormat format, const float* x, int64_t count, float* out) {
  if (format == CacheFormat::f32) {
    std::memcpy(out, x, 4 * static_cast<size_t>(count));
  } else if (format == CacheFormat::f16) {
    each_f16(x, static_cast<int>(count),
             [&](int k, uint16_t bits) LM_LAMBDA { out[k] = from_f16(bits); });
  } else {
    for (int64_t k = 0; k < count; k += kScaleBlock) {
      int8_t codes[kScaleBlock];
      const f32x16 scale = splat(from_f16(quantise(x + k, codes)));
      scale_codes(codes, scale, out + k);
      scale_codes(codes + 16, scale, out + k + 16);
    }
  }
}

void ask_to_store(const Frame& f, const isa::Instruction& i, const Worker& w) {
  const State& state = f.states[i.state];
  const PageTable& table = f.tables[state.declared];
  const PageLayout& l = state.layout;
  const SpaceRows& rows = rows_of(f, f.values[i.ins[0]]);
  const Share s = share(f, w, rows.count * l.heads);
  for (int64_t u = s.first; u < s.last; ++u) {
    const int64_t r = u / l.heads;
    if (!rows.valid[r]) continue;
    const Place at = place_of(state, table, rows.owners[r], rows.positions[r]);
    const char* head = reinterpret_cast<const char*>(state.head(at.page, u % l.heads));
    const char* keys = head + at.offset / kGroup * l.group_bytes;
    for (int64_t line = 0; line < l.group_bytes; line += 64) __builtin_prefetch(keys + line, 1, 3);
    const char* values = head + l.values_at + int64_t{at.offset} * l.row_bytes;
    for (int64_t line = 0; line < l.row_bytes; line += 64) __builtin_prefetch(values + line, 1, 3);
  }
}

void op_store(Frame& f, const isa::Instruction& i, Worker& w) {
  const Value &k = f.values[i.ins[0]], &v = f.values[i.ins[1]];
  const State& state = f.states[i.state];
  const PageTable& table = f.tables[state.declared];
  const PageLayout& l = state.layout;
  const SpaceRows& rows = rows_of(f, k);
  const Share s = share(f, w, rows.count * l.heads);
  for (int64_t u = s.first; u < s.last; ++u) {
    const int64_t r = u / l.heads, h = u % l.heads;
    if (!rows.valid[r]) continue;
    const Place at = place_of(state, table, rows.owners[r], rows.positions[r]);
    uint8_t* head = state.head(at.page, h);
    write_key(l, k.row(r) + h * l.key, at.offset, head);
    write_value(l, v.row(r) + h * l.value, at.offset, head);
  }
}

}  // namespace lmclock::LMCLOCK_PATH
