// SPDX-License-Identifier: BSD-3-Clause
// The tensor-core convolution: arguments checked, then to the kernels of the type.
#include "mma_conv.cuh"

namespace resnet_fused {

int launch_mma_conv(const MmaConvParams& p, void* stream) {
  if (!plan_is_valid(p)) return cudaErrorInvalidValue;
  if (output_rows(p) == 0 || p.K == 0) return cudaSuccess;
  const auto s = static_cast<cudaStream_t>(stream);
  switch (p.dtype) {
    case DType::f32:
      return launch_mma_conv_as<float>(p, s);
    case DType::bf16:
      return launch_mma_conv_as<BFloat>(p, s);
    case DType::f16:
      return launch_mma_conv_as<Half>(p, s);
    default:
      return cudaErrorInvalidValue;
  }
}

int launch_split_sum(const MmaConvParams& p, bool narrow, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  switch (p.dtype) {
    case DType::f32:
      return launch_split_sum_as<float>(p, narrow, s);
    case DType::bf16:
      return launch_split_sum_as<BFloat>(p, narrow, s);
    case DType::f16:
      return launch_split_sum_as<Half>(p, narrow, s);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace resnet_fused
