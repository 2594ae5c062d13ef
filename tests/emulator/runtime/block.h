// SPDX-License-Identifier: BSD-3-Clause
// One block at work on one operating-system thread.
#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "api.h"
#include "clocks.h"
#include "emulator.h"
#include "fiber.h"
#include "hopper.h"
#include "shadow.h"

namespace emulator {

constexpr int kMostWarps = kMostThreads / 32;
// The address of a place in shared memory is its offset in the arena; wgmma takes 18 bits of it.
constexpr size_t kSharedArena = 240 * 1024;
constexpr size_t kSharedMargin = 1024;  // before and behind a block's shared memory in the arena

// Small and good enough for schedules.
struct Random {
  uint64_t state;
  explicit Random(uint64_t seed) : state(seed * 0x9e3779b97f4a7c15u + 0x632be59bd9b4e019u) {
    next();
  }
  uint32_t next() {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return static_cast<uint32_t>(state * 0x2545f4914f6cdd1du >> 32);
  }
  uint32_t below(uint32_t n) { return static_cast<uint32_t>(uint64_t{next()} * n >> 32); }
};

// A cp.async that has not landed.
struct Copy {
  uint32_t shared;  // offset into the arena
  const unsigned char* global;
  int size, bytes;
  uint32_t group;
};

enum class Wait { none, block_barrier, warp, hopper };

// What a warp does together.
enum class Collective {
  none,
  barrier,
  shuffle,
  ballot,
  load_matrix,
  multiply,
  elect,
  registers,
  products
};

struct Fiber {
  Context context;
  int thread = 0, lane = 0, warp = 0;
  Wait wait = Wait::none;
  bool exited = false;
  Site site{};                    // of the block barrier it waits at
  const void* program = nullptr;  // of the last instruction, for reports
  uint32_t groups = 0;            // cp.async groups closed
  std::vector<Copy> copies;       // in order of issue
};

struct Warp {
  Collective op = Collective::none;
  uint32_t variant = 0;  // what else must agree among the lanes
  uint32_t arrived = 0, exited = 0, runnable = 0;
  void* operands[32];
};

class Block {
 public:
  Block();
  ~Block();
  Block(const Block&) = delete;

  // Runs block `number` of the launch; false if something was found.
  bool run(const Launch& launch, uint64_t launch_number, uint64_t number, uint64_t seed);

  // Of the running fiber.
  Fiber& self() { return *self_; }
  void block_barrier(Site site);
  // Blocks until all lanes of the warp have called; the last one calls `work` for all.
  void collective(Collective op, uint32_t variant, void* operands, void (*work)(Block&, Warp&));
  void check_global(const unsigned char* p, size_t bytes, bool write, const void* program);
  // A load or store at any address.
  void check(const void* p, size_t bytes, bool write, const void* program);
  void copy_async(uint32_t shared, const void* global, int size, int bytes);
  void copy_wait(int pending);
  // Records what was found and ends the block.
  [[noreturn]] void fail(const char* kind, const std::string& text, int thread,
                         const void* program);
  [[noreturn]] void fail(const char* kind, const std::string& text) {
    fail(kind, text, self_->thread, self_->program);
  }
  // For an instruction that reads shared memory on behalf of `thread`.
  void check_shared(const unsigned char* p, size_t bytes, bool write, int thread,
                    const void* program);

  // The same for an agent, by order of whoever knows the row.
  void check_agent(uint32_t shared, size_t bytes, bool write, Stamp now, const uint32_t* row);
  // The running fiber waits until another wakes it.
  void suspend();
  void wake(int thread);
  void wake_all(std::vector<int>& threads);

  unsigned char* shared_begin() { return arena_ + shared_offset_; }
  unsigned char* arena() { return arena_; }
  Index index() const { return index_; }
  const Launch& launch() const { return *launch_; }
  Fiber& fiber(int thread) { return *fibers_[thread]; }
  Random& random() { return random_; }
  Counters& counters() { return counters_; }
  Clocks& clocks() { return clocks_; }
  SharedShadow& shadow() { return shadow_; }
  Hopper& hopper() { return hopper_; }
  size_t shared_bytes() const { return shared_bytes_; }
  int threads() const { return threads_; }

 private:
  static void fiber_entry();
  void leave();            // the running fiber has to wait or is done
  Fiber* pick();           // a fiber that can run; null if there is none
  void release_barrier();  // all have arrived
  void thread_done();
  void finish_warp_barrier(Warp& warp);
  [[noreturn]] void report_deadlock();
  void land(const Copy& copy);
  void check_result(const Conflict& c, size_t at, size_t bytes, bool write, int thread,
                    const void* program);
  bool in_arena(const void* p) const {
    return reinterpret_cast<uintptr_t>(p) - reinterpret_cast<uintptr_t>(arena_) < kSharedArena;
  }

  const Launch* launch_ = nullptr;
  uint64_t launch_number_ = 0;
  uint64_t number_ = 0;
  Index index_{};
  Random random_{1};
  Counters counters_;

  Context main_;
  Fiber* self_ = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  unsigned char* stacks_ = nullptr;
  size_t stacks_bytes_ = 0;
  std::vector<Warp> warps_;
  uint32_t ready_ = 0;  // warps with runnable lanes
  int warp_ = 0, lane_ = 0;
  int threads_ = 0, live_ = 0, arrived_ = 0;

  unsigned char* arena_ = nullptr;
  size_t shared_offset_ = 0, shared_bytes_ = 0;
  SharedShadow shadow_;
  Clocks clocks_;
  Hopper hopper_{*this};
  int last_buffer_ = -1;  // where check_global looks first
  bool failed_ = false;
};

// The block that runs on this operating-system thread; null on the host's side.
extern thread_local Block* current_block;

}  // namespace emulator
