// SPDX-License-Identifier: BSD-3-Clause
// ptx.cuh's functions on a CPU; included by it. Same names, same signatures.
#pragma once

#define RESNET_FUSED_SHARED(name) unsigned char* const name = ::emulator::shared_memory()

namespace resnet_fused {
namespace ptx {

inline uint32_t shared_address(const void* p) { return emulator::shared_address(p); }

inline uint4 load_16_streaming(const void* p) {
  uint4 v;
  emulator::load(&v, p, sizeof(v));
  return v;
}

inline void copy_async_16(uint32_t shared, const void* global, int bytes) {
  emulator::copy_async(shared, global, 16, bytes);
}
inline void copy_commit() { emulator::copy_commit(); }
template <int kPending>
inline void copy_wait() {
  emulator::copy_wait(kPending);
}

inline void load_matrix_4(uint32_t (&r)[4], uint32_t row) {
  emulator::load_matrix(r, 4, false, row);
}

inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t b[2] = {b0, b1};
  emulator::multiply(emulator::Product::f16, d, a, b);
}
inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t b[2] = {b0, b1};
  emulator::multiply(emulator::Product::bf16, d, a, b);
}
inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t b[2] = {b0, b1};
  emulator::multiply(emulator::Product::tf32, d, a, b);
}

// A NaN's bits are 7fff (canonical) on the GPU, whatever it was.
inline uint16_t f16_from_float(float v) {
  const uint32_t bits = __float_as_uint(v), magnitude = bits & 0x7fffffffu;
  const uint32_t sign = bits >> 16 & 0x8000u;
  if (magnitude > 0x7f800000u) return 0x7fff;
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and up
  if (magnitude < 0x38800000u) {
    // Subnormal: in units of 2^-24, which the addition of 0.5 (whose last place that is) rounds to.
    const float sum = __uint_as_float(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (__float_as_uint(sum) - 0x3f000000u));
  }
  const uint32_t odd = magnitude >> 13 & 1;
  return static_cast<uint16_t>(sign | (magnitude - 0x38000000u + 0xfffu + odd) >> 13);
}
inline uint16_t bf16_from_float(float v) {
  const uint32_t bits = __float_as_uint(v);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}
inline float float_from_f16(uint16_t v) {
  const uint32_t sign = static_cast<uint32_t>(v & 0x8000u) << 16, magnitude = v & 0x7fffu;
  if (magnitude >= 0x7c00u) return __uint_as_float(sign | 0x7f800000u | (magnitude & 0x3ff) << 13);
  const float scaled = __uint_as_float(magnitude << 13) * 0x1p112f;  // exact, subnormals as well
  return __uint_as_float(sign | __float_as_uint(scaled));
}

inline float max_nan_f32(float a, float b) {
  if (a != a || b != b) return __uint_as_float(0x7fffffffu);
  // +0 is larger than -0.
  if (a == b) return __uint_as_float(__float_as_uint(a) & __float_as_uint(b));
  return a > b ? a : b;
}
inline uint32_t max_nan_f16x2(uint32_t a, uint32_t b) {
  const auto half = [&](int shift) -> uint32_t {
    return f16_from_float(max_nan_f32(float_from_f16(static_cast<uint16_t>(a >> shift)),
                                      float_from_f16(static_cast<uint16_t>(b >> shift))));
  };
  return half(0) | half(16) << 16;
}
inline uint32_t max_nan_bf16x2(uint32_t a, uint32_t b) {
  const auto half = [&](uint32_t x, uint32_t y) -> uint32_t {
    return bf16_from_float(
        max_nan_f32(__uint_as_float(x & 0xffff0000u), __uint_as_float(y & 0xffff0000u)));
  };
  return half(a << 16, b << 16) | half(a, b) << 16;
}

}  // namespace ptx
}  // namespace resnet_fused
