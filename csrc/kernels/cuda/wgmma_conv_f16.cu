// SPDX-License-Identifier: BSD-3-Clause
// The Hopper convolution in fp16.
#include "wgmma_conv.cuh"

namespace resnet_fused {

template cudaError_t launch_wgmma_conv_as<Half>(const WgmmaConvArgs& a, const LaunchShape& shape,
                                                cudaStream_t stream);

}  // namespace resnet_fused
