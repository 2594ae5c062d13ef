// SPDX-License-Identifier: BSD-3-Clause
// The tensors of a convolution as the copy unit takes them. Host only.
#pragma once

#include "tensor_maps.h"
#include "wgmma_tile.cuh"

namespace resnet_fused {

// The outputs, or the residual beside them: a matrix in panels of `panel` bytes of a tile's rows.
TensorMapShape output_map(const MmaConvParams& p, const void* at, int rows, int panel);

// Filters [K][taps][C]: a step of channels of one tap, for all filters of a tile.
TensorMapShape filter_map(const MmaConvParams& p, const ConvSource& source, int columns);

// Images: a step of channels for all rows of a tile, which are pixels one behind the other or,
// where windows move over the image, columns that the copy unit walks.
TensorMapShape pixel_map(const MmaConvParams& p, const ConvSource& source, int rows);

WgmmaSource wgmma_source(const MmaConvParams& p, const ConvSource& s);

}  // namespace resnet_fused
