// SPDX-License-Identifier: BSD-3-Clause
#include "../kernels/add_relu.h"

#include "boxed.h"
#include "checks.h"
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

bool same_strides(const Tensor& a, const Sizes& strides) {
  for (int64_t i = 0, d = a.dim(); i < d; ++i) {
    if (a.size(i) > 1 && a.stride(i) != strides[static_cast<size_t>(i)]) return false;
  }
  return true;
}

Tensor with_strides(const Tensor& t, const Sizes& strides) {
  if (same_strides(t, strides)) return t.share();
  Tensor copy = empty_strided(t.shape(), strides, t.dtype(), t);
  check_torch(aoti_torch_copy_(copy.handle(), t.handle(), 0), "layout conversion");
  return copy;
}

Operands read(StableIValue* stack) {
  Args args(stack);
  Operands o;
  o.x = args.tensor();
  o.y = args.tensor();
  require(o.x.device_type() == o.y.device_type() && o.x.device_index() == o.y.device_index(),
          "add_relu: y must be on x's device");
  const DType dtype = dtype_of(o.x);
  require(dtype == DType::f32 || dtype == DType::bf16 || dtype == DType::f16,
          "add_relu: x must be float32, bfloat16 or float16; use the function "
          "resnet_fused.add_relu for float64");
  require(dtype == dtype_of(o.y), "add_relu: y must have x's dtype");
  require(same_sizes(o.y, o.x.shape()), "add_relu: y must have x's shape ", Shape{o.x}, ", got ",
          Shape{o.y});
  o.out = empty_like(o.x);
  const Sizes strides(o.out.strides(), o.out.strides() + o.out.dim());
  o.x = with_strides(o.x, strides);
  o.y = with_strides(o.y, strides);
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
namespace {

class DeviceGuard {
 public:
  explicit DeviceGuard(const Tensor& t) {
    check_torch(aoti_torch_create_device_guard(t.device_index(), &guard_), "device guard");
  }
  ~DeviceGuard() { aoti_torch_delete_device_guard(guard_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  DeviceGuardHandle guard_ = nullptr;
};

}  // namespace

void add_relu_cuda(StableIValue* stack, uint64_t, uint64_t) {
  Operands o = read(stack);
  const DeviceGuard guard(o.x);
  require(aoti_torch_get_current_cuda_stream != nullptr, "add_relu: this torch build has no CUDA");
  void* stream = nullptr;
  check_torch(aoti_torch_get_current_cuda_stream(o.x.device_index(), &stream), "current stream");
  const AddReluParams p = o.params();
  const int error = p.n > 0 ? launch_add_relu_cuda(p, stream) : 0;
  require(error == 0, "add_relu: CUDA error ", error, " for shape ", Shape{o.x},
          " on cuda:", o.x.device_index());
  stack[0] = boxed(std::move(o.out));
}
#endif

}  // namespace resnet_fused
