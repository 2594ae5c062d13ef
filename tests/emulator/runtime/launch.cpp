// SPDX-License-Identifier: BSD-3-Clause
// Blocks of a launch over the worker threads, in random order.
#include <algorithm>
#include <atomic>
#include <memory>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "block.h"
#include "memory.h"
#include "run_lock.h"

namespace emulator {
namespace {

struct Machine {
  std::vector<std::unique_ptr<Block>> blocks;  // one per worker
  uint64_t launches = 0;
  uint64_t most_shared = 0;
  std::vector<Launched> launched;
};
Machine& machine() {
  static Machine m;
  return m;
}

constexpr int kInvalidConfiguration = 9, kLaunchFailure = 719;
constexpr int64_t kMostShared = 99 * 1024;  // of the GPUs with the least
constexpr int64_t kMostSharedHopper = 227 * 1024;

// Why a GPU would refuse the launch; empty if it would not.
std::string refusal(const Launch& l) {
  const int64_t most[3] = {0x7fffffff, 65535, 65535};
  for (int i = 0; i < 3; ++i) {
    if (l.grid[i] < 1 || l.grid[i] > most[i]) {
      return "grid dimension " + std::to_string(i) + " is " + std::to_string(l.grid[i]);
    }
  }
  if (l.threads < 1 || l.threads > kMostThreads) {
    return std::to_string(l.threads) + " threads in a block";
  }
  if (l.shared_bytes < 0 || l.shared_bytes > (l.hopper ? kMostSharedHopper : kMostShared)) {
    return std::to_string(l.shared_bytes) + " bytes of shared memory";
  }
  return "";
}

}  // namespace

int launch(const Launch& l) {
  const std::lock_guard lock(run_lock());
  Machine& m = machine();
  if (const std::string why = refusal(l); !why.empty()) {
    record({"launch-limit", why, l.kernel, {0, 0, 0}, -1, 0});
    return kInvalidConfiguration;
  }
  const uint64_t number = ++m.launches;
  m.launched.push_back({l.kernel, {l.grid[0], l.grid[1], l.grid[2]}});
  const auto total = static_cast<uint64_t>(l.grid[0] * l.grid[1] * l.grid[2]);
  const uint64_t workers = std::min<uint64_t>(std::max(settings().workers, 1), total);
  while (m.blocks.size() < workers) m.blocks.push_back(std::make_unique<Block>());
  m.most_shared = std::max(m.most_shared, static_cast<uint64_t>(l.shared_bytes));

  // A walk over all blocks by a step without a common divisor.
  Random random(settings().seed ^ number << 20);
  const auto some = static_cast<uint32_t>(std::min<uint64_t>(total, 1u << 30));
  const uint64_t start = random.below(some);
  uint64_t step = 1 + random.below(some);
  while (std::gcd(step, total) != 1) ++step;

  std::atomic<uint64_t> next{0};
  std::atomic<bool> failed{false};
  const auto work = [&](Block* block) {
    current_block = block;
    for (uint64_t i; !failed && (i = next++) < total;) {
      if (!block->run(l, number, (start + i * step) % total, settings().seed)) failed = true;
    }
    current_block = nullptr;
  };
  std::vector<std::thread> helpers;
  for (uint64_t w = 1; w < workers; ++w) helpers.emplace_back(work, m.blocks[w].get());
  work(m.blocks[0].get());
  for (auto& helper : helpers) helper.join();
  return failed ? kLaunchFailure : 0;
}

Counters counters() {
  const std::lock_guard lock(run_lock());
  Counters sum;
  sum.launches = machine().launches;
  sum.shared_bytes = machine().most_shared;
  for (const auto& block : machine().blocks) {
    const Counters& c = block->counters();
    sum.blocks += c.blocks;
    sum.barriers += c.barriers;
    sum.products += c.products;
    sum.matrix_loads += c.matrix_loads;
    sum.bank_conflicts += c.bank_conflicts;
    sum.copied_bytes += c.copied_bytes;
    sum.wgmma += c.wgmma;
    sum.tensor_loads += c.tensor_loads;
    sum.tensor_stores += c.tensor_stores;
    sum.tensor_bytes += c.tensor_bytes;
    sum.read_bytes += c.read_bytes;
    sum.written_bytes += c.written_bytes;
  }
  return sum;
}

std::vector<Launched> launched() {
  const std::lock_guard lock(run_lock());
  return machine().launched;
}

void reset_counters() {
  const std::lock_guard lock(run_lock());
  machine().launched.clear();
  machine().launches = machine().most_shared = 0;
  for (const auto& block : machine().blocks) block->counters() = Counters{};
}

}  // namespace emulator
