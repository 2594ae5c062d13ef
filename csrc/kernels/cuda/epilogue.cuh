// SPDX-License-Identifier: BSD-3-Clause
// What happens to a convolution's sums: BatchNorm, residual, ReLU, one rounding, and the way to
// memory through the ring's shared memory, so that global accesses are 16 bytes and in order.
//
// The tile of outputs lies in the stages behind the last step, which are free while the last steps
// are still multiplied: the residual is copied there meanwhile. Each thread then replaces the
// residual at its sums' places by the outputs, and the block writes the tile to memory.
#pragma once

#include "batch_norm.cuh"
#include "conv_mainloop.cuh"
#include "finish.cuh"

namespace resnet_fused {

// Scales and shifts of the columns k0 .. k0 + kColumns - 1 in shared memory: for each source all
// scales, then all shifts; 0 behind the last column. A thread makes one column of one source.
template <int kColumns>
struct Affine {
  ChannelBits bits;

  static __device__ __forceinline__ int source() { return threadIdx.x / kColumns; }
  static __device__ __forceinline__ int column() { return threadIdx.x % kColumns; }
  static __device__ __forceinline__ bool exists(const MmaConvParams& p, int sources, int64_t k0) {
    return source() < sources && k0 + column() < p.K;
  }

  __device__ __forceinline__ void load(const MmaConvParams& p, int sources, int64_t k0) {
    if (exists(p, sources, k0)) bits = channel_bits(p.source[source()].bn, k0 + column());
  }
  __device__ __forceinline__ void store(const MmaConvParams& p, int sources, int64_t k0,
                                        float* affine) const {
    if (source() >= sources) return;
    float scale = 0.0f, shift = 0.0f;
    if (exists(p, sources, k0)) channel_affine(p.source[source()].bn, bits, scale, shift);
    affine[source() * 2 * kColumns + column()] = scale;
    affine[(source() * 2 + 1) * kColumns + column()] = shift;
  }
};

// The tile of outputs in shared memory, in rows of chunks of 16 bytes. The 8 rows that a warp
// accesses at once (2 neighbouring columns per thread) have their chunks in different banks. To and
// from global memory, a thread moves the same chunk of every kRowsAtOnce-th row.
template <typename T, int kTile>
struct OutputTile {
  static constexpr MmaTile kShape = kMmaTiles[kTile];
  static constexpr int kRowBytes = kShape.columns * sizeof(T);
  static constexpr int kRowChunks = kRowBytes / kChunkBytes;
  static constexpr int kRowsAtOnce = kShape.threads() / kRowChunks;
  static constexpr int kStageRows = kShape.stage_bytes() < kShape.rows * kRowBytes
                                        ? kShape.stage_bytes() / kRowBytes
                                        : kShape.rows;
  static constexpr int kStages = (kShape.rows + kStageRows - 1) / kStageRows;
  static constexpr int kSwizzleRows = sizeof(T) == 2 ? 8 : 4;
  static_assert(kShape.stage_bytes() % kRowBytes == 0, "no row is in two stages");
  static_assert(kStages < kShape.stages, "the last step has a stage beside it");
  static_assert(kShape.threads() % kRowChunks == 0 && kShape.rows % kRowsAtOnce == 0 &&
                    kStageRows % kRowsAtOnce == 0 && kRowsAtOnce % kSwizzleRows == 0,
                "all of a thread's rows have one chunk and one swizzle");

  // Bytes from a row's begin to a chunk of it.
  static __device__ __forceinline__ int chunk(int row, int chunk) {
    return (chunk ^ row % kSwizzleRows * (8 / kSwizzleRows)) * kChunkBytes;
  }
  // Bytes to a row; `first` is where the tile's first stage begins, and the ring is closed.
  static __device__ __forceinline__ int row(int first, int row) {
    const int at = first + row * kRowBytes;
    return kStages == 1 || at < kShape.ring_bytes() ? at : at - kShape.ring_bytes();
  }
  // Rows of the tile that exist.
  static __device__ __forceinline__ int rows(const MmaConvParams& p, int64_t m0) {
    const int64_t left = p.N * p.P * p.Q - m0;
    return left < kShape.rows ? static_cast<int>(left) : kShape.rows;
  }
};

// Rows [stage * kStageRows, ...) of the residual, to the stage that begins at `at`.
template <typename T, int kTile>
__device__ __forceinline__ void copy_residual(const MmaConvParams& p, int64_t m0, int64_t k0,
                                              int stage, unsigned char* at) {
  using Tile = OutputTile<T, kTile>;
  constexpr int kSize = Vector<T>::kSize;
  const int chunk = threadIdx.x % Tile::kRowChunks, first = threadIdx.x / Tile::kRowChunks;
  const int begin = stage * Tile::kStageRows;
  const int end =
      begin + Tile::kStageRows < Tile::kShape.rows ? begin + Tile::kStageRows : Tile::kShape.rows;
  const int rows = Tile::rows(p, m0);
  const int64_t k = k0 + chunk * kSize;
  const T* from = static_cast<const T*>(p.residual) + (m0 + begin + first) * p.K + k;
  unsigned char* to = at + first * Tile::kRowBytes + Tile::chunk(first, chunk);
#pragma unroll 4
  for (int row = begin + first; row < end; row += Tile::kRowsAtOnce) {
    if constexpr (Tile::kShape.narrow) {
      Vector<T> v;
#pragma unroll
      for (int e = 0; e < kSize; ++e) v.v[e] = row < rows && k + e < p.K ? from[e] : T{};
      *reinterpret_cast<Vector<T>*>(to) = v;
    } else {
      ptx::copy_async_16(ptx::shared_address(to), from, row < rows && k < p.K ? 16 : 0);
    }
    from += p.K * Tile::kRowsAtOnce;
    to += Tile::kRowsAtOnce * Tile::kRowBytes;
  }
}

// Outputs of this thread's sums, to the tile that begins at `first`.
template <typename T, int kTile, int kSources>
__device__ __forceinline__ void finish_tile(const Finish& finish, unsigned char* shared, int first,
                                            const Sums<kTile> (&sums)[kSources]) {
  using Tile = OutputTile<T, kTile>;
  using Shape = WarpShape<kTile>;
  constexpr int kColumns = Tile::kShape.columns;
  const int lane = threadIdx.x % 32, column = Shape::first_column() + lane % 4 * 2;
  const int row = Shape::first_row() + lane / 4;
  const float* affine = reinterpret_cast<const float*>(shared + Tile::kShape.ring_bytes()) + column;
#pragma unroll
  for (int j = 0; j < Shape::kAcross; ++j) {
    float2 scale[kSources], shift[kSources];
#pragma unroll
    for (int source = 0; source < kSources; ++source) {
      const float* at = affine + source * 2 * kColumns + j * 8;
      scale[source] = *reinterpret_cast<const float2*>(at);
      shift[source] = *reinterpret_cast<const float2*>(at + kColumns);
    }
    const int byte = (column + j * 8) * static_cast<int>(sizeof(T));
    unsigned char* outputs =
        shared + Tile::chunk(lane / 4, byte / kChunkBytes) + byte % kChunkBytes;
#pragma unroll
    for (int i = 0; i < 2 * Shape::kDown; ++i) {
      auto* at = reinterpret_cast<ColumnPair<T>*>(outputs + Tile::row(first, row + i * 8));
      ColumnPair<T> pair = {};
      if (finish.residual) pair = *at;
      float y[2];
#pragma unroll
      for (int source = 0; source < kSources; ++source) {
        const float* sum = sums[source][i / 2][j] + i % 2 * 2;
        const float a = fmaf(sum[0], scale[source].x, shift[source].x);
        const float b = fmaf(sum[1], scale[source].y, shift[source].y);
        y[0] = source == 0 ? a : y[0] + a;
        y[1] = source == 0 ? b : y[1] + b;
      }
      pair.set(finish(y[0], pair.get(0)), finish(y[1], pair.get(1)));
      *at = pair;
    }
  }
}

// The tile of outputs to memory.
template <typename T, int kTile>
__device__ __forceinline__ void store_tile(const MmaConvParams& p, int64_t m0, int64_t k0,
                                           const unsigned char* shared, int first) {
  using Tile = OutputTile<T, kTile>;
  constexpr int kSize = Vector<T>::kSize;
  const int chunk = threadIdx.x % Tile::kRowChunks, first_row = threadIdx.x / Tile::kRowChunks;
  const int rows = Tile::rows(p, m0);
  const int64_t k = k0 + chunk * kSize;
  if (k >= p.K) return;
  const unsigned char* from = shared + Tile::chunk(first_row, chunk);
  T* to = static_cast<T*>(p.out) + (m0 + first_row) * p.K + k;
#pragma unroll
  for (int i = 0; i < Tile::kShape.rows / Tile::kRowsAtOnce; ++i) {
    const int row = first_row + i * Tile::kRowsAtOnce;
    if (row >= rows) return;
    const unsigned char* at = from + Tile::row(first, row);
    if constexpr (Tile::kShape.narrow) {
      const auto& v = *reinterpret_cast<const Vector<T>*>(at);
#pragma unroll
      for (int e = 0; e < kSize; ++e) {
        if (k + e < p.K) to[e] = v.v[e];
      }
    } else {
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(at);
    }
    to += p.K * Tile::kRowsAtOnce;
  }
}

// Sums as they are, to this split's part of the workspace: 8 bytes at a time if K is even, whole
// sectors of 32 bytes of a row together.
template <int kTile>
__device__ __forceinline__ void store_partial(const MmaConvParams& p, int64_t m0, int64_t k0,
                                              int split, const Sums<kTile>& sums) {
  using Shape = WarpShape<kTile>;
  const int64_t rows = p.N * p.P * p.Q;
  const int lane = threadIdx.x % 32;
  const int64_t first = k0 + Shape::first_column() + lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < 2 * Shape::kDown; ++i) {
    const int64_t m = m0 + Shape::first_row() + i * 8 + lane / 4;
    if (m >= rows) continue;
    float* to = p.workspace + (split * rows + m) * p.K + first;
#pragma unroll
    for (int j = 0; j < Shape::kAcross; ++j) {
      const float* pair = sums[i / 2][j] + i % 2 * 2;
      if constexpr (!kMmaTiles[kTile].narrow) {
        if (first + j * 8 < p.K) *reinterpret_cast<float2*>(to + j * 8) = {pair[0], pair[1]};
      } else {
        if (first + j * 8 < p.K) to[j * 8] = pair[0];
        if (first + j * 8 + 1 < p.K) to[j * 8 + 1] = pair[1];
      }
    }
  }
}

}  // namespace resnet_fused
