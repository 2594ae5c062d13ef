// SPDX-License-Identifier: BSD-3-Clause
// Kernels with one thing wrong each where n[0] is 0, and right where it is 1.
#include "../../../csrc/kernels/cuda/launch.cuh"
#include "../../../csrc/kernels/cuda/numeric.cuh"
#include "../runtime/test_kernels.h"

namespace resnet_fused {
namespace {

// 64 threads; input and output have 64 floats, or what a kernel says.
#define RIGHT (a.n[0] != 0)
#define IN static_cast<const float*>(a.p[0])
#define OUT static_cast<float*>(a.p[1])
#define T static_cast<int>(threadIdx.x)

float* floats(unsigned char* shared) { return reinterpret_cast<float*>(shared); }

TEST_KERNEL(write_barrier_read) {
  RESNET_FUSED_SHARED(shared);
  floats(shared)[T] = IN[T];
  if (RIGHT) __syncthreads();
  OUT[T] = floats(shared)[63 - T];
}
TEST_KERNEL(read_barrier_write) {
  RESNET_FUSED_SHARED(shared);
  floats(shared)[T] = IN[T];
  __syncthreads();
  const float v = floats(shared)[63 - T];
  if (RIGHT) __syncthreads();
  floats(shared)[T] = v;
  OUT[T] = v;
}
TEST_KERNEL(two_writers) {
  RESNET_FUSED_SHARED(shared);
  floats(shared)[RIGHT ? T : T / 2] = IN[T];
  __syncthreads();
  OUT[T] = floats(shared)[RIGHT ? T : T / 2];
}
// The barrier of one warp orders nothing for the other.
TEST_KERNEL(warp_barrier_only) {
  RESNET_FUSED_SHARED(shared);
  floats(shared)[T] = IN[T];
  __syncwarp();
  OUT[T] = floats(shared)[RIGHT ? T ^ 31 : T ^ 63];
}
TEST_KERNEL(no_warp_barrier) {
  RESNET_FUSED_SHARED(shared);
  floats(shared)[T] = IN[T];
  if (RIGHT) __syncwarp();
  OUT[T] = floats(shared)[T ^ 1];
}
// A shuffle brings lanes together, but orders no memory.
TEST_KERNEL(shuffle_is_no_barrier) {
  RESNET_FUSED_SHARED(shared);
  floats(shared)[T] = IN[T];
  const float v = __shfl_xor_sync(0xffffffffu, IN[T], 1);
  if (RIGHT) __syncwarp();
  OUT[T] = v + floats(shared)[T ^ 1];
}
TEST_KERNEL(never_waited) {
  RESNET_FUSED_SHARED(shared);
  if (T < 16) ptx::copy_async_16(ptx::shared_address(shared + 16 * T), IN + 4 * T, 16);
  ptx::copy_commit();
  if (RIGHT) ptx::copy_wait<0>();
  if (!RIGHT) ptx::copy_wait<1>();
  __syncthreads();
  OUT[T] = floats(shared)[T];
  ptx::copy_wait<0>();
}
TEST_KERNEL(waited_by_another) {
  RESNET_FUSED_SHARED(shared);
  if (T < 16) ptx::copy_async_16(ptx::shared_address(shared + 16 * T), IN + 4 * T, 16);
  ptx::copy_commit();
  ptx::copy_wait<0>();
  if (RIGHT) __syncthreads();
  OUT[T] = floats(shared)[T];
}
// Not committed: no wait covers it.
TEST_KERNEL(never_committed) {
  RESNET_FUSED_SHARED(shared);
  if (T < 16) ptx::copy_async_16(ptx::shared_address(shared + 16 * T), IN + 4 * T, 16);
  if (RIGHT) ptx::copy_commit();
  ptx::copy_wait<0>();
  __syncthreads();
  OUT[T] = floats(shared)[T];
  ptx::copy_commit();
  ptx::copy_wait<0>();
}
TEST_KERNEL(copy_into_what_is_read) {
  RESNET_FUSED_SHARED(shared);
  floats(shared)[T] = IN[T];
  __syncthreads();
  OUT[T] = floats(shared)[63 - T];
  if (RIGHT) __syncthreads();
  if (T < 16) ptx::copy_async_16(ptx::shared_address(shared + 16 * T), IN + 4 * T, 16);
  ptx::copy_commit();
  ptx::copy_wait<0>();
}
TEST_KERNEL(ends_with_a_copy) {
  RESNET_FUSED_SHARED(shared);
  OUT[T] = IN[T];
  ptx::copy_async_16(ptx::shared_address(shared + 16 * T), IN + T / 4 * 4, 16);
  ptx::copy_commit();
  if (RIGHT) ptx::copy_wait<0>();
}
TEST_KERNEL(global_read_beyond) { OUT[T] = IN[RIGHT ? T : T + 1]; }
TEST_KERNEL(global_read_before) { OUT[T] = IN[RIGHT ? T : T - 1]; }
TEST_KERNEL(global_write_beyond) {
  OUT[T] = IN[T];
  if (!RIGHT && T == 63) OUT[64] = 0.0f;
}
TEST_KERNEL(copy_beyond) {
  RESNET_FUSED_SHARED(shared);
  // The source is looked at only as far as it is read.
  ptx::copy_async_16(ptx::shared_address(shared + 16 * T), IN + 4 * T,
                     T < 16            ? 16
                     : RIGHT || T > 16 ? 0
                                       : 4);
  ptx::copy_commit();
  ptx::copy_wait<0>();
  OUT[T] = IN[T];
}
TEST_KERNEL(shared_beyond) {
  RESNET_FUSED_SHARED(shared);
  floats(shared)[RIGHT ? T : T + 1] = IN[T];
  OUT[T] = floats(shared)[RIGHT ? T : T + 1];
}
TEST_KERNEL(wide_shared_beyond) {
  RESNET_FUSED_SHARED(shared);
  auto* wide = reinterpret_cast<uint4*>(shared + (RIGHT ? 0 : 16));
  if (T < 16) wide[T] = uint4{};
  OUT[T] = IN[T];
}
TEST_KERNEL(misaligned_vector) {
  const float* from = IN + (RIGHT ? 4 : 1) * (T % 8);
  const uint4 v = *reinterpret_cast<const uint4*>(from);
  OUT[T] = __uint_as_float(v.x);
}
TEST_KERNEL(misaligned_element) {
  const auto* from = reinterpret_cast<const char*>(IN) + (RIGHT ? 4 : 2) * (T % 8);
  OUT[T] = *reinterpret_cast<const float*>(from);
}
TEST_KERNEL(misaligned_shared_store) {
  RESNET_FUSED_SHARED(shared);
  if (T < 8) *reinterpret_cast<uint4*>(shared + (RIGHT ? 16 : 8) * T) = uint4{};
  OUT[T] = IN[T];
}
TEST_KERNEL(misaligned_copy) {
  RESNET_FUSED_SHARED(shared);
  if (T == 0) ptx::copy_async_16(ptx::shared_address(shared + (RIGHT ? 0 : 8)), IN, 16);
  ptx::copy_commit();
  ptx::copy_wait<0>();
  OUT[T] = IN[T];
}
TEST_KERNEL(misaligned_copy_source) {
  RESNET_FUSED_SHARED(shared);
  if (T == 0) ptx::copy_async_16(ptx::shared_address(shared), IN + (RIGHT ? 0 : 2), 16);
  ptx::copy_commit();
  ptx::copy_wait<0>();
  OUT[T] = IN[T];
}
TEST_KERNEL(too_long_copy) {
  RESNET_FUSED_SHARED(shared);
  if (T == 0) ptx::copy_async_16(ptx::shared_address(shared), IN, RIGHT ? 16 : 20);
  ptx::copy_commit();
  ptx::copy_wait<0>();
  OUT[T] = IN[T];
}
TEST_KERNEL(misaligned_matrix) {
  RESNET_FUSED_SHARED(shared);
  for (int i = T; i < 256; i += 64) floats(shared)[i] = 1.0f;
  __syncthreads();
  uint32_t r[4];
  ptx::load_matrix_4(r, ptx::shared_address(shared) + T % 32 * (RIGHT ? 16 : 8));
  OUT[T] = __uint_as_float(r[0]);
}
TEST_KERNEL(uninitialised_shared) {
  RESNET_FUSED_SHARED(shared);
  if (RIGHT || T != 5) floats(shared)[T] = IN[T];
  __syncthreads();
  OUT[T] = floats(shared)[63 - T];
}
TEST_KERNEL(uninitialised_matrix) {
  RESNET_FUSED_SHARED(shared);
  for (int i = T; i < (RIGHT ? 128 : 127); i += 64) floats(shared)[i] = 1.0f;
  __syncthreads();
  uint32_t r[4];
  ptx::load_matrix_4(r, ptx::shared_address(shared) + T % 32 * 16);
  OUT[T] = __uint_as_float(r[0]);
}
// p[2]: scratch of 64 floats.
TEST_KERNEL(uninitialised_scratch) {
  auto* scratch = static_cast<float*>(a.p[2]);
  if (RIGHT) scratch[T] = IN[T];
  OUT[T] = scratch[T];
}
TEST_KERNEL(scratch_without_barrier) {
  auto* scratch = static_cast<float*>(a.p[2]);
  scratch[T] = IN[T];
  if (RIGHT) __syncthreads();
  OUT[T] = scratch[63 - T];
}
TEST_KERNEL(ended_lanes_at_barrier) {
  OUT[T] = IN[T];
  if (RIGHT || T < 48) __syncthreads();
}
TEST_KERNEL(two_barriers) {
  OUT[T] = IN[T];
  if (RIGHT || T < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
TEST_KERNEL(barrier_against_shuffle) {
  float v = IN[T];
  if (RIGHT || T < 16) v = __shfl_xor_sync(0xffffffffu, v, 1);
  __syncthreads();
  OUT[T] = v;
}
TEST_KERNEL(half_a_warp_multiplies) {
  float d[4] = {};
  const uint32_t x[4] = {};
  if (RIGHT || T % 32 < 16) ptx::mma_f16(d, x, 0, 0);
  OUT[T] = IN[T] + d[0];
}
TEST_KERNEL(two_instructions_in_a_warp) {
  float d[4] = {};
  const uint32_t x[4] = {};
  if (RIGHT || T % 32 < 16) {
    ptx::mma_f16(d, x, 0, 0);
  } else {
    ptx::mma_bf16(d, x, 0, 0);
  }
  OUT[T] = IN[T] + d[0];
}
TEST_KERNEL(partial_mask) { OUT[T] = __shfl_xor_sync(RIGHT ? 0xffffffffu : 0xffffu, IN[T], 1); }
TEST_KERNEL(written_twice) {
  OUT[T] = IN[T];
  if (!RIGHT && T == 7) OUT[8] = IN[8];
}
// Launched with two blocks.
TEST_KERNEL(written_by_two_blocks) {
  if (RIGHT && blockIdx.x == 1) return;
  OUT[T] = IN[T];
}
TEST_KERNEL(read_from_another_block) {
  auto* scratch = static_cast<float*>(a.p[2]);
  if (blockIdx.x == 0) {
    scratch[T] = IN[T];
    OUT[T] = IN[T];
  } else if (!RIGHT) {
    if (scratch[T] == 1.0f) OUT[T] = 0.0f;
  }
}
TEST_KERNEL(not_written) {
  if (RIGHT || T != 9) OUT[T] = IN[T];
}
TEST_KERNEL(input_written) {
  OUT[T] = IN[T];
  if (!RIGHT) const_cast<float*>(IN)[T] = 0.0f;
}
TEST_KERNEL(register_index) {
  float v[4] = {IN[T], IN[T], IN[T], IN[T]};
  OUT[T] = v[RIGHT ? T % 4 : T % 5];
}
TEST_KERNEL(host_pointer) {
  static float host[64];
  float* to = RIGHT ? OUT : host;
  to[T] = IN[T];
  if (!RIGHT) OUT[T] = IN[T];
}

}  // namespace
}  // namespace resnet_fused
