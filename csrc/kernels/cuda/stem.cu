// SPDX-License-Identifier: BSD-3-Clause
// The stem in one kernel: 7x7 convolution (stride 2, padding 3, C <= 4) on the tensor cores,
// BatchNorm, ReLU, 3x3 max-pool (stride 2, padding 1).
//
// A block makes tiles of 7x8 pooled pixels for one group of filters (128 bytes of each output
// pixel) and keeps the group's weights in shared memory for all its tiles. Per tile:
//   1. patch: the 35x40 input pixels below the tile, each as 4 channels, zeros where the image or
//      its channels end. Bytes are normalised between their load and their store (normalise.h);
//   2. product: the 15x17 convolution pixels are the 255 rows of a GEMM. Filter row r of a pixel is
//      8 neighbouring pixels of the patch: 32 operands in one piece, which ldmatrix takes from the
//      patch itself, with no copy for the overlaps;
//   3. BatchNorm in fp32, rounded, to shared memory;
//   4. the pool, from there, 16 bytes at a time, with zero in every maximum for the ReLU. Rounding
//      keeps order, so this is the rounded maximum. The next tile's pixels are under way meanwhile.
// The filter has 7 columns, its operands 8. The eighth is zero in both operands: with a weight of
// zero alone a NaN outside of the receptive field would get in.
#include "../stem.h"
#include "batch_norm.cuh"
#include "launch.cuh"
#include "stem_bytes.cuh"

namespace resnet_fused {
namespace {

constexpr int kThreads = 256;
constexpr int kPoolRows = 7, kPoolColumns = 8;
constexpr int kConvRows = 2 * kPoolRows + 1, kConvColumns = 2 * kPoolColumns + 1;
constexpr int kConvPixels = kConvRows * kConvColumns;
constexpr int kRowTiles = 2;  // m16 tiles per warp
constexpr int kGemmRows = kThreads / 32 * kRowTiles * 16;
static_assert(kConvPixels <= kGemmRows, "every pixel has a row");
constexpr int kFilterSize = 7, kTaps = 8;
constexpr int kPatchRows = 2 * (kConvRows - 1) + kFilterSize;
constexpr int kPatchColumns = 2 * (kConvColumns - 1) + kTaps;
constexpr int kRowsAtOnce = 6;  // rows that 240 of the threads load side by side
constexpr int kPatchLoads = (kPatchRows + kRowsAtOnce - 1) / kRowsAtOnce;
static_assert(kRowsAtOnce * kPatchColumns <= kThreads && kRowsAtOnce % 2 == 0, "whole rows");

template <typename T>
struct alignas(2 * sizeof(T)) Pair {
  T v[2];
};

// What the tensor cores shall multiply.
template <typename T>
__device__ __forceinline__ T operand(T v) {
  return v;
}
__device__ __forceinline__ float operand(float v) {
  return __uint_as_float(tf32_from_float(__float_as_uint(v)));
}

// Shared memory. Every ldmatrix reads eight 16-byte pieces from eight rows of an operand, and the
// pads make these fall into eight different banks of 16 bytes, also where the pixels run over the
// end of a row of the tile. TF32 reads single pixels of 16 bytes, two columns apart: there a row
// holds its even columns first, then its odd ones.
template <typename T>
struct Layout {
  static constexpr bool kSplitColumns = sizeof(Pixel<T>) == 16;
  static constexpr int kFilters = 128 / sizeof(T);
  static constexpr int kRow = kPatchColumns * sizeof(Pixel<T>);
  static constexpr int kRowPair = 2 * kRow + 16;  // of patch rows: one row of the convolution
  static constexpr int kFilter = kFilterSize * kTaps * sizeof(Pixel<T>) + 16;
  static constexpr int kTilePixel = 128 + 8 * sizeof(T);  // no two of a warp's stores in a bank

  static constexpr int kPatch = 0;
  static constexpr int kWeights = kPatch + (kPatchRows + 1) / 2 * kRowPair;
  static constexpr int kResult = kWeights + kFilters * kFilter;
  static constexpr int kAffine = kResult + kGemmRows * kTilePixel;  // scales, then shifts
  static constexpr int kTiles = kAffine + kFilters * 2 * sizeof(float);
  static constexpr int kNorm = kTiles + 2 * 16;  // of bytes: scales, then shifts
  static constexpr int kNormBytes = 2 * kChannels * sizeof(float);
  template <typename X>
  static constexpr int kBytes = kNorm + (sizeof(X) == 1 ? kNormBytes : 0);
  static_assert(kRowPair % 128 == 16 * kConvColumns % 128, "row ends keep the banks in turn");
  static_assert(kFilter / 16 % 2 == 1, "filters are in different banks");
  static_assert(kNorm + kNormBytes <= kMostShared, "fits every GPU");

  static __device__ __forceinline__ int pixel(int row, int column) {
    const int at = kSplitColumns ? column % 2 * (kRow / 2) + column / 2 * 16 : column * 8;
    return row / 2 * kRowPair + row % 2 * kRow + at;
  }
};

// A tile's first pooled pixel. One thread finds it and leaves it in shared memory, two places in
// turn: the other threads save the divisions, and as they cannot know it before the barrier, the
// product has the registers to itself.
struct alignas(16) Tile {
  int n, p, q, there;  // 0: beyond the last tile
};

__device__ __forceinline__ void find_tile(Tile* to, int at, int tiles, int down, int across) {
  if (threadIdx.x != 0) return;
  const int row = at / across;
  *to = {row / down, row % down * kPoolRows, at % across * kPoolColumns, at < tiles};
}

// The patch's pixels of this thread. As an unsigned number, a coordinate before the image is beyond
// it, so that one comparison finds both. Without a tile nothing is read; that this is no branch
// around the call keeps the pixels' registers free for the rest of the loop.
template <typename X>
__device__ __forceinline__ void load_patch(const StemParams& p, const Tile& tile,
                                           Pixel<X> (&pixels)[kPatchLoads]) {
  const uint32_t height = tile.there ? static_cast<uint32_t>(p.H) : 0;
  const uint32_t width = static_cast<uint32_t>(p.W);
  const int h = 4 * tile.p - 5 + static_cast<int>(threadIdx.x) / kPatchColumns;
  const int w = 4 * tile.q - 5 + static_cast<int>(threadIdx.x) % kPatchColumns;
  const auto* first = static_cast<const X*>(p.x) + tile.n * p.x_strides[0] + h * p.x_strides[2] +
                      w * p.x_strides[3];
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    const auto* from = first + c * p.x_strides[1];
#pragma unroll
    for (int i = 0; i < kPatchLoads; ++i) {
      const bool inside =
          static_cast<uint32_t>(w) < width && static_cast<uint32_t>(h + i * kRowsAtOnce) < height;
      pixels[i].v[c] = inside && c < p.C ? *from : X{};
      from += kRowsAtOnce * p.x_strides[2];
    }
  }
}

// There is room for the row behind an odd number of rows.
template <typename T, typename X>
__device__ __forceinline__ void store_patch(const StemParams& p, const Tile& tile,
                                            unsigned char* shared,
                                            const Pixel<X> (&pixels)[kPatchLoads]) {
  using L = Layout<T>;
  if (threadIdx.x >= kRowsAtOnce * kPatchColumns) return;
  const int first = L::pixel(threadIdx.x / kPatchColumns, threadIdx.x % kPatchColumns);
  const auto* norm = reinterpret_cast<const float*>(shared + L::kNorm);
  const int h = 4 * tile.p - 5 + static_cast<int>(threadIdx.x) / kPatchColumns;
  const int w = 4 * tile.q - 5 + static_cast<int>(threadIdx.x) % kPatchColumns;
  const bool column = static_cast<uint32_t>(w) < static_cast<uint32_t>(p.W);
#pragma unroll
  for (int i = 0; i < kPatchLoads; ++i) {
    const bool row = static_cast<uint32_t>(h + i * kRowsAtOnce) < static_cast<uint32_t>(p.H);
    Pixel<T> pixel = values<T>(pixels[i], norm, column && row);
#pragma unroll
    for (int c = 0; c < kChannels; ++c) pixel.v[c] = operand(pixel.v[c]);
    *reinterpret_cast<Pixel<T>*>(shared + L::kPatch + first + i * (kRowsAtOnce / 2 * L::kRowPair)) =
        pixel;
  }
}

// Weights as [filter][row][tap][channel], and the filters' BatchNorm.
template <typename T>
__device__ __forceinline__ void load_filters(const StemParams& p, int64_t k0,
                                             unsigned char* shared) {
  using L = Layout<T>;
  constexpr int kPixels = kFilterSize * kTaps;
  static_assert(L::kFilters * kPixels % (7 * kThreads) == 0, "seven loads at a time");
#pragma unroll 7
  for (int first = 0; first < L::kFilters * kPixels; first += kThreads) {
    const int i = first + threadIdx.x;
    const int k = i / kPixels, r = i % kPixels / kTaps, s = i % kTaps;
    const auto* from = static_cast<const T*>(p.weight) + (k0 + k) * p.weight_strides[0] +
                       r * p.weight_strides[2] + s * p.weight_strides[3];
    const bool there = k0 + k < p.K && s < kFilterSize;
    Pixel<T> pixel;
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      pixel.v[c] = there && c < p.C ? operand(from[c * p.weight_strides[1]]) : T{};
    }
    *reinterpret_cast<Pixel<T>*>(shared + L::kWeights + k * L::kFilter +
                                 i % kPixels * sizeof(pixel)) = pixel;
  }
  if (threadIdx.x < L::kFilters) {
    float scale = 0.0f, shift = 0.0f;
    if (k0 + threadIdx.x < p.K) channel_affine(p.bn, k0 + threadIdx.x, scale, shift);
    auto* affine = reinterpret_cast<float*>(shared + L::kAffine);
    affine[threadIdx.x] = scale;
    affine[L::kFilters + threadIdx.x] = shift;
  }
}

// The convolution of this warp's 32 pixels with all filters of the group.
template <typename T>
__device__ __forceinline__ void multiply(const unsigned char* shared,
                                         float (&sums)[kRowTiles][Layout<T>::kFilters / 8][4]) {
  using L = Layout<T>;
  constexpr int kSteps = sizeof(T);  // of 32 bytes, in a filter row
  // 16 bytes further: two taps on, or one, which is an odd column then.
  constexpr int kSecondHalf = L::kSplitColumns ? L::kRow / 2 : 16;
  constexpr int kPatchStep = L::kSplitColumns ? 16 : 32;
  // Lanes whose third and fourth register hold the eighth tap in a filter row's last step.
  constexpr int kFirstBeyond = L::kSplitColumns ? 0 : 2;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const bool beyond = lane % 4 >= kFirstBeyond;
  uint32_t patch[kRowTiles];
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
    const int row = (warp * kRowTiles + i) * 16 + lane % 16;
    const int pixel = row < kConvPixels ? row : row - 8;  // any, in the same bank
    patch[i] =
        ptx::shared_address(shared + L::kPatch + lane / 16 * kSecondHalf +
                            L::pixel(2 * (pixel / kConvColumns), 2 * (pixel % kConvColumns)));
  }
  const uint32_t weights = ptx::shared_address(
      shared + L::kWeights + (lane / 16 * 8 + lane % 8) * L::kFilter + lane / 8 % 2 * 16);
#pragma unroll 1  // unrolled, ptxas reads so far ahead that registers spill
  for (int r = 0; r < kFilterSize; ++r) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        ptx::load_matrix_4(a[i],
                           patch[i] + r / 2 * L::kRowPair + r % 2 * L::kRow + step * kPatchStep);
        if (step == kSteps - 1) {
          a[i][2] = beyond ? 0 : a[i][2];
          a[i][3] = beyond ? 0 : a[i][3];
        }
      }
#pragma unroll
      for (int j = 0; j < L::kFilters / 16; ++j) {
        uint32_t b[4];
        ptx::load_matrix_4(b, weights + j * 16 * L::kFilter + (r * kSteps + step) * 32);
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          mma<T>(sums[i][2 * j], a[i], b[0], b[1]);
          mma<T>(sums[i][2 * j + 1], a[i], b[2], b[3]);
        }
      }
    }
  }
}

// BatchNorm and rounding, for pixels outside of the convolution's output as well.
template <typename T>
__device__ __forceinline__ void store_result(
    unsigned char* shared, const float (&sums)[kRowTiles][Layout<T>::kFilters / 8][4]) {
  using L = Layout<T>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, column = lane % 4 * 2;
  const auto* scales = reinterpret_cast<const float*>(shared + L::kAffine) + column;
  const float* shifts = scales + L::kFilters;
  unsigned char* tile =
      shared + L::kResult + (warp * kRowTiles * 16 + lane / 4) * L::kTilePixel + column * sizeof(T);
#pragma unroll
  for (int j = 0; j < L::kFilters / 8; ++j) {
    const float scale[2] = {scales[j * 8], scales[j * 8 + 1]};
    const float shift[2] = {shifts[j * 8], shifts[j * 8 + 1]};
#pragma unroll
    for (int i = 0; i < 2 * kRowTiles; ++i) {
      Pair<T> pair;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        pair.v[e] = from_float<T>(fmaf(sums[i / 2][j][i % 2 * 2 + e], scale[e], shift[e]));
      }
      *reinterpret_cast<Pair<T>*>(tile + i * 8 * L::kTilePixel + j * 8 * sizeof(T)) = pair;
    }
  }
}

// Maximum of the elements of four bytes; NaN wins.
template <typename T>
__device__ __forceinline__ uint32_t maximum(uint32_t x, uint32_t y);
template <>
__device__ __forceinline__ uint32_t maximum<float>(uint32_t x, uint32_t y) {
  return __float_as_uint(ptx::max_nan_f32(__uint_as_float(x), __uint_as_float(y)));
}
template <>
__device__ __forceinline__ uint32_t maximum<BFloat>(uint32_t x, uint32_t y) {
  return ptx::max_nan_bf16x2(x, y);
}
template <>
__device__ __forceinline__ uint32_t maximum<Half>(uint32_t x, uint32_t y) {
  return ptx::max_nan_f16x2(x, y);
}

// A window's pixel outside of the convolution's output is replaced by its neighbour in the window,
// which changes no maximum.
template <typename T>
__device__ __forceinline__ void store_pooled(const StemParams& p, const Tile& tile, int64_t k0,
                                             const unsigned char* shared) {
  using L = Layout<T>;
  constexpr int kVectors = 8;  // per pixel: a group is 128 bytes
  constexpr int kRowsPerPass = kThreads / (kPoolColumns * kVectors);
  constexpr int kTileRow = kConvColumns * L::kTilePixel;
  const int height = static_cast<int>((p.H + 1) / 2), width = static_cast<int>((p.W + 1) / 2);
  const int vector = threadIdx.x % kVectors, column = threadIdx.x / kVectors % kPoolColumns;
  const int first = threadIdx.x / (kVectors * kPoolColumns);
  const int w = 2 * (tile.q + column);
  if (w >= width || k0 + vector * Vector<T>::kSize >= p.K) return;
  const int columns[3] = {w > 0 ? -L::kTilePixel : 0, 0, w + 1 < width ? L::kTilePixel : 0};
#pragma unroll
  for (int row = first; row < kPoolRows; row += kRowsPerPass) {
    const int h = 2 * (tile.p + row);
    if (h < height) {
      const unsigned char* middle = shared + L::kResult + vector * 16 + (2 * row + 1) * kTileRow +
                                    (2 * column + 1) * L::kTilePixel;
      const int rows[3] = {h > 0 ? -kTileRow : 0, 0, h + 1 < height ? kTileRow : 0};
      uint4 top = {0, 0, 0, 0};
#pragma unroll
      for (int j = 0; j < 9; ++j) {
        const uint4 v = *reinterpret_cast<const uint4*>(middle + rows[j / 3] + columns[j % 3]);
        top.x = maximum<T>(top.x, v.x);
        top.y = maximum<T>(top.y, v.y);
        top.z = maximum<T>(top.z, v.z);
        top.w = maximum<T>(top.w, v.w);
      }
      // Counted in vectors: from an element's address nvcc does not see that it is on 16 bytes.
      const int64_t P = (height + 1) / 2, Q = (width + 1) / 2, vectors = p.K / Vector<T>::kSize;
      const int64_t pixel = (tile.n * P + h / 2) * Q + w / 2;
      static_cast<uint4*>(p.out)[pixel * vectors + k0 / Vector<T>::kSize + vector] = top;
    }
  }
}

template <typename T, typename X>
__global__ void __launch_bounds__(kThreads, 2)
    stem_kernel(const __grid_constant__ StemParams p, int tiles, int down, int across) {
  using L = Layout<T>;
  RESNET_FUSED_SHARED(shared);
  const int64_t k0 = static_cast<int64_t>(blockIdx.y) * L::kFilters;
  auto* places = reinterpret_cast<Tile*>(shared + L::kTiles);
  Pixel<X> pixels[kPatchLoads];
  find_tile(&places[0], blockIdx.x, tiles, down, across);
  load_filters<T>(p, k0, shared);
  if (sizeof(X) == 1) load_norm(p, reinterpret_cast<float*>(shared + L::kNorm));
  __syncthreads();
  load_patch(p, places[0], pixels);
  store_patch<T>(p, places[0], shared, pixels);
  __syncthreads();
  int place = 0;
  for (int at = blockIdx.x; at < tiles; at += gridDim.x) {
    find_tile(&places[1 - place], at + gridDim.x, tiles, down, across);
    {
      float sums[kRowTiles][L::kFilters / 8][4] = {};
      multiply<T>(shared, sums);
      store_result<T>(shared, sums);
    }
    __syncthreads();  // the tile is complete, the patch has been read
    load_patch(p, places[1 - place], pixels);
    store_pooled<T>(p, places[place], k0, shared);
    store_patch<T>(p, places[1 - place], shared, pixels);
    place = 1 - place;
    __syncthreads();  // the patch is complete, the tile has been read
  }
}

template <typename T, typename X>
cudaError_t launch_stem(const StemParams& p, cudaStream_t stream) {
  using L = Layout<T>;
  const int64_t P = (p.H + 3) / 4, Q = (p.W + 3) / 4;
  const int64_t down = (P + kPoolRows - 1) / kPoolRows;
  const int64_t across = (Q + kPoolColumns - 1) / kPoolColumns;
  const int64_t tiles = p.N * down * across, groups = (p.K + L::kFilters - 1) / L::kFilters;
  if (tiles * groups == 0) return cudaSuccess;
  // Image coordinates and tiles are counted in 32 bits, with room for a patch beyond.
  if (p.H > 0x7fffff00 || p.W > 0x7fffff00 || tiles > 0x3fffffff) return cudaErrorInvalidValue;
  if (p.C > kChannels || p.K % 8 != 0 || reinterpret_cast<uintptr_t>(p.out) % 16 != 0) {
    return cudaErrorInvalidValue;
  }
  // As many tiles for one block as for another, as far as they divide.
  const int64_t most = p.most_blocks > groups ? p.most_blocks / groups : 1;
  const int64_t each = (tiles + most - 1) / most;
  const LaunchShape shape{{(tiles + each - 1) / each, groups, 1}, kThreads, L::template kBytes<X>};
  return launch<stem_kernel<T, X>>(shape, stream, p, static_cast<int>(tiles),
                                   static_cast<int>(down), static_cast<int>(across));
}

template <typename T>
cudaError_t launch_stem(const StemParams& p, cudaStream_t stream) {
  return p.norm == nullptr ? launch_stem<T, T>(p, stream) : launch_stem<T, uint8_t>(p, stream);
}

}  // namespace

int launch_stem_cuda(const StemParams& p, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  switch (p.dtype) {
    case DType::f32:
      return launch_stem<float>(p, s);
    case DType::bf16:
      return launch_stem<BFloat>(p, s);
    case DType::f16:
      return launch_stem<Half>(p, s);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace resnet_fused
