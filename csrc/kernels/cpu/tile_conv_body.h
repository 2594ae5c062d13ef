// SPDX-License-Identifier: BSD-3-Clause
// The tile convolution's loops, compiled once for AMX and once portably; see tile_conv.h for what
// it computes.
//
// A block is 32 pixels x 32 filters in four accumulators, which loads each A and B tile once for
// two products. Blocks are pipelined: while the tiles compute a block, the vector units finish the
// one before it (BatchNorm, residual, ReLU, rounding), some rows after each k-step, so that neither
// waits for the other.
#include "../tile_conv.h"
#include "amx.h"

namespace resnet_fused {
namespace RESNET_FUSED_TILES {

static_assert(kTileM == 32 && kTileN == 32 && kTileK == 32, "Tiles::step computes 32 x 32 x 32");

// Packed weights lie in the order in which they are read; two k-steps ahead is enough to hide L3, a
// quarter of the time of the 7x7 layers.
constexpr int64_t kAhead = 4096;

// A block whose sums are known but not finished: rows [next, end) of `c`, whose row i is GEMM row m
// + i.
struct Unfinished {
  alignas(64) float c[kTileM * kTileN];
  int64_t next, end;
  int64_t line, q;  // of row `next`
  int64_t k;        // first filter

  inline void begin(const TileConvParams& p, int64_t m, int64_t first, int64_t last,
                    int64_t filter) {
    next = first;
    end = last;
    line = (m + first) / p.pitch;
    q = (m + first) % p.pitch;
    k = filter;
  }

  inline void finish(const TileConvParams& p, int64_t rows) {
    if (next >= end) return;
    const int64_t columns = p.K - k < kTileN ? p.K - k : kTileN;
    const uint32_t mask = columns == 32 ? 0xffffffffu : (1u << columns) - 1u;
    const Epilogue epilogue{p.scale + k, p.shift + k, mask, p.relu, p.stream};
    const int64_t stop = end - next < rows ? end : next + rows;
    while (next < stop) {
      // The rest of this output row, then what lies between it and the next.
      const int64_t run = p.Q - q < stop - next ? p.Q - q : stop - next;
      int64_t at = (line * p.Q + q) * p.K + k;
      const float* from = c + next * kTileN;
      if (p.residual != nullptr) {
        for (int64_t i = 0; i < run; ++i, from += kTileN, at += p.K)
          epilogue(from, p.residual + at, p.out + at);
      } else {
        for (int64_t i = 0; i < run; ++i, from += kTileN, at += p.K)
          epilogue(from, nullptr, p.out + at);
      }
      if (run > 0) {
        next += run;
        q += run;
      }
      const int64_t gap = q >= p.Q ? p.pitch - q : 0;
      const int64_t skip = gap < stop - next ? gap : stop - next;
      next += skip;
      q += skip;
      if (q == p.pitch) {
        q = 0;
        ++line;
      }
    }
  }
};

// Compute the block at GEMM row m and packed panel b while finishing the one before it.
// With `fresh` weights, which no block of this call has read, those kAhead bytes on are fetched
// meanwhile.
static inline void block(const TileConvParams& p, Tiles& tiles, Unfinished& before, int64_t m,
                         const unsigned char* b, int64_t rows_per_step, bool fresh) {
  for (int64_t t = 0; t < p.taps; ++t) {
    const unsigned char* a = p.a + m * p.row_bytes + p.tap_bytes[t];
    for (int64_t s = 0; s < p.c_steps; ++s, a += 2 * kTileK, b += 2 * kTileBytes) {
      if (t + s == 0) {
        tiles.first(a, p.row_bytes, b, before.c);
      } else {
        tiles.step(a, p.row_bytes, b);
      }
      if (fresh) {
        for (int64_t i = 0; i < 2 * kTileBytes; i += 64) prefetch(b + kAhead + i);
      }
      before.finish(p, rows_per_step);
    }
  }
  before.finish(p, kTileM);
}

static void tile_conv(const TileConvParams& p, int64_t row_begin, int64_t row_end, int64_t n_begin,
                      int64_t n_end) {
  Tiles tiles;
  Unfinished before;
  before.begin(p, 0, 0, 0, n_begin * kTileN);
  const int64_t steps = p.taps * p.c_steps, panel = steps * 2 * kTileBytes;
  const int64_t rows_per_step = (kTileM + steps - 1) / steps;
  const auto* weight = reinterpret_cast<const unsigned char*>(p.weight);
  const auto run = [&](int64_t row, int64_t n) __attribute__((always_inline)) {
    // The last block moves back to end with the rows, and finishes only what is new.
    const int64_t m = row + kTileM > p.rows && p.rows >= kTileM ? p.rows - kTileM : row;
    block(p, tiles, before, m, weight + n * panel, rows_per_step, row == row_begin);
    before.begin(p, m, row - m, (row + kTileM < row_end ? row + kTileM : row_end) - m, n * kTileN);
  };
  if (p.filters_inside) {
    for (int64_t row = row_begin; row < row_end; row += kTileM) {
      for (int64_t n = n_begin; n < n_end; ++n) run(row, n);
    }
  } else {
    for (int64_t n = n_begin; n < n_end; ++n) {
      for (int64_t row = row_begin; row < row_end; row += kTileM) run(row, n);
    }
  }
  tiles.store(before.c);
  before.finish(p, kTileM);
}

}  // namespace RESNET_FUSED_TILES
}  // namespace resnet_fused
