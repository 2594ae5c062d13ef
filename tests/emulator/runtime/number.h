// SPDX-License-Identifier: BSD-3-Clause
// Operands of tensor cores as floats.
#pragma once

#include <cstdint>
#include <cstring>

namespace emulator {

inline float from_bits(uint32_t v) {
  float f;
  std::memcpy(&f, &v, 4);
  return f;
}

inline float from_f16(uint32_t v) {
  const uint32_t sign = (v & 0x8000u) << 16, magnitude = v & 0x7fffu;
  uint32_t bits = magnitude << 13;
  const float scaled = from_bits(bits) * 0x1p112f;  // exact, subnormals as well
  std::memcpy(&bits, &scaled, 4);
  if (magnitude >= 0x7c00u) bits = 0x7f800000u | (magnitude & 0x3ff) << 13;
  return from_bits(bits | sign);
}

// Whether a register means the same in TF32 whatever becomes of its low 13 bits.
inline bool is_tf32(uint32_t v) {
  const bool nan = (v & 0x7f800000u) == 0x7f800000u && (v & 0x007fe000u) != 0;
  return nan || (v & 0x1fffu) == 0;
}

}  // namespace emulator
