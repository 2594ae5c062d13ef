// SPDX-License-Identifier: BSD-3-Clause
#include "tile_stem.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "../kernels/normalise.h"
#include "../kernels/stem.h"
#include "tile_map.h"

namespace resnet_fused {
namespace {

// The input of one image is a zero-padded picture. Tiles want 4 channels, 8 bytes a pixel, and a
// window's row of 8 pixels as a k-step. In fp32 pixels have their own channels, and windows their
// own width: nothing is multiplied by zeros.
class TileStem {
 public:
  TileStem(const Conv& conv, const Packed& packed, const Affine& affine, Products products,
           const Tensor& x, const uint32_t* table, const Tensor& out)
      : products_(products),
        dtype_(dtype_of(out)),
        item_(item_size(dtype_)),
        x_item_(table == nullptr ? item_ : 1),
        table_(table),
        pixel_bytes_(products == Products::fp32 ? 4 * x.size(1) : 8),
        x_(static_cast<const unsigned char*>(x.data())),
        out_(static_cast<unsigned char*>(out.mutable_data())),
        C_(x.size(1)),
        H_(x.size(2)),
        W_(x.size(3)),
        K_(conv.channels()),
        P_(conv.out_size(0, H_)),
        Q_(conv.out_size(1, W_)),
        pool_lines_(out.size(2)),
        pool_columns_(out.size(3)) {
    for (int i = 0; i < 4; ++i) strides_[i] = x.stride(i);
    const int64_t step = conv.stride[1];
    top_ = conv.padding[0];
    left_ = conv.padding[1];
    width_ = round_up(std::max((Q_ - 1) * step + kWindowPixels, left_ + W_), step);
    lines_ = std::max((P_ - 1) * conv.stride[0] + (conv.weight.size(2) - 1) * conv.dilation[0] + 1,
                      top_ + H_);
    const int64_t per_line = (Q_ + kTileRows - 1) / kTileRows;
    for (int64_t y = 0; y < P_; ++y) {
      for (int64_t t = 0; t < per_line; ++t) {
        tiles_.push_back(static_cast<int32_t>(y * conv.stride[0] * width_ / step + t * kTileRows));
        for (int64_t q = t * kTileRows; q < (t + 1) * kTileRows; ++q)
          places_.push_back(q < Q_ ? static_cast<int32_t>(y * Q_ + q) : -1);
      }
    }
    if (tiles_.size() % 2 != 0) {
      tiles_.push_back(tiles_.back());
      places_.insert(places_.end(), kTileRows, -1);
    }
    per_pool_line_ = per_line;  // two lines of per_line tiles: as many blocks
    for (int64_t r = 0; r < conv.weight.size(2); ++r)
      taps_.push_back(r * conv.dilation[0] * width_ * pixel_bytes_);
    p_.products = products_;
    p_.depth = products_ == Products::fp32 ? conv.weight.size(3) * C_ : kTileK;
    p_.row_bytes = step * pixel_bytes_;
    p_.low_bytes = half_bytes();
    p_.step_bytes = taps_.data();
    p_.steps = conv.weight.size(2);
    p_.tiles = tiles_.data();
    p_.places = places_.data();
    p_.weight = packed.weight.data();
    p_.scale = affine.scale.data();
    p_.shift = affine.shift.data();
    p_.K = K_;
    p_.pixel_bytes = K_ * item_;
    p_.panel_bytes = kTileN * item_;
    p_.filters_inside = true;
    constexpr int64_t kStripBytes = int64_t{256} << 10;
    strip_ = std::max<int64_t>(kStripBytes / (2 * line_bytes()), 1);
  }

  int64_t picture_bytes() const { return half_bytes() * (p_.products == Products::bf16x3 ? 2 : 1); }
  int64_t strip_bytes() const { return (2 * strip_ + 3) * line_bytes(); }
  int64_t pool_lines() const { return pool_lines_; }
  int64_t lines() const { return lines_; }

  // Lines [begin, end) of image n's picture; false if something in them is not finite.
  bool fill(int64_t n, int64_t begin, int64_t end, unsigned char* picture) const {
    bool finite = true;
    for (int64_t line = begin; line < end; ++line) {
      unsigned char* to = picture + line * width_ * pixel_bytes_;
      const int64_t h = line - top_;
      std::memset(to, 0, static_cast<size_t>(width_ * pixel_bytes_));
      if (p_.products == Products::bf16x3)
        std::memset(to + half_bytes(), 0, static_cast<size_t>(width_ * pixel_bytes_));
      if (h < 0 || h >= H_) continue;
      to += left_ * pixel_bytes_;
      const unsigned char* x = x_ + (n * strides_[0] + h * strides_[2]) * x_item_;
      if (products_ == Products::fp32) {
        pack_floats_line(x, to);
        continue;
      }
      finite =
          pack_pixels_cpu(
              {x, table_, p_.products == Products::bf16x3, reinterpret_cast<uint64_t*>(to),
               reinterpret_cast<uint64_t*>(to + half_bytes()), C_, W_, strides_[1], strides_[3]}) &&
          finite;
    }
    return finite;
  }

  // Lines [begin, end) of image n's output; false if something in them is not finite.
  bool run(int64_t n, int64_t begin, int64_t end, const unsigned char* picture,
           unsigned char* memory, const TileKernels& kernels) const {
    TileConvParams p = p_;
    p.a = picture;
    unsigned char* strip = memory;
    const int64_t line = line_bytes();
    unsigned char* out = out_ + n * pool_lines_ * pool_columns_ * K_ * item_;
    bool finite = true;
    // The strip begins with the two lines before line 2 * first, of which the pool reads the
    // second.
    for (int64_t first = begin; first < end; first += strip_) {
      const int64_t last = std::min(end, first + strip_);
      unsigned char* zero = strip + (2 - 2 * first) * line;  // where line 0 would be
      const int64_t from = first == begin ? std::max<int64_t>(first - 1, 0) : first;
      const int64_t to = std::min(last * per_pool_line_, static_cast<int64_t>(tiles_.size()) / 2);
      p.out = zero;
      finite =
          kernels.conv(p, from * per_pool_line_, to, 0, round_up(K_, kTileN) / kTileN) && finite;
      relu_max_pool_cpu({zero, out, 1, P_, Q_, K_, dtype_}, first, last);
      std::memmove(strip + line, zero + (2 * last - 1) * line,
                   static_cast<size_t>(last < end ? line : 0));
    }
    return finite;
  }

 private:
  static constexpr int64_t kWindowPixels = 8;
  void pack_floats_line(const unsigned char* x, unsigned char* out) const {
    if (table_ != nullptr)
      return look_up_line_cpu({x, table_, out, item_, C_, W_, strides_[1], strides_[3]});
    const float* from = reinterpret_cast<const float*>(x);
    float* to = reinterpret_cast<float*>(out);
    for (int64_t w = 0; w < W_; ++w) {
      for (int64_t c = 0; c < C_; ++c) *to++ = from[c * strides_[1] + w * strides_[3]];
    }
  }
  int64_t line_bytes() const { return Q_ * K_ * item_; }
  // The picture, or a half of it. The last tiles of a line read up to 15 rows beyond it.
  int64_t half_bytes() const {
    const int64_t rows = (lines_ * width_ + kWindowPixels) * pixel_bytes_;
    return round_up(rows + kTileRows * p_.row_bytes, 64);
  }

  Products products_;
  DType dtype_;
  int64_t item_, x_item_;
  const uint32_t* table_;
  int64_t pixel_bytes_;
  const unsigned char* x_;
  unsigned char* out_;
  int64_t C_, H_, W_, K_, P_, Q_, pool_lines_, pool_columns_, strides_[4];
  int64_t top_, left_, width_, lines_, per_pool_line_, strip_;
  std::vector<int32_t> tiles_, places_;
  std::vector<int64_t> taps_;
  TileConvParams p_{};
};

}  // namespace

bool tile_stem_fits(const Conv& conv, const Sizes& in) {
  return conv.groups == 1 && in[1] <= 4 && conv.weight.size(3) <= 8 && conv.dilation[1] == 1 &&
         planes_fit(conv.stride, conv.padding, conv.dilation) && conv.weight.size(2) <= 64 &&
         map_fits(in[2], in[3]);
}

std::vector<int64_t> run_tile_stem(const Conv& conv, const Packed& packed, const Affine& affine,
                                   Products products, const Tensor& x, const uint32_t* table,
                                   const Tensor& out) {
  const TileStem stem(conv, packed, affine, products, x, table, out);
  uint32_t threads_now = 1;
  check_torch(torch_get_num_threads(&threads_now), "thread count");
  const int64_t N = x.size(0), threads = threads_now, each = N / threads;
  const int64_t picture = round_up(stem.picture_bytes(), 4096) + 192;
  const int64_t bytes = picture + round_up(stem.strip_bytes(), 4096) + 448;
  const Scratch scratch(static_cast<size_t>(bytes * threads));
  std::vector<char> finite(static_cast<size_t>(N), 1);
  const TileKernels& kernels = tile_kernels(products);
  if (each > 0) {
    parallel_for(threads, 1, [&](int64_t b, int64_t e) {
      for (int64_t t = b; t < e; ++t) {
        unsigned char* memory = scratch.data() + t * bytes;
        for (int64_t n = t * each; n < (t + 1) * each; ++n) {
          finite[static_cast<size_t>(n)] =
              stem.fill(n, 0, stem.lines(), memory) &&
              stem.run(n, 0, stem.pool_lines(), memory, memory + picture, kernels);
        }
      }
    });
  }
  for (int64_t n = each * threads; n < N; ++n) {
    // Together: all fill the picture, each makes a part of the lines.
    std::atomic<bool> all{true};
    parallel_for(stem.lines(), 16, [&](int64_t b, int64_t e) {
      if (!stem.fill(n, b, e, scratch.data())) all = false;
    });
    const int64_t lines = all ? stem.pool_lines() : 0;
    parallel_for(threads, 1, [&](int64_t b, int64_t e) {
      for (int64_t t = b; t < e; ++t) {
        if (!stem.run(n, lines * t / threads, lines * (t + 1) / threads, scratch.data(),
                      scratch.data() + t * bytes + picture, kernels))
          all = false;
      }
    });
    finite[static_cast<size_t>(n)] = all;
  }
  std::vector<int64_t> others;
  for (int64_t n = 0; n < N; ++n) {
    if (finite[static_cast<size_t>(n)] == 0) others.push_back(n);
  }
  return others;
}

}  // namespace resnet_fused
