// SPDX-License-Identifier: BSD-3-Clause
// Tile convolutions of random shapes against sums written out, in buffers of exactly the size that
// the maps ask for, in bf16, in bf16x3 and in fp32. Arguments: seed, count, and 1 to run the
// kernels for AMX and AVX-512 too. Values are integers, of fp32 up to 13 bits on either side, so
// every result is exact. Exits with 1 and the shape if something is wrong.
#include <cmath>
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
float number(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// Activations as the kernel reads and writes them: a tensor, whose pixels have all channels, or the
// operand of a convolution: chunks of 32 channels and, in bf16x3, planes of upper and of lower
// halves.
struct Values {
  Products products;
  bool operand;
  int64_t pixels, channels;
  std::unique_ptr<unsigned char[]> bytes{new unsigned char[static_cast<size_t>(size())]};

  bool split() const { return products == Products::bf16x3 && operand; }
  bool floats() const { return products != Products::bf16 && !split(); }
  int64_t size() const { return pixels * channels * item_bytes(products); }
  int64_t item() const { return floats() ? 4 : 2; }  // or a half of it
  int64_t pixel_bytes() const { return (operand ? 32 : channels) * item(); }
  int64_t low_bytes() const { return pixels * pixel_bytes(); }
  int64_t chunk_bytes() const { return operand ? low_bytes() * (split() ? 2 : 1) : 32 * item(); }
  // Where a value is, or its upper half.
  unsigned char* at(int64_t pixel, int64_t c) const {
    return bytes.get() + pixel * pixel_bytes() + c / 32 * chunk_bytes() + c % 32 * item();
  }
  void set(int64_t pixel, int64_t c, int value) {
    const auto f = static_cast<float>(value);
    uint16_t high, low;
    split_cpu(&f, &high, &low, 1);  // bf16 holds small integers: no lower half
    std::memcpy(at(pixel, c), floats() ? static_cast<const void*>(&f) : &high,
                static_cast<size_t>(item()));
    if (split()) std::memcpy(at(pixel, c) + low_bytes(), &low, 2);
  }
  float get(int64_t pixel, int64_t c) const {
    float f = 0;
    uint16_t high, low = 0;
    if (floats()) {
      std::memcpy(&f, at(pixel, c), 4);
      return f;
    }
    std::memcpy(&high, at(pixel, c), 2);
    if (split()) std::memcpy(&low, at(pixel, c) + low_bytes(), 2);
    return number(high) + number(low);
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

// `depth`: channels of a step.
std::vector<unsigned char> pack(const std::vector<int>& weight, Products products, int64_t K,
                                int64_t C, int64_t taps, int64_t depth = kTileK) {
  const std::vector<float> wide(weight.begin(), weight.end());
  const int64_t panels = round_up(K, kTileN) / kTileN;
  std::vector<unsigned char> packed(
      static_cast<size_t>(panels * kTileN * round_up(C, depth) * taps * item_bytes(products)));
  if (products == Products::fp32) {
    pack_floats_cpu({wide.data(), reinterpret_cast<float*>(packed.data()), K, C, taps, depth}, 0,
                    panels);
    return packed;
  }
  std::vector<uint16_t> high(wide.size()), low(wide.size());
  split_cpu(wide.data(), high.data(), low.data(), static_cast<int64_t>(wide.size()));
  pack_tiles_cpu({high.data(), products == Products::bf16x3 ? low.data() : nullptr,
                  reinterpret_cast<uint16_t*>(packed.data()), K, C, taps},
                 0, panels);
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

// What is multiplied, and at which rows.
TileConvParams product(const Values& x, const TileMap& map, const std::vector<int64_t>& step_bytes,
                       const std::vector<unsigned char>& packed, const std::vector<float>& scale,
                       const std::vector<float>& shift, int64_t K) {
  TileConvParams p{};
  p.products = x.products;
  p.a = x.bytes.get();
  p.row_bytes = x.pixel_bytes();
  p.low_bytes = x.low_bytes();
  p.step_bytes = step_bytes.data();
  p.steps = static_cast<int64_t>(step_bytes.size());
  p.depth = kTileK;
  p.tiles = map.tiles.data();
  p.places = map.places.data();
  p.weight = packed.data();
  p.scale = scale.data();
  p.shift = shift.data();
  p.K = K;
  return p;
}

void write_to(const Values& out, TileConvParams& p) {
  p.out = out.bytes.get();
  p.pixel_bytes = out.pixel_bytes();
  p.panel_bytes = out.chunk_bytes();
  p.out_low_bytes = out.low_bytes();
  p.whole = out.operand;
  p.filters_inside = pick(0, 1) == 1;
}

// In parts, divided either way; false if a result is said to be NaN or infinite.
bool run(Kernel* kernel, const TileConvParams& p, int64_t blocks) {
  const int64_t panels = round_up(p.K, kTileN) / kTileN;
  const int64_t cut = pick(0, blocks), cut_panels = pick(0, panels);
  if (kernel(p, 0, cut, 0, panels) && kernel(p, cut, blocks, 0, cut_panels) &&
      kernel(p, cut, blocks, cut_panels, panels))
    return true;
  std::printf("a result is said to be NaN or infinite\n");
  return false;
}

int integer(bool wide, int64_t most) {
  return static_cast<int>(wide ? pick(-4100, 4100) : pick(-most, most));
}

bool wrong(int64_t pixel, int64_t k, float got, double want) {
  const int at[2] = {static_cast<int>(pixel), static_cast<int>(k)};
  std::printf("pixel %d filter %d is %g instead of %g\n", at[0], at[1], got, want);
  return false;
}

bool right(const Window& w, int64_t images, bool inner, bool in_place, Products products,
           Kernel* kernel) {
  const int64_t part = products == Products::fp32 ? 8 : kTileRows;
  const TileLayout from = tile_layout(w, images, inner, part);
  // What comes next: a tensor, or some other convolution.
  const Window next = random_window(w.out[0], w.out[1]);
  const TileLayout to = tile_layout(next, images, pick(0, 1) == 1, part);
  const bool chained = pick(0, 1) == 1;
  const TileMap map = make_tile_map(from, chained ? &to : nullptr, in_place);

  const int64_t C = pick(1, 40), K = pick(1, 70), channels = round_up(C, kTileK);
  const int64_t taps = w.size[0] * w.size[1], pitch = chained ? round_up(K, kTileN) : K;
  // Split: one factor has lower halves, the other none, so that low * low is not missed.
  const bool wide = products != Products::bf16;
  const bool wide_x = wide && pick(0, 1) == 1, wide_w = wide && !wide_x;
  Values x{products, products == Products::bf16x3 || !in_place, in_place ? from.pixels() : map.rows,
           channels};
  // Poison: what is neither image nor hole must not matter.
  x.fill(0, x.pixels, 0xff);
  for (const Hole& h : map.holes) x.fill(h.first, h.count, 0);
  std::vector<int> image(static_cast<size_t>(images * w.in[0] * w.in[1] * C));
  for (int64_t g = 0; g < images; ++g) {
    for (int64_t y = 0; y < w.in[0]; ++y) {
      for (int64_t q = 0; q < w.in[1]; ++q) {
        const int64_t at = from.at(g, y, q);
        for (int64_t c = 0; c < channels; ++c) {
          const int v = c < C ? integer(wide_x, 4) : 0;
          if (c < C) image[static_cast<size_t>(((g * w.in[0] + y) * w.in[1] + q) * C + c)] = v;
          if (at >= 0) x.set(at, c, v);
        }
      }
    }
  }
  std::vector<int> weight(static_cast<size_t>(K * C * taps));
  for (int& v : weight) v = integer(wide_w, 3);
  const std::vector<unsigned char> packed = pack(weight, products, K, C, taps);
  std::vector<float> scale(static_cast<size_t>(round_up(K, kTileN)));
  std::vector<float> shift(scale), scale2(scale), shift2(scale);
  for (size_t k = 0; k < static_cast<size_t>(K); ++k) {
    scale[k] = 1.0f;
    shift[k] = static_cast<float>(k % 5);
    scale2[k] = 2.0f;
    shift2[k] = static_cast<float>(k % 3);
  }
  // NaN is kept in fp32, by ReLU too. The other kernels say that it is there instead.
  const bool odd = products == Products::fp32 && pick(0, 3) == 0;
  if (odd) shift[static_cast<size_t>(K - 1)] = std::nanf("");
  const int64_t pixels = chained ? to.pixels() : images * w.out[0] * w.out[1];
  Values out{products, chained, pixels, pitch};
  out.fill(0, pixels, 0x5a);
  Values residual{products, false, chained ? 0 : pixels, K};
  for (int64_t i = 0; i < residual.pixels; ++i) {
    for (int64_t k = 0; k < K; ++k) residual.set(i, k, static_cast<int>(pick(-9, 9)));
  }
  // A projection of other values at the same rows, instead of the residual.
  const bool projects = !chained && pick(0, 1) == 1;
  const int64_t C2 = pick(1, 40), channels2 = round_up(C2, kTileK);
  Values x2{products, products == Products::bf16x3 || pick(0, 1) == 1, map.rows, channels2};
  x2.fill(0, x2.pixels, 0xff);
  std::vector<int> weight2(static_cast<size_t>(K * C2));
  for (int& v : weight2) v = integer(wide_w, 3);
  const std::vector<unsigned char> packed2 = pack(weight2, products, K, C2, 1);
  const std::vector<int64_t> step_bytes = steps(map.taps, x), step_bytes2 = steps({0}, x2);
  for (int64_t i = 0; i < images * w.out[0] * w.out[1]; ++i) {
    const int64_t q = i % w.out[1], y = i / w.out[1] % w.out[0], g = i / w.out[1] / w.out[0];
    for (int64_t c = 0; c < channels2; ++c)
      x2.set(from.row(g, y, q), c, c < C2 ? integer(wide_x, 4) : 0);
  }
  const TileConvParams project = product(x2, map, step_bytes2, packed2, scale2, shift2, K);
  TileConvParams p = product(x, map, step_bytes, packed, scale, shift, K);
  write_to(out, p);
  p.project = projects ? &project : nullptr;
  p.residual = chained || projects ? nullptr : residual.bytes.get();
  p.relu = pick(0, 1) == 1;
  const int64_t blocks = map.blocks();
  if (!run(kernel, p, blocks)) return false;

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
          if (p.residual != nullptr) want += static_cast<int>(residual.get(at, k));
          if (projects && k < K) {
            const int64_t row = from.row(g, y, q);
            int sum = 0;
            for (int64_t c = 0; c < C2; ++c)
              sum += static_cast<int>(x2.get(row, c)) * weight2[static_cast<size_t>(k * C2 + c)];
            want += 2 * sum + static_cast<int>(k % 3);
          }
          if (p.relu && want < 0) want = 0;
          if (k >= K) want = 0;
          // bf16 holds 8 bits, and split fp32 16.
          const int bits = products == Products::bf16 ? 8 : out.split() ? 16 : 24;
          const int step = std::abs(want) < 1 << bits ? 0 : std::abs(want) >> (bits - 1);
          const float got = out.get(at, k), error = std::abs(got - static_cast<float>(want));
          const bool nan = odd && k == K - 1;
          if (nan ? !std::isnan(got) : !(error <= static_cast<float>(step)))
            return wrong(at, k, got, nan ? std::nan("") : want);
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

// The stem in fp32: a step is a row of a window, S pixels of C channels, and the picture has its
// zeros already. What rows beyond a line's end read must not matter.
bool right_windows(Kernel* kernel) {
  const int64_t C = pick(1, 4), R = pick(1, 8), S = pick(1, 8), K = pick(1, 70), depth = S * C;
  const int64_t P = pick(1, 5), Q = pick(1, 40), down = pick(1, 3), right = pick(1, 3);
  const int64_t dilation = pick(1, 2), width = round_up((Q - 1) * right + S, right);
  const int64_t padded = round_up(Q, kTileM);  // an even number of tiles
  TileMap map;
  for (int64_t i = 0; i < P * padded; ++i) {
    const int64_t y = i / padded, q = i % padded;
    if (q % kTileRows == 0) map.tiles.push_back(static_cast<int32_t>(y * down * width / right + q));
    map.places.push_back(static_cast<int32_t>(q < Q ? y * Q + q : -1));
  }
  for (int64_t r = 0; r < R; ++r) map.taps.push_back(r * dilation * width * C * 4);
  Values x{Products::fp32, false,
           (map.tiles.back() + kTileRows - 1) * right + (R - 1) * dilation * width + S, C};
  x.fill(0, x.pixels, 0xff);
  for (int64_t y = 0; y <= (P - 1) * down + (R - 1) * dilation; ++y) {
    for (int64_t i = 0; i < ((Q - 1) * right + S) * C; ++i)
      x.set(y * width + i / C, i % C, integer(true, 0));
  }
  std::vector<int> weight(static_cast<size_t>(K * depth * R));
  for (int& v : weight) v = integer(false, 3);
  const std::vector<unsigned char> packed = pack(weight, x.products, K, depth, R, depth);
  const std::vector<float> scale(static_cast<size_t>(round_up(K, kTileN)), 2.0f);
  Values out{x.products, false, P * Q, K};
  out.fill(0, P * Q, 0xff);
  TileConvParams p = product(x, map, map.taps, packed, scale, scale, K);
  write_to(out, p);
  p.row_bytes *= right;
  p.depth = depth;
  if (!run(kernel, p, map.blocks())) return false;
  for (int64_t i = 0; i < P * Q; ++i) {
    for (int64_t k = 0; k < K; ++k) {
      float want = 2.0f;
      for (int64_t j = 0; j < depth * R; ++j) {
        const int64_t at = (i / Q * down + j % R * dilation) * width + i % Q * right + j / R / C;
        const int v = 2 * weight[static_cast<size_t>(k * depth * R + j)];
        want += x.get(at, j / R % C) * static_cast<float>(v);
      }
      if (out.get(i, k) != want) return wrong(i, k, out.get(i, k), want);
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
    const auto products = static_cast<Products>(pick(0, 2));
    const bool floats = products == Products::fp32;
    std::vector<Kernel*> kernels{floats ? fma_conv_portable : tile_conv_portable};
    if (argv[3][0] == '1' && (floats ? avx512_available() : amx_available()))
      kernels.push_back(floats ? fma_conv_avx512 : tile_conv_amx);
    for (Kernel* kernel : kernels) {
      if (right(w, images, inner, in_place, products, kernel) && (!floats || right_windows(kernel)))
        continue;
      std::printf("H %d W %d window %d x %d images %d inner %d in place %d products %d\n",
                  static_cast<int>(w.in[0]), static_cast<int>(w.in[1]), static_cast<int>(w.size[0]),
                  static_cast<int>(w.size[1]), static_cast<int>(images), inner, in_place,
                  static_cast<int>(products));
      return 1;
    }
  }
  return 0;
}
