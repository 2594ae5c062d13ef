// SPDX-License-Identifier: BSD-3-Clause
#include "wgmma_maps.h"

namespace resnet_fused {

TensorMapShape output_map(const MmaConvParams& p, const void* at, int rows, int panel) {
  const auto size = static_cast<int>(item_size(p.dtype));
  TensorMapShape s{};
  s.address = at;
  s.rank = 2;
  s.dtype = p.dtype;
  s.sizes[0] = p.K;
  s.sizes[1] = output_rows(p);
  s.strides[0] = p.K * size;
  s.swizzle = panel;
  s.box[0] = s.swizzle / size;
  s.box[1] = rows;
  return s;
}

TensorMapShape filter_map(const MmaConvParams& p, const ConvSource& source, int columns) {
  const int64_t size = item_size(p.dtype);
  TensorMapShape s{};
  s.address = source.weight;
  s.rank = 3;
  s.dtype = p.dtype;
  s.tf32 = p.dtype == DType::f32;
  s.sizes[0] = source.C;
  s.sizes[1] = source.R * source.S;
  s.sizes[2] = p.K;
  s.strides[0] = source.C * size;
  s.strides[1] = source.R * source.S * source.C * size;
  s.swizzle = kStepBytes;
  s.box[0] = static_cast<int>(kStepBytes / size);
  s.box[1] = 1;
  s.box[2] = columns;
  return s;
}

TensorMapShape pixel_map(const MmaConvParams& p, const ConvSource& source, int rows) {
  const int64_t size = item_size(p.dtype);
  TensorMapShape s{};
  s.address = source.x;
  s.dtype = p.dtype;
  s.tf32 = p.dtype == DType::f32;
  s.swizzle = kStepBytes;
  s.sizes[0] = source.C;
  s.strides[0] = source.C * size;
  if (is_plain(source)) {
    s.rank = 2;
    s.sizes[1] = output_rows(p);
    s.box[0] = static_cast<int>(kStepBytes / size);
    s.box[1] = rows;
    return s;
  }
  s.rank = 4;
  s.sizes[1] = source.W;
  s.sizes[2] = source.H;
  s.sizes[3] = p.N;
  s.strides[1] = source.W * s.strides[0];
  s.strides[2] = source.H * s.strides[1];
  s.channels = static_cast<int>(kStepBytes / size);
  s.pixels = rows;
  for (int i = 0; i < 2; ++i) {
    s.lower[i] = static_cast<int>(lower_corner(source, 1 - i));
    s.upper[i] = static_cast<int>(upper_corner(source, 1 - i));
    s.steps[i] = static_cast<int>(source.stride[1 - i]);
  }
  return s;
}

WgmmaSource wgmma_source(const MmaConvParams& p, const ConvSource& s) {
  WgmmaSource w{};
  w.steps = static_cast<int>(source_steps(s, p.dtype));
  w.blocks = static_cast<int>(ceil_div(s.C * item_size(p.dtype), kStepBytes));
  w.across = static_cast<int>(s.S);
  for (int d = 0; d < 2; ++d) {
    w.dilation[d] = static_cast<int>(s.dilation[d]);
    w.stride[d] = static_cast<int>(s.stride[d]);
    w.padding[d] = static_cast<int>(s.padding[d]);
  }
  w.plain = is_plain(s);
  return w;
}

}  // namespace resnet_fused
