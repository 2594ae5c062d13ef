// SPDX-License-Identifier: BSD-3-Clause
// One convolution on one of its paths: tiles, oneDNN in the tensors' dtype, or oneDNN in fp32.
#pragma once

#include <limits>

#include "conv.h"
#include "pack.h"
#include "tile_chain.h"

namespace resnet_fused {

constexpr double kUnbounded = std::numeric_limits<double>::infinity();

// Convolves dense NHWC tensors; activates and rounds into `out`, or into a new tensor if out is
// absent. `residual` (dense NHWC, output's sizes) may be absent.
class ConvRunner {
 public:
  // Looks up or makes the packed weights for inputs of sizes `in`.
  ConvRunner(const Conv& conv, const Sizes& in, DType dtype, bool bf16x3);
  // `bound` is one on |x|: with it, and a finite residual, fp32 can take oneDNN's ReLU.
  Tensor operator()(const Tensor& x, const Tensor& residual, bool relu, Tensor out,
                    double bound) const;

  // A bound on the output's magnitude before the residual is added, for inputs below `bound`.
  double out_bound(double bound) const;

  // Whether it runs on tiles, and then what a chain of such needs.
  bool on_tiles() const { return is_chained(form_); }
  TileStep tile_step() const { return {&conv_, packed_, &affine_, products_of(form_)}; }

 private:
  const Conv& conv_;
  Sizes in_, out_;
  Form form_;
  std::shared_ptr<const Packed> packed_;
  Affine affine_;  // of the tile convolution
};

}  // namespace resnet_fused
