// SPDX-License-Identifier: BSD-3-Clause
// A convolution with its BatchNorm as an op argument, and the chain of convolutions that every
// block is.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "boxed.h"
#include "checks.h"
#include "pool.h"

namespace resnet_fused {

struct Conv {
  std::string name;  // as in messages: "conv2."
  Tensor weight, bias, bn_weight, bn_bias, running_mean, running_var;
  double eps = 0;
  int64_t stride[2] = {1, 1}, padding[2] = {0, 0}, dilation[2] = {1, 1}, groups = 1;

  bool present() const { return weight.defined(); }
  int64_t channels() const { return weight.size(0); }
  // Output height (i = 0) or width (i = 1) for an input of that size.
  int64_t out_size(int i, int64_t in) const {
    return (in + 2 * padding[i] - dilation[i] * (weight.size(2 + i) - 1) - 1) / stride[i] + 1;
  }
  Sizes out_sizes(const Sizes& in) const {
    return {in[0], channels(), out_size(0, in[2]), out_size(1, in[3])};
  }
};

// The eight arguments of one convolution, whose weight the schema declares as Tensor or as Tensor?;
// an absent one has no weight.
Conv read_conv(Args& args, const char* name);
Conv read_optional_conv(Args& args, const char* name);

// Throw unless `conv` fits an input of these sizes on x's device.
void check_conv(const Conv& conv, const Sizes& in, const Tensor& x, const char* op);

// act(conv_n(... relu(conv_1(x))) + shortcut), the shortcut being residual, downsample(x) or x
// itself.
struct Chain {
  const char* op = "";
  Tensor x;
  std::vector<Conv> convs;
  Conv downsample;      // may be absent
  Tensor residual;      // may be absent
  bool add_x = false;   // x itself is the shortcut
  bool relu = true;     // after the last convolution
  bool bf16x3 = false;  // fp32 may be multiplied as three products of bf16
};

// Throw unless all arguments fit; returns the output's sizes.
Sizes check_chain(const Chain& chain);

// The chain's result in channels_last.
Tensor run_chain(const Chain& chain);

// Whether an image's result may not depend on the images beside it. oneDNN promises no such thing,
// so that it then gets them one by one.
bool batch_invariant();

// x as dense NHWC of its own dtype: x itself if it is that already.
Tensor to_channels_last(const Tensor& x);

}  // namespace resnet_fused

extern "C" {
// What batch_invariant() says, on a GPU too: there the order of every sum then follows from the
// layer alone.
__attribute__((visibility("default"))) void resnet_fused_set_batch_invariant(int on);
}
