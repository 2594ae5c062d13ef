// SPDX-License-Identifier: BSD-3-Clause
// The main loop of the tensor-core convolution. Steps of 128 bytes of channels of one filter tap
// are copied to a ring of stages in shared memory, [rows + columns][128 bytes] each, some steps
// ahead of their use; a step is then 4 products of 32 bytes. The three element types differ in the
// mma instruction alone: bytes lie in rows and in registers alike.
//
// The 16-byte chunk c of row r is at chunk c ^ (r % 8) of that row. ldmatrix takes one chunk of 8
// consecutive rows at a time: they are in 8 different banks then, and so are the chunks of a row
// that 8 threads write.
//
// Where a channel, tap, pixel, row or column does not exist, nothing is read and zeros are put in
// its place, in both operands for channels: a zero weight would not hide a NaN of what is behind.
#pragma once

#include "conv_plan.h"
#include "numeric.cuh"

namespace resnet_fused {

constexpr int kChunkBytes = 16;
constexpr int kChunks = kStepBytes / kChunkBytes;

// A thread's chunks in a stage: the same chunk of every kRowsAtOnce-th row.
template <int kTile>
struct CopyShape {
  static constexpr MmaTile kShape = kMmaTiles[kTile];
  static constexpr int kRowsAtOnce = kShape.threads() / kChunks;
  static constexpr int kPixels = kShape.rows / kRowsAtOnce;
  static constexpr int kFilters = kShape.columns / kRowsAtOnce;
  static constexpr int kFilterStage = kShape.rows * kStepBytes;  // where filters begin in a stage
  static_assert(kShape.rows % kRowsAtOnce == 0 && kShape.columns % kRowsAtOnce == 0, "whole rows");
  static_assert(kRowsAtOnce % 8 == 0, "all of a thread's rows have one swizzle");

  static __device__ __forceinline__ int row() { return threadIdx.x / kChunks; }
  static __device__ __forceinline__ int chunk() { return threadIdx.x % kChunks; }
  static __device__ __forceinline__ int offset() {
    return row() * kStepBytes + (chunk() ^ (row() % 8)) * kChunkBytes;
  }
};

// The output pixels of a thread's rows: for each, the image position that filter tap (0, 0) meets.
template <int kRows, int kRowsAtOnce>
struct Pixels {
  int h[kRows], w[kRows];
  int at[kRows];  // pixels from the first one of image `n0`

  // Returns n0, the image of the tile's first pixel.
  __device__ __forceinline__ int64_t start(const MmaConvParams& p, const ConvSource& s, int64_t m0,
                                           int row) {
    const uint32_t image = static_cast<uint32_t>(p.P * p.Q), across = static_cast<uint32_t>(p.Q);
    const int64_t n0 = m0 / image, rows = p.N * image;
    const uint32_t first = static_cast<uint32_t>(m0 - n0 * image);
    const int height = static_cast<int>(s.H), width = static_cast<int>(s.W);
    const int down = static_cast<int>(s.stride[0]), right = static_cast<int>(s.stride[1]);
    const int above = static_cast<int>(s.padding[0]), left = static_cast<int>(s.padding[1]);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const uint32_t pixel = first + row + i * kRowsAtOnce;
      const uint32_t n = pixel / image, in_image = pixel - n * image;
      const uint32_t y = in_image / across, x = in_image - y * across;
      h[i] = -(1 << 30);  // behind the last pixel: no tap reaches the image
      w[i] = at[i] = 0;
      if (m0 + row + i * kRowsAtOnce < rows) {
        h[i] = static_cast<int>(y) * down - above;
        w[i] = static_cast<int>(x) * right - left;
        at[i] = (static_cast<int>(n) * height + h[i]) * width + w[i];
      }
    }
    return n0;
  }
};

// Copies of steps of one source, from a step on. Channels come in whole chunks; positions are
// counted in chunks from the first image of the tile, and from the first filter.
template <typename T, int kTile>
struct VectorCopy {
  using Shape = CopyShape<kTile>;
  static constexpr int kChannels = kChunkBytes / sizeof(T);  // of a chunk
  Pixels<Shape::kPixels, Shape::kRowsAtOnce> pixels;         // `at` in chunks
  const unsigned char *images, *weights;
  int filter, filter_rows;  // this thread's first filter, and from each to the next
  int filters;              // that exist, from that one on
  int channels, chunk;      // of a pixel, in chunks; this thread's within it
  int height, width;
  int tap_h, tap_w, tap_at;  // the tap's distance from tap (0, 0), in pixels and in chunks
  int row_end, dilation_h, dilation_w;

  __device__ __forceinline__ void start(const MmaConvParams& p, const ConvSource& s, int64_t m0,
                                        int64_t k0, int step) {
    const int64_t n0 = pixels.start(p, s, m0, Shape::row());
    images = static_cast<const unsigned char*>(s.x) + n0 * (s.H * s.W * s.C * sizeof(T));
    weights = static_cast<const unsigned char*>(s.weight);
    channels = static_cast<int>(s.C) / kChannels;
    height = static_cast<int>(s.H);
    width = static_cast<int>(s.W);
    dilation_h = static_cast<int>(s.dilation[0]);
    dilation_w = static_cast<int>(s.dilation[1]);
    const int taps = static_cast<int>(s.S);
    row_end = taps * dilation_w;

    const int blocks = (channels + kChunks - 1) / kChunks;
    const int tap = step / blocks, r = tap / taps;
    chunk = (step - tap * blocks) * kChunks + Shape::chunk();
    tap_h = r * dilation_h;
    tap_w = (tap - r * taps) * dilation_w;
    tap_at = (tap_h * width + tap_w) * channels;
    const int filter_chunks = static_cast<int>(s.R) * taps * channels;
    filter = (static_cast<int>(k0) + Shape::row()) * filter_chunks + tap * channels;
    filter_rows = filter_chunks * Shape::kRowsAtOnce;
    filters = static_cast<int>(p.K - k0) - Shape::row();
#pragma unroll
    for (int i = 0; i < Shape::kPixels; ++i) pixels.at[i] *= channels;
  }

  // The next step, to the stage that begins at `stage`.
  __device__ __forceinline__ void copy(unsigned char* shared, int stage) {
    const uint32_t to = ptx::shared_address(shared + stage + Shape::offset());
    const bool there = chunk < channels;
#pragma unroll
    for (int i = 0; i < Shape::kPixels; ++i) {
      const bool inside =
          static_cast<uint32_t>(pixels.h[i] + tap_h) < static_cast<uint32_t>(height) &&
          static_cast<uint32_t>(pixels.w[i] + tap_w) < static_cast<uint32_t>(width);
      const int64_t at = pixels.at[i] + tap_at + chunk;
      ptx::copy_async_16(to + i * (Shape::kRowsAtOnce * kStepBytes), images + at * kChunkBytes,
                         there && inside ? 16 : 0);
    }
#pragma unroll
    for (int i = 0; i < Shape::kFilters; ++i) {
      const int64_t at = filter + i * filter_rows + chunk;
      ptx::copy_async_16(to + Shape::kFilterStage + i * (Shape::kRowsAtOnce * kStepBytes),
                         weights + at * kChunkBytes,
                         there && i * Shape::kRowsAtOnce < filters ? 16 : 0);
    }
    advance();
  }

  __device__ __forceinline__ void advance() {
    chunk += kChunks;
    if (chunk - Shape::chunk() < channels) return;
    chunk = Shape::chunk();
    filter += channels;
    tap_w += dilation_w;
    if (tap_w == row_end) {
      tap_w = 0;
      tap_h += dilation_h;
    }
    tap_at = (tap_h * width + tap_w) * channels;
  }
};

// The same element by element, for any C and any alignment. A step may hold several taps.
template <typename T, int kTile>
struct NarrowCopy {
  using Shape = CopyShape<kTile>;
  static constexpr int kSize = Vector<T>::kSize;
  Pixels<Shape::kPixels, Shape::kRowsAtOnce> pixels;
  const ConvSource* source;
  const T *images, *filter;
  int filters;
  uint32_t padded, at;  // this chunk's first channel, counted through all taps

  __device__ __forceinline__ void start(const MmaConvParams& p, const ConvSource& s, int64_t m0,
                                        int64_t k0, int step) {
    const int64_t n0 = pixels.start(p, s, m0, Shape::row());
    source = &s;
    images = static_cast<const T*>(s.x) + n0 * (s.H * s.W * s.C);
    filter = static_cast<const T*>(s.weight) + (k0 + Shape::row()) * (s.R * s.S * s.C);
    filters = static_cast<int>(p.K - k0) - Shape::row();
    padded = static_cast<uint32_t>(padded_channels(s.C, sizeof(T)));
    at = static_cast<uint32_t>(step) * (kSize * kChunks) + Shape::chunk() * kSize;
  }

  __device__ __forceinline__ void copy(unsigned char* shared, int stage) {
    const ConvSource& s = *source;
    const uint32_t height = static_cast<uint32_t>(s.H), width = static_cast<uint32_t>(s.W);
    const uint32_t taps = static_cast<uint32_t>(s.S), rows = static_cast<uint32_t>(s.R);
    const int channels = static_cast<int>(s.C);
    const int64_t filter_rows = s.R * s.S * s.C * Shape::kRowsAtOnce;
    const uint32_t tap = at / padded;
    uint32_t c = at - tap * padded, r = tap / taps, q = tap - r * taps;
    Vector<T> pixel_chunks[Shape::kPixels], filter_chunks[Shape::kFilters];
#pragma unroll
    for (int e = 0; e < kSize; ++e) {
      const bool there = r < rows && c < static_cast<uint32_t>(channels);
      const uint32_t tap_h = r * static_cast<uint32_t>(s.dilation[0]);
      const uint32_t tap_w = q * static_cast<uint32_t>(s.dilation[1]);
      const int tap_at = static_cast<int>(tap_h * width + tap_w);
#pragma unroll
      for (int i = 0; i < Shape::kPixels; ++i) {
        const bool inside = there && pixels.h[i] + tap_h < height && pixels.w[i] + tap_w < width;
        const int64_t from = static_cast<int64_t>(pixels.at[i] + tap_at) * channels + c;
        pixel_chunks[i].v[e] = inside ? images[from] : T{};
      }
      const int64_t weight = static_cast<int64_t>(r * taps + q) * channels + c;
#pragma unroll
      for (int i = 0; i < Shape::kFilters; ++i) {
        filter_chunks[i].v[e] =
            there && i * Shape::kRowsAtOnce < filters ? filter[i * filter_rows + weight] : T{};
      }
      if (++c == padded) {
        c = 0;
        if (++q == taps) {
          q = 0;
          ++r;
        }
      }
    }
    unsigned char* to = shared + stage + Shape::offset();
#pragma unroll
    for (int i = 0; i < Shape::kPixels; ++i) {
      *reinterpret_cast<Vector<T>*>(to + i * (Shape::kRowsAtOnce * kStepBytes)) = pixel_chunks[i];
    }
    to += Shape::kFilterStage;
#pragma unroll
    for (int i = 0; i < Shape::kFilters; ++i) {
      *reinterpret_cast<Vector<T>*>(to + i * (Shape::kRowsAtOnce * kStepBytes)) = filter_chunks[i];
    }
    at += kSize * kChunks;
  }
};

template <typename T, int kTile, bool kNarrow = kMmaTiles[kTile].narrow>
struct TileCopyOf {
  using Type = VectorCopy<T, kTile>;
};
template <typename T, int kTile>
struct TileCopyOf<T, kTile, true> {
  using Type = NarrowCopy<T, kTile>;
};
template <typename T, int kTile>
using TileCopy = typename TileCopyOf<T, kTile>::Type;

// A warp's part of a tile.
template <int kTile>
struct WarpShape {
  static constexpr MmaTile kShape = kMmaTiles[kTile];
  static constexpr int kRows = kShape.rows / kShape.warps_down;
  static constexpr int kColumns = kShape.columns / kShape.warps_across;
  static constexpr int kDown = kRows / 16, kAcross = kColumns / 8;  // of mma tiles
  static_assert(kRows % 16 == 0 && kColumns % 16 == 0, "whole ldmatrix operands");

  static __device__ __forceinline__ int first_row() {
    return static_cast<int>(threadIdx.x) / 32 / kShape.warps_across * kRows;
  }
  static __device__ __forceinline__ int first_column() {
    return static_cast<int>(threadIdx.x) / 32 % kShape.warps_across * kColumns;
  }
};

template <int kTile>
using Sums = float[WarpShape<kTile>::kDown][WarpShape<kTile>::kAcross][4];

// Adds the products of one step to a warp's sums. An mma takes 16 rows (ldmatrix: the two halves of
// the rows, of the first 16 bytes and of the second) and 8 columns (16 at a time: for each 8, the
// first 16 bytes and the second).
template <typename T, int kTile>
__device__ __forceinline__ void multiply_step(uint32_t stage, Sums<kTile>& sums) {
  using Shape = WarpShape<kTile>;
  const int lane = threadIdx.x % 32;
  const uint32_t rows = stage + (Shape::first_row() + lane % 16) * kStepBytes;
  const uint32_t columns = stage + CopyShape<kTile>::kFilterStage +
                           (Shape::first_column() + lane / 16 * 8 + lane % 8) * kStepBytes;
  const uint32_t row_chunk = (lane / 16 ^ lane % 8) * kChunkBytes;
  const uint32_t column_chunk = (lane / 8 % 2 ^ lane % 8) * kChunkBytes;
#pragma unroll
  for (uint32_t part = 0; part < kStepBytes; part += 32) {
    uint32_t a[Shape::kDown][4];
#pragma unroll
    for (int i = 0; i < Shape::kDown; ++i) {
      ptx::load_matrix_4(a[i], rows + i * (16 * kStepBytes) + (row_chunk ^ part));
      round_operands<T>(a[i]);
    }
#pragma unroll
    for (int j = 0; j < Shape::kAcross; j += 2) {
      uint32_t b[4];
      ptx::load_matrix_4(b, columns + j * (8 * kStepBytes) + (column_chunk ^ part));
      round_operands<T>(b);
#pragma unroll
      for (int i = 0; i < Shape::kDown; ++i) {
        mma<T>(sums[i][j], a[i], b[0], b[1]);
        mma<T>(sums[i][j + 1], a[i], b[2], b[3]);
      }
    }
  }
}

}  // namespace resnet_fused
