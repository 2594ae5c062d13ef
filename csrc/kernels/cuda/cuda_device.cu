// SPDX-License-Identifier: BSD-3-Clause
// The emulator of the tests has its own device, hence the condition.
#ifdef __CUDACC__
#include <cuda_runtime.h>

#include <atomic>

#include "../cuda_device.h"

namespace resnet_fused {
namespace {

// All files are compiled for the same architectures: where this runs, all kernels do.
__global__ void probe_kernel() {}

}  // namespace

int probe_cuda_device() {
  cudaFuncAttributes attributes;
  const cudaError_t error =
      cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(probe_kernel));
  if (error != cudaSuccess) cudaGetLastError();  // or the next launch would report it
  return error;
}

const char* cuda_error_text(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

int count_multiprocessors(int device, int* count) {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];
  const bool kept = device >= 0 && device < kDevices;
  *count = kept ? known[device].load(std::memory_order_relaxed) : 0;
  if (*count > 0) return cudaSuccess;
  const cudaError_t error = cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) {
    cudaGetLastError();
  } else if (kept) {
    known[device].store(*count, std::memory_order_relaxed);
  }
  return error;
}

}  // namespace resnet_fused
#endif
