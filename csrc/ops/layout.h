// SPDX-License-Identifier: BSD-3-Clause
// Tensors brought into the memory order that a kernel wants.
#pragma once

#include "../torch_abi.h"

namespace resnet_fused {

// True if t's elements lie where these strides put them; those of dimensions of size 1 are free.
inline bool has_strides(const Tensor& t, const Sizes& strides) {
  for (int64_t i = 0, d = t.dim(); i < d; ++i) {
    if (t.size(i) > 1 && t.stride(i) != strides[static_cast<size_t>(i)]) return false;
  }
  return true;
}

// t itself if it has these strides and this dtype, else a copy that has.
inline Tensor laid_out(const Tensor& t, const Sizes& strides, int32_t dtype) {
  if (t.dtype() == dtype && has_strides(t, strides)) return t.share();
  Tensor copy = empty_strided(t.shape(), strides, dtype, t);
  check_torch(aoti_torch_copy_(copy.handle(), t.handle(), 0), "layout conversion");
  return copy;
}

// t itself if it is dense NHWC, else a copy that is.
inline Tensor channels_last(const Tensor& t) {
  return laid_out(t, channels_last_strides(t.shape()), t.dtype());
}

}  // namespace resnet_fused
