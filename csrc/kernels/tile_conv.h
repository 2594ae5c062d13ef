// SPDX-License-Identifier: BSD-3-Clause
// bf16 convolution on matrix tiles (Intel AMX, or portable C++ that computes the same): an implicit
// GEMM
//
//   out[p, q, k] = act(scale[k] * sum_{r, s, c} x[p * stride + r, q * stride + s, c] * w[k, c, r,
//   s] + shift[k]
//                      + residual[p, q, k])
//
// with fp32 sums, one rounding and NaN kept. Rows of the GEMM are output pixels, columns are
// filters, and a k-step is 32 channels of one tap. For each tap the rows of a tile of 16 lie at
// constant distances, `row_bytes`; where each tile begins, and which output pixel each row is, say
// two tables (ops/tile_map.h makes them). So the input may be a dense tensor (1x1 convolutions), or
// planes: zero-padded, channels padded to a multiple of 32, and split by the stride's phases, so
// that within a plane the convolution has stride 1. And the output may be written as the planes
// that the next convolution wants.
#pragma once

#include "dtype.h"

namespace resnet_fused {

constexpr int64_t kTileK = 32;  // channels of a k-step
constexpr int64_t kTileN = 32;  // filters of a block: two tiles
constexpr int64_t kTileRows = 16;
constexpr int64_t kTileM = 32;  // pixels of a block: two tiles
constexpr int64_t kTileBytes = 1024;

constexpr int64_t round_up(int64_t v, int64_t multiple) {
  return (v + multiple - 1) / multiple * multiple;
}

struct TileConvParams {
  const unsigned char* a;    // readable for every tap of every row of the tiles
  int64_t row_bytes;         // from a row to the next
  const int64_t* tap_bytes;  // [taps]
  int64_t taps;
  int64_t c_steps;           // channels / 32, rounded up
  const int32_t* tiles;      // [2 * blocks] first row of each tile of 16 rows
  const int32_t* places;     // [32 * blocks] output pixel of each row; -1: computed and dropped
  const uint16_t* weight;    // packed, see pack_tiles_cpu
  const float* scale;        // [round_up(K, 32)], zeros behind K
  const float* shift;        // [round_up(K, 32)]
  const uint16_t* residual;  // [pixels, K], or null; may be out
  // A second convolution whose result is added, or null: its input, taps, weight, scale and shift.
  // Its rows are those of this one: the same tiles, the same places. No residual then.
  const TileConvParams* project;
  uint16_t* out;  // [pixels, pitch]
  int64_t K, pitch;
  bool whole;  // pitch is a multiple of 32: zeros are written behind K
  bool relu;
  const unsigned char* ahead;  // memory that is needed later, to be fetched into L2 meanwhile
  int64_t ahead_bytes;
  bool filters_inside;  // loop order: all filters for one block of rows before the next, or the
                        // other way round
};

// Blocks [begin, end) of rows and filter blocks [n_begin, n_end), on the calling thread. Each
// output element is a sum in the order of taps and channels whatever the range, so results do not
// depend on how work is divided.
void tile_conv_amx(const TileConvParams& p, int64_t begin, int64_t end, int64_t n_begin,
                   int64_t n_end);
void tile_conv_portable(const TileConvParams& p, int64_t begin, int64_t end, int64_t n_begin,
                        int64_t n_end);

// True if this CPU and kernel let the process use AMX; asks the kernel's permission on the first
// call.
bool amx_available();

// Weights [K, C, R, S] (dense bf16) as blocks [K / 32][R * S][C / 32][2 tiles][16 channel pairs][16
// filters][2], padded with zeros. Fills filter blocks [n_begin, n_end).
struct TilePackParams {
  const uint16_t* weight;
  uint16_t* packed;
  int64_t K, C, taps;
};
void pack_tiles_cpu(const TilePackParams& p, int64_t n_begin, int64_t n_end);

// `count` pixels of C channels, `from_step` pixels apart, to pixels of `channels` channels,
// `to_step` apart; zeros behind C.
struct CopyPixelsParams {
  const uint16_t* from;
  uint16_t* to;
  int64_t count, C, channels;
  int64_t from_step, to_step;
};
void copy_pixels_cpu(const CopyPixelsParams& p);

// W pixels of C <= 4 channels as 4 channels each, zeros behind C. Returns false if one is NaN or
// infinite.
struct PackPixelsParams {
  const uint16_t* x;
  uint64_t* to;
  int64_t C, W;
  int64_t c_stride, w_stride;  // in elements
};
bool pack_pixels_cpu(const PackPixelsParams& p);

}  // namespace resnet_fused
