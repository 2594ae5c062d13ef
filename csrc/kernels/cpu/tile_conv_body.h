// SPDX-License-Identifier: BSD-3-Clause
// The tile convolution's loops, compiled once for AMX and once portably; see tile_conv.h for what
// it computes.
//
// A block is 32 pixels x 32 filters in four accumulators, which loads each A and B tile once for
// two products. Blocks are pipelined: in the first k-step of a block the sums of the one before it
// are stored, and meanwhile the vector units finish the one before that (BatchNorm, residual, ReLU,
// rounding), some rows after each k-step, so that neither waits for the other, nor for the stores.
#include "../tile_conv.h"
#include "amx.h"

namespace resnet_fused {
namespace RESNET_FUSED_TILES {

static_assert(kTileM == 32 && kTileN == 32 && kTileK == 32, "Tiles::step computes 32 x 32 x 32");

// What a call does with its sums; a loop is compiled for each.
template <bool kSplit_, Add kAdd_, bool kRelu, bool kWhole>
struct Kind {
  static constexpr bool kSplit = kSplit_;
  static constexpr Add kAdd = kAdd_;
  using Finish = Epilogue<kSplit, kAdd, kRelu, kWhole>;
};

// A block whose sums are known, but not finished.
struct Unfinished {
  alignas(64) float c[kTileM * kTileN];
  const float* projected = nullptr;  // the second convolution's sums
  const int32_t* places = nullptr;   // none: there is no block
  int64_t k = 0;                     // first filter
};

// Finishes an `Unfinished` some rows at a time. All of it is inlined, or it would live in memory,
// which costs more than the work itself.
template <typename Kind>
struct Finisher {
  static constexpr bool kProjects = Kind::kAdd == Add::projected;
  static constexpr bool kResidual = Kind::kAdd == Add::residual;
  static constexpr int64_t kItem = Kind::kSplit ? 4 : 2;  // bytes of an activation

  const typename Kind::Finish finish;
  const float *c, *projected;
  const int32_t *place, *end;
  const unsigned char* residual;
  unsigned char* out;
  const int64_t K, pixel_bytes;  // from a pixel to the next, of residual and out
  const int64_t low_bytes;
  uint32_t odd = 0;  // not 0 if a result is NaN or infinite

  RESNET_FUSED_ALWAYS Finisher(const TileConvParams& p, const Unfinished& block)
      : finish{Normed(p.scale + block.k, p.shift + block.k),
               kProjects ? Normed(p.project->scale + block.k, p.project->shift + block.k)
                         : Normed(p.scale + block.k, p.shift + block.k),
               mask(p.K - block.k)},
        c(block.c),
        projected(block.projected),
        place(block.places),
        end(block.places + (block.places == nullptr ? 0 : kTileM)),
        residual(kResidual ? static_cast<const unsigned char*>(p.residual) + block.k * kItem
                           : nullptr),
        out(static_cast<unsigned char*>(p.out) + block.k / kTileN * p.panel_bytes),
        K(p.K * kItem),
        pixel_bytes(p.pixel_bytes),
        low_bytes(p.out_low_bytes) {}
  RESNET_FUSED_ALWAYS void rows(int64_t count) {
    const int32_t* stop = end - place < count ? end : place + count;
    for (; place < stop; ++place, c += kTileN, projected += kProjects ? kTileN : 0) {
      const int64_t pixel = *place;
      if (pixel < 0) continue;
      odd |= finish(c, projected, kResidual ? residual + pixel * K : nullptr,
                    out + pixel * pixel_bytes, low_bytes);
    }
  }
  static RESNET_FUSED_ALWAYS uint32_t mask(int64_t columns) {
    return columns >= kTileN ? 0xffffffffu : (1u << columns) - 1u;
  }
};

// What is fetched for later, divided evenly over the k-steps of a call.
struct Ahead {
  const unsigned char *next, *end;
  int64_t each;  // bytes per k-step

  RESNET_FUSED_ALWAYS Ahead(const TileConvParams& p, int64_t steps)
      : next(p.ahead),
        end(p.ahead == nullptr ? nullptr : p.ahead + p.ahead_bytes),
        each(steps > 0 ? (p.ahead_bytes / steps / 64 + 1) * 64 : 0) {}
  RESNET_FUSED_ALWAYS void step() {
    if (next >= end) return;
    for (int64_t i = 0; i < each; i += 64) prefetch(next + i);
    next += each;
  }
};

// The sums of block `m` of rows for packed panel `b`, while those of the block before it are stored
// in `before` and an older block is finished. The weights lie in the order in which they are read:
// the hardware's prefetcher gets them from L3.
template <typename Kind>
static RESNET_FUSED_ALWAYS void multiply(const TileConvParams& p, Tiles& tiles, float* before,
                                         Finisher<Kind>& finisher, int64_t rows_at_once, int64_t m,
                                         const unsigned char* b, Ahead& ahead) {
  constexpr bool kSplit = Kind::kSplit;
  constexpr int64_t kPanelStep = (kSplit ? 4 : 2) * kTileBytes;
  const int64_t row_bytes = p.row_bytes, low_bytes = p.low_bytes;
  const int64_t *at = p.step_bytes, *const end = at + p.steps;
  const unsigned char* rows0 = p.a + p.tiles[2 * m] * row_bytes;
  const unsigned char* rows1 = p.a + p.tiles[2 * m + 1] * row_bytes;
  for (bool first = true; at < end; ++at, first = false) {
    const unsigned char *a0 = rows0 + *at, *a1 = rows1 + *at;
    if (first) {
      tiles.template first<kSplit>(a0, a1, row_bytes, low_bytes, b, before);
    } else {
      tiles.template step<kSplit>(a0, a1, row_bytes, low_bytes, b);
    }
    finisher.rows(rows_at_once);
    b += kPanelStep;
    ahead.step();
  }
}

static RESNET_FUSED_ALWAYS const unsigned char* panel(const TileConvParams& p, int64_t n) {
  return static_cast<const unsigned char*>(p.weight) +
         n * p.steps * item_bytes(p.products) * kTileBytes;
}

template <typename Kind>
static bool loop(const TileConvParams& p, int64_t begin, int64_t end, int64_t n_begin,
                 int64_t n_end) {
  constexpr bool kProjects = Kind::kAdd == Add::projected;
  Tiles tiles;
  Unfinished blocks[2];
  int at = 0;  // where the block now computed will be stored; the one before it is in the other
  // Sums of the second convolution: of the block now computed, the one before it, and the one that
  // is being finished.
  alignas(64) float projected[kProjects ? 3 : 1][kProjects ? kTileM * kTileN : 1];
  int place = 0;
  const int64_t steps = p.steps + (kProjects ? p.project->steps : 0);
  const int64_t rows_at_once = (kTileM + steps - 1) / steps;
  uint32_t odd = 0;
  Ahead ahead(p, (end - begin) * (n_end - n_begin) * steps);
  const auto run = [&](int64_t m, int64_t n) __attribute__((always_inline)) {
    Unfinished& now = blocks[at];
    float* before = blocks[1 - at].c;
    Finisher<Kind> finisher(p, now);
    if (kProjects) {
      multiply(*p.project, tiles, before, finisher, rows_at_once, m, panel(*p.project, n), ahead);
      before = projected[place];
    }
    multiply(p, tiles, before, finisher, rows_at_once, m, panel(p, n), ahead);
    finisher.rows(kTileM);
    odd |= finisher.odd;
    now.projected = projected[place];
    now.places = p.places + m * kTileM;
    now.k = n * kTileN;
    at = 1 - at;
    place = kProjects ? (place + 1) % 3 : 0;
  };
  if (p.filters_inside) {
    for (int64_t m = begin; m < end; ++m) {
      for (int64_t n = n_begin; n < n_end; ++n) run(m, n);
    }
  } else {
    for (int64_t n = n_begin; n < n_end; ++n) {
      for (int64_t m = begin; m < end; ++m) run(m, n);
    }
  }
  tiles.store(blocks[1 - at].c);
  const Unfinished* last[] = {&blocks[at], &blocks[1 - at]};
  for (const Unfinished* block : last) {
    Finisher<Kind> finisher(p, *block);
    finisher.rows(kTileM);
    odd |= finisher.odd;
  }
  return odd == 0;
}

template <bool kSplit, Add kAdd>
static bool choose(const TileConvParams& p, int64_t begin, int64_t end, int64_t n_begin,
                   int64_t n_end) {
  if (p.relu) {
    return p.whole ? loop<Kind<kSplit, kAdd, true, true>>(p, begin, end, n_begin, n_end)
                   : loop<Kind<kSplit, kAdd, true, false>>(p, begin, end, n_begin, n_end);
  }
  return p.whole ? loop<Kind<kSplit, kAdd, false, true>>(p, begin, end, n_begin, n_end)
                 : loop<Kind<kSplit, kAdd, false, false>>(p, begin, end, n_begin, n_end);
}

template <bool kSplit>
static bool choose(const TileConvParams& p, int64_t begin, int64_t end, int64_t n_begin,
                   int64_t n_end) {
  if (p.project != nullptr) return choose<kSplit, Add::projected>(p, begin, end, n_begin, n_end);
  if (p.residual != nullptr) return choose<kSplit, Add::residual>(p, begin, end, n_begin, n_end);
  return choose<kSplit, Add::nothing>(p, begin, end, n_begin, n_end);
}

static bool tile_conv(const TileConvParams& p, int64_t begin, int64_t end, int64_t n_begin,
                      int64_t n_end) {
  return p.products == Products::bf16x3 ? choose<true>(p, begin, end, n_begin, n_end)
                                        : choose<false>(p, begin, end, n_begin, n_end);
}

static void copy_pixels(const CopyPixelsParams& p) {
  for (int64_t i = 0; i < p.count; ++i) {
    const unsigned char* from = p.from + i * p.from_bytes;
    unsigned char* to = p.to + i * p.to_bytes;
    for (int64_t c = 0; c < p.C; c += kTileK) {
      p.products == Products::bf16x3 ? copy_32<true>(from, p.C - c, to, p.low_bytes)
                                     : copy_32<false>(from, p.C - c, to, 0);
      from += item_bytes(p.products) * kTileK;
      to += p.chunk_bytes;
    }
  }
}

}  // namespace RESNET_FUSED_TILES
}  // namespace resnet_fused
