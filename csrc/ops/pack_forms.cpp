// SPDX-License-Identifier: BSD-3-Clause
#include "pack_forms.h"

#include <cstring>
#include <tuple>
#include <utility>

#include "../kernels/conv_bn_act.h"
#include "tile_conv.h"

namespace resnet_fused {
namespace {

// A dense copy in another dtype and order.
Tensor copy_as(const Tensor& t, int32_t dtype, const Sizes& strides) {
  Tensor copy = empty_strided(t.shape(), strides, dtype, t);
  check_torch(aoti_torch_copy_(copy.handle(), t.handle(), 0), "copying a parameter");
  return copy;
}
Tensor copy_as(const Tensor& t, int32_t dtype) {
  return copy_as(t, dtype, contiguous_strides(t.shape()));
}

bool is_split(Form form) { return form == Form::split_tiles || form == Form::split_windows; }
bool is_windows(Form form) { return form == Form::tile_windows || form == Form::split_windows; }
bool is_floats(Form form) { return form == Form::floats || form == Form::float_windows; }

Tensor reorder(Tensor weight, const Conv& conv, const Sizes& in) {
  auto* input_size = new StableIValue(boxed(in));
  StableIValue stack[6] = {boxed(std::move(weight)),
                           boxed(Sizes(conv.padding, conv.padding + 2)),
                           boxed(Sizes(conv.stride, conv.stride + 2)),
                           boxed(Sizes(conv.dilation, conv.dilation + 2)),
                           boxed(conv.groups),
                           boxed(input_size)};
  call_op("mkldnn::_reorder_convolution_weight", stack);
  AtenTensorHandle h = nullptr;
  std::memcpy(&h, stack, sizeof(h));
  return Tensor(h);
}

// [K, C, R, S] as [K, 32, R, 1]: channel s * 4 + c.
Tensor windows(const Tensor& weight) {
  const int64_t K = weight.size(0), C = weight.size(1), R = weight.size(2), S = weight.size(3);
  Tensor wide = empty_strided({K, kTileK, R, 1}, contiguous_strides({K, kTileK, R, 1}),
                              weight.dtype(), weight);
  const auto* from = static_cast<const uint16_t*>(weight.data());
  auto* to = static_cast<uint16_t*>(wide.mutable_data());
  std::memset(to, 0, static_cast<size_t>(K * kTileK * R) * 2);
  for (int64_t i = 0; i < K * C * R * S; ++i) {
    const int64_t s = i % S, r = i / S % R, c = i / (S * R) % C, k = i / (S * R * C);
    to[(k * kTileK + s * 4 + c) * R + r] = from[i];
  }
  return wide;
}

// Both halves of a weight, dense in the order K, C, R, S.
std::pair<Tensor, Tensor> split(const Tensor& weight) {
  const Tensor wide = copy_as(weight, aoti_torch_dtype_float32());
  Tensor halves[2];
  for (Tensor& t : halves) {
    t = empty_strided(weight.shape(), contiguous_strides(weight.shape()),
                      aoti_torch_dtype_bfloat16(), weight);
  }
  split_cpu(static_cast<const float*>(wide.data()),
            static_cast<uint16_t*>(halves[0].mutable_data()),
            static_cast<uint16_t*>(halves[1].mutable_data()), wide.numel());
  return {std::move(halves[0]), std::move(halves[1])};
}

std::shared_ptr<const Packed> make_tiles(const Conv& conv, Form form) {
  Tensor weight, low;
  if (is_split(form)) {
    std::tie(weight, low) = split(conv.weight);
  } else {
    // Rounded to bf16 here if the weight is wider; dense in the order K, C, R, S.
    weight = copy_as(conv.weight, aoti_torch_dtype_bfloat16());
  }
  if (is_windows(form)) {
    weight = windows(weight);
    if (low.defined()) low = windows(low);
  }
  const int64_t K = conv.channels(), C = weight.size(1), taps = weight.size(2) * weight.size(3);
  const int64_t size = round_up(K, kTileN) * round_up(C, kTileK) * taps * (is_split(form) ? 2 : 1);
  auto packed = std::make_shared<Packed>();
  packed->weight = empty_strided({size}, {1}, aoti_torch_dtype_bfloat16(), weight);
  const TilePackParams p{static_cast<const uint16_t*>(weight.data()),
                         low.defined() ? static_cast<const uint16_t*>(low.data()) : nullptr,
                         static_cast<uint16_t*>(packed->weight.mutable_data()),
                         K,
                         C,
                         taps};
  parallel_for(round_up(K, kTileN) / kTileN, 1,
               [&](int64_t b, int64_t e) { pack_tiles_cpu(p, b, e); });
  return packed;
}

// Windows: a filter's row of S pixels of C channels is one step.
std::shared_ptr<const Packed> make_floats(const Conv& conv, Form form) {
  const Tensor& w = conv.weight;
  const int64_t K = w.size(0);
  const bool rows = form == Form::float_windows;
  Tensor weight = copy_as(w, aoti_torch_dtype_float32());  // [K, C, R, S]
  if (rows)
    weight = copy_as(view(weight, {K, w.size(3), w.size(1), w.size(2)},
                          {weight.stride(0), 1, weight.stride(1), weight.stride(2)}, 0),
                     aoti_torch_dtype_float32());
  const int64_t C = rows ? w.size(1) * w.size(3) : w.size(1), depth = rows ? C : kTileK,
                taps = rows ? w.size(2) : w.size(2) * w.size(3);
  auto packed = std::make_shared<Packed>();
  packed->weight = empty_strided({round_up(K, kTileN) * round_up(C, depth) * taps}, {1},
                                 aoti_torch_dtype_float32(), weight);
  const FloatPackParams p{static_cast<const float*>(weight.data()),
                          static_cast<float*>(packed->weight.mutable_data()),
                          K,
                          C,
                          taps,
                          depth};
  parallel_for(round_up(K, kTileN) / kTileN, 1,
               [&](int64_t b, int64_t e) { pack_floats_cpu(p, b, e); });
  return packed;
}

std::shared_ptr<const Packed> make_folded(const Conv& conv, const Sizes& in, bool bf16,
                                          bool plain) {
  const int64_t K = conv.channels();
  const Affine affine = read_affine(conv);
  auto packed = std::make_shared<Packed>();
  packed->shift = empty_strided({K}, {1}, aoti_torch_dtype_float32(), conv.weight);
  std::memcpy(packed->shift.mutable_data(), affine.shift.data(),
              static_cast<size_t>(K) * sizeof(float));

  Tensor weight = copy_as(conv.weight, aoti_torch_dtype_float32());
  const int64_t per_channel = weight.size(1) * weight.size(2) * weight.size(3);
  auto* data = static_cast<float*>(weight.mutable_data());
  parallel_for(K, 1, [&](int64_t begin, int64_t end) {
    scale_weight_cpu(data, affine.scale.data(), per_channel, begin, end);
  });
  const double terms = static_cast<double>(per_channel);
  packed->gain = terms * double{max_abs_cpu(data, K * per_channel)};
  packed->offset = double{max_abs_cpu(affine.shift.data(), K)};
  if (bf16) {
    // torch wants the bias of a bf16 convolution in bf16, too.
    weight = copy_as(weight, aoti_torch_dtype_bfloat16());
    packed->shift = copy_as(packed->shift, aoti_torch_dtype_bfloat16());
  }
  packed->weight = plain ? copy_as(weight, weight.dtype(), channels_last_strides(weight.shape()))
                         : reorder(std::move(weight), conv, in);
  return packed;
}

}  // namespace

std::shared_ptr<const Packed> make_packed(const Conv& conv, const Sizes& in, Form form,
                                          bool plain) {
  if (is_floats(form)) return make_floats(conv, form);
  if (is_tiles(form)) return make_tiles(conv, form);
  return make_folded(conv, in, form == Form::folded_bf16, plain);
}

}  // namespace resnet_fused
