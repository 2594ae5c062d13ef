// SPDX-License-Identifier: BSD-3-Clause
// What goes before the tile convolution: packing of weights and of the stem's images.
#include <cstring>

#include "../normalise.h"
#include "../tile_conv.h"
#include "simd.h"

namespace resnet_fused {

void pack_tiles_cpu(const TilePackParams& p, int64_t n_begin, int64_t n_end) {
  const int64_t c_steps = round_up(p.C, kTileK) / kTileK;
  const int64_t step = kTileN * kTileK * (p.low == nullptr ? 1 : 2),
                block = p.taps * c_steps * step;
  std::memset(p.packed + n_begin * block, 0, static_cast<size_t>((n_end - n_begin) * block) * 2);
  for (int64_t n = n_begin; n < n_end; ++n) {
    uint16_t* to = p.packed + n * block;
    for (int64_t f = 0; f < kTileN && n * kTileN + f < p.K; ++f) {
      const int64_t filter = (n * kTileN + f) * p.C * p.taps;
      for (int64_t c = 0; c < p.C; ++c) {
        // Tile of 16 filters, pair of channels, filter, channel of the pair.
        const int64_t at = (c / kTileK) * p.taps * step + (f / 16) * 512 + (c % kTileK / 2) * 32 +
                           (f % 16) * 2 + c % 2;
        for (int64_t t = 0; t < p.taps; ++t) {
          const int64_t from = filter + c * p.taps + t, i = t * step + at;
          to[i] = p.weight[from];
          if (p.low != nullptr) to[i + kTileN * kTileK] = p.low[from];
        }
      }
    }
  }
}

void pack_floats_cpu(const FloatPackParams& p, int64_t n_begin, int64_t n_end) {
  const int64_t filter = p.C * p.taps, rows = (p.C + p.depth - 1) / p.depth * p.depth * p.taps;
  std::memset(p.packed + n_begin * rows * kTileN, 0,
              static_cast<size_t>((n_end - n_begin) * rows * kTileN) * 4);
  for (int64_t n = n_begin; n < n_end; ++n) {
    const int64_t left = p.K - n * kTileN, filters = left < kTileN ? left : kTileN;
    for (int64_t c = 0; c < p.C; ++c) {
      for (int64_t t = 0; t < p.taps; ++t) {
        // 32 lines are read from, each to its end; the other way round each line would be written
        // 32 times.
        const float* from = p.weight + n * kTileN * filter + c * p.taps + t;
        const int64_t row = (c / p.depth * p.taps + t) * p.depth + c % p.depth;
        float* to = p.packed + (n * rows + row) * kTileN;
        for (int64_t f = 0; f < filters; ++f) to[f] = from[f * filter];
      }
    }
  }
}

namespace {

RESNET_FUSED_CLONES void split(const float* x, uint16_t* high, uint16_t* low, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    high[i] = float_to_bf16(x[i]);
    low[i] = float_to_bf16(x[i] - bf16_to_float(high[i]));
  }
}

}  // namespace

void split_cpu(const float* x, uint16_t* high, uint16_t* low, int64_t count) {
  split(x, high, low, count);
}

namespace {

// Four bf16 at once: an exponent of all ones carries into the sign's place.
constexpr uint64_t kExponents = 0x7f807f807f807f80u, kOnes = 0x0080008000800080u,
                   kSigns = 0x8000800080008000u;

template <int C>
RESNET_FUSED_INLINE uint64_t pack_line(const PackPixelsParams& p, int64_t w_stride) {
  const auto* x = static_cast<const uint16_t*>(p.x);
  uint64_t found = 0;
  for (int64_t w = 0; w < p.W; ++w) {
    uint64_t pixel = x[w * w_stride];
    if (C > 1) pixel |= static_cast<uint64_t>(x[p.c_stride + w * w_stride]) << 16;
    if (C > 2) pixel |= static_cast<uint64_t>(x[2 * p.c_stride + w * w_stride]) << 32;
    if (C > 3) pixel |= static_cast<uint64_t>(x[3 * p.c_stride + w * w_stride]) << 48;
    p.to[w] = pixel;
    found |= (pixel & kExponents) + kOnes;
  }
  return found & kSigns;
}

// fp32; returns not 0 if a value is NaN or infinite, or becomes so when it is split.
template <int C>
RESNET_FUSED_INLINE uint64_t split_line(const PackPixelsParams& p, int64_t w_stride) {
  const auto* x = static_cast<const float*>(p.x);
  uint64_t found = 0;
  for (int64_t w = 0; w < p.W; ++w) {
    uint64_t high = 0, low = 0;
    for (int c = 0; c < C; ++c) {
      const float v = x[c * p.c_stride + w * w_stride];
      const uint16_t upper = float_to_bf16(v);
      high |= static_cast<uint64_t>(upper) << (16 * c);
      low |= static_cast<uint64_t>(float_to_bf16(v - bf16_to_float(upper))) << (16 * c);
    }
    p.to[w] = high;
    p.low[w] = low;
    found |= (high & kExponents) + kOnes;
  }
  return found & kSigns;
}

template <int C, bool split>
RESNET_FUSED_INLINE void look_up_line(const PackPixelsParams& p, int64_t w_stride) {
  const auto* x = static_cast<const uint8_t*>(p.x);
  for (int64_t w = 0; w < p.W; ++w) {
    uint64_t high = 0, low = 0;
    for (int c = 0; c < C; ++c) {
      const uint64_t v = p.table[c * kByteValues + x[c * p.c_stride + w * w_stride]];
      high |= (split ? v & 0xffff : v) << (16 * c);
      low |= (v >> 16) << (16 * c);
    }
    p.to[w] = high;
    if (split) p.low[w] = low;
  }
}

// With the usual stride known, compilers vectorise.
template <int C>
RESNET_FUSED_INLINE bool pack_any(const PackPixelsParams& p) {
  if (p.table != nullptr) {
    p.split ? look_up_line<C, true>(p, p.w_stride) : look_up_line<C, false>(p, p.w_stride);
    return true;
  }
  if (p.split) return (p.w_stride == 1 ? split_line<C>(p, 1) : split_line<C>(p, p.w_stride)) == 0;
  return (p.w_stride == 1 ? pack_line<C>(p, 1) : pack_line<C>(p, p.w_stride)) == 0;
}

RESNET_FUSED_CLONES bool pack_pixels(const PackPixelsParams& p) {
  switch (p.C) {
    case 1:
      return pack_any<1>(p);
    case 2:
      return pack_any<2>(p);
    case 3:
      return pack_any<3>(p);
    default:
      return pack_any<4>(p);
  }
}

}  // namespace

bool pack_pixels_cpu(const PackPixelsParams& p) { return pack_pixels(p); }

}  // namespace resnet_fused
