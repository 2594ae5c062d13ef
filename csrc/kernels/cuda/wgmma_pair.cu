// SPDX-License-Identifier: BSD-3-Clause
// Two convolutions as one: arguments checked, tensor maps made, then to the kernels of the type.
#include "wgmma_maps.h"
#include "wgmma_pair.cuh"

namespace resnet_fused {

int launch_wgmma_pair(const WgmmaPairParams& p, int multiprocessors, bool dependent, void* stream) {
  if (!wgmma_pair_fits(p) || multiprocessors < 1) return cudaErrorInvalidValue;
  if (output_rows(p.last) == 0 || p.last.K == 0) return cudaSuccess;
  const WgmmaPairTile& tile = kWgmmaPairTiles[p.tile];
  const ConvSource& first = p.first.source[0];
  WgmmaPairArgs a{};
  a.pair = p;
  a.tiles = static_cast<int>(wgmma_pair_tiles(p.last, tile));
  a.parts = static_cast<int>(wgmma_pair_parts(p.last, tile));
  a.dependent = dependent;
  a.source = wgmma_source(p.first, first);
  int error = cudaSuccess;
  const auto map = [&](const TensorMapShape& s, TensorMap& to) {
    if (error == cudaSuccess) error = make_tensor_map(s, &to);
  };
  map(pixel_map(p.first, first, tile.rows), a.image);
  map(filter_map(p.first, first, tile.middle), a.weight);
  map(filter_map(p.last, p.last.source[0], tile.columns), a.filters);
  if (p.last.sources == 2) {
    a.project = wgmma_source(p.last, p.last.source[1]);
    map(pixel_map(p.last, p.last.source[1], tile.rows), a.project_image);
    map(filter_map(p.last, p.last.source[1], tile.columns), a.project_weight);
  }
  map(output_map(p.last, p.last.out, tile.rows, kStepBytes), a.out);
  if (p.last.residual != nullptr) {
    map(output_map(p.last, p.last.residual, tile.rows, kStepBytes), a.residual);
  }
  if (error != cudaSuccess) return error;
  const LaunchShape shape = wgmma_pair_shape(p.last, tile, multiprocessors, dependent);
  const auto s = static_cast<cudaStream_t>(stream);
  if (p.last.dtype == DType::bf16) return launch_wgmma_pair_as<BFloat>(a, shape, s);
  return launch_wgmma_pair_as<Half>(a, shape, s);
}

}  // namespace resnet_fused
