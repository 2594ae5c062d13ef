// SPDX-License-Identifier: BSD-3-Clause
// The Hopper convolution in bf16.
#include "wgmma_conv.cuh"

namespace resnet_fused {

template cudaError_t launch_wgmma_conv_as<BFloat>(const WgmmaConvArgs& a, const LaunchShape& shape,
                                                  cudaStream_t stream);

}  // namespace resnet_fused
