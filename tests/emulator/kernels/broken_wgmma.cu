// SPDX-License-Identifier: BSD-3-Clause
// Products of warpgroups, their registers and named barriers, each with one thing wrong.
#include "broken_hopper.h"

namespace resnet_fused {
namespace {

using Sums64 = float[32];

void keep(const emulator::TestArguments& a, const float (&d)[32]) {
  float sum = 0;
  for (const float v : d) sum += v;
  static_cast<float*>(a.p[0])[T] = sum;
}

// --------------------------------------------------------------------------------------- products
KERNEL(no_wgmma_fence) {
  s.fill();
  if (T >= 128) return;
  Sums64 d;
  if (RIGHT) ptx::wgmma_fence(d);
  ptx::wgmma<Half, 64>(d, s.left(), s.right(), false);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>(d);
  keep(a, d);
}
KERNEL(no_wgmma_fence_behind_a_sum) {
  s.fill();
  if (T >= 128) return;
  Sums64 d;
  for (int i = 0; i < 2; ++i) {
    if (RIGHT || i == 0) ptx::wgmma_fence(d);
    ptx::wgmma<Half, 64>(d, s.left(), s.right(), i > 0);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>(d);
    for (float& v : d) v *= 2;
  }
  keep(a, d);
}
KERNEL(sums_read_too_early) {
  s.fill();
  if (T >= 128) return;
  Sums64 d;
  ptx::wgmma_fence(d);
  ptx::wgmma<Half, 64>(d, s.left(), s.right(), false);
  ptx::wgmma_commit();
  if (!RIGHT) keep(a, d);
  ptx::wgmma_wait<0>(d);
  if (RIGHT) keep(a, d);
}
KERNEL(sums_not_named) {
  s.fill();
  if (T >= 128) return;
  Sums64 d;
  ptx::wgmma_fence(d);
  ptx::wgmma<Half, 64>(d, s.left(), s.right(), false);
  ptx::wgmma_commit();
  if (RIGHT) {
    ptx::wgmma_wait<0>(d);
  } else {
    ptx::wgmma_wait<0>();
  }
  keep(a, d);
}
KERNEL(one_wgmma_too_many_under_way) {
  s.fill();
  if (T >= 128) return;
  Sums64 d;
  ptx::wgmma_fence(d);
  ptx::wgmma<Half, 64>(d, s.left(), s.right(), false);
  ptx::wgmma_commit();
  if (RIGHT) {
    ptx::wgmma_wait<0>(d);
  } else {
    ptx::wgmma_wait<1>(d);
  }
  keep(a, d);
}
KERNEL(wgmma_not_committed) {
  s.fill();
  if (T >= 128) return;
  Sums64 d;
  ptx::wgmma_fence(d);
  ptx::wgmma<Half, 64>(d, s.left(), s.right(), false);
  if (RIGHT) ptx::wgmma_commit();
  ptx::wgmma_wait<0>(d);
}
KERNEL(ends_with_a_wgmma) {
  s.fill();
  if (T >= 128) return;
  Sums64 d;
  ptx::wgmma_fence(d);
  ptx::wgmma<Half, 64>(d, s.left(), s.right(), false);
  ptx::wgmma_commit();
  if (RIGHT) ptx::wgmma_wait<0>(d);
}
KERNEL(wgmma_of_what_is_not_fenced) {
  for (int i = T; i < 64 * 128; i += 256) s.half(s.base, i) = 0;
  if (RIGHT) ptx::fence_async_shared();
  __syncthreads();
  if (T >= 128) return;
  Sums64 d;
  ptx::wgmma_fence(d);
  ptx::wgmma<Half, 64>(d, s.left(), s.right(), false);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>(d);
}
// The copy was waited for by one warp of the four.
KERNEL(wgmma_of_what_one_warp_waited_for) {
  s.begin();
  s.fill();
  if (T == 255) s.load(a, 0);
  if (T >= 128) return;
  if (RIGHT || T < 32) ptx::barrier_wait(s.bar(0), 0);
  Sums64 d;
  ptx::wgmma_fence(d);
  ptx::wgmma<Half, 64>(d, s.left(), s.right(), false);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>(d);
}
// The ring's slot is given back while wgmma reads it.
KERNEL(slot_given_back_too_early) {
  s.begin();
  s.fill();
  if (T == 255) {
    ptx::barrier_wait(s.bar(1), 0);
    s.load(a, 0);
    ptx::barrier_wait(s.bar(0), 0);
  }
  if (T >= 128) return;
  Sums64 d;
  ptx::wgmma_fence(d);
  ptx::wgmma<Half, 64>(d, s.left(), s.right(), false);
  ptx::wgmma_commit();
  if (!RIGHT && T == 0) ptx::barrier_arrive(s.bar(1));
  ptx::wgmma_wait<0>(d);
  if (RIGHT && T == 0) ptx::barrier_arrive(s.bar(1));
}
KERNEL(misaligned_operand) {
  s.fill();
  if (T >= 128) return;
  Sums64 d;
  ptx::wgmma_fence(d);
  ptx::wgmma<Half, 64>(d, s.left(), ptx::wgmma_descriptor(s.tile(1) - (RIGHT ? 0 : 512)), false);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>(d);
}
KERNEL(other_operand_in_one_thread) {
  s.fill();
  if (T >= 128) return;
  Sums64 d;
  ptx::wgmma_fence(d);
  ptx::wgmma<Half, 64>(d, RIGHT || T != 77 ? s.left() : s.right(), s.right(), false);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>(d);
}
KERNEL(three_warps_multiply) {
  s.fill();
  if (T >= (RIGHT ? 128 : 96)) return;
  Sums64 d;
  ptx::wgmma_fence(d);
  ptx::wgmma<Half, 64>(d, s.left(), s.right(), false);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>(d);
}
KERNEL(half_a_warp_fences) {
  if (T >= 128) return;
  if (RIGHT || T % 32 < 16) ptx::wgmma_fence();
}
KERNEL(other_swizzle) {
  s.fill();
  if (T >= 128) return;
  Sums64 d;
  ptx::wgmma_fence(d);
  ptx::wgmma<Half, 64>(d, s.left() ^ (RIGHT ? 0 : uint64_t{3} << 62), s.right(), false);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>(d);
}
KERNEL(not_rounded_to_tf32) {
  for (int i = T; i < 64 * 128; i += 256) s.half(s.base, i) = i > 0 ? 0 : RIGHT ? 0x2000 : 1;
  ptx::fence_async_shared();
  __syncthreads();
  if (T >= 128) return;
  Sums64 d;
  ptx::wgmma_fence(d);
  ptx::wgmma<float, 64>(d, s.left(), s.right(), false);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>(d);
}

// -------------------------------------------------------------------------------------- registers
// 248 for each of 256 threads is what there is.
KERNEL(more_registers_than_there_are) {
  if (T < 128) {
    if (RIGHT) ptx::registers_down<240>();
  } else {
    ptx::registers_up<256>();
  }
}
KERNEL(takes_while_it_gives) {
  ptx::registers_down<40>();
  if (T >= 128) return;
  if (RIGHT) {
    ptx::registers_up<232>();
  } else {
    ptx::registers_down<232>();
  }
}
KERNEL(one_warp_gives_registers) {
  if (T < (RIGHT ? 128 : 32)) ptx::registers_down<40>();
}
KERNEL(a_warp_gives_other_registers) {
  if (T >= 128) return;
  if (RIGHT || T < 96) {
    ptx::registers_down<40>();
  } else {
    ptx::registers_down<32>();
  }
}

// --------------------------------------------------------------------------------- named barriers
KERNEL(other_count_at_a_barrier) {
  if (T < 64) ptx::barrier_sync(1, RIGHT || T < 32 ? 64 : 96);
}
KERNEL(a_warp_misses_a_barrier) {
  if (T < (RIGHT ? 96 : 64)) ptx::barrier_sync(1, 96);
}
KERNEL(half_a_warp_at_a_barrier) {
  if (RIGHT ? T < 64 : T % 32 < 16 && T < 128) ptx::barrier_sync(1, 64);
}
KERNEL(barrier_of_syncthreads) { ptx::barrier_sync(RIGHT ? 1 : 16, 256); }
KERNEL(another_barrier) {
  s.half(s.base, T) = 0;
  ptx::barrier_sync(RIGHT ? 1 : 1 + T / 128, RIGHT ? 256 : 128);
  static_cast<float*>(a.p[0])[T] = s.half(s.base, 255 - T);
}
KERNEL(half_a_warp_elects) {
  if (T < 32 && (RIGHT || T >= 16)) ptx::elect();
}

}  // namespace
}  // namespace resnet_fused
