// SPDX-License-Identifier: BSD-3-Clause
// What surrounds the tile convolution: packing of weights and copying of an image into planes.
#include <cstring>

#include "../tile_conv.h"

namespace resnet_fused {

void pack_tiles_cpu(const TilePackParams& p, int64_t n_begin, int64_t n_end) {
  const int64_t c_steps = round_up(p.C, kTileK) / kTileK;
  const int64_t block = p.taps * c_steps * kTileN * kTileK;
  std::memset(p.packed + n_begin * block, 0, static_cast<size_t>((n_end - n_begin) * block) * 2);
  for (int64_t n = n_begin; n < n_end; ++n) {
    uint16_t* to = p.packed + n * block;
    for (int64_t f = 0; f < kTileN && n * kTileN + f < p.K; ++f) {
      const uint16_t* filter = p.weight + (n * kTileN + f) * p.C * p.taps;
      for (int64_t c = 0; c < p.C; ++c) {
        // Tile of 16 filters, pair of channels, filter, channel of the pair.
        const int64_t at = (c / kTileK) * kTileN * kTileK + (f / 16) * 512 + (c % kTileK / 2) * 32 +
                           (f % 16) * 2 + c % 2;
        for (int64_t t = 0; t < p.taps; ++t)
          to[t * c_steps * kTileN * kTileK + at] = filter[c * p.taps + t];
      }
    }
  }
}

namespace {

void zero_pixels(uint16_t* to, int64_t pixels, int64_t channels) {
  std::memset(to, 0, static_cast<size_t>(pixels * channels) * 2);
}

}  // namespace

void fill_planes_cpu(const PlaneParams& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t plane = i / p.lines, y = i % p.lines;
    const int64_t fy = plane / p.phases[1], fx = plane % p.phases[1];
    uint16_t* line = p.planes + (plane * p.plane_pixels + y * p.pitch) * p.channels;
    // Only the last line may write past its pitch: the next line's first pixels are zeros of its
    // own.
    const bool last = y + 1 == p.lines;
    const int64_t width = last ? p.plane_pixels - y * p.pitch : p.pitch;
    const int64_t h = y * p.stride[0] + fy - p.padding[0];
    if (h < 0 || h >= p.H) {
      zero_pixels(line, width, p.channels);
      continue;
    }
    // Pixel x of the line is column x * stride + fx - padding of the image.
    const int64_t shift = p.padding[1] - fx;
    int64_t first = shift > 0 ? (shift + p.stride[1] - 1) / p.stride[1] : 0;
    int64_t stop = (p.W - 1 + shift) / p.stride[1] + 1;
    if (p.W - 1 + shift < 0) stop = 0;
    const int64_t reach = width < p.width ? width : p.width;
    if (stop > reach) stop = reach;
    if (first > stop) first = stop;
    zero_pixels(line, first, p.channels);
    zero_pixels(line + stop * p.channels, width - stop, p.channels);
    const uint16_t* from = p.x + (h * p.W + first * p.stride[1] - shift) * p.C;
    uint16_t* to = line + first * p.channels;
    if (p.stride[1] == 1 && p.C == p.channels) {
      std::memcpy(to, from, static_cast<size_t>((stop - first) * p.C) * 2);
      continue;
    }
    for (int64_t x = first; x < stop; ++x, from += p.stride[1] * p.C, to += p.channels) {
      std::memcpy(to, from, static_cast<size_t>(p.C) * 2);
      zero_pixels(to + p.C, 1, p.channels - p.C);
    }
  }
}

}  // namespace resnet_fused
