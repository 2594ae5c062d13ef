// SPDX-License-Identifier: BSD-3-Clause
// The tile convolution for AMX. Only this file is compiled for AMX, and for AVX-512 only this one
// and fma_conv_avx512.cpp, so nothing else can hold such an instruction; they use no C++ library
// template, whose copy the linker might hand to other files.
#include "../tile_conv.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace resnet_fused {
namespace {

// cpuid and the permission call, before any wide instruction.
bool ask() {
  unsigned a, b, c, d;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
  constexpr unsigned kAvx512 = (1u << 16) | (1u << 17) | (1u << 30) | (1u << 31);  // F, DQ, BW, VL
  constexpr unsigned kAmx = (1u << 22) | (1u << 24);                               // BF16, TILE
  if ((b & kAvx512) != kAvx512 || (d & kAmx) != kAmx) return false;
  if (__get_cpuid_count(7, 1, &a, &b, &c, &d) == 0 || (a & (1u << 5)) == 0)
    return false;  // AVX512_BF16
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace

bool amx_available() {
  static const bool available = ask();
  return available;
}

}  // namespace resnet_fused

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16")
#define RESNET_FUSED_AMX
#define RESNET_FUSED_TILES amx
#include "tile_conv_body.h"

namespace resnet_fused {
bool tile_conv_amx(const TileConvParams& p, int64_t begin, int64_t end, int64_t n_begin,
                   int64_t n_end) {
  return amx::tile_conv(p, begin, end, n_begin, n_end);
}
void copy_pixels_amx(const CopyPixelsParams& p) { amx::copy_pixels(p); }
}  // namespace resnet_fused
#pragma GCC diagnostic pop
#pragma GCC pop_options

#else

namespace resnet_fused {
bool amx_available() { return false; }
bool tile_conv_amx(const TileConvParams& p, int64_t begin, int64_t end, int64_t n_begin,
                   int64_t n_end) {
  return tile_conv_portable(p, begin, end, n_begin, n_end);
}
void copy_pixels_amx(const CopyPixelsParams& p) { copy_pixels_portable(p); }
}  // namespace resnet_fused

#endif
