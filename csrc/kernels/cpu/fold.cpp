// SPDX-License-Identifier: BSD-3-Clause
// BatchNorm as scale and shift, and hashes that tell when either has changed.
#include <cmath>

#include "../conv_bn_act.h"
#include "simd.h"

namespace resnet_fused {

namespace {

RESNET_FUSED_CLONES void scale_of(const float* weight, const float* var, float eps, float* scale,
                                  int64_t n) {
  for (int64_t k = 0; k < n; ++k) scale[k] = weight[k] / std::sqrt(var[k] + eps);
}
RESNET_FUSED_CLONES void shift_of(const float* beta, const float* bias, const float* mean,
                                  const float* scale, float* shift, int64_t n) {
  for (int64_t k = 0; k < n; ++k) shift[k] = beta[k] + (bias[k] - mean[k]) * scale[k];
}

}  // namespace

void fold_cpu(const FoldParams& p) {
  constexpr int64_t kPart = 256;
  float ones[kPart], zeros[kPart];
  for (int64_t i = 0; i < kPart; ++i) {
    ones[i] = 1.0f;
    zeros[i] = 0.0f;
  }
  for (int64_t k = 0; k < p.channels; k += kPart) {
    const int64_t n = p.channels - k < kPart ? p.channels - k : kPart;
    const auto at = [k](const float* given, const float* otherwise) {
      return given != nullptr ? given + k : otherwise;
    };
    // Without a variance, var + eps is 1.
    scale_of(at(p.bn_weight, ones), at(p.var, ones), p.var != nullptr ? p.eps : 0.0f, p.scale + k,
             n);
    shift_of(at(p.bn_bias, zeros), at(p.bias, zeros), at(p.mean, zeros), p.scale + k, p.shift + k,
             n);
  }
}

namespace {

// Multiply and fold, the mixing step of many hashes: every input bit reaches every output bit in a
// few steps.
inline uint64_t mix(uint64_t hash, uint64_t word) {
  const unsigned __int128 product =
      static_cast<unsigned __int128>(hash ^ word) * 0x9e3779b97f4a7c15u;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64) ^ word;
}

inline uint64_t load(const unsigned char* p, size_t bytes) {
  uint64_t word = 0;
  std::memcpy(&word, p, bytes);
  return word;
}

}  // namespace

uint64_t hash_cpu(const void* data, size_t bytes, uint64_t seed) {
  const auto* p = static_cast<const unsigned char*>(data);
  // Four chains hide the multiplication's latency.
  uint64_t lane[4] = {seed, seed + 1, seed + 2, seed + 3};
  size_t i = 0;
  for (; i + 32 <= bytes; i += 32) {
    for (size_t j = 0; j < 4; ++j) lane[j] = mix(lane[j], load(p + i + 8 * j, 8));
  }
  for (; i < bytes; i += 8) lane[0] = mix(lane[0], load(p + i, bytes - i < 8 ? bytes - i : 8) + 1);
  return mix(mix(mix(lane[0], lane[1]), lane[2]), lane[3] + bytes);
}

uint64_t sample_hash_cpu(const void* data, size_t bytes, int samples, uint64_t seed) {
  constexpr size_t kLine = 64;  // a cache miss is paid for: all of it may as well be read
  const size_t lines = bytes / kLine, count = static_cast<size_t>(samples);
  if (lines <= count) return hash_cpu(data, bytes, seed);
  const auto* p = static_cast<const unsigned char*>(data);
  // All misses at once: one after the other they would take 2 us.
  for (size_t i = 0; i < count; ++i) __builtin_prefetch(p + i * lines / count * kLine);
  uint64_t hash = seed;
  for (size_t i = 0; i < count; ++i) hash = hash_cpu(p + i * lines / count * kLine, kLine, hash);
  return hash;
}

}  // namespace resnet_fused
