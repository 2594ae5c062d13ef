// SPDX-License-Identifier: BSD-3-Clause
// pool_linear on the CPU. The sum over pixels is one of sums of 32 pixels: on large maps a single
// sum would lose digits to its own size. The sum over C runs in 16 lanes (lane i takes c = i mod
// 16) that are added at the end, the rest of C behind them.
#include "../pool_linear.h"

#include "simd.h"

namespace resnet_fused {
namespace {

constexpr int64_t kLanes = 16;

// Vectors of the compiler's, which it splits where registers are narrower.
typedef float Lanes __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));

template <DType D>
RESNET_FUSED_INLINE float load(const void* p, int64_t i) {
  if constexpr (D == DType::f32) return static_cast<const float*>(p)[i];
  const uint16_t h = static_cast<const uint16_t*>(p)[i];
  return D == DType::bf16 ? bf16_to_float(h) : f16_to_float(h);
}

RESNET_FUSED_INLINE float load_any(const void* p, int64_t i, DType d) {
  if (d == DType::f32) return load<DType::f32>(p, i);
  return d == DType::bf16 ? load<DType::bf16>(p, i) : load<DType::f16>(p, i);
}

RESNET_FUSED_INLINE void store_any(void* p, int64_t i, float v, DType d) {
  if (d == DType::f32) {
    static_cast<float*>(p)[i] = v;
  } else {
    static_cast<uint16_t*>(p)[i] = d == DType::bf16 ? float_to_bf16(v) : float_to_f16(v);
  }
}

template <DType D>
RESNET_FUSED_INLINE void pool_images(const PoolLinearParams& p, int64_t begin, int64_t end) {
  constexpr int64_t kPixels = 32;
  const float count = static_cast<float>(p.HW);
  const int64_t parts = pool_parts(p.C);
  for (int64_t at = begin; at < end; ++at) {
    const int64_t n = at / parts, c0 = at % parts * kPoolChannels;
    const int64_t channels = p.C - c0 < kPoolChannels ? p.C - c0 : kPoolChannels;
    float sum[kPoolChannels] = {};
    for (int64_t i0 = 0; i0 < p.HW; i0 += kPixels) {
      float part[kPoolChannels] = {};
      for (int64_t i = i0; i < i0 + kPixels && i < p.HW; ++i) {
        const int64_t pixel = (n * p.HW + i) * p.C + c0;
        for (int64_t c = 0; c < channels; ++c) part[c] += load<D>(p.x, pixel + c);
      }
      for (int64_t c = 0; c < channels; ++c) sum[c] += part[c];
    }
    for (int64_t c = 0; c < channels; ++c) p.pooled[n * p.C + c0 + c] = sum[c] / count;
  }
}

template <DType W>
RESNET_FUSED_INLINE void load_lanes(const void* p, int64_t i, Lanes* to) {
  if constexpr (W == DType::f32) {
    std::memcpy(to, static_cast<const float*>(p) + i, sizeof(Lanes));
  } else if constexpr (W == DType::bf16) {
    Halves h;
    std::memcpy(&h, static_cast<const uint16_t*>(p) + i, sizeof(h));
    const Words bits = __builtin_convertvector(h, Words) << 16;
    std::memcpy(to, &bits, sizeof(bits));
  } else {
    float f[kLanes];
    for (int64_t l = 0; l < kLanes; ++l) f[l] = load<W>(p, i + l);
    std::memcpy(to, f, sizeof(f));
  }
}

// Outputs [k, k + rows) of images [n0, n0 + images): rows * images sums side by side, because one
// alone would wait for each of its additions.
template <DType W, int64_t rows, int64_t images>
RESNET_FUSED_INLINE void dot(const PoolLinearParams& p, int64_t k, int64_t n0) {
  Lanes acc[rows][images] = {};
  const int64_t whole = p.C - p.C % kLanes;
  for (int64_t c = 0; c < whole; c += kLanes) {
    Lanes w[rows], x;
    for (int64_t r = 0; r < rows; ++r) load_lanes<W>(p.weight, (k + r) * p.C + c, &w[r]);
    for (int64_t i = 0; i < images; ++i) {
      std::memcpy(&x, p.pooled + (n0 + i) * p.C + c, sizeof(x));
      for (int64_t r = 0; r < rows; ++r) acc[r][i] += w[r] * x;
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < images; ++i) {
      float sum = p.bias != nullptr ? load_any(p.bias, k + r, p.bias_dtype) : 0.0f;
      for (int64_t l = 0; l < kLanes; ++l) sum += acc[r][i][l];
      for (int64_t c = whole; c < p.C; ++c)
        sum += load<W>(p.weight, (k + r) * p.C + c) * p.pooled[(n0 + i) * p.C + c];
      store_any(p.out, (n0 + i) * p.K + k + r, sum, p.x_dtype);
    }
  }
}

template <DType W>
RESNET_FUSED_INLINE void linear_rows(const PoolLinearParams& p, int64_t begin, int64_t end) {
  constexpr int64_t kImages = 4, kRows = 4;
  for (int64_t k = begin; k < end; k += kRows) {
    int64_t n = 0;
    for (; n + kImages <= p.N; n += kImages) {
      for (int64_t r = k; r < end && r < k + kRows; ++r) dot<W, 1, kImages>(p, r, n);
    }
    for (; n < p.N; ++n) {
      if (k + kRows <= end) {
        dot<W, kRows, 1>(p, k, n);
      } else {
        for (int64_t r = k; r < end; ++r) dot<W, 1, 1>(p, r, n);
      }
    }
  }
}

RESNET_FUSED_CLONES void pool_f32(const PoolLinearParams& p, int64_t b, int64_t e) {
  pool_images<DType::f32>(p, b, e);
}
RESNET_FUSED_CLONES void pool_bf16(const PoolLinearParams& p, int64_t b, int64_t e) {
  pool_images<DType::bf16>(p, b, e);
}
RESNET_FUSED_CLONES void pool_f16(const PoolLinearParams& p, int64_t b, int64_t e) {
  pool_images<DType::f16>(p, b, e);
}
RESNET_FUSED_CLONES void linear_f32(const PoolLinearParams& p, int64_t b, int64_t e) {
  linear_rows<DType::f32>(p, b, e);
}
RESNET_FUSED_CLONES void linear_bf16(const PoolLinearParams& p, int64_t b, int64_t e) {
  linear_rows<DType::bf16>(p, b, e);
}
RESNET_FUSED_CLONES void linear_f16(const PoolLinearParams& p, int64_t b, int64_t e) {
  linear_rows<DType::f16>(p, b, e);
}

}  // namespace

void pool_cpu(const PoolLinearParams& p, int64_t begin, int64_t end) {
  if (p.x_dtype == DType::f32) return pool_f32(p, begin, end);
  p.x_dtype == DType::bf16 ? pool_bf16(p, begin, end) : pool_f16(p, begin, end);
}

void linear_cpu(const PoolLinearParams& p, int64_t begin, int64_t end) {
  if (p.weight_dtype == DType::f32) return linear_f32(p, begin, end);
  p.weight_dtype == DType::bf16 ? linear_bf16(p, begin, end) : linear_f16(p, begin, end);
}

}  // namespace resnet_fused
