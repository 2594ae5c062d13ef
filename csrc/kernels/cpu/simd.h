// SPDX-License-Identifier: BSD-3-Clause
// What every CPU kernel needs: code for several instruction sets from one source, and 16-bit
// conversions that compilers vectorise.
//
// RESNET_FUSED_CLONES makes the compiler emit a function for AVX-512, AVX2 and plain x86-64 and
// lets the loader choose by cpuid; elsewhere it is empty. What such a function calls must be
// RESNET_FUSED_INLINE to be cloned along.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define RESNET_FUSED_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define RESNET_FUSED_CLONES
#endif
#define RESNET_FUSED_INLINE static inline __attribute__((always_inline))

namespace resnet_fused {

RESNET_FUSED_INLINE float bits_to_float(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
RESNET_FUSED_INLINE uint32_t float_to_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}

RESNET_FUSED_INLINE float bf16_to_float(uint16_t h) {
  return bits_to_float(static_cast<uint32_t>(h) << 16);
}

// Round to nearest even; NaN stays NaN.
RESNET_FUSED_INLINE uint16_t float_to_bf16(float f) {
  const uint32_t u = float_to_bits(f);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? (u >> 16) | 0x40u : rounded);
}

// Exact: subnormals are scaled by a float multiplication, infinities and NaN get the full exponent.
RESNET_FUSED_INLINE float f16_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(h & 0x7fffu) << 13;
  const float scaled = bits_to_float(magnitude) * 0x1p112f;
  const uint32_t special = magnitude | 0x7f800000u;
  const uint32_t bits = (h & 0x7c00u) == 0x7c00u ? special : float_to_bits(scaled);
  return bits_to_float(sign | bits);
}

// Round to nearest even, overflow to infinity, gradual underflow; NaN stays NaN.
RESNET_FUSED_INLINE uint16_t float_to_f16(float f) {
  const uint32_t u = float_to_bits(f), sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
  const uint32_t normal = (a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13;
  // Below 2^-14: adding 0.5 leaves the value's last 2^-24 in the mantissa's last bit, rounded by
  // the hardware.
  const uint32_t tiny = float_to_bits(bits_to_float(a) + 0.5f) - 0x3f000000u;
  uint32_t h = a < 0x38800000u ? tiny : normal;
  h = a >= 0x477ff000u ? 0x7c00u : h;
  h = a > 0x7f800000u ? 0x7e00u : h;
  return static_cast<uint16_t>(sign | h);
}

}  // namespace resnet_fused
