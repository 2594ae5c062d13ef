// SPDX-License-Identifier: BSD-3-Clause
// pool_linear on a GPU: means over H and W into p.pooled, then the linear layer, both in fp32.
//
// The order of every sum is fixed by C and HW. A mean adds the pixels i = g, g + 16, ... in group g
// and then the 16 groups. An output adds, in lane l of a warp, the channels of the quads l, l + 32,
// ...; then the lanes pairwise, 16 apart, 8 apart, ... 1 apart. How many outputs a warp makes at a
// time, and whether loads are wide, changes none of it: a batch of 1 gets a warp per output, larger
// ones reuse what is loaded, and all give the same bits.
#include "../pool_linear.h"
#include "launch.cuh"
#include "numeric.cuh"

namespace resnet_fused {
namespace {

constexpr int kThreads = 256;
constexpr int kPoolLanes = 16;  // 16-byte vectors side by side: 256 bytes of a pixel
constexpr int kPoolGroups = kThreads / kPoolLanes;
constexpr int kWarps = kThreads / 32;
constexpr int kQuad = 4;  // channels per lane and step

// kSize consecutive elements from `from`, the first `left` of them read, zeros behind.
template <typename T, int kSize, bool kWide>
__device__ __forceinline__ void load_floats(const T* __restrict__ from, int64_t left,
                                            float (&to)[kSize]) {
  struct alignas(kWide ? kSize * sizeof(T) : sizeof(T)) Pack {
    T v[kSize];
  };
  if (kWide && left > 0) {
    const Pack pack = *reinterpret_cast<const Pack*>(from);
#pragma unroll
    for (int e = 0; e < kSize; ++e) to[e] = to_float(pack.v[e]);
  } else {
#pragma unroll
    for (int e = 0; e < kSize; ++e) to[e] = !kWide && e < left ? to_float(from[e]) : 0.0f;
  }
}

template <typename T, bool kWide>
__global__ void __launch_bounds__(kThreads, 4)
    pool_kernel(const T* __restrict__ x, float* __restrict__ pooled, int64_t HW, int64_t C) {
  constexpr int kSize = Vector<T>::kSize, kChannels = kPoolLanes * kSize;
  RESNET_FUSED_SHARED(shared);
  auto* partial = reinterpret_cast<float*>(shared);  // [kPoolGroups][kChannels]
  const int64_t chunks = (C + kChannels - 1) / kChannels;
  const int64_t n = blockIdx.x / chunks, first = (blockIdx.x % chunks) * kChannels;
  const int lane = threadIdx.x % kPoolLanes, group = threadIdx.x / kPoolLanes;
  const int64_t c = first + lane * kSize;
  float sum[kSize] = {};
#pragma unroll 4
  for (int64_t i = group; i < HW; i += kPoolGroups) {
    float v[kSize];
    load_floats<T, kSize, kWide>(x + (n * HW + i) * C + c, C - c, v);
#pragma unroll
    for (int e = 0; e < kSize; ++e) sum[e] += v[e];
  }
#pragma unroll
  for (int e = 0; e < kSize; e += 4) {
    *reinterpret_cast<Vector<float>*>(partial + group * kChannels + lane * kSize + e) =
        Vector<float>{{sum[e], sum[e + 1], sum[e + 2], sum[e + 3]}};
  }
  __syncthreads();
  if (threadIdx.x < kChannels && first + threadIdx.x < C) {
    float total = 0.0f;
#pragma unroll
    for (int g = 0; g < kPoolGroups; ++g) total += partial[g * kChannels + threadIdx.x];
    pooled[n * C + first + threadIdx.x] = total / static_cast<float>(HW);
  }
}

// The sums of kCount values (a power of two up to 32) over the lanes: lane l gets value l / (32 /
// kCount). As long as a lane has several values, each step halves what it keeps.
template <int kCount>
__device__ __forceinline__ float sum_lanes(float (&v)[kCount], int lane) {
  int count = kCount;
#pragma unroll
  for (int apart = 16; apart > 0; apart /= 2) {
    if (count == 1) {
      v[0] += __shfl_xor_sync(0xffffffffu, v[0], apart);
      continue;
    }
    count /= 2;
    const bool upper = (lane & apart) != 0;
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      if (i >= count) break;
      const float given = upper ? v[i] : v[i + count], kept = upper ? v[i + count] : v[i];
      v[i] = kept + __shfl_xor_sync(0xffffffffu, given, apart);
    }
  }
  return v[0];
}

__device__ __forceinline__ float load_any(const void* p, int64_t i, DType d) {
  if (d == DType::f32) return static_cast<const float*>(p)[i];
  if (d == DType::bf16) return to_float(static_cast<const BFloat*>(p)[i]);
  return to_float(static_cast<const Half*>(p)[i]);
}

__device__ __forceinline__ void store_any(void* p, int64_t i, float v, DType d) {
  if (d == DType::f32) {
    static_cast<float*>(p)[i] = v;
  } else if (d == DType::bf16) {
    static_cast<BFloat*>(p)[i] = from_float<BFloat>(v);
  } else {
    static_cast<Half*>(p)[i] = from_float<Half>(v);
  }
}

// A warp makes kImages x kOutputs outputs, a block of kWarps warps kAcross of them side by side.
template <int kImages, int kOutputs>
struct LinearTile {
  static constexpr int kAcross = kImages == 1 ? kWarps : kWarps / 2;
  static constexpr int kBlockImages = kImages * (kWarps / kAcross);
  static constexpr int kBlockOutputs = kOutputs * kAcross;
};

template <typename W, int kImages, int kOutputs, bool kWide>
__global__ void __launch_bounds__(kThreads, 2) linear_kernel(const PoolLinearParams p) {
  using Tile = LinearTile<kImages, kOutputs>;
  constexpr int kCount = kImages * kOutputs;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t across = (p.K + Tile::kBlockOutputs - 1) / Tile::kBlockOutputs;
  const int64_t n0 = blockIdx.x / across * Tile::kBlockImages +
                     static_cast<int64_t>(warp / Tile::kAcross) * kImages;
  const int64_t k0 = blockIdx.x % across * Tile::kBlockOutputs +
                     static_cast<int64_t>(warp % Tile::kAcross) * kOutputs;
  if (n0 >= p.N || k0 >= p.K) return;  // a whole warp
  const float* pooled = p.pooled + n0 * p.C;
  const auto* weight = static_cast<const W*>(p.weight) + k0 * p.C;
  const int64_t images = p.N - n0, outputs = p.K - k0;
  float sum[kCount] = {};
  for (int64_t c = lane * kQuad; c < p.C; c += 32 * kQuad) {
    float w[kOutputs][kQuad];
#pragma unroll
    for (int k = 0; k < kOutputs; ++k) {
      load_floats<W, kQuad, kWide>(weight + k * p.C + c, k < outputs ? p.C - c : 0, w[k]);
    }
#pragma unroll
    for (int n = 0; n < kImages; ++n) {
      float x[kQuad];
      load_floats<float, kQuad, kWide>(pooled + n * p.C + c, n < images ? p.C - c : 0, x);
#pragma unroll
      for (int k = 0; k < kOutputs; ++k) {
#pragma unroll
        for (int e = 0; e < kQuad; ++e) {
          sum[n * kOutputs + k] = fmaf(x[e], w[k][e], sum[n * kOutputs + k]);
        }
      }
    }
  }
  const float total = sum_lanes<kCount>(sum, lane);
  constexpr int kShare = 32 / kCount;  // lanes that hold the same output
  const int at = lane / kShare, n = at / kOutputs, k = at % kOutputs;
  if (lane % kShare == 0 && n < images && k < outputs) {
    const float bias = p.bias != nullptr ? load_any(p.bias, k0 + k, p.bias_dtype) : 0.0f;
    store_any(p.out, (n0 + n) * p.K + k0 + k, total + bias, p.x_dtype);
  }
}

template <typename T>
cudaError_t launch_pool(const PoolLinearParams& p, cudaStream_t stream) {
  constexpr int kSize = Vector<T>::kSize, kChannels = kPoolLanes * kSize;
  const LaunchShape shape{{p.N * ((p.C + kChannels - 1) / kChannels), 1, 1},
                          kThreads,
                          static_cast<int64_t>(kPoolGroups * kChannels * sizeof(float))};
  const auto* x = static_cast<const T*>(p.x);
  const bool wide = p.C % kSize == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0;
  if (wide) return launch<pool_kernel<T, true>>(shape, stream, x, p.pooled, p.HW, p.C);
  return launch<pool_kernel<T, false>>(shape, stream, x, p.pooled, p.HW, p.C);
}

template <typename W, int kImages, int kOutputs, bool kWide>
cudaError_t launch_tile(const PoolLinearParams& p, cudaStream_t stream) {
  using Tile = LinearTile<kImages, kOutputs>;
  const int64_t down = (p.N + Tile::kBlockImages - 1) / Tile::kBlockImages;
  const int64_t across = (p.K + Tile::kBlockOutputs - 1) / Tile::kBlockOutputs;
  const LaunchShape shape{{down * across, 1, 1}, kThreads, 0};
  return launch<linear_kernel<W, kImages, kOutputs, kWide>>(shape, stream, p);
}

template <typename W>
cudaError_t launch_linear(const PoolLinearParams& p, cudaStream_t stream) {
  const bool wide = p.C % kQuad == 0 && reinterpret_cast<uintptr_t>(p.pooled) % 16 == 0 &&
                    reinterpret_cast<uintptr_t>(p.weight) % (kQuad * sizeof(W)) == 0;
  if (!wide) return launch_tile<W, 1, 1, false>(p, stream);
  if (p.N <= 4) return launch_tile<W, 1, 1, true>(p, stream);  // the weights' bytes limit it
  return launch_tile<W, 4, 8, true>(p, stream);
}

}  // namespace

int launch_pool_linear_cuda(const PoolLinearParams& p, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  if (p.N * p.K == 0) return cudaSuccess;
  cudaError_t error = cudaErrorInvalidValue;
  if (p.C == 0) {
    error = cudaSuccess;
  } else if (p.x_dtype == DType::f32) {
    error = launch_pool<float>(p, s);
  } else if (p.x_dtype == DType::bf16) {
    error = launch_pool<BFloat>(p, s);
  } else if (p.x_dtype == DType::f16) {
    error = launch_pool<Half>(p, s);
  }
  if (error != cudaSuccess) return error;
  switch (p.weight_dtype) {
    case DType::f32:
      return launch_linear<float>(p, s);
    case DType::bf16:
      return launch_linear<BFloat>(p, s);
    case DType::f16:
      return launch_linear<Half>(p, s);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace resnet_fused
