// SPDX-License-Identifier: BSD-3-Clause
// The Hopper convolution: arguments checked, tensor maps made, then to the kernels of the type.
#include "../wgmma_conv.h"
#include "wgmma_conv.cuh"
#include "wgmma_maps.h"

namespace resnet_fused {
namespace {

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
    map(pixel_map(p, p.source[i], tile.rows), a.image[i]);
    map(filter_map(p, p.source[i], tile.columns), a.weight[i]);
  }
  if (p.plan.splits == 1) {
    const int panel = tile.panel_bytes(static_cast<int>(item_size(p.dtype)));
    map(output_map(p, p.out, tile.rows, panel), a.out);
    if (p.residual != nullptr) map(output_map(p, p.residual, tile.rows, panel), a.residual);
  }
  if (error != cudaSuccess) return error;
  const auto s = static_cast<cudaStream_t>(stream);
  error = launch_kernel(a, wgmma_conv_shape(p, multiprocessors, dependent), s);
  if (error != cudaSuccess || p.plan.splits == 1) return error;
  return launch_split_sum(p, false, stream);
}

}  // namespace resnet_fused
