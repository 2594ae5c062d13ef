// SPDX-License-Identifier: BSD-3-Clause
// Element types, shared by host and kernels.
#pragma once

#include <cstdint>

namespace resnet_fused {

enum class DType { f32, bf16, f16, f64, other };

constexpr int64_t item_size(DType d) { return d == DType::f64 ? 8 : d == DType::f32 ? 4 : 2; }

}  // namespace resnet_fused
