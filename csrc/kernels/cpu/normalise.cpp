// SPDX-License-Identifier: BSD-3-Clause
#include "../normalise.h"

#include "simd.h"

namespace resnet_fused {
namespace {

uint32_t entry(float v, ByteForm form) {
  if (form == ByteForm::f32) return float_to_bits(v);
  if (form == ByteForm::f16) return float_to_f16(v);
  const uint16_t high = float_to_bf16(v);
  if (form == ByteForm::bf16) return high;
  return high | static_cast<uint32_t>(float_to_bf16(v - bf16_to_float(high))) << 16;
}

bool is_finite(uint32_t entry, ByteForm form) {
  const uint32_t exponent = form == ByteForm::f32   ? 0x7f800000u
                            : form == ByteForm::f16 ? 0x7c00u
                                                    : 0x7f80u;
  return (entry & exponent) != exponent;
}

// Most images have 3 channels, dense or as planes: known, neither is counted at run time.
template <typename T, int kC>
RESNET_FUSED_INLINE void look_up(const LookUpLineParams& p, int64_t c_stride, int64_t w_stride) {
  const int64_t C = kC > 0 ? kC : p.C;
  T* to = static_cast<T*>(p.out);
  for (int64_t w = 0; w < p.W; ++w) {
    for (int64_t c = 0; c < C; ++c) {
      const uint32_t bits = p.table[c * kByteValues + p.x[c * c_stride + w * w_stride]];
      if (sizeof(T) == 4) {
        std::memcpy(to++, &bits, sizeof(T));
      } else {
        *to++ = static_cast<T>(bits);
      }
    }
  }
}

template <typename T>
void look_up_any(const LookUpLineParams& p) {
  if (p.C != 3) return look_up<T, 0>(p, p.c_stride, p.w_stride);
  if (p.c_stride == 1 && p.w_stride == 3) return look_up<T, 3>(p, 1, 3);
  look_up<T, 3>(p, p.c_stride, p.w_stride);
}

}  // namespace

bool make_byte_table_cpu(const float* scale, const float* shift, int64_t C, ByteForm form,
                         uint32_t* table) {
  bool finite = true;
  for (int64_t c = 0; c < C; ++c) {
    for (int64_t v = 0; v < kByteValues; ++v) {
      // Volatile: no compiler may make one rounding of two.
      const volatile float product = static_cast<float>(v) * scale[c];
      const uint32_t bits = entry(product + shift[c], form);
      table[c * kByteValues + v] = bits;
      finite = is_finite(bits, form) && finite;
    }
  }
  return finite;
}

void look_up_line_cpu(const LookUpLineParams& p) {
  p.item == 4 ? look_up_any<float>(p) : look_up_any<uint16_t>(p);
}

}  // namespace resnet_fused
