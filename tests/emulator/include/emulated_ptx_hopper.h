// SPDX-License-Identifier: BSD-3-Clause
// ptx_hopper.cuh's functions on a CPU; included by it. Same names, same signatures.
#pragma once

#include "emulator_hopper.h"

namespace resnet_fused {
namespace ptx {

inline void barrier_init(uint32_t bar, uint32_t arrivals) { emulator::barrier_init(bar, arrivals); }
inline void barrier_init_fence() { emulator::barrier_init_fence(); }
inline void barrier_arrive(uint32_t bar) { emulator::barrier_arrive(bar, 0); }
inline void barrier_arrive_expect(uint32_t bar, uint32_t bytes) {
  emulator::barrier_arrive(bar, bytes);
}
inline bool barrier_try_wait(uint32_t bar, uint32_t parity) {
  return emulator::barrier_try_wait(bar, parity);
}
inline void barrier_wait(uint32_t bar, uint32_t parity) {
  while (!barrier_try_wait(bar, parity)) {
  }
}
inline void barrier_sync(int id, int threads) { emulator::barrier_sync(id, threads); }
inline void fence_async_shared() { emulator::fence_async_shared(); }
inline void fence_async_global() { emulator::fence_async_global(); }

inline void tensor_map_prefetch(const TensorMap* map) { emulator::tensor_prefetch(map); }
inline void tensor_load_2d(uint32_t shared, const TensorMap* map, int c, int row, uint32_t bar) {
  const int place[2] = {c, row};
  emulator::tensor_load(shared, map, 2, place, nullptr, bar);
}
inline void tensor_load_3d(uint32_t shared, const TensorMap* map, int c, int tap, int k,
                           uint32_t bar) {
  const int place[3] = {c, tap, k};
  emulator::tensor_load(shared, map, 3, place, nullptr, bar);
}
inline void tensor_load_im2col(uint32_t shared, const TensorMap* map, int c, int w, int h, int n,
                               uint16_t offset_w, uint16_t offset_h, uint32_t bar) {
  const int place[4] = {c, w, h, n};
  const uint16_t offsets[2] = {offset_w, offset_h};
  emulator::tensor_load(shared, map, 4, place, offsets, bar);
}
inline void tensor_store_2d(const TensorMap* map, uint32_t shared, int c, int row) {
  const int place[2] = {c, row};
  emulator::tensor_store(map, shared, 2, place);
}
inline void tensor_store_commit() { emulator::tensor_store_commit(); }
template <int kPending>
inline void tensor_store_wait_read() {
  emulator::tensor_store_wait(kPending, true);
}
template <int kPending>
inline void tensor_store_wait() {
  emulator::tensor_store_wait(kPending, false);
}

inline uint64_t wgmma_descriptor(uint32_t shared) {
  return uint64_t{(shared & 0x3ffff) >> 4} | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 |
         uint64_t{1} << 62;
}
template <int kCount>
inline void hold(float (&d)[kCount]) {
  static_cast<void>(d);
}
template <int... kCount>
inline void wgmma_fence(float (&... d)[kCount]) {
  (hold(d), ...);
  emulator::wgmma_fence();
}
inline void wgmma_commit() { emulator::wgmma_commit(); }
template <int kPending, int... kCount>
inline void wgmma_wait(float (&... d)[kCount]) {
  emulator::wgmma_wait(kPending);
  (emulator::wgmma_take(d, kCount), ...);
}
template <typename T, int kN>
inline void wgmma(float (&d)[kN / 2], uint64_t a, uint64_t b, bool add) {
  static_assert(kN % 32 == 0 && kN >= 32 && kN <= 256);
  constexpr auto kProduct = std::is_same_v<T, Half>     ? emulator::Product::f16
                            : std::is_same_v<T, BFloat> ? emulator::Product::bf16
                                                        : emulator::Product::tf32;
  emulator::wgmma(kProduct, kN, d, a, b, add);
}

template <int kRegisters>
inline void registers_up() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  emulator::set_registers(true, kRegisters);
}
template <int kRegisters>
inline void registers_down() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  emulator::set_registers(false, kRegisters);
}
inline bool elect() { return emulator::elect(); }
inline void grid_wait() { emulator::grid_wait(); }
inline void grid_launch() { emulator::grid_launch(); }

}  // namespace ptx
}  // namespace resnet_fused
