// SPDX-License-Identifier: BSD-3-Clause
// add_relu: out[i] = max(x[i] + y[i], 0), NaN kept, added in fp32, rounded once.
//
// Limited by memory: three streams of 16-byte accesses, four per thread and stream in flight. A
// block of 256 threads takes 1,024 consecutive vectors; the last block's missing vectors and the n
// % (16 bytes) last elements are bounded by index. Buffers that are not 16-byte aligned (offset
// views) go element by element. Indices are 64-bit.
#include "../add_relu.h"
#include "launch.cuh"
#include "numeric.cuh"

namespace resnet_fused {
namespace {

constexpr int kThreads = 256;
constexpr int kVectors = 4;  // per thread

template <typename T>
__device__ __forceinline__ T add_relu(T x, T y) {
  return from_float<T>(relu(to_float(x) + to_float(y)));
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    add_relu_vector_kernel(const T* __restrict__ x, const T* __restrict__ y, T* __restrict__ out,
                           int64_t n) {
  static_assert(sizeof(Vector<T>) == sizeof(uint4), "a vector is one 16-byte access");
  constexpr int kSize = Vector<T>::kSize;
  const int64_t vectors = n / kSize;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * (kThreads * kVectors) + threadIdx.x;
  uint4 a[kVectors], b[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int64_t at = first + i * kThreads;
    if (at < vectors) {
      a[i] = ptx::load_16_streaming(x + at * kSize);
      b[i] = ptx::load_16_streaming(y + at * kSize);
    }
  }
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int64_t at = first + i * kThreads;
    if (at < vectors) {
      const auto& va = reinterpret_cast<const Vector<T>&>(a[i]);
      const auto& vb = reinterpret_cast<const Vector<T>&>(b[i]);
      Vector<T> r;
#pragma unroll
      for (int e = 0; e < kSize; ++e) r.v[e] = add_relu(va.v[e], vb.v[e]);
      reinterpret_cast<Vector<T>*>(out)[at] = r;
    }
  }
  if (blockIdx.x == 0 && threadIdx.x < n % kSize) {
    const int64_t at = vectors * kSize + threadIdx.x;
    out[at] = add_relu(x[at], y[at]);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    add_relu_scalar_kernel(const T* __restrict__ x, const T* __restrict__ y, T* __restrict__ out,
                           int64_t n) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at < n) out[at] = add_relu(x[at], y[at]);
}

template <typename T>
cudaError_t launch_add_relu(const AddReluParams& p, cudaStream_t stream) {
  if (p.n == 0) return cudaSuccess;
  const auto* x = static_cast<const T*>(p.x);
  const auto* y = static_cast<const T*>(p.y);
  auto* out = static_cast<T*>(p.out);
  const auto bits = reinterpret_cast<uintptr_t>(x) | reinterpret_cast<uintptr_t>(y) |
                    reinterpret_cast<uintptr_t>(out);
  const bool aligned = bits % 16 == 0;
  // The grid's x dimension ends at 2^31 - 1: 2^41 elements in vectors, 2^39 one by one.
  const int64_t per_block = aligned ? int64_t{kThreads} * kVectors * Vector<T>::kSize : kThreads;
  const LaunchShape shape{{(p.n + per_block - 1) / per_block, 1, 1}, kThreads, 0};
  if (aligned) return launch<add_relu_vector_kernel<T>>(shape, stream, x, y, out, p.n);
  return launch<add_relu_scalar_kernel<T>>(shape, stream, x, y, out, p.n);
}

}  // namespace

int launch_add_relu_cuda(const AddReluParams& p, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  switch (p.dtype) {
    case DType::f32:
      return launch_add_relu<float>(p, s);
    case DType::bf16:
      return launch_add_relu<BFloat>(p, s);
    case DType::f16:
      return launch_add_relu<Half>(p, s);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace resnet_fused
