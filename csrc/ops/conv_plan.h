// SPDX-License-Identifier: BSD-3-Clause
// Which way a convolution goes on the CPU, and in how many pieces: pure functions of shapes,
// unit-tested.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../kernels/dtype.h"

namespace resnet_fused {

enum class ConvPath { tiles, fma, onednn, onednn_f32 };

// True if planes (below) stay within a few times the image. Strides, paddings and dilations beyond
// those of any network are left to oneDNN.
constexpr bool planes_fit(const int64_t stride[2], const int64_t padding[2],
                          const int64_t dilation[2]) {
  constexpr int64_t kMost = 32;
  return std::max(stride[0], stride[1]) <= kMost && std::max(padding[0], padding[1]) <= kMost &&
         std::max(dilation[0], dilation[1]) <= kMost;
}

// True if the tile convolution can count the pixels of planes and outputs in 32 bits, given that
// planes_fit.
constexpr bool map_fits(int64_t H, int64_t W) {
  constexpr int64_t kMost = int64_t{1} << 28;
  return H <= kMost && W <= kMost && (H + 128) * (W + 128) <= kMost;
}

// True if some window of a convolution may lie in its padding alone.
constexpr bool reaches_outside(int64_t R, int64_t S, const int64_t padding[2],
                               const int64_t dilation[2]) {
  return padding[0] > dilation[0] * (R - 1) || padding[1] > dilation[1] * (S - 1);
}

// The way of one convolution; `tiles` says whether the tile kernels can take it at all, `bf16x3`
// whether fp32 may be multiplied so.
//
// bf16, and fp32 as bf16x3, go to the tile kernels, and other fp32 to those of multiply-adds (`fma`
// says whether they can take it), except grouped convolutions and those with fewer channels than
// half a k-step, whose padding would cost more than the kernel gains. With `outside`, these go
// there as well: oneDNN (3.12) crashes on some shapes with windows that lie in the padding alone,
// if there is a bias, as BatchNorm makes one.
//
// fp16 goes through fp32: BatchNorm folded into weights leaves fp16's range or precision for
// ordinary statistics.
//
// So does oneDNN in bf16 with kernel > 1, stride > 1 and an output one pixel wide: its AMX kernel
// (3.12) reads uninitialised memory. 1,002 of 1,818 such shapes are wrong, none of 6,012 others;
// pytorch/pytorch#169688 is the 3-d case.
constexpr ConvPath conv_path(DType dtype, bool bf16x3, int64_t channels_per_group, int64_t groups,
                             int64_t R, int64_t S, const int64_t stride[2], int64_t out_w,
                             bool outside, bool tiles, bool fma) {
  if (dtype == DType::f16) return ConvPath::onednn_f32;
  const bool multiplied_as_bf16 = dtype == DType::bf16 || (dtype == DType::f32 && bf16x3);
  const bool own = groups == 1 && (channels_per_group >= 16 || outside);
  if (tiles && multiplied_as_bf16 && own) return ConvPath::tiles;
  if (fma && dtype == DType::f32 && own) return ConvPath::fma;
  if (dtype != DType::bf16) return ConvPath::onednn;
  const bool narrow = R * S > 1 && std::max(stride[0], stride[1]) > 1 && out_w == 1;
  return narrow ? ConvPath::onednn_f32 : ConvPath::onednn;
}

// True if a NaN or infinity in the input could reach outputs outside its receptive field: oneDNN
// pads the channels of a K step of 32 bf16 values with zeros in the weights alone, and 0 * NaN is
// NaN.
constexpr bool leaks_nan(DType dtype, int64_t channels_per_group) {
  return dtype == DType::bf16 && channels_per_group % 32 != 0;
}

// True if the windows of a convolution leave out no row (or column) of its input.
constexpr bool windows_cover(int64_t in, int64_t out, int64_t window, int64_t stride,
                             int64_t padding, int64_t dilation) {
  return (dilation == 1 || window == 1) && window >= stride &&
         (out - 1) * stride - padding + window >= in;
}

// Images a chain of convolutions processes at a time, so that what it hands from one convolution to
// the next stays in the cores' L2 caches and its memory is reused instead of faulted in anew.
// `bytes_per_image` counts the largest input and output pair. At least one image per thread, and
// pieces of equal size.
constexpr int64_t images_per_piece(int64_t images, int64_t bytes_per_image, int64_t threads) {
  constexpr int64_t kBytesPerThread = int64_t{3} << 20;
  const int64_t fit = threads * kBytesPerThread / std::max<int64_t>(bytes_per_image, 1);
  const int64_t least = std::min(images, std::max(threads, fit));
  if (least < 1) return 1;
  const int64_t pieces = (images + least - 1) / least;
  const int64_t even = (images + pieces - 1) / pieces;
  // A multiple of the threads keeps them equally busy.
  return std::min(images, (even + threads - 1) / threads * threads);
}

// Input bytes that a thread holds in its L2 (2 MB on CPUs with AMX) while the packed weights pass
// by: more where the weights are too many to stay there themselves and come from L3 each time.
constexpr int64_t tile_input_bytes(int64_t weight_bytes) {
  return weight_bytes > (int64_t{512} << 10) ? int64_t{1} << 20 : int64_t{256} << 10;
}

// Images that a thread takes through a chain of tile convolutions together, whose intermediate
// tensors have `bytes` per image. The more, the less often the weights pass by, which come from L3;
// but what does not stay in L2 (2 MB) comes from there as well.
constexpr int64_t images_per_group(int64_t images, int64_t bytes, int64_t weight_bytes) {
  const int64_t fit = std::max(int64_t{1} << 20, weight_bytes / 2);
  return std::max<int64_t>(std::min(images, fit / std::max<int64_t>(bytes, 1)), 1);
}

// Whether threads divide the filters of a convolution, or else its rows: what is larger, weights or
// input, should go to one thread only; but above all, all threads should have as much to do.
constexpr bool divide_filters(int64_t blocks, int64_t panels, int64_t threads, int64_t weight_bytes,
                              int64_t input_bytes) {
  const int64_t by_rows = (blocks + threads - 1) / threads * panels;
  const int64_t by_filters = (panels + threads - 1) / threads * blocks;
  if (by_rows != by_filters && 8 * by_rows > 9 * by_filters) return true;
  if (by_rows != by_filters && 8 * by_filters > 9 * by_rows) return false;
  return weight_bytes > input_bytes;
}

// Loop order of the tile convolution: true if the input of 32 pixels stays in L1 (of at least 32
// KB) while all packed weights, which must fit L2, pass by; false if a panel of 32 filters stays
// while a chunk of rows passes by.
constexpr bool filters_inside(int64_t steps, int64_t item, int64_t K) {
  constexpr int64_t kInput = int64_t{32} << 10, kWeights = int64_t{512} << 10;
  const int64_t row = steps * 32 * item;
  return row * 32 <= kInput && row * K <= kWeights;
}

// Planes of one image for the tile convolution (kernels/tile_conv.h).
struct Planes {
  int64_t phases[2];  // in use: 1 if no tap needs another, else the stride
  int64_t lines;      // output rows and what the taps reach beyond
  int64_t width;      // likewise of columns
  int64_t
      pitch;  // width less the zero columns that a line's end shares with the next line's beginning
  int64_t pixels;  // per plane, with what the last blocks read beyond

  // First pixel, counted through all planes, of the tap at offset (y, x) in the padded image.
  constexpr int64_t tap_pixel(int64_t y, int64_t x, const int64_t stride[2]) const {
    return (y % stride[0] * phases[1] + x % stride[1]) * pixels + y / stride[0] * pitch +
           x / stride[1];
  }
};

constexpr Planes plan_planes(int64_t H, int64_t W, int64_t P, int64_t Q, int64_t R, int64_t S,
                             const int64_t stride[2], const int64_t padding[2],
                             const int64_t dilation[2]) {
  (void)H;
  Planes p{};
  const int64_t window[2] = {R, S};
  int64_t reach[2] = {0, 0};
  for (int i = 0; i < 2; ++i) {
    int64_t phases = 1;
    for (int64_t t = 0; t < window[i]; ++t)
      phases = std::max(phases, t * dilation[i] % stride[i] + 1);
    p.phases[i] = phases;
    reach[i] = (window[i] - 1) * dilation[i] / stride[i];
  }
  p.lines = P + reach[0];
  p.width = Q + reach[1];
  // Zeros at the beginning and at the end of a line, the fewest of all phases.
  int64_t shared = reach[1];
  for (int64_t f = 0; f < p.phases[1]; ++f) {
    const int64_t left = padding[1] - f;
    const int64_t lead = left > 0 ? (left + stride[1] - 1) / stride[1] : 0;
    const int64_t stop = W - 1 + left < 0 ? 0 : (W - 1 + left) / stride[1] + 1;
    shared = std::min(shared, std::min(lead, std::max<int64_t>(p.width - stop, 0)));
  }
  p.pitch = p.width - shared;
  p.pixels = p.lines * p.pitch + reach[1] + 32;
  return p;
}

}  // namespace resnet_fused
