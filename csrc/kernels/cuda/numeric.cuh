// SPDX-License-Identifier: BSD-3-Clause
// Element types of the CUDA kernels, their conversions, and the tensor-core product of each.
#pragma once

#include "../dtype.h"
#include "ptx.cuh"

namespace resnet_fused {

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(Half v) { return ptx::float_from_f16(v.bits); }
__device__ __forceinline__ float to_float(BFloat v) {
  return __uint_as_float(static_cast<uint32_t>(v.bits) << 16);
}

template <typename T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ Half from_float<Half>(float v) {
  return Half{ptx::f16_from_float(v)};
}
template <>
__device__ __forceinline__ BFloat from_float<BFloat>(float v) {
  return BFloat{ptx::bf16_from_float(v)};
}

// max(v, 0), NaN kept.
__device__ __forceinline__ float relu(float v) { return v < 0.0f ? 0.0f : v; }

// d += a * b over 32 bytes of each row: 16 channels of a 16-bit type, 8 of fp32 taken as TF32.
template <typename T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1);
template <>
__device__ __forceinline__ void mma<Half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                          uint32_t b1) {
  ptx::mma_f16(d, a, b0, b1);
}
template <>
__device__ __forceinline__ void mma<BFloat>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                            uint32_t b1) {
  ptx::mma_bf16(d, a, b0, b1);
}
template <>
__device__ __forceinline__ void mma<float>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                           uint32_t b1) {
  ptx::mma_tf32(d, a, b0, b1);
}

// fp32 as the tensor cores shall multiply it. They ignore the low 13 bits, which would shrink every
// product: so these are rounded away. A NaN must not lose all bits of its fraction, and infinity
// must not get any, even such that are ignored.
__device__ __forceinline__ uint32_t tf32_from_float(uint32_t bits) {
  const float v = __uint_as_float(bits);
  return v == v ? (bits + 0x1000) & ~0x1fffu : 0x7fffffff;
}

// The same for four registers of any type.
template <typename T>
__device__ __forceinline__ void round_operands(uint32_t (&)[4]) {}
template <>
__device__ __forceinline__ void round_operands<float>(uint32_t (&r)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) r[i] = tf32_from_float(r[i]);
}

// Sixteen bytes of elements, loaded and stored in one access.
template <typename T>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(T);
  T v[kSize];
};

}  // namespace resnet_fused
