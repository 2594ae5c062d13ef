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

// A positive number of each device, asked for once.
class KnownValues {
 public:
  template <typename Ask>
  cudaError_t get(int device, int* value, Ask ask) {
    const bool kept = device >= 0 && device < kDevices;
    *value = kept ? known_[device].load(std::memory_order_relaxed) : 0;
    if (*value > 0) return cudaSuccess;
    const cudaError_t error = ask(value);
    if (error != cudaSuccess) {
      cudaGetLastError();
    } else if (kept) {
      known_[device].store(*value, std::memory_order_relaxed);
    }
    return error;
  }

 private:
  static constexpr int kDevices = 64;
  std::atomic<int> known_[kDevices] = {};
};

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

int compute_capability(int device, int* number) {
  static KnownValues known;
  return known.get(device, number, [device](int* value) {
    int minor = 0;
    cudaError_t error = cudaDeviceGetAttribute(value, cudaDevAttrComputeCapabilityMajor, device);
    if (error == cudaSuccess) {
      error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    }
    *value = 10 * *value + minor;
    return error;
  });
}

int count_multiprocessors(int device, int* count) {
  static KnownValues known;
  return known.get(device, count, [device](int* value) {
    return cudaDeviceGetAttribute(value, cudaDevAttrMultiProcessorCount, device);
  });
}

}  // namespace resnet_fused
#endif
