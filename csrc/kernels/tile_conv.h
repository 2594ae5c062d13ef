// SPDX-License-Identifier: BSD-3-Clause
// bf16 convolution on matrix tiles (Intel AMX, or portable C++ that computes the same): an implicit
// GEMM
//
//   out[p, q, k] = act(scale[k] * sum_{r, s, c} x[p * stride + r, q * stride + s, c] * w[k, c, r,
//   s] + shift[k]
//                      + residual[p, q, k])
//
// with fp32 sums, one rounding and NaN kept. Rows of the GEMM are output pixels, columns are
// filters, and a k-step is 32 channels of one tap. Row m of tap t starts at a + m * row_bytes +
// tap_bytes[t]; for that to hold for every convolution the input is first copied into planes:
// zero-padded, channels padded to a multiple of 32, and split by the stride's phases, so that
// within a plane the convolution has stride 1. An output row then has `pitch` >= Q entries, of
// which the last pitch - Q are computed and dropped. A dense 1x1 convolution reads x in place.
#pragma once

#include "dtype.h"

namespace resnet_fused {

constexpr int64_t kTileK = 32;  // channels of a k-step
constexpr int64_t kTileN = 32;  // filters of a block: two tiles
constexpr int64_t kTileM = 32;  // pixels of a block: two tiles
constexpr int64_t kTileBytes = 1024;

constexpr int64_t round_up(int64_t v, int64_t multiple) {
  return (v + multiple - 1) / multiple * multiple;
}

struct TileConvParams {
  const unsigned char*
      a;  // rows [0, round_up(rows, 32)) must be readable for every tap unless rows >= 32
  int64_t row_bytes;
  const int64_t* tap_bytes;  // [taps]
  int64_t taps;
  int64_t c_steps;           // channels / 32, rounded up
  const uint16_t* weight;    // packed, see pack_tiles_cpu
  const float* scale;        // [round_up(K, 32)]
  const float* shift;        // [round_up(K, 32)]
  const uint16_t* residual;  // as out, or null
  uint16_t* out;             // [pixels, K]
  int64_t K;
  int64_t rows;      // of the GEMM: P * pitch
  int64_t pitch, Q;  // row m is output pixel (m / pitch) * Q + m % pitch if m % pitch < Q
  bool relu;
  bool stream;          // write past the caches: K % 32 == 0 and out on a 64-byte boundary
  bool filters_inside;  // loop order: all filters for one block of rows before the next, or the
                        // other way round
};

// Rows [row_begin, row_end) and filter blocks [n_begin, n_end), on the calling thread. Each output
// element is a sum in the order of taps and channels whatever the range, so results do not depend
// on how work is divided.
void tile_conv_amx(const TileConvParams& p, int64_t row_begin, int64_t row_end, int64_t n_begin,
                   int64_t n_end);
void tile_conv_portable(const TileConvParams& p, int64_t row_begin, int64_t row_end,
                        int64_t n_begin, int64_t n_end);

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

// One image into planes. Plane f = fy * phases_w + fx holds the pixels (y * stride_h + fy, x *
// stride_w + fx) of the padded image for the phases in use, as [rows][pitch][channels]. Lines of a
// plane overlap by the zeros at their ends.
struct PlaneParams {
  const uint16_t* x;  // [H, W, C]
  uint16_t* planes;
  int64_t H, W, C;
  int64_t channels;  // C rounded up to a multiple of 32
  int64_t stride[2], padding[2];
  int64_t phases[2];  // in use: 1, or stride
  int64_t lines;      // of a plane
  int64_t width;      // pixels of a line that are read, pitch <= width
  int64_t pitch;
  int64_t plane_pixels;  // lines * pitch and slack, which is zeroed
};
// Lines [begin, end) of all planes, counted through; line (plane, y) is plane * lines + y.
void fill_planes_cpu(const PlaneParams& p, int64_t begin, int64_t end);

}  // namespace resnet_fused
