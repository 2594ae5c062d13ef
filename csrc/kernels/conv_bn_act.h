// SPDX-License-Identifier: BSD-3-Clause
// The passes around a library convolution on the CPU. The convolution itself (with BatchNorm folded
// into its weights and the residual added before its one rounding) is oneDNN's; these are what it
// cannot do right or at all: a ReLU that keeps NaN (oneDNN's turns NaN into 0), float32 detours,
// and folding.
#pragma once

#include <cstddef>

#include "dtype.h"

namespace resnet_fused {

struct ActParams {
  const void* in;   // dense
  void* out;        // dense, in the order of in; may be in itself if the dtypes agree
  DType in_dtype;   // out_dtype, or f32
  DType out_dtype;  // f32, bf16 or f16
  bool relu;        // out = max(in, 0), NaN kept; else out = in
};

// Elements [begin, end): activation, and the rounding to out_dtype where in is f32.
void act_cpu(const ActParams& p, int64_t begin, int64_t end);

// out[i] = in[i] for i in [begin, end); exact.
void widen_cpu(const void* in, DType in_dtype, float* out, int64_t begin, int64_t end);

// y[i] += other[i].
void add_cpu(float* y, const float* other, int64_t n);

// False if one of the n elements is NaN or infinite.
bool all_finite_cpu(const void* in, DType dtype, int64_t n);

// y[i] = max(y[i], 0), NaN kept; returns the largest magnitude before, infinite or NaN if one was.
float relu_max_abs_cpu(float* y, int64_t n);

// The largest magnitude of n elements; infinite or NaN if one of them is.
float max_abs_cpu(const float* in, int64_t n);

// BatchNorm of K channels behind a convolution; every pointer but scale and shift may be null: 1
// for bn_weight, 0 for bias, bn_bias and mean. Without var there is no BatchNorm: bn_weight,
// bn_bias and mean are null, too.
struct FoldParams {
  const float* bias;
  const float* bn_weight;
  const float* bn_bias;
  const float* mean;
  const float* var;
  float eps;
  float* scale;  // [K] bn_weight / sqrt(var + eps)
  float* shift;  // [K] bn_bias + (bias - mean) * scale
  int64_t channels;
};
void fold_cpu(const FoldParams& p);

// weight[k][i] *= scale[k] for channels [begin, end), `per_channel` weights each.
void scale_weight_cpu(float* weight, const float* scale, int64_t per_channel, int64_t begin,
                      int64_t end);

// A 64-bit mixture of `bytes` bytes and of `seed`; the whole memory is read.
uint64_t hash_cpu(const void* data, size_t bytes, uint64_t seed);

// As hash_cpu of `samples` words of 8 bytes spread evenly over the memory: notices any change of
// the whole, not one of a few elements.
uint64_t sample_hash_cpu(const void* data, size_t bytes, int samples, uint64_t seed);

}  // namespace resnet_fused
