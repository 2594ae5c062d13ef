// SPDX-License-Identifier: BSD-3-Clause
// Convolutions on a GPU.
#pragma once

#include "../kernels/mma_conv.h"
#include "conv.h"
#include "cuda.h"

namespace resnet_fused {

// The chain's result in channels_last.
Tensor run_chain_cuda(const Chain& chain);

// One convolution: act(conv(x) + residual), for x and residual in dense NHWC; residual may be
// absent.
Tensor run_conv_cuda(const CudaCall& call, const Conv& conv, const Tensor& x,
                     const Tensor& residual, bool relu);

// BatchNorm as the kernels read it. What they cannot read in place is copied; `copies` must live
// until the launch.
BatchNorm batch_norm(const Conv& conv, std::vector<Tensor>& copies);

}  // namespace resnet_fused

extern "C" {
// For tests: the plan of every convolution on a GPU that it can make; others get the automatic
// plan, as all do once the tile is -1. Tiles and splits are those of kernels/cuda/conv_plan.h.
__attribute__((visibility("default"))) void resnet_fused_force_mma_plan(int tile, int splits);
// For tests: the same for the kernels of Hopper GPUs, whatever RESNET_FUSED_HOPPER says; and two
// convolutions as one wherever a kernel can.
__attribute__((visibility("default"))) void resnet_fused_force_wgmma_plan(int tile, int splits);
__attribute__((visibility("default"))) void resnet_fused_force_wgmma_pairs(int on);
// What RESNET_FUSED_HOPPER says when it is first read: 0, or 1 for "1", 2 for "pairs".
__attribute__((visibility("default"))) void resnet_fused_set_hopper(int level);
// That, or 0 if the kernels of Hopper GPUs are not there.
__attribute__((visibility("default"))) int resnet_fused_hopper();
}
