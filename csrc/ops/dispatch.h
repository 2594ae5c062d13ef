// SPDX-License-Identifier: BSD-3-Clause
// torch dtypes to the kernels' DType, written once.
#pragma once

#include "../kernels/dtype.h"
#include "../torch_abi.h"

namespace resnet_fused {

inline DType dtype_of(const Tensor& t) {
  const int32_t d = t.dtype();
  if (d == aoti_torch_dtype_float32()) return DType::f32;
  if (d == aoti_torch_dtype_bfloat16()) return DType::bf16;
  if (d == aoti_torch_dtype_float16()) return DType::f16;
  if (d == aoti_torch_dtype_float64()) return DType::f64;
  return DType::other;
}

inline int32_t torch_dtype(DType d) {
  switch (d) {
    case DType::f32:
      return aoti_torch_dtype_float32();
    case DType::bf16:
      return aoti_torch_dtype_bfloat16();
    case DType::f16:
      return aoti_torch_dtype_float16();
    default:
      return aoti_torch_dtype_float64();
  }
}

}  // namespace resnet_fused
