// SPDX-License-Identifier: BSD-3-Clause
// What a running thread may call: emulator_hopper.h.
#include "block.h"
#include "emulator_hopper.h"

#define RETURN_ADDRESS __builtin_extract_return_addr(__builtin_return_address(0))
// The place in the kernel is kept for reports.
#define HOPPER (current_block->self().program = RETURN_ADDRESS, current_block->hopper())

namespace emulator {

void barrier_init(uint32_t at, uint32_t arrivals) { HOPPER.barrier_init(at, arrivals); }
void barrier_init_fence() { HOPPER.fence(Clocks::kInit); }
void barrier_arrive(uint32_t at, uint32_t bytes) { HOPPER.barrier_arrive(at, bytes); }
bool barrier_try_wait(uint32_t at, uint32_t parity) { return HOPPER.barrier_try_wait(at, parity); }
void barrier_sync(int id, int threads) { HOPPER.barrier_sync(id, threads); }
void fence_async_shared() { HOPPER.fence(Clocks::kAsync); }
void fence_async_global() { HOPPER.fence_global(); }

void tensor_prefetch(const void* map) { HOPPER.tensor_prefetch(map); }
void tensor_load(uint32_t shared, const void* map, int rank, const int* place,
                 const uint16_t* offsets, uint32_t at) {
  HOPPER.tensor_load(shared, map, rank, place, offsets, at);
}
void tensor_store(const void* map, uint32_t shared, int rank, const int* place) {
  HOPPER.tensor_store(map, shared, rank, place);
}
void tensor_store_commit() { HOPPER.tensor_store_commit(); }
void tensor_store_wait(int pending, bool read_only) {
  HOPPER.tensor_store_wait(pending, read_only);
}

void wgmma_fence() { HOPPER.wgmma_fence(); }
void wgmma_commit() { HOPPER.wgmma_commit(); }
void wgmma_wait(int pending) { HOPPER.wgmma_wait(pending); }
void wgmma_take(float* d, int count) { HOPPER.wgmma_take(d, count); }
void wgmma(Product product, int n, float* d, uint64_t a, uint64_t b, bool add) {
  HOPPER.wgmma(product, n, d, a, b, add);
}

void set_registers(bool up, int count) { HOPPER.set_registers(up, count); }
bool elect() { return HOPPER.elect(); }
void grid_wait() { HOPPER.grid_wait(); }
// The next kernel begins when this one has ended, at the latest: here, always.
void grid_launch() {}

}  // namespace emulator
