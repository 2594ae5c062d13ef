// SPDX-License-Identifier: BSD-3-Clause
#include "conv_runner.h"

#include "../kernels/conv_bn_act.h"
#include "conv_plan.h"

namespace resnet_fused {
namespace {

// Elements a thread gets at least in an elementwise pass.
constexpr int64_t kGrain = 16384;

// Sums whose exact magnitudes stay below this stay finite with every rounding on the way.
constexpr double kNoOverflow = 1e38;

Tensor widen(const Tensor& t) {
  Tensor out = empty_channels_last(t.shape(), DType::f32, t);
  const void* in = t.data();
  const DType dtype = dtype_of(t);
  auto* to = static_cast<float*>(out.mutable_data());
  parallel_for(t.numel(), kGrain, [&](int64_t b, int64_t e) { widen_cpu(in, dtype, to, b, e); });
  return out;
}

bool all_finite(const Tensor& t) { return all_finite_cpu(t.data(), dtype_of(t), t.numel()); }

// oneDNN's convolution of a dense NHWC tensor; the residual is added before the only rounding.
Tensor onednn_conv(const Tensor& x, const Packed& packed, const Conv& conv, const Tensor& residual,
                   bool relu) {
  const char* act = relu ? "relu" : "none";
  AtenTensorHandle shift = packed.shift.handle(), out = nullptr;
  if (residual.defined()) {
    check_torch(aoti_torch_cpu_mkldnn__convolution_pointwise_binary(
                    x.handle(), residual.handle(), packed.weight.handle(), &shift, conv.padding, 2,
                    conv.stride, 2, conv.dilation, 2, conv.groups, "add", nullptr,
                    relu ? &act : nullptr, nullptr, 0, nullptr, &out),
                "oneDNN convolution");
  } else {
    check_torch(aoti_torch_cpu_mkldnn__convolution_pointwise(
                    x.handle(), packed.weight.handle(), &shift, conv.padding, 2, conv.stride, 2,
                    conv.dilation, 2, conv.groups, act, nullptr, 0, nullptr, &out),
                "oneDNN convolution");
  }
  return Tensor(out);
}

Form form_of(const Conv& conv, const Sizes& in, const Sizes& out, DType dtype, bool bf16x3) {
  const bool fits = planes_fit(conv.stride, conv.padding, conv.dilation) && map_fits(in[2], in[3]);
  const Tensor& w = conv.weight;
  const bool outside = reaches_outside(w.size(2), w.size(3), conv.padding, conv.dilation);
  const ConvPath path =
      conv_path(dtype, bf16x3, w.size(1), conv.groups, w.size(2), w.size(3), conv.stride, out[3],
                outside, fits && tiles_available(), fits && fma_available());
  if (path == ConvPath::tiles) return dtype == DType::f32 ? Form::split_tiles : Form::tiles;
  if (path == ConvPath::fma) return Form::floats;
  const bool wide = path == ConvPath::onednn_f32 || dtype == DType::f32;
  return wide ? Form::folded_f32 : Form::folded_bf16;
}

}  // namespace

ConvRunner::ConvRunner(const Conv& conv, const Sizes& in, DType dtype, bool bf16x3)
    : conv_(conv),
      in_(in),
      out_(conv.out_sizes(in)),
      form_(form_of(conv, in, out_, dtype, bf16x3)),
      packed_(pack(conv, in, form_)) {
  if (on_tiles()) affine_ = read_affine(conv);
}

double ConvRunner::out_bound(double bound) const { return packed_->gain * bound + packed_->offset; }

Tensor ConvRunner::operator()(const Tensor& x, const Tensor& residual, bool relu, Tensor out,
                              double bound) const {
  const DType dtype = dtype_of(x);
  if (on_tiles()) {
    Sizes sizes = out_;
    sizes[0] = x.size(0);
    if (!out.defined()) out = empty_channels_last(sizes, dtype, x);
    for (int64_t n : run_tile_chain({tile_step()}, nullptr, x, residual, relu, out)) {
      ConvRunner(conv_, in_, dtype, false)(images(x, n, 1),
                                           residual.defined() ? images(residual, n, 1) : Tensor(),
                                           relu, images(out, n, 1), kUnbounded);
    }
    return out;
  }
  std::shared_ptr<const Packed> packed = packed_;
  bool wide = form_ == Form::folded_f32 && dtype != DType::f32;
  // oneDNN of torch before 2.13 cannot add to an output of one pixel.
  const bool add_apart = residual.defined() && out_[2] * out_[3] == 1;
  const bool spread = !wide && leaks_nan(dtype, conv_.weight.size(1)) && !all_finite(x);
  if (spread || (add_apart && dtype != DType::f32)) {
    packed = pack(conv_, in_, Form::folded_f32);
    wide = true;
  }
  const Tensor input = wide ? widen(x) : x.share();
  Tensor other;
  if (residual.defined()) other = wide ? widen(residual) : residual.share();
  const Tensor none;
  // oneDNN's ReLU turns NaN into 0: right where no sum can leave fp32's range, and so none is NaN.
  // False for NaN.
  const bool tame = !wide && dtype == DType::f32 && out_bound(bound) < kNoOverflow;
  const bool relu_inside = relu && tame && !add_apart && !out.defined();
  Tensor y = onednn_conv(input, *packed, conv_, add_apart ? none : other, relu_inside);
  if (relu_inside) return y;
  if (add_apart) {
    add_cpu(static_cast<float*>(y.mutable_data()), static_cast<const float*>(other.data()),
            y.numel());
  }
  if (!out.defined()) {
    if (!wide && !relu) return y;
    out = wide ? empty_channels_last(y.shape(), dtype, x) : y.share();
  }
  const ActParams p{y.data(), out.mutable_data(), dtype_of(y), dtype, relu};
  parallel_for(y.numel(), kGrain, [&](int64_t b, int64_t e) { act_cpu(p, b, e); });
  return out;
}

}  // namespace resnet_fused
