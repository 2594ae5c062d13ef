// SPDX-License-Identifier: BSD-3-Clause
// Barriers, registers and the order of grids; hopper.h has the parts, tensor_copy.cpp and wgmma.cpp
// the rest.
#include "hopper.h"

#include <algorithm>

#include "block.h"
#include "memory.h"

namespace emulator {
namespace {

constexpr int64_t kMostBytes = (1 << 20) - 1;  // that a barrier object counts
constexpr int kWarpgroupThreads = 128;

}  // namespace

void Hopper::reset(int threads) {
  used_ = false;
  objects_.clear();
  for (NamedBarrier& n : named_) n = {};
  loads_.clear();
  waited_ = fenced_ = {};
  if (!block_.launch().hopper) return;
  threads_.assign(threads, {});
  groups_.clear();
  groups_.resize((threads + kWarpgroupThreads - 1) / kWarpgroupThreads);
  agents_.clear();
  waits_.assign(threads, "");
  const int warps = (threads + 31) / 32;
  chosen_.assign(warps, 0);
  for (int& lane : chosen_) lane = static_cast<int>(block_.random().below(32));
  // What the compiler deals out to a kernel that is alone on its multiprocessor.
  registers_.assign(warps, std::min(255, 65536 / threads) / 8 * 8);
  changed_.assign(warps, 0);
  free_registers_ = 0;
  register_waiters_.clear();
}

// Every instruction comes here first.
void Hopper::begin(const char* instruction) {
  if (!block_.launch().hopper) {
    block_.fail("instruction", std::string(instruction) + " in a launch that is not for Hopper");
  }
  if (!used_ && instrumented()) block_.clocks().refine();
  used_ = true;
}

ThreadState& Hopper::me() { return threads_[block_.self().thread]; }

int Hopper::new_agent(std::string name) {
  const int agent = block_.clocks().fine() ? block_.clocks().add_agent() : kMostThreads;
  if (agent < 0) block_.fail("emulator-limit", "too many barrier objects and copying threads");
  agents_.push_back(std::move(name));
  return agent;
}
std::string Hopper::agent_name(int agent) const { return agents_.at(agent - kMostThreads); }

std::string Hopper::byte(uint32_t shared) const {
  const auto at = static_cast<int64_t>(block_.arena() + shared - block_.shared_begin());
  return "byte " + std::to_string(at);
}

// ------------------------------------------------------------------------------ barrier objects
void Hopper::barrier_init(uint32_t at, uint32_t arrivals) {
  begin("barrier_init");
  if (at % 8 != 0) block_.fail("misaligned", "a barrier object at " + byte(at));
  if (arrivals < 1 || arrivals > kMostBytes) {
    block_.fail("instruction", "a barrier object for " + std::to_string(arrivals) + " arrivals");
  }
  for (const BarrierObject& o : objects_) {
    if (at == o.at) block_.fail("instruction", "a second barrier object at " + byte(at));
  }
  const int thread = block_.self().thread;
  block_.check_shared(block_.arena() + at, 8, true, thread, block_.self().program);
  if (instrumented()) block_.shadow().close(block_.arena() + at - block_.shared_begin(), 8);
  BarrierObject o{};
  o.at = at;
  o.arrivals = o.pending = arrivals;
  o.thread = thread;
  o.tick = block_.clocks().clock(thread);
  o.agent = new_agent("a copy for the barrier object at " + byte(at));
  o.arriving.assign(block_.clocks().fine() ? block_.clocks().columns() : 0, 0);
  o.over = o.arriving;
  objects_.push_back(std::move(o));
}

void Hopper::fence(Clocks::Fence kind) {
  begin("a fence");
  if (block_.clocks().fine()) block_.clocks().fence(kind, block_.self().thread);
}

size_t Hopper::object_at(uint32_t at, const char* what) {
  begin(what);
  for (size_t i = 0; i < objects_.size(); ++i) {
    const BarrierObject& o = objects_[i];
    if (o.at != at) continue;
    if (block_.clocks().fine() &&
        !block_.clocks().ordered(o.thread, o.tick, block_.self().thread)) {
      block_.fail("race", std::string(what) + ": without a barrier, thread " +
                              std::to_string(o.thread) + " made the barrier object at " + byte(at));
    }
    return i;
  }
  block_.fail("uninitialised", std::string(what) + ": there is no barrier object at " + byte(at));
}

void Hopper::barrier_arrive(uint32_t at, uint32_t bytes) {
  BarrierObject& o = objects_[object_at(at, "barrier_arrive")];
  o.bytes += bytes;
  if (o.bytes > kMostBytes || bytes > kMostBytes) {
    block_.fail("instruction", std::to_string(o.bytes) + " bytes announced, which is too many");
  }
  if (o.pending == 0) {
    block_.fail("over-arrival", "more than " + std::to_string(o.arrivals) +
                                    " arrivals in a phase of the barrier object at " + byte(at));
  }
  if (block_.clocks().fine()) block_.clocks().release(block_.self().thread, o.arriving);
  --o.pending;
  settle(o);
}

// Ends the phase if it is over.
void Hopper::settle(BarrierObject& o) {
  if (o.pending != 0) return;
  if (o.bytes < 0 || (o.bytes == 0 && o.copies > 0)) {
    block_.fail("expect-tx", "more is copied in a phase of the barrier object at " + byte(o.at) +
                                 " than was announced");
  }
  if (o.bytes != 0) return;
  ++o.phase;
  o.pending = o.arrivals;
  if (block_.clocks().fine()) {
    row_max(o.over.data(), o.arriving.data(), o.over.size());
    o.over[block_.clocks().column(o.agent)] = o.phase;
  }
  block_.wake_all(o.waiters);
}

bool Hopper::barrier_try_wait(uint32_t at, uint32_t parity) {
  const size_t number = object_at(at, "barrier_try_wait");
  if (parity > 1) block_.fail("instruction", "parity " + std::to_string(parity));
  const auto is_over = [&] { return (objects_[number].phase & 1) != parity; };
  // It may run out of time for no reason.
  if (block_.random().below(5) == 0) return false;
  const int thread = block_.self().thread;
  if (!is_over()) {
    objects_[number].waiters.push_back(thread);
    waits_[thread] = "the barrier object at " + byte(at) + " for parity " + std::to_string(parity);
    block_.suspend();
    if (!is_over()) return false;
  }
  BarrierObject& o = objects_[number];
  o.waited = std::max(o.waited, o.phase);
  if (block_.clocks().fine()) block_.clocks().acquire(thread, o.over);
  return true;
}

std::string Hopper::place_of(int thread) const { return waits_[thread]; }

std::string Hopper::barrier_objects() const {
  if (objects_.empty()) return "";
  std::string text = " Barrier objects:";
  for (const BarrierObject& o : objects_) {
    text += " " + byte(o.at) + " in phase " + std::to_string(o.phase) + " lacks " +
            std::to_string(o.pending) + " of " + std::to_string(o.arrivals) + " arrivals and " +
            std::to_string(o.bytes) + " bytes;";
  }
  text.back() = '.';
  return text;
}

// ------------------------------------------------------------------------------- named barriers
void Hopper::barrier_sync(int id, int threads) {
  begin("barrier_sync");
  if (id < 1 || id > 15) {
    block_.fail("instruction", "barrier " + std::to_string(id) + ", of 1 to 15");
  }
  if (threads < 32 || threads % 32 != 0 || threads > block_.threads()) {
    block_.fail("instruction", "a barrier of " + std::to_string(threads) + " threads");
  }
  NamedBarrier& b = named_[id];
  if (!b.threads.empty() && b.expected != threads) {
    block_.fail("divergent-barrier", "expects " + std::to_string(threads) + " threads at barrier " +
                                         std::to_string(id) + ", but others expect " +
                                         std::to_string(b.expected));
  }
  b.expected = threads;
  const int thread = block_.self().thread;
  b.threads.push_back(thread);
  if (static_cast<int>(b.threads.size()) < threads) {
    waits_[thread] = "barrier " + std::to_string(id);
    block_.suspend();
    return;
  }
  std::vector<int> lanes(block_.threads() / 32 + 1, 0);
  for (const int t : b.threads) ++lanes[t / 32];
  for (const int count : lanes) {
    if (count % 32 != 0) {
      block_.fail("divergent-barrier",
                  "lanes of one warp are at barrier " + std::to_string(id) + ", others are not");
    }
  }
  if (block_.clocks().fine()) block_.clocks().meet(b.threads);
  b.threads.pop_back();  // runs on
  block_.wake_all(b.threads);
}

// ------------------------------------------------------------------------------------ registers
void Hopper::take_registers(int warp, bool up, int count) {
  int& has = registers_[warp];
  Warpgroup& group = groups_[warp / 4];
  const auto order = static_cast<size_t>(changed_[warp]++);
  if (block_.threads() % kWarpgroupThreads != 0) {
    block_.fail("instruction", "setmaxnreg in a block that is not of warpgroups");
  }
  if (order == group.changes.size()) group.changes.push_back(count);
  if (group.changes[order] != count) {
    block_.fail("divergent-collective", "warps of one warpgroup ask for different registers");
  }
  if (up ? count < has : count > has) {
    block_.fail("instruction", std::string("setmaxnreg ") + (up ? "up" : "down") + " from " +
                                   std::to_string(has) + " registers to " + std::to_string(count));
  }
}

void Hopper::set_registers(bool up, int count) {
  begin("setmaxnreg");
  Fiber& f = block_.self();
  block_.collective(Collective::registers, static_cast<uint32_t>(count * 2 + up), nullptr,
                    [](Block&, Warp&) {});
  if (f.lane != 0) return;
  take_registers(f.warp, up, count);
  const int more = (count - registers_[f.warp]) * 32;
  while (free_registers_ < more) {
    register_waiters_.push_back(f.thread);
    waits_[f.thread] = "setmaxnreg for " + std::to_string(count) + " registers, of which " +
                       std::to_string(free_registers_) + " are free";
    block_.suspend();
  }
  free_registers_ -= more;
  registers_[f.warp] = count;
  if (more < 0) block_.wake_all(register_waiters_);
}

bool Hopper::elect() {
  begin("elect");
  block_.collective(Collective::elect, 0, nullptr, [](Block&, Warp&) {});
  return block_.self().lane == chosen_[block_.self().warp];
}

// ---------------------------------------------------------------------------- grids and the end
void Hopper::note(FirstTime& first) const {
  if (first.thread >= 0 || !block_.clocks().fine()) return;
  first.thread = block_.self().thread;
  first.tick = block_.clocks().clock(first.thread);
}

bool Hopper::comes_behind(const FirstTime& first) const {
  return first.thread >= 0 &&
         block_.clocks().ordered(first.thread, first.tick, block_.self().thread);
}

void Hopper::grid_wait() {
  begin("grid_wait");
  me().grid_waited = true;
  note(waited_);
}

// Before the wait there is nothing that it could order.
void Hopper::fence_global() {
  begin("fence_async_global");
  if (!me().grid_waited && !comes_behind(waited_)) return;
  me().grid_fenced = true;
  note(fenced_);
}

void Hopper::check_grid_wait() {
  if (!instrumented()) return;
  // A kernel for all GPUs has no way to wait.
  if (block_.launch().hopper && (me().grid_waited || comes_behind(waited_))) return;
  block_.fail("grid-wait", "global memory, before grid_wait, in a launch that may begin early");
}

// Nobody tells how the kernel before has written what a copy moves.
void Hopper::check_grid_fence() {
  check_grid_wait();
  if (!instrumented() || me().grid_fenced || comes_behind(fenced_)) return;
  block_.fail("proxy",
              "a copy in a launch that may begin early, without fence_async_global behind "
              "grid_wait");
}

void Hopper::thread_ends() {
  const Fiber& f = block_.self();
  const ThreadState& t = threads_[f.thread];
  if (t.waited < t.products) {
    block_.fail("in-flight", "the thread ends with a wgmma under way");
  }
  for (const TensorStore& store : t.stores) {
    if (!store.waited) {
      block_.fail("in-flight", "the thread ends with a copy to a tensor under way");
    }
  }
}

void Hopper::block_ends() {
  for (const Warpgroup& group : groups_) {
    if (group.issued < group.products.size()) {
      block_.fail("divergent-collective", "not all threads of a warpgroup were at a wgmma");
    }
  }
  for (size_t w = 0; w < changed_.size(); ++w) {
    if (static_cast<size_t>(changed_[w]) != groups_[w / 4].changes.size()) {
      block_.fail("divergent-collective", "not all warps of a warpgroup were at a setmaxnreg");
    }
  }
  while (land_something()) {
  }
  for (const BarrierObject& o : objects_) {
    if (o.bytes != 0) {
      block_.fail("expect-tx", "the block ends, and the barrier object at " + byte(o.at) +
                                   " lacks " + std::to_string(o.bytes) + " bytes");
    }
    if (o.filled > o.waited) {
      block_.fail("in-flight",
                  "the block ends, and nobody has waited for the last copy for the barrier "
                  "object at " +
                      byte(o.at));
    }
  }
  for (ThreadState& t : threads_) {
    for (const TensorStore& store : t.stores) write_out(store);
  }
}

}  // namespace emulator
