// SPDX-License-Identifier: BSD-3-Clause
// Tile convolutions of random shapes against sums written out, in buffers of exactly the size that
// the maps ask for. Arguments: seed, count, and 1 to run the AMX kernel too. Values are small
// integers, so every result is exact. Exits with 1 and the shape if something is wrong.
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
int integer(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return static_cast<int>(f);
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

using Kernel = void(const TileConvParams&, int64_t, int64_t, int64_t, int64_t);

bool right(const Window& w, int64_t images, bool inner, bool in_place, Kernel* kernel) {
  const TileLayout from = tile_layout(w, images, inner);
  // What comes next: a tensor, or some other convolution.
  const Window next = random_window(w.out[0], w.out[1]);
  const TileLayout to = tile_layout(next, images, pick(0, 1) == 1);
  const bool chained = pick(0, 1) == 1;
  const TileMap map = make_tile_map(from, chained ? &to : nullptr, in_place);

  const int64_t C = pick(1, 40), K = pick(1, 70), channels = round_up(C, kTileK);
  const int64_t taps = w.size[0] * w.size[1], pitch = chained ? round_up(K, kTileN) : K;
  const int64_t rows = in_place ? from.pixels() : map.rows;
  // Poison: what is neither image nor hole must not matter.
  std::unique_ptr<uint16_t[]> x(new uint16_t[static_cast<size_t>(rows * channels)]);
  std::fill_n(x.get(), rows * channels, uint16_t{0x7fc0});
  for (const Hole& h : map.holes)
    std::fill_n(x.get() + h.first * channels, h.count * channels, uint16_t{0});
  std::vector<int> image(static_cast<size_t>(images * w.in[0] * w.in[1] * C));
  for (int64_t g = 0; g < images; ++g) {
    for (int64_t y = 0; y < w.in[0]; ++y) {
      for (int64_t q = 0; q < w.in[1]; ++q) {
        const int64_t at = from.at(g, y, q);
        for (int64_t c = 0; c < channels; ++c) {
          const int value = c < C ? static_cast<int>(pick(-4, 4)) : 0;
          if (c < C) image[static_cast<size_t>(((g * w.in[0] + y) * w.in[1] + q) * C + c)] = value;
          if (at >= 0) x[static_cast<size_t>(at * channels + c)] = bf16(value);
        }
      }
    }
  }
  std::vector<uint16_t> weight(static_cast<size_t>(K * C * taps));
  for (auto& v : weight) v = bf16(static_cast<int>(pick(-3, 3)));
  std::vector<uint16_t> packed(static_cast<size_t>(round_up(K, kTileN) * channels * taps));
  pack_tiles_cpu({weight.data(), packed.data(), K, C, taps}, 0, round_up(K, kTileN) / kTileN);
  std::vector<float> scale(static_cast<size_t>(round_up(K, kTileN))), shift(scale.size());
  for (size_t k = 0; k < static_cast<size_t>(K); ++k) {
    scale[k] = 1.0f;
    shift[k] = static_cast<float>(k % 5);
  }
  const int64_t pixels = chained ? to.pixels() : images * w.out[0] * w.out[1];
  std::vector<uint16_t> out(static_cast<size_t>(pixels * pitch), bf16(99));
  std::vector<uint16_t> residual(chained ? 0 : out.size());
  for (auto& v : residual) v = bf16(static_cast<int>(pick(-9, 9)));
  std::vector<int64_t> tap_bytes;
  for (int64_t tap : map.taps) tap_bytes.push_back(tap * channels * 2);

  TileConvParams p{};
  p.a = reinterpret_cast<const unsigned char*>(x.get());
  p.row_bytes = channels * 2;
  p.tap_bytes = tap_bytes.data();
  p.taps = taps;
  p.c_steps = channels / kTileK;
  p.tiles = map.tiles.data();
  p.places = map.places.data();
  p.weight = packed.data();
  p.scale = scale.data();
  p.shift = shift.data();
  p.residual = chained ? nullptr : residual.data();
  p.out = out.data();
  p.K = K;
  p.pitch = pitch;
  p.whole = chained;
  p.relu = pick(0, 1) == 1;
  p.filters_inside = pick(0, 1) == 1;
  // A projection of other values at the same rows, instead of the residual.
  const bool projects = !chained && pick(0, 1) == 1;
  const int64_t C2 = pick(1, 40), channels2 = round_up(C2, kTileK), zero = 0;
  std::vector<uint16_t> x2(static_cast<size_t>(map.rows * channels2), 0x7fc0), weight2, packed2;
  std::vector<int> image2(static_cast<size_t>(images * w.out[0] * w.out[1] * C2));
  std::vector<float> scale2(scale.size()), shift2(scale.size());
  TileConvParams project = p;
  if (projects) {
    for (int64_t i = 0; i < images * w.out[0] * w.out[1]; ++i) {
      const int64_t q = i % w.out[1], y = i / w.out[1] % w.out[0], g = i / w.out[1] / w.out[0];
      for (int64_t c = 0; c < channels2; ++c) {
        const int value = c < C2 ? static_cast<int>(pick(-4, 4)) : 0;
        if (c < C2) image2[static_cast<size_t>(i * C2 + c)] = value;
        x2[static_cast<size_t>(from.row(g, y, q) * channels2 + c)] = bf16(value);
      }
    }
    weight2.resize(static_cast<size_t>(K * C2));
    for (auto& v : weight2) v = bf16(static_cast<int>(pick(-3, 3)));
    packed2.resize(static_cast<size_t>(round_up(K, kTileN) * channels2));
    pack_tiles_cpu({weight2.data(), packed2.data(), K, C2, 1}, 0, round_up(K, kTileN) / kTileN);
    for (size_t k = 0; k < static_cast<size_t>(K); ++k) {
      scale2[k] = 2.0f;
      shift2[k] = static_cast<float>(k % 3);
    }
    project.a = reinterpret_cast<const unsigned char*>(x2.data());
    project.row_bytes = channels2 * 2;
    project.tap_bytes = &zero;
    project.taps = 1;
    project.c_steps = channels2 / kTileK;
    project.weight = packed2.data();
    project.scale = scale2.data();
    project.shift = shift2.data();
    p.project = &project;
    p.residual = nullptr;
  }
  // In two parts, divided either way.
  const int64_t blocks = map.blocks(), panels = round_up(K, kTileN) / kTileN;
  const int64_t cut = pick(0, blocks), cut_panels = pick(0, panels);
  kernel(p, 0, cut, 0, panels);
  kernel(p, cut, blocks, 0, cut_panels);
  kernel(p, cut, blocks, cut_panels, panels);

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
                    pixel[c] *
                    integer(weight[static_cast<size_t>((k * C + c) * taps + r * w.size[1] + s)]);
            }
          }
          const auto index = static_cast<size_t>(at * pitch + k);
          if (!chained && !projects) want += integer(residual[index]);
          if (projects && k < K) {
            int sum = 0;
            const int* pixel = &image2[static_cast<size_t>(at * C2)];
            for (int64_t c = 0; c < C2; ++c)
              sum += pixel[c] * integer(weight2[static_cast<size_t>(k * C2 + c)]);
            want += 2 * sum + static_cast<int>(k % 3);
          }
          if (p.relu && want < 0) want = 0;
          if (k >= K) want = 0;
          // Sums beyond 2^8 are rounded to bf16.
          const int got = integer(out[index]),
                    step = std::abs(want) < 256 ? 0 : std::abs(want) / 128;
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
      if (out[i * static_cast<size_t>(pitch) + static_cast<size_t>(k)] != bf16(99)) {
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
