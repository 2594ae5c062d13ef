// SPDX-License-Identifier: BSD-3-Clause
#include "../kernels/pool_linear.h"

#include "conv.h"
#include "ops.h"

namespace resnet_fused {
namespace {

Tensor contiguous(const Tensor& t) {
  const Sizes strides = contiguous_strides(t.shape());
  bool dense = true;
  for (int64_t i = 0, d = t.dim(); i < d; ++i) {
    dense = dense && (t.size(i) <= 1 || t.stride(i) == strides[static_cast<size_t>(i)]);
  }
  if (dense) return t.share();
  Tensor copy = empty_strided(t.shape(), strides, t.dtype(), t);
  check_torch(aoti_torch_copy_(copy.handle(), t.handle(), 0), "layout conversion");
  return copy;
}

}  // namespace

void pool_linear_cpu(StableIValue* stack, uint64_t, uint64_t) {
  const char* op = "pool_linear";
  Args args(stack);
  Tensor x = args.tensor(), weight = args.tensor(), bias = args.optional_tensor();
  require_kernel_input(x, op);
  require(x.dim() == 4 && x.size(2) >= 1 && x.size(3) >= 1, op,
          ": x must be [N, C, H, W] with H and W at least 1, got shape ", Shape{x});
  require_on_cpu(weight, op, "", "weight");
  require(dtype_of(weight) != DType::f64, op,
          ": weight must be float32, bfloat16 or float16, got float64");
  require(weight.dim() == 2 && weight.size(1) == x.size(1), op, ": weight must have shape [K, ",
          x.size(1), "], got ", Shape{weight});
  if (bias.defined()) {
    require_on_cpu(bias, op, "", "bias");
    require(dtype_of(bias) != DType::f64, op,
            ": bias must be float32, bfloat16 or float16, got float64");
    require(bias.dim() == 1 && bias.size(0) == weight.size(0), op, ": bias must have shape [",
            weight.size(0), "], got ", Shape{bias});
    bias = contiguous(bias);
  }
  const int64_t N = x.size(0), C = x.size(1), HW = x.size(2) * x.size(3), K = weight.size(0);
  Tensor out = empty_strided({N, K}, contiguous_strides({N, K}), x.dtype(), x);
  if (N > 0 && K > 0) {
    x = to_channels_last(x);
    weight = contiguous(weight);
    Tensor pooled =
        empty_strided({N, C}, contiguous_strides({N, C}), aoti_torch_dtype_float32(), x);
    const PoolLinearParams p{x.data(),
                             static_cast<float*>(pooled.mutable_data()),
                             weight.data(),
                             bias.defined() ? bias.data() : nullptr,
                             out.mutable_data(),
                             N,
                             HW,
                             C,
                             K,
                             dtype_of(x),
                             dtype_of(weight),
                             bias.defined() ? dtype_of(bias) : DType::f32};
    parallel_for(N, 1, [&](int64_t b, int64_t e) { pool_cpu(p, b, e); });
    parallel_for(K, 16, [&](int64_t b, int64_t e) { linear_cpu(p, b, e); });
  }
  stack[0] = boxed(std::move(out));
}

}  // namespace resnet_fused
