// SPDX-License-Identifier: BSD-3-Clause
// One kernel per function of ptx.cuh and per CUDA built-in of the emulator: operands from memory,
// results to memory.
#include "../../../csrc/kernels/cuda/launch.cuh"
#include "../../../csrc/kernels/cuda/numeric.cuh"
#include "../runtime/test_kernels.h"

namespace resnet_fused {
namespace {

template <typename T>
T* as(void* p) {
  return static_cast<T*>(p);
}
int at() { return static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); }

TEST_KERNEL(float_from_f16) {
  if (at() < a.n[0]) as<float>(a.p[1])[at()] = ptx::float_from_f16(as<uint16_t>(a.p[0])[at()]);
}
TEST_KERNEL(f16_from_float) {
  if (at() < a.n[0]) as<uint16_t>(a.p[1])[at()] = ptx::f16_from_float(as<float>(a.p[0])[at()]);
}
TEST_KERNEL(bf16_from_float) {
  if (at() < a.n[0]) as<uint16_t>(a.p[1])[at()] = ptx::bf16_from_float(as<float>(a.p[0])[at()]);
}
TEST_KERNEL(max_nan_f32) {
  if (at() < a.n[0]) {
    as<float>(a.p[2])[at()] = ptx::max_nan_f32(as<float>(a.p[0])[at()], as<float>(a.p[1])[at()]);
  }
}
TEST_KERNEL(max_nan_f16x2) {
  if (at() < a.n[0]) {
    as<uint32_t>(a.p[2])[at()] =
        ptx::max_nan_f16x2(as<uint32_t>(a.p[0])[at()], as<uint32_t>(a.p[1])[at()]);
  }
}
TEST_KERNEL(max_nan_bf16x2) {
  if (at() < a.n[0]) {
    as<uint32_t>(a.p[2])[at()] =
        ptx::max_nan_bf16x2(as<uint32_t>(a.p[0])[at()], as<uint32_t>(a.p[1])[at()]);
  }
}
TEST_KERNEL(load_16_streaming) {
  as<uint4>(a.p[1])[at()] = ptx::load_16_streaming(as<char>(a.p[0]) + at() * 16 + a.n[0]);
}

// Lane l of a warp: d of its own place, from registers that are laid out in memory.
template <typename T>
void product(const emulator::TestArguments& a) {
  float d[4];
  uint32_t x[4];
  for (int i = 0; i < 4; ++i) {
    d[i] = as<float>(a.p[0])[at() * 4 + i];
    x[i] = as<uint32_t>(a.p[1])[at() * 4 + i];
  }
  mma<T>(d, x, as<uint32_t>(a.p[2])[at() * 2], as<uint32_t>(a.p[2])[at() * 2 + 1]);
  for (int i = 0; i < 4; ++i) as<float>(a.p[3])[at() * 4 + i] = d[i];
}
TEST_KERNEL(mma_f16) { product<Half>(a); }
TEST_KERNEL(mma_bf16) { product<BFloat>(a); }
TEST_KERNEL(mma_tf32) { product<float>(a); }

// Shared memory is p[0], n[0] bytes; lane l gives the row at byte p[1][l].
TEST_KERNEL(load_matrix_4) {
  RESNET_FUSED_SHARED(shared);
  for (int i = threadIdx.x; i < a.n[0] / 4; i += 32) {
    as<uint32_t>(shared)[i] = as<uint32_t>(a.p[0])[i];
  }
  __syncthreads();
  uint32_t r[4];
  ptx::load_matrix_4(r, ptx::shared_address(shared) + as<uint32_t>(a.p[1])[threadIdx.x]);
  for (int i = 0; i < 4; ++i) as<uint32_t>(a.p[2])[threadIdx.x * 4 + i] = r[i];
}

// Thread t copies p[1][t] bytes from 16 t of p[0] to 16 t + n[0], then tells what is there.
TEST_KERNEL(copy_async_16) {
  RESNET_FUSED_SHARED(shared);
  const int t = threadIdx.x;
  ptx::copy_async_16(ptx::shared_address(shared + t * 16 + a.n[0]), as<char>(a.p[0]) + t * 16,
                     as<int>(a.p[1])[t]);
  ptx::copy_commit();
  ptx::copy_wait<0>();
  as<uint4>(a.p[2])[t] = *reinterpret_cast<uint4*>(shared + t * 16 + a.n[0]);
}

// Four groups of one copy each, then an empty one if n[1]; at most two stay under way. Reads what
// copy n[0] brought.
TEST_KERNEL(copy_groups) {
  RESNET_FUSED_SHARED(shared);
  for (int i = 0; i < 4; ++i) {
    ptx::copy_async_16(ptx::shared_address(shared + i * 16), as<char>(a.p[0]) + i * 16, 16);
    if (i < 3 || a.n[2] == 0) ptx::copy_commit();
  }
  if (a.n[1] != 0) ptx::copy_commit();
  ptx::copy_wait<2>();
  as<uint4>(a.p[1])[0] = *reinterpret_cast<uint4*>(shared + a.n[0] * 16);
  ptx::copy_commit();
  ptx::copy_wait<0>();
}

// Where shared memory begins, and the distance of two places in it.
TEST_KERNEL(shared_address) {
  RESNET_FUSED_SHARED(shared);
  as<uint32_t>(a.p[0])[0] = ptx::shared_address(shared);
  as<uint32_t>(a.p[0])[1] = ptx::shared_address(shared + 48) - ptx::shared_address(shared);
}

TEST_KERNEL(shuffles) {
  const float v = as<float>(a.p[0])[threadIdx.x];
  const int by = static_cast<int>(a.n[0]), width = static_cast<int>(a.n[1]);
  float* out = as<float>(a.p[1]) + threadIdx.x * 4;
  out[0] = __shfl_sync(0xffffffffu, v, by, width);
  out[1] = __shfl_xor_sync(0xffffffffu, v, by, width);
  out[2] = __shfl_up_sync(0xffffffffu, v, static_cast<unsigned>(by), width);
  out[3] = __shfl_down_sync(0xffffffffu, v, static_cast<unsigned>(by), width);
}
TEST_KERNEL(votes) {
  const int v = as<int>(a.p[0])[threadIdx.x];
  unsigned* out = as<unsigned>(a.p[1]) + threadIdx.x * 3;
  out[0] = __ballot_sync(0xffffffffu, v);
  out[1] = static_cast<unsigned>(__any_sync(0xffffffffu, v));
  out[2] = static_cast<unsigned>(__all_sync(0xffffffffu, v));
}
TEST_KERNEL(indices) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  unsigned* out = as<unsigned>(a.p[0]) + (block * blockDim.x + threadIdx.x) * 4;
  out[0] = blockIdx.x;
  out[1] = blockIdx.y;
  out[2] = blockIdx.z;
  out[3] = threadIdx.x;
}

}  // namespace
}  // namespace resnet_fused
