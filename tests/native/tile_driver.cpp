// SPDX-License-Identifier: BSD-3-Clause
// Tile convolutions of random shapes against sums written out, in buffers of exactly the size that
// the maps ask for, in bf16 and, as bf16x3, in fp32. Arguments: seed, count, and 1 to run the AMX
// kernel too. Values are integers, in bf16x3 of up to 13 bits on either side, so every result is
// exact. Exits with 1 and the shape if something is wrong.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>

#include "ops/tile_map.h"

using namespace resnet_fused;

namespace {

std::mt19937 generator;
int64_t pick(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(generator);
}
uint16_t bf16(int value) {
  const auto f = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return static_cast<uint16_t>(bits >> 16);  // exact for small integers
}
float number(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// Activations as the kernel reads and writes them: bf16 or fp32; a tensor, whose pixels have all
// channels, or the operand of a convolution: chunks of 32 channels and, of fp32, planes of upper
// and of lower halves.
struct Values {
  bool fp32, operand;
  int64_t pixels, channels;
  std::unique_ptr<unsigned char[]> bytes{new unsigned char[static_cast<size_t>(size())]};

  bool split() const { return fp32 && operand; }
  int64_t item() const { return fp32 ? 4 : 2; }
  int64_t size() const { return pixels * channels * item(); }
  int64_t pixel_bytes() const { return operand ? 64 : channels * item(); }
  int64_t low_bytes() const { return pixels * 64; }
  int64_t chunk_bytes() const { return operand ? low_bytes() * (fp32 ? 2 : 1) : 32 * item(); }
  // Where a value is, or its upper half.
  unsigned char* at(int64_t pixel, int64_t c) const {
    return bytes.get() + pixel * pixel_bytes() + c / 32 * chunk_bytes() +
           c % 32 * (split() ? 2 : item());
  }
  void set(int64_t pixel, int64_t c, int value) {
    const auto f = static_cast<float>(value);
    if (fp32 && !operand) {
      std::memcpy(at(pixel, c), &f, 4);
      return;
    }
    uint16_t high = bf16(value), low = 0;
    if (fp32) split_cpu(&f, &high, &low, 1);
    std::memcpy(at(pixel, c), &high, 2);
    if (fp32) std::memcpy(at(pixel, c) + low_bytes(), &low, 2);
  }
  int get(int64_t pixel, int64_t c) const {
    float f = 0;
    uint16_t high, low = 0;
    if (fp32 && !operand) {
      std::memcpy(&f, at(pixel, c), 4);
      return static_cast<int>(f);
    }
    std::memcpy(&high, at(pixel, c), 2);
    if (fp32) std::memcpy(&low, at(pixel, c) + low_bytes(), 2);
    return static_cast<int>(number(high) + number(low));
  }
  // `count` pixels filled with a byte: NaN of either dtype, if that is 0xff.
  void fill(int64_t first, int64_t count, unsigned char byte) {
    for (int64_t c = 0; c < channels; c += operand ? 32 : channels) {
      const auto run = static_cast<size_t>(count * pixel_bytes());
      std::memset(at(first, c), byte, run);
      if (split()) std::memset(at(first, c) + low_bytes(), byte, run);
    }
  }
};

std::vector<uint16_t> pack(const std::vector<int>& weight, bool split, int64_t K, int64_t C,
                           int64_t taps) {
  std::vector<float> wide(weight.begin(), weight.end());
  std::vector<uint16_t> high(wide.size()), low(wide.size());
  split_cpu(wide.data(), high.data(), low.data(), static_cast<int64_t>(wide.size()));
  const int64_t panels = round_up(K, kTileN) / kTileN;
  std::vector<uint16_t> packed(
      static_cast<size_t>(panels * kTileN * round_up(C, kTileK) * taps * (split ? 2 : 1)));
  pack_tiles_cpu({high.data(), split ? low.data() : nullptr, packed.data(), K, C, taps}, 0, panels);
  return packed;
}

std::vector<int64_t> steps(const std::vector<int64_t>& taps, const Values& x) {
  std::vector<int64_t> bytes;
  for (int64_t c = 0; c < x.channels; c += kTileK) {
    for (int64_t tap : taps) bytes.push_back(x.at(tap, c) - x.bytes.get());
  }
  return bytes;
}

Window random_window(int64_t H, int64_t W) {
  Window w{};
  const int64_t in[2] = {H, W};
  const bool pointwise = pick(0, 3) == 0;
  for (int i = 0; i < 2; ++i) {
    w.in[i] = in[i];
    w.size[i] = pointwise ? 1 : pick(1, 3);
    w.dilation[i] = pick(1, 2);
    w.stride[i] = pointwise ? 1 : pick(1, 3);
    w.padding[i] = pointwise ? 0 : pick(0, 2);
    const int64_t span = w.dilation[i] * (w.size[i] - 1) + 1;
    if (in[i] + 2 * w.padding[i] < span) w.padding[i] = (span - in[i] + 1) / 2;
    w.out[i] = (in[i] + 2 * w.padding[i] - span) / w.stride[i] + 1;
  }
  return w;
}

using Kernel = bool(const TileConvParams&, int64_t, int64_t, int64_t, int64_t);

bool right(const Window& w, int64_t images, bool inner, bool in_place, Kernel* kernel) {
  const TileLayout from = tile_layout(w, images, inner);
  // What comes next: a tensor, or some other convolution.
  const Window next = random_window(w.out[0], w.out[1]);
  const TileLayout to = tile_layout(next, images, pick(0, 1) == 1);
  const bool chained = pick(0, 1) == 1;
  const TileMap map = make_tile_map(from, chained ? &to : nullptr, in_place);

  const bool split = pick(0, 1) == 1;
  const int64_t C = pick(1, 40), K = pick(1, 70), channels = round_up(C, kTileK);
  const int64_t taps = w.size[0] * w.size[1], pitch = chained ? round_up(K, kTileN) : K;
  // Split: one factor has lower halves, the other none, so that low * low is not missed.
  const bool wide_x = split && pick(0, 1) == 1, wide_w = split && !wide_x;
  const auto value = [](bool wide, int64_t most) {
    return static_cast<int>(wide ? pick(-4100, 4100) : pick(-most, most));
  };
  Values x{split, split || !in_place, in_place ? from.pixels() : map.rows, channels};
  // Poison: what is neither image nor hole must not matter.
  x.fill(0, x.pixels, 0xff);
  for (const Hole& h : map.holes) x.fill(h.first, h.count, 0);
  std::vector<int> image(static_cast<size_t>(images * w.in[0] * w.in[1] * C));
  for (int64_t g = 0; g < images; ++g) {
    for (int64_t y = 0; y < w.in[0]; ++y) {
      for (int64_t q = 0; q < w.in[1]; ++q) {
        const int64_t at = from.at(g, y, q);
        for (int64_t c = 0; c < channels; ++c) {
          const int v = c < C ? value(wide_x, 4) : 0;
          if (c < C) image[static_cast<size_t>(((g * w.in[0] + y) * w.in[1] + q) * C + c)] = v;
          if (at >= 0) x.set(at, c, v);
        }
      }
    }
  }
  std::vector<int> weight(static_cast<size_t>(K * C * taps));
  for (int& v : weight) v = value(wide_w, 3);
  const std::vector<uint16_t> packed = pack(weight, split, K, C, taps);
  std::vector<float> scale(static_cast<size_t>(round_up(K, kTileN))), shift(scale.size());
  for (size_t k = 0; k < static_cast<size_t>(K); ++k) {
    scale[k] = 1.0f;
    shift[k] = static_cast<float>(k % 5);
  }
  const int64_t pixels = chained ? to.pixels() : images * w.out[0] * w.out[1];
  Values out{split, chained, pixels, pitch};
  out.fill(0, pixels, 0x5a);
  Values residual{split, false, chained ? 0 : pixels, K};
  for (int64_t i = 0; i < residual.pixels; ++i) {
    for (int64_t k = 0; k < K; ++k) residual.set(i, k, static_cast<int>(pick(-9, 9)));
  }
  const std::vector<int64_t> step_bytes = steps(map.taps, x);

  TileConvParams p{};
  p.split = split;
  p.a = x.bytes.get();
  p.row_bytes = x.pixel_bytes();
  p.low_bytes = x.low_bytes();
  p.step_bytes = step_bytes.data();
  p.steps = static_cast<int64_t>(step_bytes.size());
  p.tiles = map.tiles.data();
  p.places = map.places.data();
  p.weight = packed.data();
  p.scale = scale.data();
  p.shift = shift.data();
  p.residual = chained ? nullptr : residual.bytes.get();
  p.out = out.bytes.get();
  p.K = K;
  p.pixel_bytes = out.pixel_bytes();
  p.panel_bytes = out.chunk_bytes();
  p.out_low_bytes = out.low_bytes();
  p.whole = chained;
  p.relu = pick(0, 1) == 1;
  p.filters_inside = pick(0, 1) == 1;
  // A projection of other values at the same rows, instead of the residual.
  const bool projects = !chained && pick(0, 1) == 1;
  const int64_t C2 = pick(1, 40), channels2 = round_up(C2, kTileK);
  Values x2{split, true, map.rows, channels2};
  x2.fill(0, x2.pixels, 0xff);
  std::vector<int> image2(static_cast<size_t>(images * w.out[0] * w.out[1] * C2)), weight2;
  std::vector<uint16_t> packed2;
  std::vector<float> scale2(scale.size()), shift2(scale.size());
  const std::vector<int64_t> step_bytes2 = steps({0}, x2);
  TileConvParams project = p;
  if (projects) {
    for (int64_t i = 0; i < images * w.out[0] * w.out[1]; ++i) {
      const int64_t q = i % w.out[1], y = i / w.out[1] % w.out[0], g = i / w.out[1] / w.out[0];
      for (int64_t c = 0; c < channels2; ++c) {
        const int v = c < C2 ? value(wide_x, 4) : 0;
        if (c < C2) image2[static_cast<size_t>(i * C2 + c)] = v;
        x2.set(from.row(g, y, q), c, v);
      }
    }
    weight2.resize(static_cast<size_t>(K * C2));
    for (int& v : weight2) v = value(wide_w, 3);
    packed2 = pack(weight2, split, K, C2, 1);
    for (size_t k = 0; k < static_cast<size_t>(K); ++k) {
      scale2[k] = 2.0f;
      shift2[k] = static_cast<float>(k % 3);
    }
    project.a = x2.bytes.get();
    project.row_bytes = x2.pixel_bytes();
    project.low_bytes = x2.low_bytes();
    project.step_bytes = step_bytes2.data();
    project.steps = static_cast<int64_t>(step_bytes2.size());
    project.weight = packed2.data();
    project.scale = scale2.data();
    project.shift = shift2.data();
    p.project = &project;
    p.residual = nullptr;
  }
  // In two parts, divided either way.
  const int64_t blocks = map.blocks(), panels = round_up(K, kTileN) / kTileN;
  const int64_t cut = pick(0, blocks), cut_panels = pick(0, panels);
  bool finite = kernel(p, 0, cut, 0, panels);
  finite = kernel(p, cut, blocks, 0, cut_panels) && finite;
  finite = kernel(p, cut, blocks, cut_panels, panels) && finite;
  if (!finite) {
    std::printf("a result is said to be NaN or infinite\n");
    return false;
  }

  std::vector<char> written(static_cast<size_t>(pixels), 0);
  for (int64_t g = 0; g < images; ++g) {
    for (int64_t y = 0; y < w.out[0]; ++y) {
      for (int64_t q = 0; q < w.out[1]; ++q) {
        const int64_t at = chained ? to.at(g, y, q) : (g * w.out[0] + y) * w.out[1] + q;
        if (at < 0) continue;
        written[static_cast<size_t>(at)] = 1;
        for (int64_t k = 0; k < pitch; ++k) {
          int want = static_cast<int>(k % 5);
          for (int64_t r = 0; r < w.size[0]; ++r) {
            for (int64_t s = 0; s < w.size[1]; ++s) {
              const int64_t h = y * w.stride[0] + r * w.dilation[0] - w.padding[0];
              const int64_t v = q * w.stride[1] + s * w.dilation[1] - w.padding[1];
              if (h < 0 || h >= w.in[0] || v < 0 || v >= w.in[1] || k >= K) continue;
              const int* pixel = &image[static_cast<size_t>(((g * w.in[0] + h) * w.in[1] + v) * C)];
              for (int64_t c = 0; c < C; ++c)
                want +=
                    pixel[c] * weight[static_cast<size_t>((k * C + c) * taps + r * w.size[1] + s)];
            }
          }
          if (!chained && !projects) want += residual.get(at, k);
          if (projects && k < K) {
            int sum = 0;
            const int* pixel = &image2[static_cast<size_t>(at * C2)];
            for (int64_t c = 0; c < C2; ++c)
              sum += pixel[c] * weight2[static_cast<size_t>(k * C2 + c)];
            want += 2 * sum + static_cast<int>(k % 3);
          }
          if (p.relu && want < 0) want = 0;
          if (k >= K) want = 0;
          // bf16 holds 8 bits, and split fp32 16.
          const int got = out.get(at, k), bits = !split ? 8 : chained ? 16 : 24;
          const int step = std::abs(want) < 1 << bits ? 0 : std::abs(want) >> (bits - 1);
          if (std::abs(got - want) > step) {
            std::printf("pixel (%d, %d, %d) filter %d is %d instead of %d\n", static_cast<int>(g),
                        static_cast<int>(y), static_cast<int>(q), static_cast<int>(k), got, want);
            return false;
          }
        }
      }
    }
  }
  for (size_t i = 0; i < written.size(); ++i) {
    for (int64_t k = 0; written[i] == 0 && k < pitch; ++k) {
      if (*out.at(static_cast<int64_t>(i), k) != 0x5a) {
        std::printf("a place without a pixel was written\n");
        return false;
      }
    }
  }
  if (images > 1) return true;
  // Lines: whoever computes blocks up to `blocks_to_line` has the line, and needs `last_line`.
  for (int64_t y = 0; y < w.out[0]; ++y) {
    const int64_t end = map.blocks_to_line[static_cast<size_t>(y)];
    if (end < 1 || end > blocks) return false;
    const int64_t need = std::min(
        std::max<int64_t>(y * w.stride[0] + (w.size[0] - 1) * w.dilation[0] - w.padding[0], 0),
        w.in[0] - 1);
    if (map.last_line[static_cast<size_t>(end - 1)] < need) {
      std::printf("line %d needs input line %d\n", static_cast<int>(y), static_cast<int>(need));
      return false;
    }
    if (chained) continue;
    for (int64_t m = end * kTileM; m < blocks * kTileM; ++m) {
      const int32_t place = map.places[static_cast<size_t>(m)];
      if (place >= 0 && place / w.out[1] <= y) {
        std::printf("line %d is not complete with its blocks\n", static_cast<int>(y));
        return false;
      }
    }
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  generator.seed(static_cast<unsigned>(std::atoi(argv[1])));
  for (int i = 0; i < std::atoi(argv[2]); ++i) {
    const Window w = random_window(pick(1, 20), pick(1, 20));
    const int64_t images = pick(1, 9);
    const bool enough = images * w.in[0] * w.in[1] >= kTileRows;
    const bool in_place = w.pointwise() && enough && pick(0, 1) == 1;
    const bool inner = !in_place && pick(0, 1) == 1;
    for (Kernel* kernel : {tile_conv_portable, tile_conv_amx}) {
      if (kernel == tile_conv_amx && (argv[3][0] != '1' || !amx_available())) continue;
      if (right(w, images, inner, in_place, kernel)) continue;
      std::printf("H %d W %d window %d x %d images %d inner %d in place %d\n",
                  static_cast<int>(w.in[0]), static_cast<int>(w.in[1]), static_cast<int>(w.size[0]),
                  static_cast<int>(w.size[1]), static_cast<int>(images), inner, in_place);
      return 1;
    }
  }
  return 0;
}
