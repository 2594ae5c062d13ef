// SPDX-License-Identifier: BSD-3-Clause
// What kernels for Hopper with one thing wrong share: wrong where n[0] is 0, right where it is 1.
#pragma once

#include "../../../csrc/kernels/cuda/launch.cuh"
#include "../../../csrc/kernels/cuda/ptx_hopper.cuh"
#include "../runtime/test_kernels.h"

namespace resnet_fused {
namespace {

// 256 threads. Maps: 0 and 1 are inputs, 2 is an output, all 64 x 64 halves in boxes of that size.
#define RIGHT (a.n[0] != 0)
#define T static_cast<int>(threadIdx.x)
#define KERNEL(name)                                                               \
  void name##_body(const emulator::TestArguments& a, const Places& s);             \
  TEST_KERNEL(name) {                                                              \
    RESNET_FUSED_SHARED(shared);                                                   \
    name##_body(a, Places{shared, (ptx::shared_address(shared) + 1023) & ~1023u}); \
  }                                                                                \
  void name##_body([[maybe_unused]] const emulator::TestArguments& a,              \
                   [[maybe_unused]] const Places& s)

constexpr uint32_t kTile = 64 * 128;

struct Places {
  unsigned char* shared;
  uint32_t base;  // on 1024

  uint32_t tile(uint32_t i) const { return base + i * kTile; }
  uint32_t bar(uint32_t i) const { return base + 3 * kTile + 8 * i; }
  uint16_t& half(uint32_t address, int i) const {
    return reinterpret_cast<uint16_t*>(shared + (address - ptx::shared_address(shared)))[i];
  }
  // Barrier object 0 for copies, 1 for `arrivals`.
  void begin(uint32_t arrivals = 1) const {
    if (T == 0) {
      ptx::barrier_init(bar(0), 1);
      ptx::barrier_init(bar(1), arrivals);
      ptx::barrier_init_fence();
    }
    __syncthreads();
  }
  void load(const emulator::TestArguments& a, uint32_t i) const {
    ptx::barrier_arrive_expect(bar(0), kTile);
    ptx::tensor_load_2d(tile(i), &a.map[i], 0, 0, bar(0));
  }
  // Tiles 0 and 1 filled by all threads, for agents to read.
  void fill() const {
    for (int i = T; i < 64 * 128; i += 256) half(base, i) = 0;
    ptx::fence_async_shared();
    __syncthreads();
  }
  uint64_t left() const { return ptx::wgmma_descriptor(tile(0)); }
  uint64_t right() const { return ptx::wgmma_descriptor(tile(1)); }
};
}  // namespace
}  // namespace resnet_fused
