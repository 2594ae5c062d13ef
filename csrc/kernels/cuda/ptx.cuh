// SPDX-License-Identifier: BSD-3-Clause
// Every PTX instruction of the CUDA kernels, once, behind a small function; the only file with
// inline assembly. Compiled for the host, the same functions come from the emulator in
// tests/emulator, which runs the kernels' own source on a CPU.
//
// What kernels must keep for that: no assembly elsewhere, shared memory only through
// RESNET_FUSED_SHARED, its addresses only from shared_address(), no memcpy, no atomics, launches
// only through launch.cuh.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#ifndef __CUDACC__
#include <emulated_ptx.h>
#else

// The block's dynamic shared memory, aligned to 128 bytes.
#define RESNET_FUSED_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

namespace resnet_fused {
namespace ptx {

// Address within shared memory, as the instructions below take it.
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Sixteen bytes of read-only data that are used once: they need not stay in L1.
__device__ __forceinline__ uint4 load_16_streaming(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

// Copy 16 bytes from global to shared memory behind the thread's back, past L1; both addresses on
// 16 bytes. `bytes` in 0..16 of them are read, the rest becomes zero; with 0 nothing is read. What
// was copied is visible to the issuing thread after copy_wait, to others after a barrier behind it.
__device__ __forceinline__ void copy_async_16(uint32_t shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(shared), "l"(global), "r"(bytes)
               : "memory");
}

// Close the group of copies issued since the last one; an empty group counts.
__device__ __forceinline__ void copy_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Wait until at most the `kPending` youngest groups of this thread are under way.
template <int kPending>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" : : "n"(kPending) : "memory");
}

// Four 8x8 matrices of 16-bit elements, or 8x4 of 32-bit ones. Lanes 8i..8i+7 give the addresses,
// on 16 bytes, of matrix i's rows; register i of lane l gets bytes 4 (l % 4) .. + 3 of row l / 4.
__device__ __forceinline__ void load_matrix_4(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

// d += a * b on the tensor cores, [16][16] x [16][8] in fp16, fp32 sums. With g = lane / 4 and t =
// lane % 4: a[0] holds (row g, k 2t and 2t + 1), a[1] row g + 8, a[2] k + 8, a[3] both; b[0] holds
// (k 2t and 2t + 1, column g), b[1] k + 8; d holds (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t +
// 1).
__device__ __forceinline__ void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                        uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same in bf16.
__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// [16][8] x [8][8] in TF32: of the fp32 operands the low 13 bits are ignored. a[0] holds (g, t),
// a[1] (g + 8, t), a[2] (g, t + 4), a[3] (g + 8, t + 4); b0 (k t, column g), b1 (k t + 4); d as
// above. Bytes lie in registers as with 16 bits, so load_matrix_4 serves both.
__device__ __forceinline__ void mma_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Rounding to nearest even; NaN stays NaN.
__device__ __forceinline__ uint16_t f16_from_float(float v) {
  uint16_t r;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(v));
  return r;
}
__device__ __forceinline__ uint16_t bf16_from_float(float v) {
  uint16_t r;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(v));
  return r;
}
__device__ __forceinline__ float float_from_f16(uint16_t v) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(v));
  return r;
}

// The larger of two values, in each half for two 16-bit ones; NaN where either is NaN.
__device__ __forceinline__ float max_nan_f32(float a, float b) {
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}
__device__ __forceinline__ uint32_t max_nan_f16x2(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
__device__ __forceinline__ uint32_t max_nan_bf16x2(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}

}  // namespace ptx
}  // namespace resnet_fused
#endif
