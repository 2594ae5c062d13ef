// SPDX-License-Identifier: BSD-3-Clause
// Argument checks. A message names the argument, the rule and the value got.
#pragma once

#include <sstream>
#include <stdexcept>

#include "../torch_abi.h"
#include "dispatch.h"

namespace resnet_fused {

// Sizes that print as [2, 3]; a type of its own, so that nothing is formatted unless a check fails.
struct Shape {
  const Tensor& t;
};

inline std::ostream& operator<<(std::ostream& out, const Sizes& sizes) {
  out << "[";
  for (size_t i = 0; i < sizes.size(); ++i) out << (i ? ", " : "") << sizes[i];
  return out << "]";
}
inline std::ostream& operator<<(std::ostream& out, const Shape& s) { return out << s.t.shape(); }

template <typename... Parts>
void require(bool ok, const Parts&... message) {
  if (ok) return;
  std::ostringstream text;
  (text << ... << message);
  throw std::runtime_error(text.str());
}

inline bool same_sizes(const Tensor& t, const Sizes& sizes) {
  return t.dim() == static_cast<int64_t>(sizes.size()) &&
         std::memcmp(t.sizes(), sizes.data(), sizes.size() * sizeof(int64_t)) == 0;
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.device_type() == b.device_type() &&
         (a.device_type() == aoti_torch_device_type_cpu() || a.device_index() == b.device_index());
}

// Argument prefix + name must be on x's device, in a floating dtype.
inline void require_beside(const Tensor& x, const Tensor& t, const char* op, const char* prefix,
                           const char* name) {
  require(same_device(t, x), op, ": ", prefix, name, " must be on x's device");
  require(dtype_of(t) != DType::other, op, ": ", prefix, name,
          " must be float32, bfloat16, float16 or float64, got another dtype");
}

// x: what the kernels compute in.
inline void require_kernel_input(const Tensor& x, const char* op) {
  require_beside(x, x, op, "", "x");
  require(dtype_of(x) != DType::f64, op, ": x must be float32, bfloat16 or float16, got float64; ",
          "use the function resnet_fused.", op, ", which computes float64 by plain PyTorch");
}

}  // namespace resnet_fused
