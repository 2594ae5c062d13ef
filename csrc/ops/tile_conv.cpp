// SPDX-License-Identifier: BSD-3-Clause
#include "tile_conv.h"

#include <atomic>

#include "../kernels/conv_bn_act.h"

namespace resnet_fused {
namespace {

enum Path { kAuto, kOneDnn, kPortable };
std::atomic<int> path{kAuto};

}  // namespace

bool tiles_available() {
  const int now = path.load(std::memory_order_relaxed);
  return now == kPortable || (now == kAuto && amx_available());
}

bool fma_available() {
  const int now = path.load(std::memory_order_relaxed);
  return now == kPortable || (now == kAuto && avx512_available());
}

const TileKernels& tile_kernels(Products products) {
  static constexpr TileKernels kAmx{tile_conv_amx, copy_pixels_amx};
  static constexpr TileKernels kPlain{tile_conv_portable, copy_pixels_portable};
  static constexpr TileKernels kAvx512{fma_conv_avx512, copy_floats_avx512};
  static constexpr TileKernels kPlainFma{fma_conv_portable, copy_floats_portable};
  const bool plain = path.load(std::memory_order_relaxed) == kPortable;
  if (products == Products::fp32) return plain ? kPlainFma : kAvx512;
  return plain ? kPlain : kAmx;
}

Affine read_affine(const Conv& conv) {
  const int64_t K = conv.channels();
  Affine a;
  a.scale.resize(static_cast<size_t>(round_up(K, kTileN)));
  a.shift.resize(a.scale.size());
  const Tensor* fields[] = {&conv.bias, &conv.bn_weight, &conv.bn_bias, &conv.running_mean,
                            &conv.running_var};
  std::vector<float> wide[5];
  Tensor copies[5];
  const float* values[5] = {};
  for (int i = 0; i < 5; ++i) {
    const Tensor& t = *fields[i];
    if (!t.defined()) continue;
    const DType dtype = dtype_of(t);
    const bool dense = K == 1 || t.stride(0) == 1;
    if (dense && dtype == DType::f32) {
      values[i] = static_cast<const float*>(t.data());
    } else if (dense && (dtype == DType::bf16 || dtype == DType::f16)) {
      // torch's copy would take ten times as long: 0.1 ms of a network.
      wide[i].resize(static_cast<size_t>(K));
      widen_cpu(t.data(), dtype, wide[i].data(), 0, K);
      values[i] = wide[i].data();
    } else {
      copies[i] = empty_strided({K}, {1}, aoti_torch_dtype_float32(), t);
      check_torch(aoti_torch_copy_(copies[i].handle(), t.handle(), 0), "reading a parameter");
      values[i] = static_cast<const float*>(copies[i].data());
    }
  }
  fold_cpu({values[0], values[1], values[2], values[3], values[4], static_cast<float>(conv.eps),
            a.scale.data(), a.shift.data(), K});
  return a;
}

}  // namespace resnet_fused

void resnet_fused_cpu_path(int value) {
  resnet_fused::path.store(value, std::memory_order_relaxed);
}
