// SPDX-License-Identifier: BSD-3-Clause
// Barrier objects, copies of tensors and grids, each with one thing wrong.
#include "broken_hopper.h"

namespace resnet_fused {
namespace {

// ------------------------------------------------------------------------------ barrier objects
KERNEL(no_init_fence) {
  if (T == 0) {
    ptx::barrier_init(s.bar(0), 1);
    if (RIGHT) ptx::barrier_init_fence();
  }
  __syncthreads();
  if (T == 64) s.load(a, 0);
  ptx::barrier_wait(s.bar(0), 0);
}
KERNEL(no_barrier_behind_init) {
  if (T == 0) {
    ptx::barrier_init(s.bar(0), 256);
    ptx::barrier_init_fence();
  }
  if (RIGHT) __syncthreads();
  ptx::barrier_arrive(s.bar(0));
}
KERNEL(made_twice) {
  s.begin();
  if (T == 0) ptx::barrier_init(s.bar(RIGHT ? 2 : 1), 1);
}
KERNEL(misaligned_barrier_object) {
  if (T == 0) ptx::barrier_init(s.bar(0) + (RIGHT ? 0 : 4), 1);
}
KERNEL(barrier_object_overwritten) {
  s.begin();
  if (T == 0) s.half(s.bar(RIGHT ? 2 : 1), 0) = 0;
}
KERNEL(too_many_arrivals) {
  s.begin();
  if (T == 0) {
    ptx::barrier_arrive_expect(s.bar(0), kTile);
    if (!RIGHT) ptx::barrier_arrive(s.bar(0));
    ptx::tensor_load_2d(s.tile(0), &a.map[0], 0, 0, s.bar(0));
  }
  ptx::barrier_wait(s.bar(0), 0);
}
KERNEL(no_phase_ends) {
  s.begin(RIGHT ? 1 : 2);
  if (T == 0) ptx::barrier_arrive(s.bar(1));
  ptx::barrier_wait(s.bar(1), 0);
}
// What all lanes read may be overwritten when one of them says so, without the others.
KERNEL(one_lane_for_all) {
  s.begin();
  s.fill();
  if (T < 32) {
    if (s.half(s.base, T) != 0) return;
    if (RIGHT) __syncwarp();
    if (T == 0) ptx::barrier_arrive(s.bar(1));
  } else if (T == 32) {
    ptx::barrier_wait(s.bar(1), 0);
    s.half(s.base, 7) = 1;
  }
}

// ------------------------------------------------------------------------------ copies of tensors
KERNEL(copy_not_waited_for) {
  s.begin();
  if (T == 0) s.load(a, 0);
  if (RIGHT) ptx::barrier_wait(s.bar(0), 0);
  static_cast<float*>(a.p[0])[T] = s.half(s.base, T);
  if (!RIGHT) ptx::barrier_wait(s.bar(0), 0);
}
KERNEL(copy_waited_for_by_one) {
  s.begin();
  if (T == 0) {
    s.load(a, 0);
    ptx::barrier_wait(s.bar(0), 0);
  }
  if (RIGHT) __syncthreads();
  static_cast<float*>(a.p[0])[T] = s.half(s.base, T);
}
KERNEL(copy_waited_for_with_other_parity) {
  s.begin();
  if (T == 0) s.load(a, 0);
  ptx::barrier_wait(s.bar(0), RIGHT ? 0 : 1);
  static_cast<float*>(a.p[0])[T] = s.half(s.base, T);
  ptx::barrier_wait(s.bar(0), 0);
}
KERNEL(too_little_announced) {
  s.begin();
  if (T == 0) {
    ptx::barrier_arrive_expect(s.bar(0), RIGHT ? kTile : kTile - 16);
    ptx::tensor_load_2d(s.tile(0), &a.map[0], 0, 0, s.bar(0));
  }
  ptx::barrier_wait(s.bar(0), 0);
}
KERNEL(one_copy_announced_of_two) {
  s.begin();
  if (T == 0) {
    ptx::tensor_load_2d(s.tile(0), &a.map[0], 0, 0, s.bar(0));
    ptx::tensor_load_2d(s.tile(1), &a.map[1], 0, 0, s.bar(0));
    ptx::barrier_arrive_expect(s.bar(0), RIGHT ? 2 * kTile : kTile);
  }
  ptx::barrier_wait(s.bar(0), 0);
}
KERNEL(too_much_announced) {
  s.begin();
  if (T == 0) {
    ptx::barrier_arrive_expect(s.bar(0), RIGHT ? kTile : kTile + 16);
    ptx::tensor_load_2d(s.tile(0), &a.map[0], 0, 0, s.bar(0));
  }
  ptx::barrier_wait(s.bar(0), 0);
}
KERNEL(ends_with_a_copy_from_a_tensor) {
  s.begin();
  if (T == 0) s.load(a, 0);
  if (RIGHT && T == 255) ptx::barrier_wait(s.bar(0), 0);
}
KERNEL(copy_over_what_is_read) {
  s.begin(256);
  s.fill();
  static_cast<float*>(a.p[0])[T] = s.half(s.base, T);
  ptx::barrier_arrive(s.bar(1));
  if (T == 0) {
    if (RIGHT) ptx::barrier_wait(s.bar(1), 0);
    s.load(a, 0);
  }
  ptx::barrier_wait(s.bar(0), 0);
}
KERNEL(copy_over_what_was_written) {
  s.begin();
  s.half(s.base, T) = 0;
  if (RIGHT) ptx::fence_async_shared();
  __syncthreads();
  if (T == 0) s.load(a, 0);
  ptx::barrier_wait(s.bar(0), 0);
}
KERNEL(misaligned_tile) {
  s.begin();
  if (T == 0) {
    ptx::barrier_arrive_expect(s.bar(0), kTile);
    ptx::tensor_load_2d(s.tile(0) + (RIGHT ? 1024 : 512), &a.map[0], 0, 0, s.bar(0));
  }
  ptx::barrier_wait(s.bar(0), 0);
}
KERNEL(copy_beyond_shared_memory) {
  s.begin();
  if (T == 0) {
    ptx::barrier_arrive_expect(s.bar(0), kTile);
    ptx::tensor_load_2d(s.tile(RIGHT ? 1 : 4), &a.map[0], 0, 0, s.bar(0));
  }
  ptx::barrier_wait(s.bar(0), 0);
}
KERNEL(copy_of_another_rank) {
  s.begin();
  if (T == 0) {
    ptx::barrier_arrive_expect(s.bar(0), kTile);
    if (RIGHT) {
      ptx::tensor_load_2d(s.tile(0), &a.map[0], 0, 0, s.bar(0));
    } else {
      ptx::tensor_load_3d(s.tile(0), &a.map[0], 0, 0, 0, s.bar(0));
    }
  }
  ptx::barrier_wait(s.bar(0), 0);
}
KERNEL(map_of_nobody) {
  s.begin();
  const TensorMap none{};
  if (T == 0) ptx::tensor_map_prefetch(RIGHT ? &a.map[0] : &none);
}

// ------------------------------------------------------------------------------ copies to tensors
KERNEL(store_of_what_is_not_fenced) {
  for (int i = T; i < 64 * 64; i += 256) s.half(s.base, i) = 0;
  if (RIGHT) ptx::fence_async_shared();
  __syncthreads();
  if (T != 0) return;
  ptx::tensor_store_2d(&a.map[2], s.base, 0, 0);
  ptx::tensor_store_commit();
  ptx::tensor_store_wait_read<0>();
}
// The one who issues the copy cannot fence for the others.
KERNEL(store_fenced_by_another) {
  for (int i = T; i < 64 * 64; i += 256) s.half(s.base, i) = 0;
  if (RIGHT) ptx::fence_async_shared();
  __syncthreads();
  if (T != 0) return;
  ptx::fence_async_shared();
  ptx::tensor_store_2d(&a.map[2], s.base, 0, 0);
  ptx::tensor_store_commit();
  ptx::tensor_store_wait_read<0>();
}
KERNEL(store_without_a_barrier) {
  for (int i = T; i < 64 * 64; i += 256) s.half(s.base, i) = 0;
  ptx::fence_async_shared();
  if (RIGHT) __syncthreads();
  if (T != 255) return;
  ptx::tensor_store_2d(&a.map[2], s.base, 0, 0);
  ptx::tensor_store_commit();
  ptx::tensor_store_wait_read<0>();
}
KERNEL(written_under_a_store) {
  s.fill();
  if (T == 0) {
    ptx::tensor_store_2d(&a.map[2], s.base, 0, 0);
    ptx::tensor_store_commit();
    if (RIGHT) ptx::tensor_store_wait_read<0>();
  }
  __syncthreads();
  s.half(s.base, T) = 1;
  if (T == 0) ptx::tensor_store_wait_read<0>();
}
KERNEL(ends_with_a_copy_to_a_tensor) {
  s.fill();
  if (T != 0) return;
  ptx::tensor_store_2d(&a.map[2], s.base, 0, 0);
  if (!RIGHT) ptx::tensor_store_wait_read<0>();
  ptx::tensor_store_commit();
  if (RIGHT) ptx::tensor_store_wait_read<0>();
}
KERNEL(stored_twice) {
  s.fill();
  if (T != 0 && (RIGHT || T != 128)) return;
  ptx::tensor_store_2d(&a.map[2], s.base, 0, 0);
  ptx::tensor_store_commit();
  ptx::tensor_store_wait_read<0>();
}

// ----------------------------------------------------------------------------------------- grids
KERNEL(grid_not_waited_for) {
  s.begin();
  if (T == 0) {
    if (RIGHT) ptx::grid_wait();
    ptx::fence_async_global();
    s.load(a, 0);
  }
  ptx::barrier_wait(s.bar(0), 0);
}
KERNEL(grid_waited_for_by_another) {
  if (T == 0) ptx::grid_wait();
  if (RIGHT) __syncthreads();
  static_cast<float*>(a.p[0])[T] = 0;
}
KERNEL(grid_waited_for_without_a_fence) {
  s.begin();
  if (T == 0) {
    if (!RIGHT) ptx::fence_async_global();
    ptx::grid_wait();
    if (RIGHT) ptx::fence_async_global();
    s.load(a, 0);
  }
  ptx::barrier_wait(s.bar(0), 0);
}
KERNEL(not_for_hopper) {
  if (!RIGHT) ptx::barrier_sync(1, 256);
}

}  // namespace
}  // namespace resnet_fused
