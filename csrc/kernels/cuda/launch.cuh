// SPDX-License-Identifier: BSD-3-Clause
// The one way a kernel is launched: launch<kernel>(shape, stream, arguments...). Checks the limits
// that hold on every GPU that the shape is for, opts in to large shared memory, and returns the
// error.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

#include "launch_shape.h"

#ifndef __CUDACC__
#include <emulated_launch.h>
#else

namespace resnet_fused {
namespace detail {
// An error is the caller's to report. The runtime keeps it as well, and would give it to whoever
// launches next: so it is taken from there.
inline cudaError_t taken(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

// Device numbers from 64 on set the attribute at each launch.
template <auto kKernel>
cudaError_t allow_shared(const LaunchShape& shape) {
  static std::atomic<uint64_t> done{0};
  if (shape.shared_bytes <= 48 * 1024) return cudaSuccess;
  int device = 0;
  const cudaError_t error = taken(cudaGetDevice(&device));
  if (error != cudaSuccess) return error;
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if ((done.load(std::memory_order_acquire) & bit) != 0) return cudaSuccess;
  // The most: another launch of the same kernel may need more than this one.
  const cudaError_t set = taken(cudaFuncSetAttribute(reinterpret_cast<const void*>(kKernel),
                                                     cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                     static_cast<int>(most_shared(shape))));
  if (set == cudaSuccess) done.fetch_or(bit, std::memory_order_release);
  return set;
}
}  // namespace detail

template <auto kKernel, typename... Args>
cudaError_t launch(const LaunchShape& shape, cudaStream_t stream, Args... args) {
  if (!fits_every_gpu(shape)) return cudaErrorInvalidConfiguration;
  const cudaError_t allowed = detail::allow_shared<kKernel>(shape);
  if (allowed != cudaSuccess) return allowed;
  const dim3 grid(static_cast<unsigned>(shape.grid[0]), static_cast<unsigned>(shape.grid[1]),
                  static_cast<unsigned>(shape.grid[2]));
  if (shape.dependent) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(static_cast<unsigned>(shape.threads));
    config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    return detail::taken(cudaLaunchKernelEx(&config, kKernel, args...));
  }
  // clang-format off
  kKernel<<<grid, shape.threads, static_cast<size_t>(shape.shared_bytes), stream>>>(args...);
  // clang-format on
  return cudaGetLastError();
}

}  // namespace resnet_fused
#endif
