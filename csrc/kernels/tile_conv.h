// SPDX-License-Identifier: BSD-3-Clause
// Convolution on matrix tiles (Intel AMX), or with fp32 multiply-adds (AVX-512), or in portable C++
// that computes the same: an implicit GEMM
//
//   out[p, q, k] = act(scale[k] * sum_{r, s, c} x[p * stride + r, q * stride + s, c] * w[k, c, r,
//   s] + shift[k]
//                      + residual[p, q, k])
//
// with fp32 sums, one rounding and NaN kept. Rows of the GEMM are output pixels, columns are
// filters, and a k-step is 32 channels of one tap. For each tap the rows of a tile of 16 lie at
// constant distances, `row_bytes`; where each tile begins, and which output pixel each row is, say
// two tables (ops/tile_map.h makes them). So the input may be a dense tensor (1x1 convolutions), or
// planes: zero-padded, in chunks of 32 channels, and divided by the stride's phases, so that within
// a plane the convolution has stride 1. And the output may be written as the planes that the next
// convolution wants. In a chunk the pixels follow each other without gaps, 64 bytes each: a tile is
// 1 KB of consecutive memory wherever it begins, which caches and prefetchers like: 3x3
// convolutions take 10 to 20 % less time than with all channels of a pixel together.
//
// Tiles multiply bf16. fp32 is multiplied as bf16x3: a value is split into the bf16 nearest to it,
// and the bf16 nearest to what that leaves, v = high + low, which keeps 16 of its 24 bits; and
//
//   x * w = low(x) * high(w) + high(x) * high(w) + high(x) * low(w),
//
// each product exact and summed in fp32. What is missing is below 3 * 2^-16 of |x * w|: 2^-16 for
// either factor, and low(x) * low(w). Three times the products of bf16, five times fewer cycles
// than fp32 multiply-adds. Split activations have planes of upper halves and planes of lower ones.
//
// With fp32 multiply-adds, a row of a plane is 128 bytes.
#pragma once

#include "dtype.h"

namespace resnet_fused {

constexpr int64_t kTileK = 32;  // channels of a k-step
constexpr int64_t kTileN = 32;  // filters of a block: two tiles
constexpr int64_t kTileRows = 16;
constexpr int64_t kTileM = 32;  // pixels of a block: two tiles
constexpr int64_t kTileBytes = 1024;
constexpr int64_t kFmaRows = 8;  // of a tile, that fp32 makes or leaves out together

constexpr int64_t round_up(int64_t v, int64_t multiple) {
  return (v + multiple - 1) / multiple * multiple;
}

// What a convolution multiplies. bf16x3 has fp32 results and split operands.
enum class Products { bf16, bf16x3, fp32 };

constexpr int64_t item_bytes(Products products) { return products == Products::bf16 ? 2 : 4; }

struct TileConvParams {
  Products products;
  const unsigned char* a;  // readable for every tap of every row of the tiles
  int64_t row_bytes;       // from a row to the next
  int64_t low_bytes;       // bf16x3: from upper halves to lower ones
  // [steps] from a row's first pixel to the operand of each k-step. All taps of 32 channels come
  // before the next 32: neighbouring taps read the same pixels, while these are in L1.
  const int64_t* step_bytes;
  int64_t steps;
  int64_t depth;          // channels of a k-step: 32, but in fp32 it may be less
  const int32_t* tiles;   // [2 * blocks] first row of each tile of 16 rows
  const int32_t* places;  // [32 * blocks] output pixel of each row; -1: computed and dropped
  const void* weight;     // packed, see pack_tiles_cpu and pack_floats_cpu
  const float* scale;     // [round_up(K, 32)], zeros behind K
  const float* shift;     // [round_up(K, 32)]
  const void* residual;   // [pixels, K], or null; may be out
  // A second convolution whose result is added, or null: its input, k-steps, weight, scale and
  // shift. Its rows are those of this one: the same tiles, the same places. No residual then.
  const TileConvParams* project;
  void* out;
  int64_t K;
  int64_t pixel_bytes, panel_bytes;  // of out: from a pixel, from 32 filters to the next
  int64_t out_low_bytes;             // bf16x3 and whole: from upper halves to lower ones
  bool whole;  // an operand of the next convolution: zeros are written behind K, and bf16x3 splits
  bool relu;
  // Memory that is needed later, to be fetched into L2 meanwhile; not in fp32, which has time.
  const unsigned char* ahead;
  int64_t ahead_bytes;
  bool filters_inside;  // loop order: all filters for one block of rows before the next, or the
                        // other way round
};

// Blocks [begin, end) of rows and filter blocks [n_begin, n_end), on the calling thread. Each
// output element is a sum in the order of the k-steps whatever the range, so results do not
// depend on how work is divided. Returns false if an fp32 result is NaN or infinite. It may be so
// because a factor does not split, infinity or a finite one that bf16 rounds to infinity: then high
// is infinite, low is -high or NaN, and so all sums it goes into are NaN.
bool tile_conv_amx(const TileConvParams& p, int64_t begin, int64_t end, int64_t n_begin,
                   int64_t n_end);
bool tile_conv_portable(const TileConvParams& p, int64_t begin, int64_t end, int64_t n_begin,
                        int64_t n_end);

// The same with fp32 multiply-adds; always true.
bool fma_conv_avx512(const TileConvParams& p, int64_t begin, int64_t end, int64_t n_begin,
                     int64_t n_end);
bool fma_conv_portable(const TileConvParams& p, int64_t begin, int64_t end, int64_t n_begin,
                       int64_t n_end);

// `count` pixels of C channels to chunks of 32 channels, with zeros behind C: bf16, or fp32 that
// bf16x3 splits on the way.
struct CopyPixelsParams {
  const unsigned char* from;
  unsigned char* to;
  int64_t count, C;
  int64_t from_bytes, to_bytes;  // from a pixel to the next
  int64_t chunk_bytes;           // from a chunk to the next
  Products products;
  int64_t low_bytes;  // bf16x3: from upper halves to lower ones
};
void copy_pixels_amx(const CopyPixelsParams& p);
void copy_pixels_portable(const CopyPixelsParams& p);
void copy_floats_avx512(const CopyPixelsParams& p);
void copy_floats_portable(const CopyPixelsParams& p);

// True if this CPU and kernel let the process use AMX; asks the kernel's permission on the first
// call.
bool amx_available();
// True if this CPU has AVX-512 (F, VL, BW, DQ) and the kernel lets processes use it.
bool avx512_available();

// Weights [K, C, R, S] (dense bf16) as blocks [K / 32][C / 32][R * S][2 tiles][16 channel pairs][16
// filters][2], padded with zeros. Fills filter blocks [n_begin, n_end). With `low`, the lower
// halves of split weights, each step's two tiles of them follow those of the upper halves.
struct TilePackParams {
  const uint16_t *weight, *low;
  uint16_t* packed;
  int64_t K, C, taps;
};
void pack_tiles_cpu(const TilePackParams& p, int64_t n_begin, int64_t n_end);

// The same for fp32 multiply-adds: blocks [K / 32][C / depth][R * S][depth][32 filters].
struct FloatPackParams {
  const float* weight;
  float* packed;
  int64_t K, C, taps, depth;
};
void pack_floats_cpu(const FloatPackParams& p, int64_t n_begin, int64_t n_end);

// Both halves of `count` fp32 values.
void split_cpu(const float* x, uint16_t* high, uint16_t* low, int64_t count);

// W pixels of C <= 4 channels as 4 channels each, zeros behind C. Returns false if one is NaN or
// infinite. fp32 is split: the lower halves go to `low`.
struct PackPixelsParams {
  const void* x;
  const uint32_t* table;  // x is bytes, and these their finite values (normalise.h); or null
  bool split;
  uint64_t *to, *low;
  int64_t C, W;
  int64_t c_stride, w_stride;  // in elements
};
bool pack_pixels_cpu(const PackPixelsParams& p);

}  // namespace resnet_fused
