// SPDX-License-Identifier: BSD-3-Clause
// Two convolutions as one on a Hopper GPU: a window of any size, then one of 1x1 on what it made,
// whose tile stays in shared memory,
//
//   y[m, j] = round(act(bn_1(conv_1(x)[m, j])))
//   out[m, k] = act(scale[k] * sum_j y[m, j] * w[k, j] + shift[k] + residual[m, k])
//
// with the projection of mma_conv.h beside the second, if there is one. Every sum, and y, is what
// launch_wgmma_conv makes of the two one by one without splits, bit for bit.
//
// cuda/wgmma_pair_plan.h says what fits, and when it is the faster way.
#pragma once

#include "mma_conv.h"

namespace resnet_fused {

// The convolutions as they would be launched one by one; `plan` and `workspace` are not used.
struct WgmmaPairParams {
  MmaConvParams first;  // out is null
  MmaConvParams last;   // source[0].x is null
  int tile;             // index into kWgmmaPairTiles
};

// As launch_wgmma_conv.
int launch_wgmma_pair(const WgmmaPairParams& p, int multiprocessors, bool dependent, void* stream);

}  // namespace resnet_fused
