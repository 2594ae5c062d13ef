// SPDX-License-Identifier: BSD-3-Clause
// The Hopper convolution in fp32, multiplied as TF32.
#include "wgmma_conv.cuh"

namespace resnet_fused {

template cudaError_t launch_wgmma_conv_as<float>(const WgmmaConvArgs& a, const LaunchShape& shape,
                                                 cudaStream_t stream);

}  // namespace resnet_fused
