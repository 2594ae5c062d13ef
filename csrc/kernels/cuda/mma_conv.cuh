// SPDX-License-Identifier: BSD-3-Clause
// The kernels of the tensor-core convolution and their launch for one element type.
#pragma once

#include "epilogue.cuh"
#include "launch.cuh"

namespace resnet_fused {

// The ring of stages that copies fill and products empty.
template <typename T, int kTile>
struct Ring {
  static constexpr MmaTile kShape = kMmaTiles[kTile];
  TileCopy<T, kTile> copies;

  // Step `next` of `total` to the stage at `to`, and the residual behind the last step. The second
  // source begins with step `second`.
  __device__ __forceinline__ void fill(const MmaConvParams& p, unsigned char* shared, int64_t m0,
                                       int64_t k0, int next, int second, int total, int to) {
    if (next < total) {
      if (kShape.sources == 2 && next == second) copies.start(p, p.source[1], m0, k0, 0);
      copies.copy(shared, to);
    } else if (p.residual != nullptr && p.plan.splits == 1 &&
               next - total < OutputTile<T, kTile>::kStages) {
      copy_residual<T, kTile>(p, m0, k0, next - total, shared + to);
    }
    if constexpr (!kShape.narrow) ptx::copy_commit();
  }

  // Until the oldest step under way is in shared memory, and the one before it has been used by
  // all threads: its stage is the next to be filled.
  static __device__ __forceinline__ void wait() {
    if constexpr (!kShape.narrow) ptx::copy_wait<kShape.stages - 2>();
    __syncthreads();
  }

  static __device__ __forceinline__ int following(int stage) {
    stage += kShape.stage_bytes();
    return stage == kShape.ring_bytes() ? 0 : stage;
  }
  static __device__ __forceinline__ int before(int stage) {
    return (stage == 0 ? kShape.ring_bytes() : stage) - kShape.stage_bytes();
  }
};

template <typename T, int kTile>
__global__ void __launch_bounds__(kMmaTiles[kTile].threads(), kMmaTiles[kTile].blocks)
    mma_conv_kernel(const __grid_constant__ MmaConvParams p, int steps0, int steps1) {
  constexpr MmaTile kShape = kMmaTiles[kTile];
  RESNET_FUSED_SHARED(shared);
  const uint32_t across = static_cast<uint32_t>((p.K + kShape.columns - 1) / kShape.columns);
  const uint32_t down = blockIdx.x / across;
  const int64_t m0 = static_cast<int64_t>(down) * kShape.rows;
  const int64_t k0 = static_cast<int64_t>(blockIdx.x - down * across) * kShape.columns;

  // One source: a range of the steps of either. Two: all of the first, then all of the second.
  StepRange range{0, 0, steps0};
  if (kShape.sources == 1 && p.plan.splits > 1) {
    range = split_range(steps0, steps1, p.plan.splits, static_cast<int>(blockIdx.y));
  }
  const int second = range.end - range.begin;
  const int total = second + (kShape.sources == 2 ? steps1 : 0);

  // Under way before the copies: both take a memory latency, and it is the same one.
  static_assert(kShape.sources * kShape.columns <= kShape.threads(), "a column for each thread");
  Affine<kShape.columns> affine;
  if (p.plan.splits == 1) affine.load(p, kShape.sources, k0);

  Ring<T, kTile> ring;
  ring.copies.start(p, p.source[range.source], m0, k0, range.begin);
  constexpr int kAhead = kShape.stages - 1;
#pragma unroll 1
  for (int step = 0; step < kAhead; ++step) {
    ring.fill(p, shared, m0, k0, step, second, total, step * kShape.stage_bytes());
  }
  if (p.plan.splits == 1) {
    affine.store(p, kShape.sources, k0, reinterpret_cast<float*>(shared + kShape.ring_bytes()));
  }

  Sums<kTile> sums[kShape.sources] = {};
  int stage = 0;
#pragma unroll 1
  for (int step = 0; step < second; ++step) {
    ring.wait();
    ring.fill(p, shared, m0, k0, step + kAhead, second, total, ring.before(stage));
    multiply_step<T, kTile>(ptx::shared_address(shared + stage), sums[0]);
    stage = ring.following(stage);
  }
  if constexpr (kShape.sources == 2) {
#pragma unroll 1
    for (int step = second; step < total; ++step) {
      ring.wait();
      ring.fill(p, shared, m0, k0, step + kAhead, second, total, ring.before(stage));
      multiply_step<T, kTile>(ptx::shared_address(shared + stage), sums[1]);
      stage = ring.following(stage);
    }
  }

  if constexpr (kShape.sources == 1) {
    if (p.plan.splits > 1) {
      store_partial<kTile>(p, m0, k0, static_cast<int>(blockIdx.y), sums[0]);
      return;
    }
  }
  if constexpr (!kShape.narrow) ptx::copy_wait<0>();
  __syncthreads();
  // `stage` is the one behind the last step.
  finish_tile<T, kTile>(Finish{p.residual != nullptr, p.relu}, shared, stage, sums);
  __syncthreads();
  store_tile<T, kTile>(p, m0, k0, shared, stage);
}

// `count` (at most 4) elements from `from` on, zeros behind; all 4 in one access unless kNarrow.
template <bool kNarrow, typename T>
struct alignas(kNarrow ? sizeof(T) : 4 * sizeof(T)) Quad {
  T v[4];

  __device__ __forceinline__ void load(const T* from, int count) {
    if constexpr (kNarrow) {
#pragma unroll
      for (int e = 0; e < 4; ++e) v[e] = e < count ? from[e] : T{};
    } else if (count > 0) {
      *this = *reinterpret_cast<const Quad*>(from);
    } else {
      *this = {};
    }
  }
  __device__ __forceinline__ void store(T* to, int count) const {
    if constexpr (kNarrow) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (e < count) to[e] = v[e];
      }
    } else {
      if (count > 0) *reinterpret_cast<Quad*>(to) = *this;
    }
  }
};

// Adds the partial sums of each source in the order of the splits and finishes the outputs. A
// thread makes 4 neighbouring columns of a row.
template <typename T, bool kNarrow>
__global__ void __launch_bounds__(kSplitSumThreads, 3)
    split_sum_kernel(const __grid_constant__ MmaConvParams p, int first_splits) {
  constexpr int kEach = 4, kAhead = 8;
  constexpr int kThreadsAcross = kSplitSumColumns / kEach;
  static_assert(kThreadsAcross * kSplitSumRows == kSplitSumThreads, "a thread for every 4 columns");
  RESNET_FUSED_SHARED(shared);
  const uint32_t across = static_cast<uint32_t>((p.K + kSplitSumColumns - 1) / kSplitSumColumns);
  const uint32_t down = blockIdx.x / across;
  const int64_t k0 = static_cast<int64_t>(blockIdx.x - down * across) * kSplitSumColumns;
  Affine<kSplitSumColumns> affine;
  affine.load(p, p.sources, k0);

  const int column = threadIdx.x % kThreadsAcross * kEach;
  const int64_t rows = p.N * p.P * p.Q, k = k0 + column;
  const int64_t m = static_cast<int64_t>(down) * kSplitSumRows + threadIdx.x / kThreadsAcross;
  const int64_t at = m * p.K + k, step = rows * p.K;
  const int count = m < rows && k < p.K ? static_cast<int>(p.K - k < kEach ? p.K - k : kEach) : 0;
  const Finish finish{p.residual != nullptr, p.relu};
  Quad<kNarrow, T> outputs = {};
  if (finish.residual) outputs.load(static_cast<const T*>(p.residual) + at, count);

  // Eight loads are under way at once; what is behind the last split adds 0.
  float sums[2][kEach] = {};
#pragma unroll
  for (int source = 0; source < 2; ++source) {
    const int end = source == 0 ? first_splits : p.plan.splits;
    for (int split = source == 0 ? 0 : first_splits; split < end; split += kAhead) {
      Quad<kNarrow, float> parts[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        parts[i].load(p.workspace + (split + i) * step + at, split + i < end ? count : 0);
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
#pragma unroll
        for (int e = 0; e < kEach; ++e) sums[source][e] += parts[i].v[e];
      }
    }
  }

  auto* scales = reinterpret_cast<float*>(shared);
  affine.store(p, p.sources, k0, scales);
  __syncthreads();
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    const float* scale = scales + column + e;
    float y = fmaf(sums[0][e], scale[0], scale[kSplitSumColumns]);
    if (p.sources == 2) {
      scale += 2 * kSplitSumColumns;
      y += fmaf(sums[1][e], scale[0], scale[kSplitSumColumns]);
    }
    outputs.v[e] = finish(y, outputs.v[e]);
  }
  outputs.store(static_cast<T*>(p.out) + at, count);
}

// Outputs from the partial sums in p.workspace.
template <typename T>
cudaError_t launch_split_sum_as(const MmaConvParams& p, bool narrow, cudaStream_t stream) {
  const int64_t steps1 = p.sources == 2 ? source_steps(p.source[1], p.dtype) : 0;
  const int first_splits =
      first_source_splits(source_steps(p.source[0], p.dtype), steps1, p.plan.splits);
  const LaunchShape shape = split_sum_shape(p);
  return narrow ? launch<split_sum_kernel<T, true>>(shape, stream, p, first_splits)
                : launch<split_sum_kernel<T, false>>(shape, stream, p, first_splits);
}

template <typename T, int kTile = 0>
cudaError_t launch_mma_conv_as(const MmaConvParams& p, cudaStream_t stream) {
  if constexpr (kTile < kMmaTileCount) {
    if (p.plan.tile != kTile) return launch_mma_conv_as<T, kTile + 1>(p, stream);
    const int steps0 = static_cast<int>(source_steps(p.source[0], p.dtype));
    const int steps1 = p.sources == 2 ? static_cast<int>(source_steps(p.source[1], p.dtype)) : 0;
    const cudaError_t error =
        launch<mma_conv_kernel<T, kTile>>(mma_conv_shape(p), stream, p, steps0, steps1);
    if (error != cudaSuccess || p.plan.splits == 1) return error;
    return launch_split_sum_as<T>(p, kMmaTiles[kTile].narrow, stream);
  } else {
    return cudaErrorInvalidValue;
  }
}

// One file instantiates each type, so that they compile side by side.
extern template cudaError_t launch_mma_conv_as<Half>(const MmaConvParams& p, cudaStream_t stream);
extern template cudaError_t launch_mma_conv_as<BFloat>(const MmaConvParams& p, cudaStream_t stream);
extern template cudaError_t launch_mma_conv_as<float>(const MmaConvParams& p, cudaStream_t stream);
extern template cudaError_t launch_split_sum_as<Half>(const MmaConvParams& p, bool narrow,
                                                      cudaStream_t stream);
extern template cudaError_t launch_split_sum_as<BFloat>(const MmaConvParams& p, bool narrow,
                                                        cudaStream_t stream);
extern template cudaError_t launch_split_sum_as<float>(const MmaConvParams& p, bool narrow,
                                                       cudaStream_t stream);

}  // namespace resnet_fused
