// SPDX-License-Identifier: BSD-3-Clause
#include "../kernels/add_relu.h"

#include "boxed.h"
#include "cuda.h"
#include "layout.h"
#include "ops.h"

namespace resnet_fused {
namespace {

struct Operands {
  Tensor x, y, out;  // same sizes and strides, dense
  AddReluParams params() const {
    return {x.data(), y.data(), out.mutable_data(), out.numel(), dtype_of(out)};
  }
};

// A new tensor laid out as torch lays out elementwise results: t's strides if t is dense, else its
// order of dimensions.
Tensor empty_like(const Tensor& t) {
  StableIValue stack[6] = {boxed(t.share())};
  call_op("aten::empty_like", stack);
  AtenTensorHandle h = nullptr;
  std::memcpy(&h, stack, sizeof(h));
  return Tensor(h);
}

Operands read(StableIValue* stack) {
  Args args(stack);
  Operands o;
  o.x = args.tensor();
  o.y = args.tensor();
  require(same_device(o.x, o.y), "add_relu: y must be on x's device");
  const DType dtype = dtype_of(o.x);
  require(dtype == DType::f32 || dtype == DType::bf16 || dtype == DType::f16,
          "add_relu: x must be float32, bfloat16 or float16; use the function "
          "resnet_fused.add_relu for float64");
  require(dtype == dtype_of(o.y), "add_relu: y must have x's dtype");
  require(same_sizes(o.y, o.x.shape()), "add_relu: y must have x's shape ", Shape{o.x}, ", got ",
          Shape{o.y});
  o.out = empty_like(o.x);
  const Sizes strides(o.out.strides(), o.out.strides() + o.out.dim());
  o.x = laid_out(o.x, strides, o.x.dtype());
  o.y = laid_out(o.y, strides, o.y.dtype());
  return o;
}

}  // namespace

void add_relu_cpu(StableIValue* stack, uint64_t, uint64_t) {
  Operands o = read(stack);
  const AddReluParams p = o.params();
  parallel_for(p.n, 16384, [&](int64_t b, int64_t e) { add_relu_cpu(p, b, e); });
  stack[0] = boxed(std::move(o.out));
}

#ifdef RESNET_FUSED_CUDA
void add_relu_cuda(StableIValue* stack, uint64_t, uint64_t) {
  Operands o = read(stack);
  const CudaCall call("add_relu", o.out);
  call.check(launch_add_relu_cuda(o.params(), call.stream()));
  stack[0] = boxed(std::move(o.out));
}
#endif

}  // namespace resnet_fused
