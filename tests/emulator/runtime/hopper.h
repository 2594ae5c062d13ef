// SPDX-License-Identifier: BSD-3-Clause
// What a block of a Hopper GPU has besides threads: barrier objects, copies of tensors, wgmma,
// registers that warpgroups hand on. Part of a Block.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "clocks.h"
#include "emulator.h"
#include "shadow.h"
#include "tensor_map.h"

namespace emulator {

class Block;

// An mbarrier in shared memory.
struct BarrierObject {
  uint32_t at;
  uint32_t arrivals, pending, phase;
  int64_t bytes;  // announced, not yet copied; below 0 if copies were first
  int copies;     // under way
  int thread;     // that made it, and its clock's tick then
  uint32_t tick;
  int agent;                // whose tick is the phase
  uint32_t waited, filled;  // the last phase that somebody has seen end, and that brought copies
  Clocks::Row arriving, over;
  std::vector<int> waiters;
};

// bar.sync with a number.
struct NamedBarrier {
  int expected = 0;
  std::vector<int> threads;
};

// A copy from a tensor that has not landed.
struct TensorLoad {
  MapFields map;
  int place[5];
  uint16_t offsets[3];
  uint32_t shared;
  size_t barrier;
  uint32_t phase;
  int64_t bytes;
};

// A copy to a tensor: it reads shared memory, then it writes.
struct TensorStore {
  MapFields map;
  int place[5];
  uint32_t shared;
  uint32_t group;
  bool read, waited;                // the thread knows that it has been read
  std::vector<unsigned char> data;  // as it lay in shared memory
};

// Sums that wgmma makes. While products are under way, they are here and not in registers.
struct Sums {
  int n;
  float* at[128] = {};
  bool held[128] = {};
  uint32_t fences[128] = {};  // the thread's fences when it last could touch its part
  uint32_t last[128] = {};    // the thread's last product on it
  std::vector<float> v;       // [64][n]
};

struct ProductOf {
  Product product;
  int n;
  uint64_t a, b;
  bool add;
  Sums* sums;
  int arrived;
};

struct Warpgroup {
  std::vector<ProductOf> products;
  std::vector<std::unique_ptr<Sums>> sums;
  size_t issued = 0, done = 0;  // products
  int agent = -1;
  uint64_t version = 0;               // of the threads' rows when `known` was made
  Clocks::Row known;                  // by all threads
  std::vector<int> waiters, changes;  // changes: of registers, by the first warp to make them
};

struct ThreadState {
  uint32_t fences = 0, products = 0, waited = 0;  // wgmma
  std::vector<uint32_t> groups;                   // products at each commit
  int store_agent = -1;
  uint32_t store_groups = 0;
  std::vector<TensorStore> stores;
  bool grid_waited = false, grid_fenced = false;
};

// Where a thread was the first of its block to do something.
struct FirstTime {
  int thread = -1;
  uint32_t tick = 0;
};

class Hopper {
 public:
  explicit Hopper(Block& block) : block_(block) {}
  void reset(int threads);
  bool used() const { return used_; }

  void barrier_init(uint32_t at, uint32_t arrivals);
  void fence(Clocks::Fence kind);
  void barrier_arrive(uint32_t at, uint32_t bytes);
  bool barrier_try_wait(uint32_t at, uint32_t parity);
  void barrier_sync(int id, int threads);
  void set_registers(bool up, int count);
  bool elect();

  void tensor_prefetch(const void* map);
  void tensor_load(uint32_t shared, const void* map, int rank, const int* place,
                   const uint16_t* offsets, uint32_t at);
  void tensor_store(const void* map, uint32_t shared, int rank, const int* place);
  void tensor_store_commit();
  void tensor_store_wait(int pending, bool read_only);

  void wgmma_fence();
  void wgmma(Product product, int n, float* d, uint64_t a, uint64_t b, bool add);
  void wgmma_commit();
  void wgmma_wait(int pending);
  void wgmma_take(float* d, int count);

  void grid_wait();
  void fence_global();
  // An access to global memory, by a copy of a tensor, or to a thread's own.
  void check_grid_wait();
  void check_grid_fence();
  void check_stack(const void* p, size_t bytes, bool write);

  // Lands something that is under way; false if there is nothing.
  bool land_something();
  bool anything_to_land() const { return !loads_.empty(); }
  // The running thread ends; with it, the block.
  void thread_ends();
  void block_ends();
  // For a report: what agent it is, where a thread waits, the state of all barrier objects.
  std::string agent_name(int agent) const;
  std::string place_of(int thread) const;
  std::string barrier_objects() const;

 private:
  void begin(const char* instruction);
  ThreadState& me();
  void note(FirstTime& first) const;
  bool comes_behind(const FirstTime& first) const;
  int new_agent(std::string name);
  std::string byte(uint32_t shared) const;
  size_t object_at(uint32_t at, const char* what);
  void settle(BarrierObject& o);
  void take_registers(int warp, bool up, int count);

  MapFields read_map(const void* map);
  void check_place(const MapFields& map, uint32_t shared, const char* what);
  void land(const TensorLoad& load);
  void capture(TensorStore& store);
  void write_out(const TensorStore& store);

  void meet_warp(uint32_t variant);
  void issue(Warpgroup& group, size_t number);
  void perform(Warpgroup& group, size_t end);
  void multiply(const ProductOf& p);
  const uint32_t* known_by_all(Warpgroup& group, int first);
  void check_descriptor(uint64_t descriptor, int rows);

  Block& block_;
  bool used_ = false;
  std::vector<BarrierObject> objects_;
  NamedBarrier named_[16];
  std::vector<TensorLoad> loads_;
  std::vector<ThreadState> threads_;
  std::vector<Warpgroup> groups_;
  std::vector<std::string> agents_;
  std::vector<int> registers_;  // by warp
  std::vector<int> changed_;    // changes that the warp has made
  int free_registers_ = 0;
  std::vector<int> register_waiters_;
  std::vector<std::string> waits_;  // by thread
  std::vector<int> chosen_;         // by warp: elect's lane
  FirstTime waited_, fenced_;       // for the grid before, for what it stored
};

}  // namespace emulator
