// SPDX-License-Identifier: BSD-3-Clause
// pool_linear: out[n, k] = sum_c weight[k, c] * mean_hw(x[n, h, w, c]) + bias[k], all in fp32,
// rounded once. The order of every sum depends on C, H and W alone, so an image's result does not
// depend on its batch.
#pragma once

#include "dtype.h"

namespace resnet_fused {

struct PoolLinearParams {
  const void* x;       // [N, HW, C] dense, NHWC order
  float* pooled;       // [N, C] scratch, for the means
  const void* weight;  // [K, C] dense
  const void* bias;    // [K] or null
  void* out;           // [N, K]
  int64_t N, HW, C, K;
  DType x_dtype, weight_dtype, bias_dtype;  // f32, bf16 or f16; out has x_dtype
};

constexpr int64_t kPoolChannels = 64;
constexpr int64_t pool_parts(int64_t C) { return (C + kPoolChannels - 1) / kPoolChannels; }

// Means [begin, end) of N * pool_parts(C): each of an image's 64 channels.
void pool_cpu(const PoolLinearParams& p, int64_t begin, int64_t end);
// Outputs [begin, end) of K, for all images; reads each weight once per four images.
void linear_cpu(const PoolLinearParams& p, int64_t begin, int64_t end);

// Both on a GPU, on `stream` (a cudaStream_t) of the current device; returns a cudaError_t.
int launch_pool_linear_cuda(const PoolLinearParams& p, void* stream);

}  // namespace resnet_fused
