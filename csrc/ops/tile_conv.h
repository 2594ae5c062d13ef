// SPDX-License-Identifier: BSD-3-Clause
// Host side of the tile convolution: plan, scratch, division of the work over torch's threads.
#pragma once

#include <vector>

#include "conv.h"

namespace resnet_fused {

// BatchNorm and biases of a convolution as fp32 scale and shift, read off the live tensors at each
// call.
struct Affine {
  std::vector<float> scale, shift;  // padded with zeros to a multiple of 32
};
Affine read_affine(const Conv& conv);

// out = act(bn(conv(x)) + residual) for dense NHWC bf16 tensors; residual may be absent. `stream`:
// write past the caches where that can be done.
void run_tile_conv(const Conv& conv, const Tensor& packed, const Affine& affine, const Tensor& x,
                   const Tensor& residual, bool relu, bool stream, const Tensor& out);

// True if bf16 convolutions without groups run on tiles here.
bool tiles_available();

}  // namespace resnet_fused

extern "C" {
// For tests: "auto" (0) as the CPU has it, oneDNN (1), or portable tiles (2).
__attribute__((visibility("default"))) void resnet_fused_cpu_path(int path);
}
