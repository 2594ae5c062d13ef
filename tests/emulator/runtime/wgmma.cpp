// SPDX-License-Identifier: BSD-3-Clause
// Products of warpgroups. Threads hand in their sums and go on; once all 128 have, a product is
// under way, and it is done at any time until somebody waits for it. Sums that were handed in are
// poisoned, and come back with a wait that names them.
#include <algorithm>
#include <cstring>

#include "block.h"
#include "hopper.h"
#include "memory.h"
#include "number.h"
#include "vectorised.h"

namespace emulator {
namespace {

constexpr int kGroupThreads = 128, kRows = 64, kRowBytes = 128, kStep = 32, kMostDepth = 16;
constexpr uint32_t kPoison = 0x7fdead00;  // a NaN

// Element i of the sums of thread x.
size_t element(int n, int x, int i) {
  const int row = 16 * (x / 32) + x % 32 / 4 + 8 * (i / 2 % 2);
  return row * n + 8 * (i / 4) + 2 * (x % 4) + i % 2;
}

uint32_t address_of(uint64_t descriptor) { return static_cast<uint32_t>(descriptor & 0x3fff) << 4; }

// The 16-byte half `half` of row r's step.
uint32_t piece(uint32_t address, int r, int half) {
  const uint32_t tile = address & ~1023u, chunk = (address & 127) / 16 + half;
  return tile + r * kRowBytes + ((chunk ^ (r & 7)) << 4);
}

EMULATOR_VECTORISED void add_products(float* sums, const float* a, const float* b, int n,
                                      int depth) {
  for (int row = 0; row < kRows; ++row) {
    float* sum = sums + row * n;
    for (int k = 0; k < depth; ++k) {
      const float left = a[row * kMostDepth + k];
      const float* right = b + k * 256;
      for (int j = 0; j < n; ++j) sum[j] += left * right[j];
    }
  }
}

}  // namespace

void Hopper::check_descriptor(uint64_t descriptor, int rows) {
  const uint32_t address = address_of(descriptor);
  const uint64_t rest = descriptor & ~uint64_t{0x3fff} & ~(uint64_t{0x3fff} << 16);
  if (rest != (uint64_t{1} << 62 | uint64_t{64} << 32)) {
    block_.fail("instruction", "a descriptor other than of 128-byte swizzle and groups of 1024");
  }
  if ((address & 1023) >= 128 || address % kStep != 0) {
    block_.fail("misaligned", "wgmma reads from " + byte(address) + ", at shared address " +
                                  std::to_string(address) +
                                  ", which is not within the first row of a multiple of 1024");
  }
  const auto first = block_.arena() + (address & ~1023u) - block_.shared_begin();
  if (first < 0 || first + rows * kRowBytes > static_cast<int64_t>(block_.shared_bytes())) {
    block_.fail("out-of-bounds", "wgmma reads " + std::to_string(rows) + " rows from " +
                                     byte(address) + " of " +
                                     std::to_string(block_.shared_bytes()));
  }
}

// The lanes of a warp meet, though no memory is ordered by it.
void Hopper::meet_warp(uint32_t variant) {
  block_.collective(Collective::products, variant, nullptr, [](Block&, Warp&) {});
}

void Hopper::wgmma_fence() {
  begin("wgmma_fence");
  meet_warp(0);
  ++me().fences;
}

void Hopper::wgmma(Product product, int n, float* d, uint64_t a, uint64_t b, bool add) {
  begin("wgmma");
  if (block_.threads() % kGroupThreads != 0) {
    block_.fail("instruction", "wgmma in a block that is not of warpgroups");
  }
  const int thread = block_.self().thread, x = thread % kGroupThreads;
  Warpgroup& group = groups_[thread / kGroupThreads];
  ThreadState& t = threads_[thread];
  if (group.agent < 0) {
    group.agent = new_agent("wgmma of warpgroup " + std::to_string(thread / kGroupThreads));
  }

  Sums* sums = nullptr;
  for (const auto& s : group.sums) {
    if (s->at[x] == d) sums = s.get();
  }
  const size_t number = t.products++;
  if (number == group.products.size()) {
    if (sums == nullptr) {
      group.sums.push_back(std::make_unique<Sums>());
      sums = group.sums.back().get();
    }
    group.products.push_back({product, n, a, b, add, sums, 0});
  }
  ProductOf& p = group.products[number];
  if (p.product != product || p.n != n || p.a != a || p.b != b || p.add != add ||
      (sums != nullptr && p.sums != sums)) {
    block_.fail("divergent-collective", "another wgmma than other threads of the warpgroup");
  }
  sums = p.sums;
  if (sums->at[x] != nullptr && sums->at[x] != d) {
    block_.fail("divergent-collective", "other sums than other threads of the warpgroup");
  }
  if (sums->held[x] && sums->n != n) {
    block_.fail("instruction", "wgmma of another shape on sums that are under way");
  }
  if (!sums->held[x]) {
    if (t.fences <= sums->fences[x]) {
      block_.fail("wgmma-fence", "wgmma without wgmma_fence since its sums could be touched");
    }
    if (sums->n != n && std::count(sums->held, sums->held + kGroupThreads, true) != 0) {
      block_.fail("emulator-limit", "wgmma of another shape on sums that others have not taken");
    }
    sums->n = n;
    sums->v.resize(static_cast<size_t>(kRows) * n);
    for (int i = 0; i < n / 2; ++i) {
      sums->v[element(n, x, i)] = d[i];
      std::memcpy(&d[i], &kPoison, sizeof(kPoison));
    }
    sums->at[x] = d;
    sums->held[x] = true;
  }
  sums->last[x] = static_cast<uint32_t>(number);
  if (++p.arrived == kGroupThreads) issue(group, number);
}

// The least of what the warpgroup's threads know.
const uint32_t* Hopper::known_by_all(Warpgroup& group, int first) {
  const Clocks& clocks = block_.clocks();
  uint64_t version = 1;
  for (int x = 0; x < kGroupThreads; ++x) version += clocks.version(first + x);
  if (version != group.version) {
    group.version = version;
    group.known.assign(clocks.row(first), clocks.row(first) + clocks.columns());
    for (int x = 1; x < kGroupThreads; ++x) {
      row_min(group.known.data(), clocks.row(first + x), clocks.columns());
    }
  }
  return group.known.data();
}

void Hopper::issue(Warpgroup& group, size_t number) {
  const ProductOf& p = group.products[number];
  check_descriptor(p.a, kRows);
  check_descriptor(p.b, p.n);
  if (block_.clocks().fine()) {
    const int first = block_.self().thread / kGroupThreads * kGroupThreads;
    const uint32_t* known = known_by_all(group, first);
    const Stamp stamp = Stamp::of(group.agent, static_cast<uint32_t>(number));
    for (int operand = 0; operand < 2; ++operand) {
      const uint32_t address = address_of(operand == 0 ? p.a : p.b);
      for (int r = 0; r < (operand == 0 ? kRows : p.n); ++r) {
        for (int half = 0; half < 2; ++half) {
          block_.check_agent(piece(address, r, half), 16, false, stamp, known);
        }
      }
    }
  }
  group.issued = number + 1;
  ++block_.counters().wgmma;
  if (block_.random().below(3) == 0) perform(group, group.issued);
  block_.wake_all(group.waiters);
}

void Hopper::perform(Warpgroup& group, size_t end) {
  for (; group.done < end; ++group.done) multiply(group.products[group.done]);
}

void Hopper::multiply(const ProductOf& p) {
  float a[kRows * kMostDepth], b[kMostDepth * 256];
  const int depth = p.product == Product::tf32 ? 8 : 16;
  const auto fetch = [&](uint64_t descriptor, int rows, float* to, int per_row, int per_k) {
    for (int r = 0; r < rows; ++r) {
      for (int half = 0; half < 2; ++half) {
        const unsigned char* from = block_.arena() + piece(address_of(descriptor), r, half);
        float* at = to + r * per_row + half * (depth / 2) * per_k;
        for (int k = 0; k < depth / 2; ++k) {
          uint32_t word = 0;
          std::memcpy(&word, from + k * (32 / depth), 32 / depth);
          if (p.product == Product::tf32 && !is_tf32(word)) {
            block_.fail("operand", "a TF32 operand with bits below its fraction");
          }
          at[k * per_k] = p.product == Product::f16    ? from_f16(word)
                          : p.product == Product::bf16 ? from_bits(word << 16)
                                                       : from_bits(word);
        }
      }
    }
  };
  fetch(p.a, kRows, a, kMostDepth, 1);
  fetch(p.b, p.n, b, 1, 256);
  float* sums = p.sums->v.data();
  if (!p.add) std::fill_n(sums, kRows * p.n, 0.0f);
  add_products(sums, a, b, p.n, depth);
}

void Hopper::wgmma_commit() {
  begin("wgmma_commit");
  me().groups.push_back(me().products);
}

void Hopper::wgmma_wait(int pending) {
  begin("wgmma_wait");
  meet_warp(1 + static_cast<uint32_t>(pending));
  ThreadState& t = me();
  const auto left = static_cast<int64_t>(t.groups.size()) - pending;
  const uint32_t end = left > 0 ? t.groups[left - 1] : 0;
  const int thread = block_.self().thread;
  Warpgroup& group = groups_[thread / kGroupThreads];
  while (group.issued < end) {
    group.waiters.push_back(thread);
    waits_[thread] = "wgmma_wait";
    block_.suspend();
  }
  perform(group, std::max<size_t>(group.done, end));
  t.waited = std::max(t.waited, end);
  if (block_.clocks().fine() && end > 0) block_.clocks().learn(thread, group.agent, end);
}

void Hopper::wgmma_take(float* d, int count) {
  const int thread = block_.self().thread, x = thread % kGroupThreads;
  for (const auto& s : groups_[thread / kGroupThreads].sums) {
    if (s->at[x] != d || !s->held[x]) continue;
    if (s->last[x] >= threads_[thread].waited) {
      block_.fail("in-flight", "takes sums of a wgmma that it has not waited for");
    }
    if (count != s->n / 2) block_.fail("instruction", "takes a part of wgmma's sums");
    for (int i = 0; i < count; ++i) {
      if (std::memcmp(&d[i], &kPoison, sizeof(kPoison)) != 0) {
        block_.fail("in-flight", "wrote sums while a wgmma was under way");
      }
      d[i] = s->v[element(s->n, x, i)];
    }
    s->held[x] = false;
    s->fences[x] = threads_[thread].fences;
  }
}

// Sums lie on the stack, where the compiler leaves what others know the address of.
void Hopper::check_stack(const void* p, size_t bytes, bool write) {
  const int thread = block_.self().thread, x = thread % kGroupThreads;
  const auto* at = static_cast<const char*>(p);
  for (const auto& s : groups_[thread / kGroupThreads].sums) {
    const auto* begin = reinterpret_cast<const char*>(s->at[x]);
    if (begin == nullptr || at + bytes <= begin || at >= begin + s->n / 2 * sizeof(float)) continue;
    if (s->held[x]) {
      block_.fail("in-flight", std::string(write ? "writes" : "reads") +
                                   " a sum of wgmma before a wait that names it");
    }
    s->fences[x] = threads_[thread].fences;
  }
}

}  // namespace emulator
