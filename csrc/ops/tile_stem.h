// SPDX-License-Identifier: BSD-3-Clause
// The stem on tiles: convolution, ReLU and max-pool of some lines at a time, while they are in L2.
#pragma once

#include "tile_chain.h"

namespace resnet_fused {

// Whether a k-step of tiles can hold a row of the window: 8 pixels of 4 channels.
bool tile_stem_fits(const Conv& conv, const Sizes& in);

// out = maxpool(relu(bn(conv(x)))), out dense NHWC; x has any strides, and out's dtype, or is bytes
// whose finite values `table` holds (kernels/normalise.h), else null. `packed` is the weight as
// Form::tile_windows, split_windows or float_windows. Returns the images that hold NaN or infinity,
// whose outputs are not written: beside a window of 7 pixels lies an eighth, whose weight is zero,
// which would not hide these; in fp32 there is none.
std::vector<int64_t> run_tile_stem(const Conv& conv, const Packed& packed, const Affine& affine,
                                   Products products, const Tensor& x, const uint32_t* table,
                                   const Tensor& out);

}  // namespace resnet_fused
