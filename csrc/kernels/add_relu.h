// SPDX-License-Identifier: BSD-3-Clause
// add_relu: out[i] = max(x[i] + y[i], 0), NaN kept, added in fp32 and rounded once.
#pragma once

#include "dtype.h"

namespace resnet_fused {

struct AddReluParams {
  const void* x;  // n elements, dense
  const void* y;  // n elements in the order of x
  void* out;      // n elements in the order of x
  int64_t n;
  DType dtype;  // f32, bf16 or f16, of all three
};

// Elements [begin, end) on the calling thread.
void add_relu_cpu(const AddReluParams& p, int64_t begin, int64_t end);

// All elements on `stream` (a cudaStream_t) of the current device; returns a cudaError_t.
int launch_add_relu_cuda(const AddReluParams& p, void* stream);

}  // namespace resnet_fused
