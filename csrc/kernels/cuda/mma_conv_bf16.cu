// SPDX-License-Identifier: BSD-3-Clause
// The tensor-core convolution in bf16.
#include "mma_conv.cuh"

namespace resnet_fused {

template cudaError_t launch_mma_conv_as<BFloat>(const MmaConvParams& p, cudaStream_t stream);
template cudaError_t launch_split_sum_as<BFloat>(const MmaConvParams& p, bool narrow,
                                                 cudaStream_t stream);

}  // namespace resnet_fused
