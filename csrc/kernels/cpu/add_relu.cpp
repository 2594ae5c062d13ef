// SPDX-License-Identifier: BSD-3-Clause
// add_relu on the CPU: one pass, limited by memory, vectorised by the compiler.
#include "../add_relu.h"

#include "simd.h"

namespace resnet_fused {
namespace {

// v < 0 is false for NaN, so NaN stays.
RESNET_FUSED_INLINE float relu(float v) { return v < 0.0f ? 0.0f : v; }

RESNET_FUSED_CLONES void add_relu_f32(const float* x, const float* y, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = relu(x[i] + y[i]);
}

RESNET_FUSED_CLONES void add_relu_bf16(const uint16_t* x, const uint16_t* y, uint16_t* out,
                                       int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    out[i] = float_to_bf16(relu(bf16_to_float(x[i]) + bf16_to_float(y[i])));
}

RESNET_FUSED_CLONES void add_relu_f16(const uint16_t* x, const uint16_t* y, uint16_t* out,
                                      int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    out[i] = float_to_f16(relu(f16_to_float(x[i]) + f16_to_float(y[i])));
}

}  // namespace

void add_relu_cpu(const AddReluParams& p, int64_t begin, int64_t end) {
  const int64_t n = end - begin;
  if (p.dtype == DType::f32) {
    add_relu_f32(static_cast<const float*>(p.x) + begin, static_cast<const float*>(p.y) + begin,
                 static_cast<float*>(p.out) + begin, n);
    return;
  }
  const auto* x = static_cast<const uint16_t*>(p.x) + begin;
  const auto* y = static_cast<const uint16_t*>(p.y) + begin;
  auto* out = static_cast<uint16_t*>(p.out) + begin;
  p.dtype == DType::bf16 ? add_relu_bf16(x, y, out, n) : add_relu_f16(x, y, out, n);
}

}  // namespace resnet_fused
