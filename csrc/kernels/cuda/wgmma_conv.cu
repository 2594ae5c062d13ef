// SPDX-License-Identifier: BSD-3-Clause
// The Hopper convolution: arguments checked, tensor maps made, then to the kernels of the type.
#include "../wgmma_conv.h"
#include "tensor_maps.h"
#include "wgmma_conv.cuh"

namespace resnet_fused {
namespace {

// The outputs, and the residual beside them: a matrix in panels of a tile.
TensorMapShape panels(const MmaConvParams& p, const WgmmaTile& tile, const void* at) {
  const auto size = static_cast<int>(item_size(p.dtype));
  TensorMapShape s{};
  s.address = at;
  s.rank = 2;
  s.dtype = p.dtype;
  s.sizes[0] = p.K;
  s.sizes[1] = output_rows(p);
  s.strides[0] = p.K * size;
  s.swizzle = tile.panel_bytes(size);
  s.box[0] = s.swizzle / size;
  s.box[1] = tile.rows;
  return s;
}

// Filters [K][taps][C]: a step of channels of one tap, for all filters of a tile.
TensorMapShape filters(const MmaConvParams& p, const WgmmaTile& tile, const ConvSource& source) {
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
  s.box[2] = tile.columns;
  return s;
}

// Images: a step of channels for all rows of a tile, which are pixels one behind the other or,
// where windows move over the image, columns that the copy unit walks.
TensorMapShape pixels(const MmaConvParams& p, const WgmmaTile& tile, const ConvSource& source) {
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
    s.box[1] = tile.rows;
    return s;
  }
  s.rank = 4;
  s.sizes[1] = source.W;
  s.sizes[2] = source.H;
  s.sizes[3] = p.N;
  s.strides[1] = source.W * s.strides[0];
  s.strides[2] = source.H * s.strides[1];
  s.channels = static_cast<int>(kStepBytes / size);
  s.pixels = tile.rows;
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

int launch_kernel(const WgmmaConvArgs& a, const LaunchShape& shape, cudaStream_t stream) {
  switch (a.conv.dtype) {
    case DType::f32:
      return launch_wgmma_conv_as<float>(a, shape, stream);
    case DType::bf16:
      return launch_wgmma_conv_as<BFloat>(a, shape, stream);
    default:
      return launch_wgmma_conv_as<Half>(a, shape, stream);
  }
}

}  // namespace

int launch_wgmma_conv(const MmaConvParams& p, int multiprocessors, bool dependent, void* stream) {
  if (!wgmma_plan_fits(p) || multiprocessors < 1) return cudaErrorInvalidValue;
  if (p.plan.splits > 1 && !(p.workspace != nullptr && on_16_bytes(p.workspace))) {
    return cudaErrorInvalidValue;
  }
  if (output_rows(p) == 0 || p.K == 0) return cudaSuccess;
  const WgmmaTile& tile = kWgmmaTiles[p.plan.tile];
  WgmmaConvArgs a{};
  a.conv = p;
  a.items = static_cast<int>(wgmma_items(p, tile));
  a.across = static_cast<int>(ceil_div(p.K, tile.columns));
  a.dependent = dependent;
  int error = cudaSuccess;
  const auto map = [&](const TensorMapShape& s, TensorMap& to) {
    if (error == cudaSuccess) error = make_tensor_map(s, &to);
  };
  for (int i = 0; i < p.sources; ++i) {
    a.source[i] = wgmma_source(p, p.source[i]);
    map(pixels(p, tile, p.source[i]), a.image[i]);
    map(filters(p, tile, p.source[i]), a.weight[i]);
  }
  if (p.plan.splits == 1) {
    map(panels(p, tile, p.out), a.out);
    if (p.residual != nullptr) map(panels(p, tile, p.residual), a.residual);
  }
  if (error != cudaSuccess) return error;
  const auto s = static_cast<cudaStream_t>(stream);
  error = launch_kernel(a, wgmma_conv_shape(p, multiprocessors, dependent), s);
  if (error != cudaSuccess || p.plan.splits == 1) return error;
  return launch_split_sum(p, false, stream);
}

}  // namespace resnet_fused
