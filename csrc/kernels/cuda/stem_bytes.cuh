// SPDX-License-Identifier: BSD-3-Clause
// The stem's pixels, and what those of bytes stand for (normalise.h).
#pragma once

#include "../stem.h"
#include "numeric.cuh"

namespace resnet_fused {

constexpr int kChannels = 4;

template <typename T>
struct alignas(kChannels * sizeof(T)) Pixel {
  T v[kChannels];
};

// Scales, then shifts, one for each of the channels; 0 beyond the last, which makes a value of 0.
__device__ __forceinline__ void load_norm(const StemParams& p, float* norm) {
  if (threadIdx.x >= 2 * kChannels) return;
  const int64_t row = threadIdx.x / kChannels, c = threadIdx.x % kChannels;
  norm[threadIdx.x] = c < p.C ? p.norm[row * p.C + c] : 0.0f;
}

// A byte has a value within the image only. Product and sum are rounded each, as everywhere: nvcc
// would make one rounding of them.
template <typename T>
__device__ __forceinline__ Pixel<T> values(const Pixel<uint8_t>& bytes, const float* norm,
                                           bool inside) {
  Pixel<T> pixel;
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    const float v = __fadd_rn(__fmul_rn(bytes.v[c], norm[c]), norm[kChannels + c]);
    pixel.v[c] = inside ? from_float<T>(v) : T{};
  }
  return pixel;
}
template <typename T>
__device__ __forceinline__ Pixel<T> values(const Pixel<T>& pixel, const float*, bool) {
  return pixel;
}

}  // namespace resnet_fused
