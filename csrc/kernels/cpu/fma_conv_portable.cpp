// SPDX-License-Identifier: BSD-3-Clause
// The fp32 tile convolution for any CPU: tests hold it against AVX-512 and against the reference.
#pragma GCC diagnostic ignored "-Wpsabi"  // all functions that return vectors are inlined
#define RESNET_FUSED_FMA portable_fma
#include "fma_conv_body.h"

namespace resnet_fused {
bool fma_conv_portable(const TileConvParams& p, int64_t begin, int64_t end, int64_t n_begin,
                       int64_t n_end) {
  return portable_fma::conv(p, begin, end, n_begin, n_end);
}
void copy_floats_portable(const CopyPixelsParams& p) { portable_fma::copy(p); }
}  // namespace resnet_fused
