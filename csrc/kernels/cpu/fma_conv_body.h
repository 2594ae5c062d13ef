// SPDX-License-Identifier: BSD-3-Clause
// The tile convolution in fp32 multiply-adds, compiled once for AVX-512 and once for any CPU; see
// tile_conv.h for what it computes.
//
// Eight pixels x 32 filters are summed in sixteen registers of sixteen floats: per channel two
// loads of weights and eight broadcasts of pixels feed sixteen multiply-adds, so that the loads
// (two a cycle) never hold up the multiply-adds (two a cycle, four cycles each).
#include <cstring>

#include "../tile_conv.h"

#define RESNET_FUSED_ALWAYS inline __attribute__((always_inline))

namespace resnet_fused {
namespace RESNET_FUSED_FMA {

constexpr int kLanes = 16;
constexpr int kRows = kFmaRows;
static_assert(kTileN == 2 * kLanes && kTileRows % kRows == 0, "filters fill two registers");

// GCC's vectors, which it splits where registers are narrower.
typedef float Vector __attribute__((vector_size(64)));
typedef float Memory __attribute__((vector_size(64), aligned(4), may_alias));

static RESNET_FUSED_ALWAYS Vector load(const float* p) {
  return *reinterpret_cast<const Memory*>(p);
}
static RESNET_FUSED_ALWAYS void store(float* p, const Vector& v) {
  *reinterpret_cast<Memory*>(p) = v;
}
static RESNET_FUSED_ALWAYS Vector broadcast(const unsigned char* p) {
  float f;
  std::memcpy(&f, p, 4);
  return Vector{f, f, f, f, f, f, f, f, f, f, f, f, f, f, f, f};
}

// Fetches the next chunk's weights into L2 while this one is used, a line at a time.
struct Ahead {
  const unsigned char *next, *end;
  int64_t each;  // bytes per step of eight pixels

  RESNET_FUSED_ALWAYS void step() {
    if (next >= end) return;
    for (int64_t i = 0; i < each; i += 64) __builtin_prefetch(next + i, 0, 2);
    next += each;
  }
};

// Sums of kRows pixels, in the order of the k-steps and of the channels within each.
struct Sums {
  Vector v[kRows][2];

  RESNET_FUSED_ALWAYS void load_from(const float* c) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      v[r][0] = load(c + r * kTileN);
      v[r][1] = load(c + r * kTileN + kLanes);
    }
  }
  RESNET_FUSED_ALWAYS void store_to(float* c) const {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      store(c + r * kTileN, v[r][0]);
      store(c + r * kTileN + kLanes, v[r][1]);
    }
  }
  // What is known when compiled, addresses need no registers for.
  template <int64_t kDepth, int64_t kRowBytes>
  RESNET_FUSED_ALWAYS void step(const unsigned char* a, int64_t any_row_bytes, const float* w,
                                int64_t depth) {
    const int64_t row_bytes = kRowBytes > 0 ? kRowBytes : any_row_bytes;
    for (int64_t c = 0; c < (kDepth > 0 ? kDepth : depth); ++c) {
      const Vector w0 = load(w + c * kTileN), w1 = load(w + c * kTileN + kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const Vector x = broadcast(a + r * row_bytes + c * 4);
        v[r][0] += x * w0;
        v[r][1] += x * w1;
      }
    }
  }
  // Steps [begin, end).
  RESNET_FUSED_ALWAYS void run(const TileConvParams& p, const unsigned char* rows, const float* w,
                               int64_t begin, int64_t end, Ahead& ahead) {
    for (int64_t i = begin; i < end; ++i) {
      const unsigned char* a = rows + p.step_bytes[i];
      if (p.depth != kTileK) {
        step<0, 0>(a, p.row_bytes, w, p.depth);
      } else if (p.row_bytes == kTileK * 4) {
        step<kTileK, kTileK * 4>(a, 0, w, 0);
      } else {
        step<kTileK, 0>(a, p.row_bytes, w, 0);
      }
      w += p.depth * kTileN;
      ahead.step();
    }
  }
  // BatchNorm.
  RESNET_FUSED_ALWAYS void normalise(const TileConvParams& p, int64_t n) {
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const Vector scale = load(p.scale + n * kTileN + h * kLanes);
      const Vector shift = load(p.shift + n * kTileN + h * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) v[r][h] = v[r][h] * scale + shift;
    }
  }
};

// NaN is not below 0, and stays.
static RESNET_FUSED_ALWAYS Vector relu(const Vector& v) { return v < Vector{} ? Vector{} : v; }

// The first `count` of 32 floats; the others are 0.
static RESNET_FUSED_ALWAYS void load_some(const float* p, int64_t count, Vector (&v)[2]) {
  float all[kTileN] = {};
  std::memcpy(all, p, static_cast<size_t>(count) * 4);
  v[0] = load(all);
  v[1] = load(all + kLanes);
}

// The results of kRows pixels and 32 filters, from their normalised sums.
static RESNET_FUSED_ALWAYS void finish(const TileConvParams& p, const Sums& sums,
                                       const float* projected, const int32_t* places, int64_t n) {
  // A copy: an index that is known only when it runs would keep the sums out of registers.
  Vector results[kRows][2];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    results[r][0] = sums.v[r][0];
    results[r][1] = sums.v[r][1];
  }
  const int64_t k = n * kTileN, left = p.K - k, count = left < kTileN ? left : kTileN;
  for (int r = 0; r < kRows; ++r) {
    const int64_t pixel = places[r];
    if (pixel < 0) continue;
    Vector* y = results[r];
    if (p.project != nullptr) {
      y[0] += load(projected + r * kTileN);
      y[1] += load(projected + r * kTileN + kLanes);
    } else if (p.residual != nullptr) {
      const float* from = static_cast<const float*>(p.residual) + pixel * p.K + k;
      Vector added[2];
      if (count == kTileN) {
        added[0] = load(from);
        added[1] = load(from + kLanes);
      } else {
        load_some(from, count, added);
      }
      y[0] += added[0];
      y[1] += added[1];
    }
    if (p.relu) {
      y[0] = relu(y[0]);
      y[1] = relu(y[1]);
    }
    auto* to = reinterpret_cast<float*>(static_cast<unsigned char*>(p.out) + pixel * p.pixel_bytes +
                                        n * p.panel_bytes);
    if (count == kTileN) {
      store(to, y[0]);
      store(to + kLanes, y[1]);
    } else {
      std::memcpy(to, y, static_cast<size_t>(count) * 4);
      if (p.whole) std::memset(to + count, 0, static_cast<size_t>(kTileN - count) * 4);
    }
  }
}

constexpr int64_t kChunkBytes = 24 << 10;  // of weights, which stay in L1
constexpr int64_t kBlocks = 8;             // of rows that pass by them
constexpr int64_t kParts = kTileM / kRows;

// Sums of blocks [begin, end), at most kBlocks, for 32 filters: a chunk of steps at a time for all
// rows. `each(sums, i)` gets those of the i-th eight rows.
template <typename F>
static RESNET_FUSED_ALWAYS void sum_up(const TileConvParams& p, const int32_t* places,
                                       int64_t begin, int64_t end, int64_t n, float* partial,
                                       const float* following, F&& each) {
  const int64_t parts = (end - begin) * kParts, step = p.depth * kTileN;
  const float* w = static_cast<const float*>(p.weight) + n * p.steps * step;
  const int64_t most = kChunkBytes / (step * 4), chunks = (p.steps + most - 1) / most;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t first = p.steps * chunk / chunks, last = p.steps * (chunk + 1) / chunks;
    const float* next = last < p.steps ? w + last * step : following;
    const int64_t bytes = next == nullptr ? 0 : (last - first) * step * 4;
    Ahead ahead{reinterpret_cast<const unsigned char*>(next),
                reinterpret_cast<const unsigned char*>(next) + bytes,
                (bytes / (parts * (last - first)) / 64 + 1) * 64};
    for (int64_t i = 0; i < parts; ++i) {
      const int32_t* place = places + i * kRows;
      bool any = false;
      for (int r = 0; r < kRows; ++r) any = any || place[r] >= 0;
      if (!any) continue;
      const int64_t tile = 2 * begin + i * kRows / kTileRows, row = i * kRows % kTileRows;
      Sums sums;
      if (first == 0) {
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) sums.v[r][0] = sums.v[r][1] = Vector{};
      } else {
        sums.load_from(partial + i * kRows * kTileN);
      }
      sums.run(p, p.a + (p.tiles[tile] + row) * p.row_bytes, w + first * step, first, last, ahead);
      if (last < p.steps) {
        sums.store_to(partial + i * kRows * kTileN);
      } else {
        sums.normalise(p, n);
        each(sums, i);
      }
    }
  }
}

static void blocks(const TileConvParams& p, int64_t begin, int64_t end, int64_t n,
                   const float* following) {
  alignas(64) float partial[kBlocks * kTileM * kTileN], projected[kBlocks * kTileM * kTileN];
  const int32_t* places = p.places + begin * kTileM;
  if (p.project != nullptr) {
    sum_up(*p.project, places, begin, end, n, partial, nullptr,
           [&](const Sums& sums, int64_t i)
               __attribute__((always_inline)) { sums.store_to(projected + i * kRows * kTileN); });
  }
  sum_up(p, places, begin, end, n, partial, following,
         [&](const Sums& sums, int64_t i) __attribute__((always_inline)) {
           finish(p, sums, projected + i * kRows * kTileN, places + i * kRows, n);
         });
}

static bool conv(const TileConvParams& p, int64_t begin, int64_t end, int64_t n_begin,
                 int64_t n_end) {
  const auto most = [&](int64_t m) { return m + kBlocks < end ? m + kBlocks : end; };
  const auto panel = [&](int64_t n) {
    return static_cast<const float*>(p.weight) + n * p.steps * p.depth * kTileN;
  };
  if (p.filters_inside) {
    for (int64_t m = begin; m < end; m += kBlocks) {
      for (int64_t n = n_begin; n < n_end; ++n) blocks(p, m, most(m), n, nullptr);
    }
  } else {
    for (int64_t n = n_begin; n < n_end; ++n) {
      for (int64_t m = begin; m < end; m += kBlocks) {
        const bool last = most(m) == end;
        blocks(p, m, most(m), n, last ? (n + 1 < n_end ? panel(n + 1) : nullptr) : panel(n));
      }
    }
  }
  return true;
}

static void copy(const CopyPixelsParams& p) {
  for (int64_t i = 0; i < p.count; ++i) {
    const unsigned char* from = p.from + i * p.from_bytes;
    unsigned char* to = p.to + i * p.to_bytes;
    for (int64_t c = 0; c < p.C; c += kTileK) {
      const int64_t count = p.C - c < kTileK ? p.C - c : kTileK;
      if (count == kTileK) {
        std::memcpy(to, from, kTileK * 4);
      } else {
        std::memset(to, 0, kTileK * 4);
        std::memcpy(to, from, static_cast<size_t>(count) * 4);
      }
      from += kTileK * 4;
      to += p.chunk_bytes;
    }
  }
}

}  // namespace RESNET_FUSED_FMA
}  // namespace resnet_fused
