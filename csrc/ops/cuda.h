// SPDX-License-Identifier: BSD-3-Clause
// The CUDA side of an op's call: its device, its stream, the outcome of its launches.
#pragma once

#include "checks.h"

namespace resnet_fused {

// x's device is the current one while this lives. Memory that the op frees within the call goes
// back to torch's allocator, which gives it out again only behind what was launched on the stream.
class CudaCall {
 public:
  CudaCall(const char* op, const Tensor& x);
  ~CudaCall();
  CudaCall(const CudaCall&) = delete;
  CudaCall& operator=(const CudaCall&) = delete;

  const char* op() const { return op_; }
  void* stream() const { return stream_; }
  // Multiprocessors of the device.
  int multiprocessors() const;
  // Whether the kernels for Hopper GPUs (sm_90a) run on the device.
  bool hopper() const;
  // Throw unless a launcher returned cudaSuccess.
  void check(int error) const;

 private:
  const char* op_;
  const Tensor& x_;
  DeviceGuardHandle guard_ = nullptr;
  void* stream_ = nullptr;
};

}  // namespace resnet_fused
