// SPDX-License-Identifier: BSD-3-Clause
// The end of every output, however its sum was made.
#pragma once

#include "numeric.cuh"

namespace resnet_fused {

// act(y + residual), rounded.
struct Finish {
  bool residual, relu;

  template <typename T>
  __device__ __forceinline__ T operator()(float y, T other) const {
    if (residual) y += to_float(other);
    if (relu) y = resnet_fused::relu(y);
    return from_float<T>(y);
  }
};

// Two neighbouring columns of a row, in one register where the type has 16 bits.
template <typename T>
struct ColumnPair {
  uint32_t bits;
  __device__ __forceinline__ T get(int e) const {
    return T{static_cast<uint16_t>(e == 0 ? bits : bits >> 16)};
  }
  __device__ __forceinline__ void set(T first, T second) {
    bits = first.bits | static_cast<uint32_t>(second.bits) << 16;
  }
};
template <>
struct alignas(8) ColumnPair<float> {
  float v[2];
  __device__ __forceinline__ float get(int e) const { return v[e]; }
  __device__ __forceinline__ void set(float first, float second) {
    v[0] = first;
    v[1] = second;
  }
};

}  // namespace resnet_fused
