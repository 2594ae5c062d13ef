// SPDX-License-Identifier: BSD-3-Clause
// What the emulator offers to kernel code for Hopper: the instructions behind ptx_hopper.cuh. `at`
// and `shared` are addresses of shared memory.
#pragma once

#include <cstdint>

#include "emulator.h"

namespace emulator {

void barrier_init(uint32_t at, uint32_t arrivals);
void barrier_init_fence();
// Announces `bytes`, then arrives.
void barrier_arrive(uint32_t at, uint32_t bytes);
bool barrier_try_wait(uint32_t at, uint32_t parity);
void barrier_sync(int id, int threads);
void fence_async_shared();
void fence_async_global();

// `map` has 128 bytes. A place is given by coordinates, the innermost dimension first; offsets of
// width and height are for maps of pixel columns alone.
void tensor_prefetch(const void* map);
void tensor_load(uint32_t shared, const void* map, int rank, const int* place,
                 const uint16_t* offsets, uint32_t at);
void tensor_store(const void* map, uint32_t shared, int rank, const int* place);
void tensor_store_commit();
void tensor_store_wait(int pending, bool read_only);

void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int pending);
// The sums may be touched from here on.
void wgmma_take(float* d, int count);
// d[n / 2] (+)= a * b, 64 x n sums of 32 bytes of k.
void wgmma(Product product, int n, float* d, uint64_t a, uint64_t b, bool add);

void set_registers(bool up, int count);
bool elect();
void grid_wait();
void grid_launch();

}  // namespace emulator
