// SPDX-License-Identifier: BSD-3-Clause
#include "clocks.h"

#include <algorithm>
#include <cstring>

#include "vectorised.h"

namespace emulator {

EMULATOR_VECTORISED void row_max(uint32_t* to, const uint32_t* from, size_t count) {
  for (size_t i = 0; i < count; ++i) to[i] = to[i] < from[i] ? from[i] : to[i];
}
EMULATOR_VECTORISED void row_min(uint32_t* to, const uint32_t* from, size_t count) {
  for (size_t i = 0; i < count; ++i) to[i] = from[i] < to[i] ? from[i] : to[i];
}

void Clocks::reset(int threads) {
  fine_ = false;
  threads_ = threads;
  warps_ = (threads + 31) / 32;
  clock_.assign(warps_, 0);
  known_.assign(warps_ * warps_, 0);
}

void Clocks::refine() {
  if (fine_) return;
  fine_ = true;
  agents_ = 0;
  columns_ = threads_ + kMostAgents;
  own_.resize(threads_);
  rows_.assign(threads_ * columns_, 0);
  versions_.assign(threads_, 0);
  for (auto& fences : fences_) fences.assign(threads_, {});
  meeting_.resize(columns_);
  for (int t = 0; t < threads_; ++t) {
    const int w = t / 32;
    own_[t] = clock_[w];
    uint32_t* to = &rows_[t * columns_];
    for (int o = 0; o < threads_; ++o) {
      to[o] = o / 32 == w ? clock_[w] : known_[w * warps_ + o / 32];
    }
    to[t] = own_[t] + 1;
  }
}

void Clocks::tick(int thread) {
  ++own_[thread];
  rows_[thread * columns_ + thread] = own_[thread] + 1;
  ++versions_[thread];
}

void Clocks::release(int thread, Row& into) {
  row_max(into.data(), row(thread), columns_);
  tick(thread);
}

void Clocks::acquire(int thread, const Row& from) {
  row_max(&rows_[thread * columns_], from.data(), columns_);
  ++versions_[thread];
}

void Clocks::meet(const std::vector<int>& threads) {
  std::fill(meeting_.begin(), meeting_.end(), 0);
  for (const int t : threads) row_max(meeting_.data(), row(t), columns_);
  for (const int t : threads) {
    std::memcpy(&rows_[t * columns_], meeting_.data(), columns_ * sizeof(uint32_t));
    tick(t);
  }
}

void Clocks::learn(int thread, int agent, uint32_t ticks) {
  uint32_t& known = rows_[thread * columns_ + column(agent)];
  known = std::max(known, ticks);
  ++versions_[thread];
}

void Clocks::fence(Fence kind, int thread) {
  tick(thread);
  fences_[kind][thread].push_back(own_[thread]);
}

bool Clocks::fenced(Fence kind, int other, uint32_t then, const uint32_t* row) const {
  const auto& fences = fences_[kind][other];
  const auto first = std::upper_bound(fences.begin(), fences.end(), then);
  return first != fences.end() && *first < row[other];
}

void Clocks::warp_barrier(int warp, uint32_t lanes) {
  if (!fine_) {
    ++clock_[warp];
    return;
  }
  std::vector<int> threads;
  for (int lane = 0; lane < 32; ++lane) {
    if ((lanes >> lane & 1) != 0) threads.push_back(warp * 32 + lane);
  }
  meet(threads);
}

void Clocks::block_barrier() {
  if (fine_) {
    std::vector<int> all(threads_);
    for (int t = 0; t < threads_; ++t) all[t] = t;
    meet(all);
    return;
  }
  for (int w = 0; w < warps_; ++w) {
    for (int v = 0; v < warps_; ++v) known_[w * warps_ + v] = clock_[v] + 1;
  }
  for (auto& c : clock_) ++c;
}

}  // namespace emulator
