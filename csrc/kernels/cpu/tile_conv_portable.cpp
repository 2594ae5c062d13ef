// SPDX-License-Identifier: BSD-3-Clause
// The tile convolution in plain C++: tests hold it against AMX and against the reference on any
// CPU.
#define RESNET_FUSED_TILES portable
#include "tile_conv_body.h"

namespace resnet_fused {
bool tile_conv_portable(const TileConvParams& p, int64_t begin, int64_t end, int64_t n_begin,
                        int64_t n_end) {
  return portable::tile_conv(p, begin, end, n_begin, n_end);
}
void copy_pixels_portable(const CopyPixelsParams& p) { portable::copy_pixels(p); }
}  // namespace resnet_fused
