// SPDX-License-Identifier: BSD-3-Clause
// Kernels around the functions of ptx_hopper.cuh: operands from memory, results to memory.
#include "../../../csrc/kernels/cuda/launch.cuh"
#include "../../../csrc/kernels/cuda/ptx_hopper.cuh"
#include "../runtime/test_kernels.h"

namespace resnet_fused {
namespace {

template <typename T>
T* as(void* p) {
  return static_cast<T*>(p);
}
int thread() { return static_cast<int>(threadIdx.x); }
int number(const emulator::TestArguments& a, int i) { return static_cast<int>(a.n[i]); }

// Shared memory from a multiple of 1024 on.
uint32_t aligned(unsigned char* shared) { return (ptx::shared_address(shared) + 1023) & ~1023u; }
unsigned char* pointer(unsigned char* shared, uint32_t address) {
  return shared + (address - ptx::shared_address(shared));
}

// A box as it lies in shared memory, n[1] bytes: n[0] dimensions, from n[2] on, with offsets n[6]
// and n[7] for four of them; n[8] more copies to the same place.
TEST_KERNEL(tensor_load) {
  RESNET_FUSED_SHARED(shared);
  const uint32_t box = aligned(shared), bar = box + static_cast<uint32_t>(a.n[1]);
  if (thread() == 0) {
    ptx::tensor_map_prefetch(&a.map[0]);
    ptx::barrier_init(bar, 1);
    ptx::barrier_init_fence();
    ptx::grid_wait();
    ptx::fence_async_global();
  }
  __syncthreads();
  for (int turn = 0; turn <= number(a, 8); ++turn) {
    if (thread() < 32 && ptx::elect()) {
      ptx::barrier_arrive_expect(bar, static_cast<uint32_t>(a.n[1]));
      if (a.n[0] == 2) {
        ptx::tensor_load_2d(box, &a.map[0], number(a, 2), number(a, 3), bar);
      } else if (a.n[0] == 3) {
        ptx::tensor_load_3d(box, &a.map[0], number(a, 2), number(a, 3), number(a, 4), bar);
      } else {
        ptx::tensor_load_im2col(box, &a.map[0], number(a, 2), number(a, 3), number(a, 4),
                                number(a, 5), static_cast<uint16_t>(a.n[6]),
                                static_cast<uint16_t>(a.n[7]), bar);
      }
    }
    ptx::barrier_wait(bar, static_cast<uint32_t>(turn & 1));
    __syncthreads();
  }
  for (int i = 16 * thread(); i < a.n[1]; i += 16 * static_cast<int>(blockDim.x)) {
    *as<uint4>(as<char>(a.p[0]) + i) = *as<uint4>(pointer(shared, box) + i);
  }
}

// n[0] bytes of shared memory to a box from (n[1], n[2]) on.
TEST_KERNEL(tensor_store) {
  RESNET_FUSED_SHARED(shared);
  const uint32_t box = aligned(shared);
  for (int i = 16 * thread(); i < a.n[0]; i += 16 * static_cast<int>(blockDim.x)) {
    *as<uint4>(pointer(shared, box) + i) = *as<uint4>(as<char>(a.p[0]) + i);
  }
  ptx::fence_async_shared();
  __syncthreads();
  if (thread() == 0) {
    ptx::tensor_store_2d(&a.map[0], box, number(a, 1), number(a, 2));
    ptx::tensor_store_commit();
    ptx::tensor_store_wait_read<0>();
    ptx::tensor_store_wait<0>();
  }
}

// The thread's sums before and after n[0] steps of 32 bytes; the first adds to them if n[1] is set.
template <typename T, int kN>
void product(const emulator::TestArguments& a) {
  RESNET_FUSED_SHARED(shared);
  const uint32_t left = aligned(shared), right = left + 64 * 128;
  for (int i = 16 * thread(); i < (64 + kN) * 128; i += 16 * static_cast<int>(blockDim.x)) {
    *as<uint4>(pointer(shared, left) + i) = *as<uint4>(as<char>(a.p[0]) + i);
  }
  float d[kN / 2];
  for (int i = 0; i < kN / 2; ++i) d[i] = as<float>(a.p[1])[thread() * (kN / 2) + i];
  ptx::fence_async_shared();
  __syncthreads();
  ptx::wgmma_fence(d);
  for (uint32_t step = 0; step < a.n[0]; ++step) {
    ptx::wgmma<T, kN>(d, ptx::wgmma_descriptor(left + 32 * step),
                      ptx::wgmma_descriptor(right + 32 * step), step > 0 || a.n[1] != 0);
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>(d);
  for (int i = 0; i < kN / 2; ++i) as<float>(a.p[2])[thread() * (kN / 2) + i] = d[i];
}
TEST_KERNEL(wgmma_f16_32) { product<Half, 32>(a); }
TEST_KERNEL(wgmma_f16_96) { product<Half, 96>(a); }
TEST_KERNEL(wgmma_f16_256) { product<Half, 256>(a); }
TEST_KERNEL(wgmma_bf16_64) { product<BFloat, 64>(a); }
TEST_KERNEL(wgmma_tf32_64) { product<float, 64>(a); }
TEST_KERNEL(wgmma_tf32_128) { product<float, 128>(a); }

// [64 n[0]][64 n[2]] x [64 n[1]][64 n[2]] of halves: one warpgroup copies, two make a tile each, by
// turns, through a ring of two stages, and copy it out.
TEST_KERNEL(pipeline) {
  RESNET_FUSED_SHARED(shared);
  constexpr uint32_t kTile = 64 * 128, kStages = 2;
  const uint32_t ring = aligned(shared), out = ring + 2 * kStages * kTile, full = out + 2 * kTile;
  const uint32_t empty = full + 8 * kStages, order = empty + 8 * kStages;
  const int across = number(a, 1), steps = number(a, 2), tiles = number(a, 0) * across;
  if (thread() == 0) {
    for (uint32_t s = 0; s < kStages; ++s) {
      ptx::barrier_init(full + 8 * s, 1);
      ptx::barrier_init(empty + 8 * s, 1);
    }
    for (uint32_t g = 0; g < 2; ++g) ptx::barrier_init(order + 8 * g, 1);
    ptx::barrier_init_fence();
  }
  __syncthreads();
  const int group = thread() / 128;
  if (group == 0) {
    ptx::registers_down<40>();
    if (thread() != 0) return;
    uint32_t turn = 0;
    for (int tile = static_cast<int>(blockIdx.x); tile < tiles; tile += gridDim.x) {
      for (int k = 0; k < steps; ++k, ++turn) {
        const uint32_t s = turn % kStages, stage = ring + 2 * s * kTile, bar = full + 8 * s;
        ptx::barrier_wait(empty + 8 * s, (turn / kStages + 1) & 1);
        ptx::barrier_arrive_expect(bar, 2 * kTile);
        ptx::tensor_load_2d(stage, &a.map[0], 64 * k, tile / across * 64, bar);
        ptx::tensor_load_2d(stage + kTile, &a.map[1], 64 * k, tile % across * 64, bar);
      }
    }
    ptx::grid_launch();
    return;
  }
  ptx::registers_up<232>();
  const uint32_t mine = out + (group - 1) * kTile;
  int count = 0;
  for (int tile = static_cast<int>(blockIdx.x); tile < tiles; tile += gridDim.x, ++count) {
    if (count % 2 != group - 1) continue;
    // Two phases ahead, a barrier object cannot be told from one that is over: so the other's
    // products come first.
    ptx::barrier_wait(order + 8 * (group - 1), static_cast<uint32_t>(count / 2 + 2 - group) & 1);
    float d[32];
    ptx::wgmma_fence(d);
    for (int k = 0; k < steps; ++k) {
      const auto turn = static_cast<uint32_t>(count * steps + k);
      const uint32_t s = turn % kStages, stage = ring + 2 * s * kTile;
      ptx::barrier_wait(full + 8 * s, turn / kStages & 1);
      for (uint32_t step = 0; step < 4; ++step) {
        ptx::wgmma<Half, 64>(d, ptx::wgmma_descriptor(stage + 32 * step),
                             ptx::wgmma_descriptor(stage + kTile + 32 * step), k + step > 0);
      }
      ptx::wgmma_commit();
      // The slot of the step before is free when its products are done.
      ptx::wgmma_wait<1>();
      if (k > 0 && thread() % 128 == 0) ptx::barrier_arrive(empty + 8 * ((turn - 1) % kStages));
    }
    ptx::wgmma_wait<0>(d);
    const auto last = static_cast<uint32_t>(count * steps + steps - 1);
    if (thread() % 128 == 0) {
      ptx::barrier_arrive(empty + 8 * (last % kStages));
      ptx::barrier_arrive(order + 8 * (2 - group));
      ptx::tensor_store_wait_read<0>();
    }
    ptx::barrier_sync(group, 128);
    const int row = 16 * (thread() % 128 / 32) + thread() % 32 / 4;
    for (int i = 0; i < 32; ++i) {
      const int r = row + 8 * (i / 2 % 2), c = 8 * (i / 4) + 2 * (thread() % 4) + i % 2;
      const uint32_t at = mine + r * 128 + (((c / 8) ^ (r % 8)) << 4) + c % 8 * 2;
      *as<Half>(pointer(shared, at)) = from_float<Half>(d[i]);
    }
    ptx::fence_async_shared();
    ptx::barrier_sync(group, 128);
    if (thread() % 128 == 0) {
      ptx::tensor_store_2d(&a.map[2], mine, tile % across * 64, tile / across * 64);
      ptx::tensor_store_commit();
    }
  }
  if (thread() % 128 == 0) ptx::tensor_store_wait_read<0>();
}

// What barrier_try_wait says of n[0] arrivals by one thread: out[2 i + p] counts, before arrival i,
// how often of 64 times parity p was over.
TEST_KERNEL(phases) {
  RESNET_FUSED_SHARED(shared);
  const uint32_t bar = ptx::shared_address(shared);
  ptx::barrier_init(bar, static_cast<uint32_t>(a.n[1]));
  uint32_t phase = 0, arrived = 0;
  for (int i = 0; i < a.n[0]; ++i) {
    // A phase that is not over would be waited for.
    int over = 0;
    for (int j = 0; j < 64; ++j) over += ptx::barrier_try_wait(bar, (phase + 1) & 1);
    as<int>(a.p[0])[i] = over;
    ptx::barrier_arrive(bar);
    if (++arrived == a.n[1]) {
      arrived = 0;
      ptx::barrier_wait(bar, phase++ & 1);
    }
  }
}

// Two halves of a block each pass a number on within themselves; then all do.
TEST_KERNEL(named_barriers) {
  RESNET_FUSED_SHARED(shared);
  int* values = as<int>(shared);
  const int half = thread() / 64, at = thread() % 64;
  values[thread()] = as<int>(a.p[0])[thread()];
  ptx::barrier_sync(1 + half, 64);
  const int v = values[64 * half + 63 - at];
  ptx::barrier_sync(1 + half, 64);
  values[thread()] = v + 1;
  ptx::barrier_sync(3, 128);
  as<int>(a.p[1])[thread()] = values[127 - thread()];
}

TEST_KERNEL(elected) {
  as<int>(a.p[0])[2 * thread()] = ptx::elect();
  as<int>(a.p[0])[2 * thread() + 1] = ptx::elect();
}

TEST_KERNEL(grids) {
  if (thread() == 0) ptx::grid_wait();
  __syncthreads();
  as<float>(a.p[1])[thread()] = as<const float>(a.p[0])[thread()];
}

// A thread's copies: n[0] to n[1] different places, then whether it may write the first one again.
TEST_KERNEL(store_groups) {
  RESNET_FUSED_SHARED(shared);
  const uint32_t box = aligned(shared);
  auto* halves = as<uint16_t>(pointer(shared, box));
  for (int i = thread(); i < 3 * 8 * 64; i += static_cast<int>(blockDim.x)) {
    halves[i] = as<uint16_t>(a.p[0])[i];
  }
  ptx::fence_async_shared();
  __syncthreads();
  if (thread() != 0) return;
  for (int group = 0; group < 3; ++group) {
    ptx::tensor_store_2d(&a.map[0], box + 1024 * static_cast<uint32_t>(group), 0, 8 * group);
    if (group < 2 || a.n[1] == 0) ptx::tensor_store_commit();
  }
  ptx::tensor_store_wait_read<1>();
  halves[8 * 64 * a.n[0]] = 0;
  ptx::tensor_store_commit();
  ptx::tensor_store_wait_read<0>();
}

}  // namespace
}  // namespace resnet_fused
