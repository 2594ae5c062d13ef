// SPDX-License-Identifier: BSD-3-Clause
// 3x3 max-pool (stride 2, padding 1) of relu(in), NHWC: what stands behind the convolution of a
// stem that stem.cu does not take.
//
// Limited by memory. A thread makes 16 bytes of one output pixel (one element where K or a buffer's
// alignment is not a multiple of that) from nine loads, of which L1 serves the repeated ones. A
// block stays within one output row.
#include "../stem.h"
#include "launch.cuh"
#include "numeric.cuh"

namespace resnet_fused {
namespace {

constexpr int kThreads = 256;

template <typename T, int kSize>
struct alignas(kSize * sizeof(T)) Pack {
  T v[kSize];
};

template <typename T, int kSize>
__global__ void __launch_bounds__(kThreads, 4)
    relu_max_pool_kernel(const T* __restrict__ in, T* __restrict__ out, int64_t H, int64_t W,
                         int64_t K) {
  using Items = Pack<T, kSize>;
  const int64_t P = (H + 1) / 2, Q = (W + 1) / 2, packs = K / kSize;
  const int64_t row = blockIdx.x, n = row / P, p = row % P;
  // A window's pixel outside the image is replaced by its neighbour in the window: no maximum
  // changes, and all nine loads can be under way at once.
  const int64_t h[3] = {p > 0 ? 2 * p - 1 : 0, 2 * p, 2 * p + 1 < H ? 2 * p + 1 : 2 * p};
  const int64_t step = static_cast<int64_t>(gridDim.y) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x; i < Q * packs;
       i += step) {
    const int64_t q = i / packs, k = (i % packs) * kSize;
    const int64_t w[3] = {q > 0 ? 2 * q - 1 : 0, 2 * q, 2 * q + 1 < W ? 2 * q + 1 : 2 * q};
    Items window[9];
#pragma unroll
    for (int j = 0; j < 9; ++j) {
      window[j] = *reinterpret_cast<const Items*>(in + ((n * H + h[j / 3]) * W + w[j % 3]) * K + k);
    }
    float top[kSize] = {};  // ReLU: nothing below zero
#pragma unroll
    for (int j = 0; j < 9; ++j) {
#pragma unroll
      for (int e = 0; e < kSize; ++e) {
        const float v = to_float(window[j].v[e]);
        if (v > top[e] || v != v) top[e] = v;  // once NaN, it stays: v > NaN is false
      }
    }
    Items items;
#pragma unroll
    for (int e = 0; e < kSize; ++e) items.v[e] = from_float<T>(top[e]);
    *reinterpret_cast<Items*>(out + (row * Q + q) * K + k) = items;
  }
}

template <typename T>
cudaError_t launch_relu_max_pool(const ReluMaxPoolParams& p, cudaStream_t stream) {
  constexpr int kSize = Vector<T>::kSize;
  const int64_t rows = p.N * ((p.H + 1) / 2), columns = (p.W + 1) / 2;
  if (rows * columns * p.K == 0) return cudaSuccess;
  const auto* in = static_cast<const T*>(p.in);
  auto* out = static_cast<T*>(p.out);
  const auto bits = reinterpret_cast<uintptr_t>(in) | reinterpret_cast<uintptr_t>(out);
  const bool aligned = bits % 16 == 0 && p.K % kSize == 0;
  const int64_t packs = columns * (aligned ? p.K / kSize : p.K);
  const int64_t blocks = (packs + kThreads - 1) / kThreads;
  const LaunchShape shape{{rows, blocks < 65535 ? blocks : 65535, 1}, kThreads, 0};
  if (aligned) {
    return launch<relu_max_pool_kernel<T, kSize>>(shape, stream, in, out, p.H, p.W, p.K);
  }
  return launch<relu_max_pool_kernel<T, 1>>(shape, stream, in, out, p.H, p.W, p.K);
}

}  // namespace

int launch_relu_max_pool_cuda(const ReluMaxPoolParams& p, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  switch (p.dtype) {
    case DType::f32:
      return launch_relu_max_pool<float>(p, s);
    case DType::bf16:
      return launch_relu_max_pool<BFloat>(p, s);
    case DType::f16:
      return launch_relu_max_pool<Half>(p, s);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace resnet_fused
