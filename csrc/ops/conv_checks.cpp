// SPDX-License-Identifier: BSD-3-Clause
// The rules of convolution arguments; resnet_fused/ops/conv_bn.py holds the same ones for fakes and
// the reference.
#include "conv.h"

namespace resnet_fused {

void check_conv(const Conv& conv, const Sizes& in, const Tensor& x, const char* op) {
  const std::string& name = conv.name;
  const Tensor& w = conv.weight;
  require_beside(x, w, op, name.c_str(), "weight");
  require(w.dim() == 4, op, ": ", name,
          "weight must have 4 dimensions [K, C/groups, R, S], got shape ", Shape{w});
  require(conv.groups >= 1 && w.size(0) % std::max<int64_t>(conv.groups, 1) == 0, op, ": ", name,
          "groups must divide the ", w.size(0), " output channels, got ", conv.groups);
  require(w.size(0) >= 1 && w.size(1) >= 1 && w.size(2) >= 1 && w.size(3) >= 1, op, ": ", name,
          "weight must not be empty, got shape ", Shape{w});
  require(in[1] == w.size(1) * conv.groups, op, ": x must have ", w.size(1) * conv.groups,
          " channels to fit ", name, "weight, got ", in[1]);
  constexpr int64_t kMost = int64_t{1} << 31;
  for (int i = 0; i < 2; ++i) {
    require(conv.stride[i] >= 1 && conv.dilation[i] >= 1 && conv.padding[i] >= 0, op, ": ", name,
            "needs stride >= 1, dilation >= 1 and padding >= 0, got stride ", conv.stride[i],
            ", dilation ", conv.dilation[i], ", padding ", conv.padding[i]);
    require(conv.stride[i] < kMost && conv.dilation[i] < kMost && conv.padding[i] < kMost, op, ": ",
            name, "stride, dilation and padding must be below 2^31, got ", conv.stride[i], ", ",
            conv.dilation[i], ", ", conv.padding[i]);
    const int64_t span = conv.dilation[i] * (w.size(2 + i) - 1) + 1,
                  padded = in[static_cast<size_t>(2 + i)] + 2 * conv.padding[i];
    require(padded >= span, op, ": x must be large enough for ", name,
            "weight: ", i == 0 ? "H" : "W", " = ", in[static_cast<size_t>(2 + i)],
            " with its padding is ", padded, ", below the window's ", span, "; enlarge x");
  }
  require(conv.running_mean.defined() == conv.running_var.defined(), op, ": ", name,
          "running_mean and ", name, "running_var must be given together");
  const struct {
    const char* field;
    const Tensor& t;
    bool affine;  // of a BatchNorm
  } vectors[] = {{"bias", conv.bias, false},
                 {"bn_weight", conv.bn_weight, true},
                 {"bn_bias", conv.bn_bias, true},
                 {"running_mean", conv.running_mean, false},
                 {"running_var", conv.running_var, false}};
  for (const auto& v : vectors) {
    if (!v.t.defined()) continue;
    require(!v.affine || conv.running_var.defined(), op, ": ", name, v.field,
            " is a BatchNorm's and needs ", name, "running_mean and ", name,
            "running_var; give both, or leave ", v.field, " out");
    require_beside(x, v.t, op, name.c_str(), v.field);
    require(v.t.dim() == 1 && v.t.size(0) == w.size(0), op, ": ", name, v.field,
            " must have shape [", w.size(0), "], got ", Shape{v.t});
  }
}

Sizes check_chain(const Chain& chain) {
  const char* op = chain.op;
  const Tensor& x = chain.x;
  require_kernel_input(x, op);
  require(x.dim() == 4, op, ": x must have 4 dimensions [N, C, H, W], got shape ", Shape{x});
  Sizes sizes = x.shape();
  for (const Conv& conv : chain.convs) {
    require(conv.present(), op, ": ", conv.name, "weight must be given");
    check_conv(conv, sizes, x, op);
    sizes = conv.out_sizes(sizes);
  }
  if (chain.downsample.present()) {
    check_conv(chain.downsample, x.shape(), x, op);
    const Sizes got = chain.downsample.out_sizes(x.shape());
    require(got == sizes, op, ": downsample(x) must have the block's output shape ", sizes,
            ", got ", got);
  } else if (chain.add_x) {
    require(same_sizes(x, sizes), op, ": x must have the block's output shape ", sizes,
            " to be added, got ", Shape{x}, "; give a downsample convolution that maps x to it");
  }
  if (chain.residual.defined()) {
    const Tensor& r = chain.residual;
    require_beside(x, r, op, "", "residual");
    require(same_sizes(r, sizes), op, ": residual must have the output's shape ", sizes, ", got ",
            Shape{r});
    require(dtype_of(r) == dtype_of(x), op, ": residual must have x's dtype");
  }
  return sizes;
}

}  // namespace resnet_fused
