// SPDX-License-Identifier: BSD-3-Clause
// Where the rows of a tile convolution lie, as tables for kernels/tile_conv.h: pure functions of
// shapes, unit-tested.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "../kernels/tile_conv.h"
#include "conv_plan.h"

namespace resnet_fused {

// The spatial shape of a convolution.
struct Window {
  int64_t in[2], out[2];  // height, width
  int64_t size[2], stride[2], padding[2], dilation[2];

  constexpr bool unpadded_1x1() const {
    return size[0] == 1 && size[1] == 1 && padding[0] == 0 && padding[1] == 0;
  }
  // One pixel at a time, in order: its input needs no copy.
  constexpr bool pointwise() const { return unpadded_1x1() && stride[0] == 1 && stride[1] == 1; }
};

// Where the input pixels of a group of images lie in memory, in pixels.
//
// `dense`: as in a tensor. Otherwise in planes (kernels/tile_conv.h). With `inner`, the images of a
// group lie side by side at each pixel, so that on small maps no tile is filled by line ends;
// otherwise one behind the other.
struct TileLayout {
  Window window;
  int64_t images;
  bool dense, inner;
  int64_t part;   // rows of a tile that a kernel makes or leaves out together: 16, or 8 in fp32
  Planes planes;  // unless dense

  // Pixels of the group.
  constexpr int64_t pixels() const {
    return images * (dense ? window.in[0] * window.in[1] : plane_pixels());
  }
  // Where pixel (y, x) of image g is; -1 if no tap reads it.
  constexpr int64_t at(int64_t g, int64_t y, int64_t x) const {
    int64_t pixel = y * window.in[1] + x, each = window.in[0] * window.in[1];
    if (!dense) {
      y += window.padding[0];
      x += window.padding[1];
      const int64_t fy = y % window.stride[0], fx = x % window.stride[1];
      y /= window.stride[0];
      x /= window.stride[1];
      if (fy >= planes.phases[0] || fx >= planes.phases[1] || y >= planes.lines ||
          x >= planes.width) {
        return -1;
      }
      each = plane_pixels();
      pixel = (fy * planes.phases[1] + fx) * planes.pixels + y * planes.pitch + x;
    }
    return inner ? pixel * images + g : g * each + pixel;
  }
  // The row that makes output pixel (y, x) of image g, in rows of the input: its first tap's pixel.
  constexpr int64_t row(int64_t g, int64_t y, int64_t x) const {
    if (dense) return at(g, y, x);
    const int64_t pixel = y * planes.pitch + x;
    return inner ? pixel * images + g : g * plane_pixels() + pixel;
  }
  // How far tap (r, s) is from a row's first pixel.
  constexpr int64_t tap(int64_t r, int64_t s) const {
    if (dense) return 0;
    return planes.tap_pixel(r * window.dilation[0], s * window.dilation[1], window.stride) *
           (inner ? images : 1);
  }

 private:
  constexpr int64_t plane_pixels() const {
    return planes.phases[0] * planes.phases[1] * planes.pixels;
  }
};

TileLayout tile_layout(const Window& window, int64_t images, bool inner, int64_t part);

// Pixels [first, first + count) of a layout where no pixel of an image is, and zeros must be.
struct Hole {
  int64_t first, count;
};

struct TileMap {
  std::vector<int32_t> tiles;   // [2 * blocks], see kernels/tile_conv.h
  std::vector<int32_t> places;  // [32 * blocks]
  std::vector<int64_t> taps;    // [R * S] rows from a tile's row to the tap's
  // Without `inner`, for each output line of one image: blocks that are needed for all lines up to
  // it. And for each block: the last input line that it reads.
  std::vector<int32_t> blocks_to_line, last_line;
  std::vector<Hole> holes;  // of the input
  int64_t parts = 0;        // what a kernel makes: its time
  int64_t rows = 0;         // pixels that the input must have, with what dropped rows read

  int64_t blocks() const { return static_cast<int64_t>(tiles.size()) / 2; }
};

// The map of a convolution whose input is laid out as `from` and whose output as `to`, or as a
// dense tensor if `to` is null. `in_place`: the input is a tensor of other people's, behind whose
// last row nothing may be read; it has 16 rows at least.
TileMap make_tile_map(const TileLayout& from, const TileLayout* to, bool in_place);

// The same from a cache of bounded size.
std::shared_ptr<const TileMap> tile_map(const TileLayout& from, const TileLayout* to,
                                        bool in_place);

}  // namespace resnet_fused
