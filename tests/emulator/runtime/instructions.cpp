// SPDX-License-Identifier: BSD-3-Clause
// What a running thread may call: emulator.h.
#include <cstring>

#include "block.h"
#include "memory.h"
#include "number.h"

#define RETURN_ADDRESS __builtin_extract_return_addr(__builtin_return_address(0))

namespace emulator {
namespace {

Block& block() { return *current_block; }

// The block, with the place in the kernel kept for reports.
Block& block_at(const void* program) {
  current_block->self().program = program;
  return *current_block;
}

struct ShuffleLane {
  Shuffle kind;
  unsigned mask;
  uint64_t value, result;
  int by, width;
};

void shuffle_all(Block& b, Warp& warp) {
  for (int lane = 0; lane < 32; ++lane) {
    auto& me = *static_cast<ShuffleLane*>(warp.operands[lane]);
    const int first = lane / me.width * me.width, at = lane - first;
    int from = at;
    switch (me.kind) {
      case Shuffle::index:
        from = me.by & (me.width - 1);
        break;
      case Shuffle::exclusive_or:
        from = at ^ me.by;
        break;
      case Shuffle::up:
        from = at - me.by;
        break;
      case Shuffle::down:
        from = at + me.by;
        break;
    }
    if (from < 0 || from >= me.width) from = at;
    me.result = static_cast<ShuffleLane*>(warp.operands[first + from])->value;
  }
  (void)b;
}

struct BallotLane {
  bool predicate;
  unsigned result;
};

void ballot_all(Block&, Warp& warp) {
  unsigned all = 0;
  for (int lane = 0; lane < 32; ++lane) {
    all |= unsigned{static_cast<BallotLane*>(warp.operands[lane])->predicate} << lane;
  }
  for (void* operands : warp.operands) static_cast<BallotLane*>(operands)->result = all;
}

struct MatrixLane {
  uint32_t* registers;
  int count;
  bool transposed;
  uint32_t row;
  const void* program;
};

void load_matrix_all(Block& b, Warp& warp) {
  const auto lane_of = [&](int lane) -> MatrixLane& {
    return *static_cast<MatrixLane*>(warp.operands[lane]);
  };
  const MatrixLane& first = lane_of(0);
  const int base = b.self().warp * 32;
  ++b.counters().matrix_loads;
  for (int m = 0; m < first.count; ++m) {
    uint16_t rows[8][8];
    uint32_t starts[8];
    for (int r = 0; r < 8; ++r) {
      const MatrixLane& lane = lane_of(8 * m + r);
      starts[r] = lane.row;
      if (lane.row % 16 != 0) {
        b.fail("misaligned", "ldmatrix from shared address " + std::to_string(lane.row),
               base + 8 * m + r, lane.program);
      }
      const unsigned char* p = b.arena() + lane.row;
      b.check_shared(p, 16, false, base + 8 * m + r, lane.program);
      std::memcpy(rows[r], p, 16);
    }
    // Eight rows are read in one pass if they lie in different groups of four banks, or are one.
    int worst = 1;
    for (int bank = 0; bank < 8; ++bank) {
      int different = 0;
      for (int r = 0; r < 8; ++r) {
        bool again = false;
        for (int q = 0; q < r; ++q) again |= starts[q] == starts[r];
        different += !again && starts[r] / 16 % 8 == static_cast<uint32_t>(bank);
      }
      worst = different > worst ? different : worst;
    }
    b.counters().bank_conflicts += worst - 1;
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      const uint32_t low = first.transposed ? rows[2 * t][g] : rows[g][2 * t];
      const uint32_t high = first.transposed ? rows[2 * t + 1][g] : rows[g][2 * t + 1];
      lane_of(lane).registers[m] = low | high << 16;
    }
  }
}

struct ProductLane {
  Product product;
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

// Operands as floats, then 16 x 8 sums over k in order: eight columns side by side, so that the
// compiler can vectorise.
template <int kDepth, typename Unpack>
void multiply_as(Warp& warp, Unpack unpack) {
  constexpr int kEach = kDepth / 8;  // elements in a register
  float a[16][kDepth], b[kDepth][8], d[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& in = *static_cast<const ProductLane*>(warp.operands[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int e = 0; e < kEach; ++e) {
      const int k = t * kEach + e;
      a[g][k] = unpack(in.a[0], e);
      a[g + 8][k] = unpack(in.a[1], e);
      a[g][k + kDepth / 2] = unpack(in.a[2], e);
      a[g + 8][k + kDepth / 2] = unpack(in.a[3], e);
      b[k][g] = unpack(in.b[0], e);
      b[k + kDepth / 2][g] = unpack(in.b[1], e);
    }
    for (int i = 0; i < 4; ++i) d[g + i / 2 * 8][2 * t + i % 2] = in.d[i];
  }
  for (int row = 0; row < 16; ++row) {
    float sum[8];
    for (int j = 0; j < 8; ++j) sum[j] = d[row][j];
    for (int k = 0; k < kDepth; ++k) {
      for (int j = 0; j < 8; ++j) sum[j] += a[row][k] * b[k][j];
    }
    for (int j = 0; j < 8; ++j) d[row][j] = sum[j];
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto& out = *static_cast<const ProductLane*>(warp.operands[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) out.d[i] = d[g + i / 2 * 8][2 * t + i % 2];
  }
}

void multiply_all(Block& b, Warp& warp) {
  ++b.counters().products;
  switch (static_cast<ProductLane*>(warp.operands[0])->product) {
    case Product::f16:
      multiply_as<16>(warp, [](uint32_t v, int e) { return from_f16(v >> 16 * e); });
      break;
    case Product::bf16:
      multiply_as<16>(
          warp, [](uint32_t v, int e) { return from_bits(e == 0 ? v << 16 : v & 0xffff0000u); });
      break;
    case Product::tf32:
      multiply_as<8>(warp, [&b](uint32_t v, int) {
        if (!is_tf32(v)) b.fail("operand", "a TF32 operand with bits below its fraction");
        return from_bits(v);
      });
      break;
  }
}

}  // namespace

Index thread_index() { return {static_cast<unsigned>(block().self().thread), 0, 0}; }
Index block_index() { return block().index(); }
Index block_size() { return {static_cast<unsigned>(block().launch().threads), 1, 1}; }
Index grid_size() {
  const auto& grid = block().launch().grid;
  return {static_cast<unsigned>(grid[0]), static_cast<unsigned>(grid[1]),
          static_cast<unsigned>(grid[2])};
}

void block_barrier(Site site) { block_at(RETURN_ADDRESS).block_barrier(site); }

void warp_barrier(unsigned mask, Site site) {
  Block& b = block_at(RETURN_ADDRESS);
  (void)site;
  if (mask != 0xffffffffu) b.fail("partial-mask", "__syncwarp of a part of the warp");
  b.collective(Collective::barrier, 0, nullptr, nullptr);
}

uint64_t shuffle(Shuffle kind, unsigned mask, uint64_t value, int by, int width) {
  Block& b = block_at(RETURN_ADDRESS);
  if (mask != 0xffffffffu) b.fail("partial-mask", "a shuffle of a part of the warp");
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) {
    b.fail("instruction", "a shuffle with width " + std::to_string(width));
  }
  ShuffleLane lane{kind, mask, value, 0, by, width};
  b.collective(Collective::shuffle, static_cast<uint32_t>(kind), &lane, shuffle_all);
  return lane.result;
}

unsigned ballot(unsigned mask, bool predicate) {
  Block& b = block_at(RETURN_ADDRESS);
  if (mask != 0xffffffffu) b.fail("partial-mask", "a ballot of a part of the warp");
  BallotLane lane{predicate, 0};
  b.collective(Collective::ballot, 0, &lane, ballot_all);
  return lane.result;
}

unsigned char* shared_memory() { return block().shared_begin(); }
uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(p) - block().arena());
}

void load_matrix(uint32_t* registers, int count, bool transposed, uint32_t row) {
  MatrixLane lane{registers, count, transposed, row, RETURN_ADDRESS};
  block_at(lane.program)
      .collective(Collective::load_matrix, static_cast<uint32_t>(count * 2 + transposed), &lane,
                  load_matrix_all);
}

void multiply(Product product, float* d, const uint32_t* a, const uint32_t* b) {
  ProductLane lane{product, d, a, b};
  block_at(RETURN_ADDRESS)
      .collective(Collective::multiply, static_cast<uint32_t>(product), &lane, multiply_all);
}

void copy_async(uint32_t shared, const void* global, int size, int bytes) {
  block_at(RETURN_ADDRESS).copy_async(shared, global, size, bytes);
}
void copy_commit() { ++block().self().groups; }
void copy_wait(int pending) { block_at(RETURN_ADDRESS).copy_wait(pending); }

void load(void* to, const void* from, size_t bytes) {
  Block& b = block_at(RETURN_ADDRESS);
  if (reinterpret_cast<uintptr_t>(from) % bytes != 0) {
    b.fail("misaligned", "a load of " + std::to_string(bytes) + " bytes from " +
                             describe(static_cast<const unsigned char*>(from)));
  }
  b.check(from, bytes, false, b.self().program);
  std::memcpy(to, from, bytes);
}

void store(void* to, const void* from, size_t bytes) {
  Block& b = block_at(RETURN_ADDRESS);
  if (reinterpret_cast<uintptr_t>(to) % bytes != 0) {
    b.fail("misaligned", "a store of " + std::to_string(bytes) + " bytes to " +
                             describe(static_cast<const unsigned char*>(to)));
  }
  b.check(to, bytes, true, b.self().program);
  std::memcpy(to, from, bytes);
}

}  // namespace emulator
