// SPDX-License-Identifier: BSD-3-Clause
#ifdef RESNET_FUSED_CUDA
#include "cuda.h"

#include "../kernels/cuda_device.h"

namespace resnet_fused {

CudaCall::CudaCall(const char* op, const Tensor& x) : op_(op), x_(x) {
  require(aoti_torch_get_current_cuda_stream != nullptr, op, ": this torch build has no CUDA");
  const int32_t device = x.device_index();
  check_torch(aoti_torch_get_current_cuda_stream(device, &stream_), "current stream");
  check_torch(aoti_torch_create_device_guard(device, &guard_), "device guard");
}

CudaCall::~CudaCall() { aoti_torch_delete_device_guard(guard_); }

int CudaCall::multiprocessors() const {
  int count = 0;
  check(count_multiprocessors(x_.device_index(), &count));
  return count;
}

bool CudaCall::hopper() const {
  int number = 0;
  check(compute_capability(x_.device_index(), &number));
  return number == 90;
}

void CudaCall::check(int error) const {
  require(error == 0, op_, ": CUDA error ", error, " (", cuda_error_text(error),
          ") for x of shape ", Shape{x_}, " on cuda:", x_.device_index());
}

}  // namespace resnet_fused

extern "C" {
// 0 if the kernels run on the current device, else the cudaError_t that says why not.
__attribute__((visibility("default"))) int resnet_fused_cuda_probe() {
  return resnet_fused::probe_cuda_device();
}
__attribute__((visibility("default"))) const char* resnet_fused_cuda_error_text(int error) {
  return resnet_fused::cuda_error_text(error);
}
}
#endif
