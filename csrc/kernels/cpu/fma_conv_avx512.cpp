// SPDX-License-Identifier: BSD-3-Clause
// The fp32 tile convolution for AVX-512; what tile_conv_amx.cpp says of such files holds here.
#include "../tile_conv.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)

namespace resnet_fused {
bool avx512_available() {
  static const bool available = __builtin_cpu_supports("avx512f") &&
                                __builtin_cpu_supports("avx512vl") &&
                                __builtin_cpu_supports("avx512bw") &&
                                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma");
  return available;
}
}  // namespace resnet_fused

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma")
#define RESNET_FUSED_FMA avx512
#include "fma_conv_body.h"

namespace resnet_fused {
bool fma_conv_avx512(const TileConvParams& p, int64_t begin, int64_t end, int64_t n_begin,
                     int64_t n_end) {
  return avx512::conv(p, begin, end, n_begin, n_end);
}
void copy_floats_avx512(const CopyPixelsParams& p) { avx512::copy(p); }
}  // namespace resnet_fused
#pragma GCC pop_options

#else

namespace resnet_fused {
bool avx512_available() { return false; }
bool fma_conv_avx512(const TileConvParams& p, int64_t begin, int64_t end, int64_t n_begin,
                     int64_t n_end) {
  return fma_conv_portable(p, begin, end, n_begin, n_end);
}
void copy_floats_avx512(const CopyPixelsParams& p) { copy_floats_portable(p); }
}  // namespace resnet_fused

#endif
