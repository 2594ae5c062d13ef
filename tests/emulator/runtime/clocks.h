// SPDX-License-Identifier: BSD-3-Clause
// What has happened before what. Whole-warp and whole-block barriers order warps, and a clock per
// warp is exact. From the first instruction of Hopper on, single threads are ordered as well, and
// agents that work beside them: then each has a clock of its own.
//
// An access is stamped with who did it and the tick of its clock. A row says, for everybody, how
// many ticks are known: an access with a smaller tick is before whatever the row's owner does now.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace emulator {

constexpr int kMostThreads = 1024;
constexpr int kMostAgents = 64;  // numbered from kMostThreads on

class Clocks {
 public:
  using Row = std::vector<uint32_t>;

  void reset(int threads);
  uint32_t clock(int thread) const { return fine_ ? own_[thread] : clock_[thread / 32]; }
  void warp_barrier(int warp, uint32_t lanes);
  void block_barrier();
  // True if what `other` did at tick `then` is before what `thread` does now.
  bool ordered(int other, uint32_t then, int thread) const {
    if (other == thread) return true;
    if (fine_) return then < row(thread)[column(other)];
    const int w = thread / 32, v = other / 32;
    return w == v ? then < clock_[w] : then < known_[w * warps_ + v];
  }

  // Single threads and agents; nothing of what follows may be called before.
  void refine();
  bool fine() const { return fine_; }
  size_t column(int who) const { return who < kMostThreads ? who : threads_ + who - kMostThreads; }
  size_t columns() const { return columns_; }
  const uint32_t* row(int thread) const { return &rows_[thread * columns_]; }
  // Changes whenever the row does.
  uint64_t version(int thread) const { return versions_[thread]; }
  // All that the thread did and knows is known to whoever acquires the row.
  void release(int thread, Row& into);
  void acquire(int thread, const Row& from);
  void meet(const std::vector<int>& threads);
  void learn(int thread, int agent, uint32_t ticks);
  int add_agent() { return agents_ < kMostAgents ? kMostThreads + agents_++ : -1; }

  // A fence behind which the thread's earlier accesses are visible to others than threads.
  enum Fence { kAsync, kInit, kFences };
  void fence(Fence kind, int thread);
  // True if `other` fenced what it did at tick `then`, and the row knows of it.
  bool fenced(Fence kind, int other, uint32_t then, const uint32_t* row) const;

 private:
  void tick(int thread);

  bool fine_ = false;
  int warps_ = 0, threads_ = 0, agents_ = 0;
  std::vector<uint32_t> clock_, known_;  // of warps

  size_t columns_ = 0;
  std::vector<uint32_t> own_, rows_;
  std::vector<uint64_t> versions_;
  std::vector<std::vector<uint32_t>> fences_[kFences];  // ticks, by thread
  Row meeting_;
};

// Element-wise, over rows.
void row_max(uint32_t* to, const uint32_t* from, size_t count);
void row_min(uint32_t* to, const uint32_t* from, size_t count);

}  // namespace emulator
