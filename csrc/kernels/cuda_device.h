// SPDX-License-Identifier: BSD-3-Clause
// What the host side asks CUDA besides launching kernels.
#pragma once

namespace resnet_fused {

// 0 if this library's kernels run on the current device, else the cudaError_t that says why not.
int probe_cuda_device();

// CUDA's name for an error.
const char* cuda_error_text(int error);

// Compute capability of a device, 90 for 9.0; returns a cudaError_t. Asks the driver once per
// device.
int compute_capability(int device, int* number);

// Multiprocessors of a device; returns a cudaError_t. Asks the driver once per device.
int count_multiprocessors(int device, int* count);

}  // namespace resnet_fused
