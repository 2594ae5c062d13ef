// SPDX-License-Identifier: BSD-3-Clause
// stem, the part behind the convolution: out[n, p, q, k] = max over a 3x3 window (stride 2, padding
// 1) of max(in[n, h, w, k], 0). NaN wins every maximum, as in torch.
#pragma once

#include "dtype.h"

namespace resnet_fused {

struct ReluMaxPoolParams {
  const void* in;  // [N, H, W, K] dense
  void* out;       // [N, P, Q, K] dense, P = ceil(H / 2), Q = ceil(W / 2)
  int64_t N, H, W, K;
  DType dtype;  // f32, bf16 or f16
};

// Rows [begin, end) of the N * P output rows, on the calling thread.
void relu_max_pool_cpu(const ReluMaxPoolParams& p, int64_t begin, int64_t end);

}  // namespace resnet_fused
