// SPDX-License-Identifier: BSD-3-Clause
// The schedule: fibers, barriers, and what a warp does together.
#include "block.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <new>

#include "memory.h"

namespace emulator {

thread_local Block* current_block = nullptr;

namespace {

constexpr size_t kStackBytes = 64 * 1024;
// Stacks a power of two apart would fall into the same few sets of the cache.
constexpr size_t kStackPitch = kStackBytes + 5 * 64;
constexpr uint64_t kCanary = 0x5ca1ab1e0ddba11u;

uint32_t bit(int lane) { return uint32_t{1} << lane; }

const char* name(Collective op) {
  switch (op) {
    case Collective::barrier:
      return "__syncwarp";
    case Collective::shuffle:
      return "a shuffle";
    case Collective::ballot:
      return "a ballot";
    case Collective::load_matrix:
      return "ldmatrix";
    case Collective::multiply:
      return "mma";
    case Collective::elect:
      return "elect";
    case Collective::registers:
      return "setmaxnreg";
    case Collective::products:
      return "an instruction of wgmma";
    default:
      return "nothing";
  }
}

std::string place(Site site) {
  const char* slash = std::strrchr(site.file, '/');
  return std::string(slash != nullptr ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}

bool same(Site a, Site b) { return a.line == b.line && std::strcmp(a.file, b.file) == 0; }

}  // namespace

Block::Block() {
  stacks_bytes_ = kMostThreads * kStackPitch + 4096;
  void* p = mmap(nullptr, stacks_bytes_ + kSharedArena, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  arena_ = static_cast<unsigned char*>(p);
  stacks_ = arena_ + kSharedArena;
  for (int t = 0; t < kMostThreads; ++t) {
    fibers_.push_back(std::make_unique<Fiber>());
    fibers_[t]->thread = t;
    fibers_[t]->warp = t / 32;
    fibers_[t]->lane = t % 32;
  }
}

Block::~Block() { munmap(arena_, stacks_bytes_ + kSharedArena); }

bool Block::run(const Launch& launch, uint64_t launch_number, uint64_t number, uint64_t seed) {
  launch_ = &launch;
  launch_number_ = launch_number;
  number_ = number;
  const auto across = static_cast<uint64_t>(launch.grid[0]);
  const auto down = static_cast<uint64_t>(launch.grid[1]);
  index_ = {static_cast<unsigned>(number % across), static_cast<unsigned>(number / across % down),
            static_cast<unsigned>(number / across / down)};
  random_ = Random(seed ^ launch_number << 40 ^ number);
  threads_ = live_ = launch.threads;
  arrived_ = 0;
  last_buffer_ = -1;
  failed_ = false;

  // Shared memory starts at any multiple of 128, and holds NaNs.
  shared_bytes_ = static_cast<size_t>(launch.shared_bytes);
  shared_offset_ = kSharedMargin + 128 * random_.below(16);
  if (shared_bytes_ != 0) {
    std::memset(arena_, 0xff, shared_offset_ + shared_bytes_ + kSharedMargin);
    if (instrumented()) shadow_.reset(shared_bytes_);
  }

  const int warps = (threads_ + 31) / 32;
  clocks_.reset(threads_);
  hopper_.reset(threads_);
  warps_.assign(warps, Warp{});
  ready_ = 0;
  for (int t = 0; t < warps * 32; ++t) {
    Warp& warp = warps_[t / 32];
    if (t >= threads_) {
      warp.exited |= bit(t % 32);
      continue;
    }
    Fiber& f = *fibers_[t];
    f.wait = Wait::none;
    f.exited = false;
    f.groups = 0;
    f.copies.clear();
    unsigned char* stack = stacks_ + t * kStackPitch;
    std::memcpy(stack, &kCanary, sizeof(kCanary));
    make_context(f.context, stack, kStackBytes, fiber_entry);
    warp.runnable |= bit(t % 32);
    ready_ |= bit(t / 32);
  }
  warp_ = -1;
  self_ = pick();
  switch_context(main_, self_->context);
  ++counters_.blocks;
  return !failed_;
}

// Fibers come here first; the block is the one of this operating-system thread.
void Block::fiber_entry() {
  current_block->launch_->body(current_block->launch_->arguments);
  current_block->thread_done();
}

Fiber* Block::pick() {
  if (ready_ == 0) return nullptr;
  // Within a warp as long as it goes, which keeps caches warm and lets warps drift apart; now and
  // then to another, which makes them meet in other orders.
  const bool stay = warp_ >= 0 && (ready_ & bit(warp_)) != 0 && random_.below(64) != 0;
  if (!stay) {
    uint32_t left = ready_;
    for (uint32_t skip = random_.below(__builtin_popcount(left)); skip > 0; --skip) {
      left &= left - 1;
    }
    warp_ = __builtin_ctz(left);
    lane_ = static_cast<int>(random_.below(32));
  }
  Warp& warp = warps_[warp_];
  const uint32_t turned = warp.runnable >> lane_ | (lane_ ? warp.runnable << (32 - lane_) : 0);
  lane_ = (lane_ + __builtin_ctz(turned)) % 32;
  warp.runnable &= ~bit(lane_);
  if (warp.runnable == 0) ready_ &= ~bit(warp_);
  return fibers_[warp_ * 32 + lane_].get();
}

void Block::leave() {
  Fiber& from = *self_;
  if (hopper_.anything_to_land() && random_.below(8) == 0) hopper_.land_something();
  self_ = pick();
  while (self_ == nullptr && live_ > 0 && hopper_.land_something()) self_ = pick();
  if (self_ == nullptr) {
    if (live_ > 0) report_deadlock();
    switch_context(from.context, main_);
  }
  if (self_ == &from) return;  // what landed was what it waited for
  switch_context(from.context, self_->context);
}

void Block::thread_done() {
  Fiber& f = *self_;
  if (!f.copies.empty()) fail("in-flight", "the thread ends with a cp.async under way");
  uint64_t canary;
  std::memcpy(&canary, stacks_ + f.thread * kStackPitch, sizeof(canary));
  if (canary != kCanary) fail("stack", "the thread used more stack than the emulator has");
  if (hopper_.used()) hopper_.thread_ends();
  f.exited = true;
  --live_;
  if (hopper_.used() && live_ == 0) hopper_.block_ends();
  Warp& warp = warps_[f.warp];
  warp.exited |= bit(f.lane);
  if (warp.arrived != 0 && warp.op == Collective::barrier && (warp.arrived | warp.exited) == ~0u) {
    finish_warp_barrier(warp);
  }
  if (arrived_ != 0 && arrived_ == live_) release_barrier();
  leave();
  __builtin_unreachable();
}

void Block::suspend() {
  self_->wait = Wait::hopper;
  leave();
}

void Block::wake(int thread) {
  Fiber& f = *fibers_[thread];
  f.wait = Wait::none;
  warps_[f.warp].runnable |= bit(f.lane);
  ready_ |= bit(f.warp);
}

void Block::wake_all(std::vector<int>& threads) {
  for (const int t : threads) wake(t);
  threads.clear();
}

void Block::block_barrier(Site site) {
  Fiber& f = *self_;
  f.site = site;
  if (arrived_ != 0) {
    for (int t = 0; t < threads_; ++t) {
      const Fiber& other = *fibers_[t];
      if (other.wait != Wait::block_barrier) continue;
      if (!same(other.site, site)) {
        fail("divergent-barrier", "waits at " + place(site) + ", but thread " + std::to_string(t) +
                                      " at " + place(other.site));
      }
      break;
    }
  }
  if (++arrived_ == live_) {
    release_barrier();
    return;
  }
  f.wait = Wait::block_barrier;
  leave();
}

void Block::release_barrier() {
  for (size_t w = 0; w < warps_.size(); ++w) {
    // Warps may be done, but the instruction takes whole warps.
    const int last = std::min<int>(threads_ - static_cast<int>(w) * 32, 32);
    const uint32_t ended = warps_[w].exited & (last == 32 ? ~0u : bit(last) - 1);
    if (ended != 0 && ~warps_[w].exited != 0) {
      fail("divergent-barrier",
           "lanes of warp " + std::to_string(w) + " have ended, others wait at __syncthreads");
    }
  }
  for (int t = 0; t < threads_; ++t) {
    if (fibers_[t]->wait == Wait::block_barrier) wake(t);
  }
  arrived_ = 0;
  warp_ = -1;
  clocks_.block_barrier();
  ++counters_.barriers;
}

void Block::collective(Collective op, uint32_t variant, void* operands,
                       void (*work)(Block&, Warp&)) {
  Fiber& f = *self_;
  Warp& warp = warps_[f.warp];
  if (op != Collective::barrier && warp.exited != 0) {
    fail("divergent-collective", std::string("is at ") + name(op) +
                                     ", which takes the whole warp, but lanes of it have ended");
  }
  if (warp.arrived == 0) {
    warp.op = op;
    warp.variant = variant;
  } else if (warp.op != op || warp.variant != variant) {
    fail("divergent-collective", std::string("is at ") + name(op) + ", but other lanes are at " +
                                     (warp.op == op ? "another kind of it" : name(warp.op)));
  }
  warp.operands[f.lane] = operands;
  warp.arrived |= bit(f.lane);
  if ((warp.arrived | warp.exited) != ~0u) {
    f.wait = Wait::warp;
    leave();
    return;
  }
  if (op == Collective::barrier) {
    warp.arrived &= ~bit(f.lane);  // runs on
    finish_warp_barrier(warp);
    return;
  }
  work(*this, warp);
  warp.arrived = 0;
  warp.runnable = ~bit(f.lane);
  ready_ |= bit(f.warp);
  for (int lane = 0; lane < 32; ++lane) fibers_[f.warp * 32 + lane]->wait = Wait::none;
}

void Block::finish_warp_barrier(Warp& warp) {
  const int number = static_cast<int>(&warp - warps_.data());
  clocks_.warp_barrier(number, warp.arrived | (self_->warp == number ? bit(self_->lane) : 0));
  warp.runnable = warp.arrived;
  if (warp.runnable != 0) ready_ |= bit(number);
  for (int lane = 0; lane < 32; ++lane) {
    if ((warp.arrived & bit(lane)) != 0) fibers_[number * 32 + lane]->wait = Wait::none;
  }
  warp.arrived = 0;
}

void Block::report_deadlock() {
  std::string text = "no thread can run on:";
  for (size_t w = 0; w < warps_.size(); ++w) {
    for (int lane = 0, count; lane < 32; lane += count) {
      const auto what = [&](int l) -> std::string {
        const int t = static_cast<int>(w) * 32 + l;
        const Fiber& f = *fibers_[t];
        if (t >= threads_ || f.exited) return "";
        if (f.wait == Wait::block_barrier) return "__syncthreads at " + place(f.site);
        if (f.wait == Wait::hopper) return hopper_.place_of(t);
        return name(warps_[w].op);
      };
      const std::string first = what(lane);
      for (count = 1; lane + count < 32 && what(lane + count) == first;) ++count;
      if (first.empty()) continue;
      text += " warp " + std::to_string(w) + " lanes " + std::to_string(lane) + "-" +
              std::to_string(lane + count - 1) + " wait at " + first + ";";
    }
  }
  text.back() = '.';
  if (live_ < threads_) text += " " + std::to_string(threads_ - live_) + " threads have ended.";
  fail("deadlock", text + hopper_.barrier_objects(), -1, nullptr);
}

void Block::fail(const char* kind, const std::string& text, int thread, const void* program) {
  Finding f{kind, text, launch_->kernel, {index_.x, index_.y, index_.z}, thread, 0};
  f.program = program != nullptr ? program_offset(program) : 0;
  record(std::move(f));
  failed_ = true;
  Context lost;  // the block is not taken up again
  switch_context(lost, main_);
  __builtin_unreachable();
}

}  // namespace emulator
