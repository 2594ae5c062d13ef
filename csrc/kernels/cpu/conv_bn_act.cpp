// SPDX-License-Identifier: BSD-3-Clause
// Passes around a library convolution; see the contract. All work on bits where they can: a 16-bit
// ReLU needs no conversion, and integer compares treat NaN as wanted.
#include "../conv_bn_act.h"

#include "simd.h"

namespace resnet_fused {
namespace {

RESNET_FUSED_INLINE float relu(float v) { return v < 0.0f ? 0.0f : v; }

// ReLU on the bits of a 16-bit float whose infinity is `inf`: negative numbers become 0, NaN stays.
template <uint16_t inf>
RESNET_FUSED_INLINE uint16_t relu_bits(uint16_t v) {
  const bool nan = (v & 0x7fffu) > inf;
  return (v & 0x8000u) != 0 && !nan ? 0 : v;
}

RESNET_FUSED_CLONES void relu_f32(const float* in, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = relu(in[i]);
}
RESNET_FUSED_CLONES void relu_bf16(const uint16_t* in, uint16_t* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = relu_bits<0x7f80>(in[i]);
}
RESNET_FUSED_CLONES void relu_f16(const uint16_t* in, uint16_t* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = relu_bits<0x7c00>(in[i]);
}
RESNET_FUSED_CLONES void round_bf16(const float* in, uint16_t* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = float_to_bf16(in[i]);
}
RESNET_FUSED_CLONES void round_f16(const float* in, uint16_t* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = float_to_f16(in[i]);
}
RESNET_FUSED_CLONES void round_relu_bf16(const float* in, uint16_t* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = float_to_bf16(relu(in[i]));
}
RESNET_FUSED_CLONES void round_relu_f16(const float* in, uint16_t* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = float_to_f16(relu(in[i]));
}
RESNET_FUSED_CLONES void widen_bf16(const uint16_t* in, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = bf16_to_float(in[i]);
}
RESNET_FUSED_CLONES void widen_f16(const uint16_t* in, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = f16_to_float(in[i]);
}

RESNET_FUSED_CLONES void add_f32(float* y, const float* other, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] += other[i];
}

// The largest magnitude as an integer: above every finite number's if and only if one is NaN or
// infinite.
RESNET_FUSED_CLONES uint32_t max_bits_32(const uint32_t* in, int64_t n) {
  uint32_t most = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t m = in[i] & 0x7fffffffu;
    most = m > most ? m : most;
  }
  return most;
}
RESNET_FUSED_CLONES uint32_t relu_max_bits(float* y, int64_t n) {
  uint32_t most = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float v = y[i];
    const uint32_t m = float_to_bits(v) & 0x7fffffffu;
    most = m > most ? m : most;
    y[i] = relu(v);
  }
  return most;
}
RESNET_FUSED_CLONES uint16_t max_bits_16(const uint16_t* in, int64_t n) {
  uint16_t most = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint16_t m = in[i] & 0x7fffu;
    most = m > most ? m : most;
  }
  return most;
}

RESNET_FUSED_CLONES void scale_row(float* row, float scale, int64_t n) {
  for (int64_t i = 0; i < n; ++i) row[i] *= scale;
}

}  // namespace

void act_cpu(const ActParams& p, int64_t begin, int64_t end) {
  const int64_t n = end - begin, size = item_size(p.out_dtype);
  void* out = static_cast<char*>(p.out) + begin * size;
  const void* in = static_cast<const char*>(p.in) + begin * item_size(p.in_dtype);
  auto* out16 = static_cast<uint16_t*>(out);
  const auto* in16 = static_cast<const uint16_t*>(in);
  const auto* in32 = static_cast<const float*>(in);
  if (p.in_dtype != p.out_dtype) {
    if (p.out_dtype == DType::bf16) {
      p.relu ? round_relu_bf16(in32, out16, n) : round_bf16(in32, out16, n);
    } else {
      p.relu ? round_relu_f16(in32, out16, n) : round_f16(in32, out16, n);
    }
  } else if (!p.relu) {
    if (in != out) std::memcpy(out, in, static_cast<size_t>(n * size));
  } else if (p.out_dtype == DType::f32) {
    relu_f32(in32, static_cast<float*>(out), n);
  } else {
    p.out_dtype == DType::bf16 ? relu_bf16(in16, out16, n) : relu_f16(in16, out16, n);
  }
}

void widen_cpu(const void* in, DType in_dtype, float* out, int64_t begin, int64_t end) {
  const auto* from = static_cast<const uint16_t*>(in) + begin;
  in_dtype == DType::bf16 ? widen_bf16(from, out + begin, end - begin)
                          : widen_f16(from, out + begin, end - begin);
}

void add_cpu(float* y, const float* other, int64_t n) { add_f32(y, other, n); }

float relu_max_abs_cpu(float* y, int64_t n) { return bits_to_float(relu_max_bits(y, n)); }

float max_abs_cpu(const float* in, int64_t n) {
  return bits_to_float(max_bits_32(reinterpret_cast<const uint32_t*>(in), n));
}

bool all_finite_cpu(const void* in, DType dtype, int64_t n) {
  if (dtype == DType::f32) return max_bits_32(static_cast<const uint32_t*>(in), n) < 0x7f800000u;
  return max_bits_16(static_cast<const uint16_t*>(in), n) <
         (dtype == DType::bf16 ? 0x7f80u : 0x7c00u);
}

void scale_weight_cpu(float* weight, const float* scale, int64_t per_channel, int64_t begin,
                      int64_t end) {
  for (int64_t k = begin; k < end; ++k) scale_row(weight + k * per_channel, scale[k], per_channel);
}

}  // namespace resnet_fused
