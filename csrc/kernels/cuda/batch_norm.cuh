// SPDX-License-Identifier: BSD-3-Clause
// BatchNorm as the kernels apply it: one fp32 scale and shift per channel, from the live
// parameters.
#pragma once

#include "../mma_conv.h"
#include "numeric.cuh"

namespace resnet_fused {

// One channel's parameters as they are stored. Loading is apart from use so that all loads are
// under way together, and other work can be done meanwhile.
struct ChannelBits {
  uint32_t conv_bias, weight, bias, mean, var;
};

__device__ __forceinline__ uint32_t channel_bits(const ChannelVector& v, int64_t k) {
  if (v.data == nullptr) return 0;
  if (v.dtype == DType::f32) return static_cast<const uint32_t*>(v.data)[k];
  return static_cast<const uint16_t*>(v.data)[k];
}

__device__ __forceinline__ ChannelBits channel_bits(const BatchNorm& bn, int64_t k) {
  return {channel_bits(bn.conv_bias, k), channel_bits(bn.weight, k), channel_bits(bn.bias, k),
          channel_bits(bn.mean, k), channel_bits(bn.var, k)};
}

__device__ __forceinline__ float channel_value(const ChannelVector& v, uint32_t bits,
                                               float absent) {
  if (v.data == nullptr) return absent;
  if (v.dtype == DType::f32) return __uint_as_float(bits);
  const auto half = static_cast<uint16_t>(bits);
  return v.dtype == DType::bf16 ? to_float(BFloat{half}) : to_float(Half{half});
}

// bn(conv) = conv * scale + shift.
__device__ __forceinline__ void channel_affine(const BatchNorm& bn, const ChannelBits& bits,
                                               float& scale, float& shift) {
  scale = channel_value(bn.weight, bits.weight, 1.0f);
  if (bn.var.data != nullptr) scale /= sqrtf(channel_value(bn.var, bits.var, 1.0f) + bn.eps);
  const float offset =
      channel_value(bn.conv_bias, bits.conv_bias, 0.0f) - channel_value(bn.mean, bits.mean, 0.0f);
  shift = channel_value(bn.bias, bits.bias, 0.0f) + offset * scale;
}

__device__ __forceinline__ void channel_affine(const BatchNorm& bn, int64_t k, float& scale,
                                               float& shift) {
  channel_affine(bn, channel_bits(bn, k), scale, shift);
}

}  // namespace resnet_fused
