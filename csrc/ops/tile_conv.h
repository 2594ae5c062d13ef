// SPDX-License-Identifier: BSD-3-Clause
// What every tile convolution needs: its kernel, and BatchNorm as the kernel wants it.
#pragma once

#include <vector>

#include "../kernels/tile_conv.h"
#include "conv.h"

namespace resnet_fused {

// BatchNorm and biases of a convolution as fp32 scale and shift, read off the live tensors at each
// call.
struct Affine {
  std::vector<float> scale, shift;  // padded with zeros to a multiple of 32
};
Affine read_affine(const Conv& conv);

// True if convolutions without groups run on tiles here: in bf16 and bf16x3; in fp32.
bool tiles_available();
bool fma_available();

// The kernels that run them.
struct TileKernels {
  bool (*conv)(const TileConvParams&, int64_t, int64_t, int64_t, int64_t);
  void (*copy)(const CopyPixelsParams&);
};
const TileKernels& tile_kernels(Products products);

}  // namespace resnet_fused

extern "C" {
// For tests: "auto" (0) as the CPU has it, oneDNN (1), or portable tiles (2).
__attribute__((visibility("default"))) void resnet_fused_cpu_path(int path);
}
