// SPDX-License-Identifier: BSD-3-Clause
// The convolution of mma_conv.h on a Hopper GPU (sm_90a): wgmma on operands that the copy unit
// (TMA) brings. Same arguments, same order of every sum, except that p.plan.tile is an index into
// kWgmmaTiles.
//
// cuda/wgmma_plan.h says what fits (wgmma_conv_fits) and chooses the plan (plan_wgmma_conv); the
// workspace is counted as there (mma_conv_workspace).
#pragma once

#include "mma_conv.h"

namespace resnet_fused {

// As launch_mma_conv, on a GPU of compute capability 9.0 with so many multiprocessors. `dependent`:
// the kernel may begin while the one before it in the stream still runs, for whose end it then
// waits before it reads or writes tensors.
int launch_wgmma_conv(const MmaConvParams& p, int multiprocessors, bool dependent, void* stream);

}  // namespace resnet_fused
