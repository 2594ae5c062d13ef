// SPDX-License-Identifier: BSD-3-Clause
// Every PTX instruction of the CUDA kernels, once, behind a small function; the only file with
// inline assembly.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace resnet_fused {
namespace ptx {

// Sixteen bytes of read-only data that are used once: they need not stay in L1.
__device__ __forceinline__ uint4 load_16_streaming(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

}  // namespace ptx
}  // namespace resnet_fused
