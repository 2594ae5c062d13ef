// SPDX-License-Identifier: BSD-3-Clause
// A chain of tile convolutions, depth first: a thread takes some images, or some lines of one,
// through all convolutions before the next, so that what they hand to each other stays in its L2
// cache. It is written there as the next convolution wants to read it.
#pragma once

#include "conv.h"
#include "pack.h"
#include "tile_conv.h"

namespace resnet_fused {

// One convolution, ready to run.
struct TileStep {
  const Conv* conv;
  std::shared_ptr<const Packed> packed;
  const Affine* affine;
  Products products;  // the same of all steps of a chain
};

// out = act(conv_n(... relu(conv_1(x))) + shortcut) for dense NHWC tensors. The shortcut is
// project(x) if there is a `project`, else `residual`, which may be absent. Returns the images of a
// bf16x3 result in which something is NaN or infinite: there it may differ in kind from fp32.
std::vector<int64_t> run_tile_chain(const std::vector<TileStep>& steps, const TileStep* project,
                                    const Tensor& x, const Tensor& residual, bool relu,
                                    const Tensor& out);

}  // namespace resnet_fused
