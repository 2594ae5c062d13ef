// SPDX-License-Identifier: BSD-3-Clause
#include "../kernels/pool_linear.h"

#include "conv.h"
#include "cuda.h"
#include "layout.h"
#include "ops.h"

namespace resnet_fused {
namespace {

constexpr const char* kOp = "pool_linear";

Tensor contiguous(const Tensor& t) { return laid_out(t, contiguous_strides(t.shape()), t.dtype()); }

struct Operands {
  Tensor x, weight, bias, out;  // bias may be absent

  bool empty() const { return out.numel() == 0; }
  // Brings the tensors into the order that the kernels read; `pooled` gets scratch memory.
  PoolLinearParams params(Tensor dense_x, Tensor& pooled) {
    const Sizes sizes{dense_x.size(0), dense_x.size(1)};
    x = std::move(dense_x);
    weight = contiguous(weight);
    if (bias.defined()) bias = contiguous(bias);
    pooled = empty_strided(sizes, contiguous_strides(sizes), aoti_torch_dtype_float32(), x);
    return {x.data(),
            static_cast<float*>(pooled.mutable_data()),
            weight.data(),
            bias.defined() ? bias.data() : nullptr,
            out.mutable_data(),
            sizes[0],
            x.size(2) * x.size(3),
            sizes[1],
            weight.size(0),
            dtype_of(x),
            dtype_of(weight),
            bias.defined() ? dtype_of(bias) : DType::f32};
  }
};

Operands read(StableIValue* stack) {
  Args args(stack);
  Operands o;
  o.x = args.tensor();
  o.weight = args.tensor();
  o.bias = args.optional_tensor();
  const Tensor &x = o.x, &weight = o.weight, &bias = o.bias;
  require_kernel_input(x, kOp);
  require(x.dim() == 4 && x.size(2) >= 1 && x.size(3) >= 1, kOp,
          ": x must be [N, C, H, W] with H and W at least 1, got shape ", Shape{x});
  require_beside(x, weight, kOp, "", "weight");
  require(dtype_of(weight) != DType::f64, kOp,
          ": weight must be float32, bfloat16 or float16, got float64");
  require(weight.dim() == 2 && weight.size(1) == x.size(1), kOp, ": weight must have shape [K, ",
          x.size(1), "], got ", Shape{weight});
  if (bias.defined()) {
    require_beside(x, bias, kOp, "", "bias");
    require(dtype_of(bias) != DType::f64, kOp,
            ": bias must be float32, bfloat16 or float16, got float64");
    require(bias.dim() == 1 && bias.size(0) == weight.size(0), kOp, ": bias must have shape [",
            weight.size(0), "], got ", Shape{bias});
  }
  const Sizes sizes{x.size(0), weight.size(0)};
  o.out = empty_strided(sizes, contiguous_strides(sizes), x.dtype(), x);
  return o;
}

}  // namespace

void pool_linear_cpu(StableIValue* stack, uint64_t, uint64_t) {
  Operands o = read(stack);
  if (!o.empty()) {
    Tensor pooled;
    const PoolLinearParams p = o.params(to_channels_last(o.x), pooled);
    constexpr int64_t kGrain = 8;  // of 64 channels
    parallel_for(p.N * pool_parts(p.C), kGrain, [&](int64_t b, int64_t e) { pool_cpu(p, b, e); });
    parallel_for(p.K, 16, [&](int64_t b, int64_t e) { linear_cpu(p, b, e); });
  }
  stack[0] = boxed(std::move(o.out));
}

#ifdef RESNET_FUSED_CUDA
void pool_linear_cuda(StableIValue* stack, uint64_t, uint64_t) {
  Operands o = read(stack);
  if (!o.empty()) {
    const CudaCall call(kOp, o.x);
    Tensor pooled;
    const PoolLinearParams p = o.params(channels_last(o.x), pooled);
    call.check(launch_pool_linear_cuda(p, call.stream()));
  }
  stack[0] = boxed(std::move(o.out));
}
#endif

}  // namespace resnet_fused
