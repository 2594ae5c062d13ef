// SPDX-License-Identifier: BSD-3-Clause
// stem, the part behind the convolution: out[n, p, q, k] = max over a 3x3 window (stride 2, padding
// 1) of max(in[n, h, w, k], 0). NaN wins every maximum, as in torch.
#pragma once

#include "mma_conv.h"

namespace resnet_fused {

struct ReluMaxPoolParams {
  const void* in;  // [N, H, W, K] dense
  void* out;       // [N, P, Q, K] dense, P = ceil(H / 2), Q = ceil(W / 2)
  int64_t N, H, W, K;
  DType dtype;  // f32, bf16 or f16
};

// Rows [begin, end) of the N * P output rows, on the calling thread.
void relu_max_pool_cpu(const ReluMaxPoolParams& p, int64_t begin, int64_t end);

// The same on a GPU, on `stream` (a cudaStream_t) of the current device; returns a cudaError_t.
int launch_relu_max_pool_cuda(const ReluMaxPoolParams& p, void* stream);

// The whole stem on a GPU: the maximum above of relu(bn(conv(x))) for a 7x7 convolution with stride
// 2 and padding 3, C <= 4 and K % 8 == 0, K <= 128. The convolution's output stays on the chip.
struct StemParams {
  const void* x;         // [N, C, H, W] at any strides; bytes if there is a norm
  const float* norm;     // [2, C] dense, scales and shifts of bytes (normalise.h); or null
  int64_t x_strides[4];  // of n, c, h, w, in elements
  const void* weight;    // [K, C, 7, 7] dense, or channels_last
  int64_t weight_strides[4];
  BatchNorm bn;
  void* out;  // [N, P, Q, K] dense, on 16 bytes; P = ceil(H / 4), Q = ceil(W / 4)
  int64_t N, C, H, W, K;
  DType dtype;  // of x but for bytes, weight and out: f32 (rounded to TF32), bf16 or f16
  // Blocks at most, of which a multiprocessor holds two at a time. Each loads its weights once and
  // makes several tiles of the output; no result depends on their number.
  int64_t most_blocks = 1056;
};
constexpr bool stem_fits(int64_t C, int64_t K, int64_t R, int64_t S, const int64_t stride[2],
                         const int64_t padding[2], const int64_t dilation[2], int64_t groups) {
  return C >= 1 && C <= 4 && K % 8 == 0 && K <= 128 && R == 7 && S == 7 && stride[0] == 2 &&
         stride[1] == 2 && padding[0] == 3 && padding[1] == 3 && dilation[0] == 1 &&
         dilation[1] == 1 && groups == 1;
}
int launch_stem_cuda(const StemParams& p, void* stream);

}  // namespace resnet_fused
