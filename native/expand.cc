// Packed panel blocks of every layout as generic blocks (int8 codes, f32 scale and minimum), and as
// f32.
//
// The slow, complete way to read a panel: embedding rows, f32 activations and many-row tiles go
// through it.

#include "layouts.h"
#include "tables.h"

namespace lmclock::LMCLOCK_PATH {

namespace {

// Added to stored codes, it makes them signed.
LM_INLINE i32x16 offset_bytes(int offset) {
  return splat_i(static_cast<int32_t>(static_cast<uint32_t>(-offset & 0xff) * 0x01010101u));
}

template <class L>
LM_INLINE void expand_block32(const uint8_t* p, uint8_t* out) {
  BlockCodes b;
  L::load_block(p, b);
  store_i(out, as_i32(b.d));
  store_i(out + 64, as_i32(L::kMin ? b.m : splat(-0.0f)));
  const i32x16 signs = offset_bytes(L::kOffset);
  unroll<8>([&](auto i) LM_LAMBDA { store_i(out + 128 + 64 * i, add_bytes(b.g[i], signs)); });
}

void expand_q4k(const uint8_t* p, uint8_t* out) {
  K4Scales s;
  load_scales(p, s);
  const i32x16 low = splat_i(0x0f0f0f0f);
  unroll<8>([&](auto j) LM_LAMBDA {
    store_i(out + 640 * j, as_i32(s.d[j]));
    store_i(out + 640 * j + 64, as_i32(s.m[j]));
  });
  for (int c = 0; c < 4; ++c)
    for (int g = 0; g < 8; ++g) {
      const i32x16 raw = load_i(p + Q4_K::kCodes + 512 * c + 64 * g);
      uint8_t* at = out + 1280 * c + 128 + 64 * g;
      store_i(at, raw & low);
      store_i(at + 640, shr<4>(raw) & low);
    }
}

void expand_q6k(const uint8_t* p, uint8_t* out) {
  const f32x16 d = load_f16(p);
  const i32x16 signs = offset_bytes(32);
  for (int h = 0; h < 2; ++h) {
    const uint8_t* half = p + 32 + Q6_K::kHalf * h;
    uint8_t* to = out + 8 * 384 * h;
    unroll<8>([&](auto j) LM_LAMBDA {
      store_i(to + 384 * j, as_i32(q6k_scale<j>(half, d)));
      store_i(to + 384 * j + 64, as_i32(splat(-0.0f)));
    });
    for (int g = 0; g < 8; ++g) {
      i32x16 codes[4];
      q6k_codes(half, g, codes);
      uint8_t* at = to + 384 * (g / 4) + 128 + 64 * (g % 4);
      unroll<4>([&](auto j) LM_LAMBDA { store_i(at + 768 * j, add_bytes(codes[j], signs)); });
    }
  }
}

void expand_generic16(const uint8_t* p, uint8_t* out) {
  std::memcpy(out, p, 128);
  for (int g = 0; g < 4; ++g)
    store_i(out + 128 + 64 * g, add_bytes(load_i(p + 128 + 64 * g), offset_bytes(128)));
}

// One generic block of `elements` to f32: product and sum rounded apart, as the formats define
// them.
void generic_f32(const uint8_t* p, int elements, float* out) {
  const f32x16 d = as_f32(load_i(p)), m = as_f32(load_i(p + 64));
  for (int g = 0; g < elements / 4; ++g) {
    const i32x16 raw = load_i(p + 128 + 64 * g);
    unroll<4>([&](auto i) LM_LAMBDA {
      store(out + 64 * g + 16 * i, d * to_f32(sra<24>(shl<24 - 8 * i>(raw))) + m);
    });
  }
}

void dequantise_float(Layout layout, const uint8_t* panel, int64_t k0, int64_t n, float* out) {
  for (int64_t k = k0; k < k0 + n; ++k, out += 16) {
    if (layout == Layout::f32) {
      store(out, load(reinterpret_cast<const float*>(panel) + 16 * k));
    } else if (layout == Layout::f16) {
      store(out, load_f16(panel + 32 * k));
    } else {
      const i32x16 pair = load_i(panel + k / 2 * 64);
      store(out,
            k % 2 ? as_f32(pair & splat_i(static_cast<int32_t>(0xffff0000))) : from_bf16(pair));
    }
  }
}

}  // namespace

void expand(Layout layout, const uint8_t* p, int64_t count, uint8_t* out) {
  const int64_t bytes = layout_bytes(layout), to = expanded_bytes(layout);
  for (int64_t n = 0; n < count; ++n, p += bytes, out += to) switch (layout) {
      case Layout::q4_0: expand_block32<Q4_0>(p, out); break;
      case Layout::q4_1: expand_block32<Q4_1>(p, out); break;
      case Layout::q5_0: expand_block32<Q5_0>(p, out); break;
      case Layout::q8_0: expand_block32<Q8_0>(p, out); break;
      case Layout::generic32: expand_block32<Generic32>(p, out); break;
      case Layout::q4_k: expand_q4k(p, out); break;
      case Layout::q6_k: expand_q6k(p, out); break;
      default: expand_generic16(p, out);
    }
}

void dequantise(Layout layout, const uint8_t* panel, int64_t k0, int64_t n, float* out) {
  if (layout == Layout::f32 || layout == Layout::f16 || layout == Layout::bf16)
    return dequantise_float(layout, panel, k0, n, out);
  const int64_t block = layout_block(layout), bytes = layout_bytes(layout);
  const int elements = scale_elements(layout);
  alignas(64) uint8_t scratch[6144];  // 256 elements as generic16
  for (int64_t k = 0; k < n; k += block) {
    expand(layout, panel + (k0 + k) / block * bytes, 1, scratch);
    for (int64_t e = 0; e < block; e += elements)
      generic_f32(scratch + e / elements * (128 + 16 * elements), elements, out + 16 * (k + e));
  }
}

void unpack_rows(const Matrix& w, const int32_t* ids, int64_t count, float* out, int64_t stride) {
  constexpr int64_t kChunk = 256;
  alignas(64) float values[kChunk * kPanel];
  for (int64_t i = 0; i < count; ++i) {
    const uint8_t* panel = w.data + ids[i] / kPanel * w.panel_stride;
    for (int64_t k0 = 0; k0 < w.width; k0 += kChunk) {
      const int64_t n = w.width - k0 < kChunk ? w.width - k0 : kChunk;
      dequantise(w.layout, panel, k0, n, values);
      for (int64_t k = 0; k < n; ++k)
        out[i * stride + k0 + k] = values[k * kPanel + ids[i] % kPanel];
    }
  }
}

}  // namespace lmclock::LMCLOCK_PATH
