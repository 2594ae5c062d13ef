// SPDX-License-Identifier: BSD-3-Clause
// Two convolutions as one on a Hopper GPU in fp16.
#include "wgmma_pair.cuh"

namespace resnet_fused {

template cudaError_t launch_wgmma_pair_as<Half>(const WgmmaPairArgs& a, const LaunchShape& shape,
                                                cudaStream_t stream);

}  // namespace resnet_fused
