// SPDX-License-Identifier: BSD-3-Clause
// Convolution on a GPU's tensor cores (mma.sync, compute capability 8.0 and up), an implicit GEMM
//
//   out[m, k] = act(sum_i (scale_i[k] * conv_i[m, k] + shift_i[k]) + residual[m, k])
//   conv_i[m, k] = sum_{r, s, c} x_i[n, h, w, c] * w_i[k, r, s, c]
//   m = (n, p, q),   h = p * stride + r * dilation - padding
//
// over one or two sources i: the second is a block's projection, whose sum has an accumulator of
// its own because its BatchNorm differs. fp32 sums, BatchNorm in fp32 from the live parameters, one
// rounding, NaN kept. fp32 data are rounded to TF32, 10 of 23 bits, to be multiplied. The order of
// every sum depends on the layer and on `splits` alone: not on N, on the tile or on the alignment
// of a buffer.
//
// cuda/conv_plan.h says what fits (mma_conv_fits), chooses the plan (plan_mma_conv) and counts the
// workspace (mma_conv_workspace).
#pragma once

#include <cstddef>

#include "dtype.h"

namespace resnet_fused {

// A vector of K parameters, any of f32, bf16, f16; null where it is absent.
struct ChannelVector {
  const void* data;
  DType dtype;
};

// scale = weight / sqrt(var + eps), shift = bias + (conv_bias - mean) * scale. Absent: 1 for
// weight, 0 for bias, mean and conv_bias. Without var there is no BatchNorm: weight, bias and mean
// are absent, too.
struct BatchNorm {
  ChannelVector conv_bias, weight, bias, mean, var;
  float eps;
};

struct ConvSource {
  const void* x;       // [N, H, W, C] dense
  const void* weight;  // [K, R, S, C] dense, x's dtype
  int64_t H, W, C;
  int64_t R, S;
  int64_t stride[2], padding[2], dilation[2];
  BatchNorm bn;
};

// Which kernel: a choice of cuda/conv_plan.h.
struct MmaConvPlan {
  int tile;    // index into kMmaTiles
  int splits;  // blocks that share one tile's sum, each a range of the steps of one source
};

struct MmaConvParams {
  ConvSource source[2];
  int sources;           // 1 or 2
  const void* residual;  // as out, or null
  void* out;             // [N, P, Q, K] dense
  float* workspace;      // [splits, N * P * Q, K] if splits > 1, on 16 bytes
  int64_t N, P, Q, K;
  DType dtype;  // of x, weight, residual and out: f32, bf16 or f16
  bool relu;
  MmaConvPlan plan;
};

// On `stream` (a cudaStream_t) of the current device; returns a cudaError_t.
int launch_mma_conv(const MmaConvParams& p, void* stream);

// The outputs out of the partial sums in p.workspace, whatever kernel left them there. `narrow`: K
// is no multiple of 4, or out or residual is not on 16 bytes.
int launch_split_sum(const MmaConvParams& p, bool narrow, void* stream);

}  // namespace resnet_fused
