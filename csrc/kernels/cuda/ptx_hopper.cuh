// SPDX-License-Identifier: BSD-3-Clause
// The PTX instructions that only Hopper GPUs (sm_90a) have, behind small functions, as ptx.cuh has
// those of all GPUs. Compiled for the host, the same functions come from the emulator. Files with
// kernels that use them are compiled for that GPU alone.
#pragma once

#include <type_traits>

#include "numeric.cuh"
#include "tensor_map.h"

#ifndef __CUDACC__
#include <emulated_ptx_hopper.h>
#else

namespace resnet_fused {
namespace ptx {

// A barrier object: 8 bytes of shared memory on a multiple of 8. A phase of it ends when `arrivals`
// threads have arrived and all bytes that were announced have been copied. Other threads, and
// copies, may use it after barrier_init_fence() and a barrier of the block.
__device__ __forceinline__ void barrier_init(uint32_t bar, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" : : "r"(bar), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" : : "r"(bar) : "memory");
}
// Announces `bytes` that copies will bring within this phase, then arrives.
__device__ __forceinline__ void barrier_arrive_expect(uint32_t bar, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
               :
               : "r"(bar), "r"(bytes)
               : "memory");
}
// True if the phase of this parity is over. Phases begin with parity 0, and before the first one
// ends, that of parity 1 counts as over. May be false without a reason.
__device__ __forceinline__ bool barrier_try_wait(uint32_t bar, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n.reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}"
      : "=r"(done)
      : "r"(bar), "r"(parity)
      : "memory");
  return done != 0;
}
__device__ __forceinline__ void barrier_wait(uint32_t bar, uint32_t parity) {
  while (!barrier_try_wait(bar, parity)) {
  }
}

// A barrier of `threads` threads of the block, whole warps, by number: 1 to 15, 0 is that of
// __syncthreads().
__device__ __forceinline__ void barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" : : "r"(id), "r"(threads) : "memory");
}

// The calling thread's stores to shared memory come before what copies and wgmma do there, once
// they are ordered behind this by a barrier.
__device__ __forceinline__ void fence_async_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// The same for stores to global memory that this thread has seen, those of a kernel before that it
// has waited for among them: they come before the copies of tensors that follow.
__device__ __forceinline__ void fence_async_global() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

// Copies of a box of a tensor to shared memory, and back. Elements outside of the tensor become
// zero, but count as copied; a store leaves them out. The map has 128-byte swizzle, and `shared` is
// on a multiple of 1024: 16-byte chunk j of the 128-byte row r is at row r, chunk j ^ (r % 8).
// One thread issues a copy for the block.
__device__ __forceinline__ void tensor_map_prefetch(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" : : "l"(map) : "memory");
}
__device__ __forceinline__ void tensor_load_2d(uint32_t shared, const TensorMap* map, int c,
                                               int row, uint32_t bar) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];"
      :
      : "r"(shared), "l"(map), "r"(c), "r"(row), "r"(bar)
      : "memory");
}
__device__ __forceinline__ void tensor_load_3d(uint32_t shared, const TensorMap* map, int c,
                                               int tap, int k, uint32_t bar) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4}], [%5];"
      :
      : "r"(shared), "l"(map), "r"(c), "r"(tap), "r"(k), "r"(bar)
      : "memory");
}
// A column of pixels: from the base pixel (w, h, n) on, by the map's strides, through lines and
// images of the map's bounding box; each is read `offset_w` and `offset_h` behind its base.
__device__ __forceinline__ void tensor_load_im2col(uint32_t shared, const TensorMap* map, int c,
                                                   int w, int h, int n, uint16_t offset_w,
                                                   uint16_t offset_h, uint32_t bar) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4, %5}], [%6], {%7, %8};"
      :
      : "r"(shared), "l"(map), "r"(c), "r"(w), "r"(h), "r"(n), "r"(bar), "h"(offset_w),
        "h"(offset_h)
      : "memory");
}
__device__ __forceinline__ void tensor_store_2d(const TensorMap* map, uint32_t shared, int c,
                                                int row) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];"
               :
               : "l"(map), "r"(c), "r"(row), "r"(shared)
               : "memory");
}

// Close the group of stores that this thread has issued since the last one.
__device__ __forceinline__ void tensor_store_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// Wait until at most the `kPending` youngest groups of this thread still read shared memory; or
// until all else is written.
template <int kPending>
__device__ __forceinline__ void tensor_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" : : "n"(kPending) : "memory");
}
template <int kPending>
__device__ __forceinline__ void tensor_store_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" : : "n"(kPending) : "memory");
}

// What wgmma reads: rows of 128 bytes with 128-byte swizzle, eight of them in 1024 bytes. A step of
// 32 bytes along the rows is 32 more in `shared`.
__device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t shared) {
  return uint64_t{(shared & 0x3ffff) >> 4} | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 |
         uint64_t{1} << 62;
}

// Keeps the compiler from moving accesses to registers across this place.
template <int kCount>
__device__ __forceinline__ void hold(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Before the first wgmma, and before one whose sums the thread has touched since: it names them.
template <int... kCount>
__device__ __forceinline__ void wgmma_fence(float (&... d)[kCount]) {
  (hold(d), ...);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
// Close the group of products issued since the last one.
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Wait until at most the `kPending` youngest groups are under way: of the others, shared memory may
// be written again, and the sums that are named here may be touched, no others.
template <int kPending, int... kCount>
__device__ __forceinline__ void wgmma_wait(float (&... d)[kCount]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" : : "n"(kPending) : "memory");
  (hold(d), ...);
}

// Registers of a thread, as operands.
// clang-format off
#define RESNET_FUSED_R0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define RESNET_FUSED_R1 \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define RESNET_FUSED_R2 \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define RESNET_FUSED_R3 \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define RESNET_FUSED_R4 \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define RESNET_FUSED_R5 \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define RESNET_FUSED_R6 \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define RESNET_FUSED_R7 \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define RESNET_FUSED_N1 RESNET_FUSED_R0
#define RESNET_FUSED_N2 RESNET_FUSED_N1 ", " RESNET_FUSED_R1
#define RESNET_FUSED_N3 RESNET_FUSED_N2 ", " RESNET_FUSED_R2
#define RESNET_FUSED_N4 RESNET_FUSED_N3 ", " RESNET_FUSED_R3
#define RESNET_FUSED_N5 RESNET_FUSED_N4 ", " RESNET_FUSED_R4
#define RESNET_FUSED_N6 RESNET_FUSED_N5 ", " RESNET_FUSED_R5
#define RESNET_FUSED_N7 RESNET_FUSED_N6 ", " RESNET_FUSED_R6
#define RESNET_FUSED_N8 RESNET_FUSED_N7 ", " RESNET_FUSED_R7
#define RESNET_FUSED_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define RESNET_FUSED_D16(i) \
  RESNET_FUSED_D4(i), RESNET_FUSED_D4(i + 4), RESNET_FUSED_D4(i + 8), RESNET_FUSED_D4(i + 12)
#define RESNET_FUSED_D32(i) RESNET_FUSED_D16(i), RESNET_FUSED_D16(i + 16)
#define RESNET_FUSED_D64(i) RESNET_FUSED_D32(i), RESNET_FUSED_D32(i + 32)
// kN and types, the registers' names, the numbers of the operands behind them, the registers.
#define RESNET_FUSED_WGMMA_AS(shape, negate, names, da, db, p, ...)                            \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #p ", 0;\n"                               \
               "wgmma.mma_async.sync.aligned.m64n" shape " {" names "}, %" #da ", %" #db         \
               ", p, 1, 1" negate ";\n}"                                                        \
               : __VA_ARGS__                                                                    \
               : "l"(a), "l"(b), "r"(static_cast<int>(add))                                     \
               : "memory")
#define RESNET_FUSED_WGMMA(n, names, da, db, p, ...)                                            \
  if constexpr (std::is_same_v<T, Half>) {                                                      \
    RESNET_FUSED_WGMMA_AS(#n "k16.f32.f16.f16", ", 0, 0", names, da, db, p, __VA_ARGS__);       \
  } else if constexpr (std::is_same_v<T, BFloat>) {                                             \
    RESNET_FUSED_WGMMA_AS(#n "k16.f32.bf16.bf16", ", 0, 0", names, da, db, p, __VA_ARGS__);     \
  } else {                                                                                      \
    static_assert(std::is_same_v<T, float>);                                                    \
    RESNET_FUSED_WGMMA_AS(#n "k8.f32.tf32.tf32", "", names, da, db, p, __VA_ARGS__);            \
  }

// d = a * b + (add ? d : 0) on the tensor cores by the four warps of a warpgroup: [64][k] x [kN][k]
// over 32 bytes of each row, in Half, BFloat or, for float, TF32 (of which the low 13 bits are
// ignored), fp32 sums. Register i of thread t holds row 16 * (t / 32) + t % 32 / 4 + 8 * (i / 2 %
// 2), column 8 * (i / 4) + 2 * (t % 4) + i % 2. It is done when it has been waited for.
template <typename T, int kN>
__device__ __forceinline__ void wgmma(float (&d)[kN / 2], uint64_t a, uint64_t b, bool add) {
  static_assert(kN % 32 == 0 && kN >= 32 && kN <= 256);
  if constexpr (kN == 32) {
    RESNET_FUSED_WGMMA(32, RESNET_FUSED_N1, 16, 17, 18, RESNET_FUSED_D16(0))
  } else if constexpr (kN == 64) {
    RESNET_FUSED_WGMMA(64, RESNET_FUSED_N2, 32, 33, 34, RESNET_FUSED_D32(0))
  } else if constexpr (kN == 96) {
    RESNET_FUSED_WGMMA(96, RESNET_FUSED_N3, 48, 49, 50, RESNET_FUSED_D32(0), RESNET_FUSED_D16(32))
  } else if constexpr (kN == 128) {
    RESNET_FUSED_WGMMA(128, RESNET_FUSED_N4, 64, 65, 66, RESNET_FUSED_D64(0))
  } else if constexpr (kN == 160) {
    RESNET_FUSED_WGMMA(160, RESNET_FUSED_N5, 80, 81, 82, RESNET_FUSED_D64(0), RESNET_FUSED_D16(64))
  } else if constexpr (kN == 192) {
    RESNET_FUSED_WGMMA(192, RESNET_FUSED_N6, 96, 97, 98, RESNET_FUSED_D64(0), RESNET_FUSED_D32(64))
  } else if constexpr (kN == 224) {
    RESNET_FUSED_WGMMA(224, RESNET_FUSED_N7, 112, 113, 114, RESNET_FUSED_D64(0),
                       RESNET_FUSED_D32(64), RESNET_FUSED_D16(96))
  } else if constexpr (kN == 256) {
    RESNET_FUSED_WGMMA(256, RESNET_FUSED_N8, 128, 129, 130, RESNET_FUSED_D64(0),
                       RESNET_FUSED_D64(64))
  }
}

#undef RESNET_FUSED_WGMMA
#undef RESNET_FUSED_WGMMA_AS
// clang-format on

// Takes registers for every thread of the warpgroup, or gives them back: `kRegisters` is what each
// has then, a multiple of 8 in 24..256. All its warps call it; taking waits until there are some.
template <int kRegisters>
__device__ __forceinline__ void registers_up() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" : : "n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void registers_down() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" : : "n"(kRegisters));
}

// True in one lane of the warp, the same one each time; all lanes call it.
__device__ __forceinline__ bool elect() {
  uint32_t chosen;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}"
               : "=r"(chosen)::"memory");
  return chosen != 0;
}

// A kernel that was launched before the previous one in its stream has ended: wait for that one
// and for what it wrote; tell that the next kernel may be launched.
__device__ __forceinline__ void grid_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void grid_launch() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

}  // namespace ptx
}  // namespace resnet_fused
#endif
