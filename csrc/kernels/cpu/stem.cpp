// SPDX-License-Identifier: BSD-3-Clause
// ReLU and max-pool on bits: a non-negative float orders as its integer does, and a NaN without its
// sign is above infinity, so an unsigned integer maximum is right for numbers and keeps NaN. Each
// output row reads three input rows; a row of 112 x 64 bfloat16 is 14 KB, so all three stay in L1.
#include "../stem.h"

#include "simd.h"

namespace resnet_fused {
namespace {

// max(v, 0) as an integer key; NaN loses its sign.
template <typename U, U inf>
RESNET_FUSED_INLINE U key(U v) {
  constexpr U magnitude = static_cast<U>(~U{0}) >> 1;
  const U m = v & magnitude;
  return v > magnitude && m <= inf ? U{0} : m;
}

template <typename U, U inf>
RESNET_FUSED_INLINE void pool_rows(const ReluMaxPoolParams& p, int64_t begin, int64_t end) {
  const int64_t P = (p.H + 1) / 2, Q = (p.W + 1) / 2, row = p.W * p.K;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t n = r / P, y = r % P;
    const int64_t top = y > 0 ? 2 * y - 1 : 0, bottom = 2 * y + 1 < p.H ? 2 * y + 1 : p.H - 1;
    U* out = static_cast<U*>(p.out) + r * Q * p.K;
    for (int64_t q = 0; q < Q; ++q, out += p.K) {
      const int64_t left = q > 0 ? 2 * q - 1 : 0, right = 2 * q + 1 < p.W ? 2 * q + 1 : p.W - 1;
      for (int64_t k = 0; k < p.K; ++k) out[k] = 0;
      for (int64_t h = top; h <= bottom; ++h) {
        const U* in = static_cast<const U*>(p.in) + (n * p.H + h) * row;
        for (int64_t w = left; w <= right; ++w) {
          const U* pixel = in + w * p.K;
          for (int64_t k = 0; k < p.K; ++k) {
            const U v = key<U, inf>(pixel[k]);
            out[k] = v > out[k] ? v : out[k];
          }
        }
      }
    }
  }
}

RESNET_FUSED_CLONES void pool_f32(const ReluMaxPoolParams& p, int64_t begin, int64_t end) {
  pool_rows<uint32_t, 0x7f800000u>(p, begin, end);
}
RESNET_FUSED_CLONES void pool_bf16(const ReluMaxPoolParams& p, int64_t begin, int64_t end) {
  pool_rows<uint16_t, 0x7f80u>(p, begin, end);
}
RESNET_FUSED_CLONES void pool_f16(const ReluMaxPoolParams& p, int64_t begin, int64_t end) {
  pool_rows<uint16_t, 0x7c00u>(p, begin, end);
}

}  // namespace

void relu_max_pool_cpu(const ReluMaxPoolParams& p, int64_t begin, int64_t end) {
  if (p.dtype == DType::f32) return pool_f32(p, begin, end);
  p.dtype == DType::bf16 ? pool_bf16(p, begin, end) : pool_f16(p, begin, end);
}

}  // namespace resnet_fused
