// SPDX-License-Identifier: BSD-3-Clause
#ifdef RESNET_FUSED_CUDA
#include "conv_cuda.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#include "../kernels/cuda/wgmma_plan.h"
#include "../kernels/wgmma_conv.h"
#include "layout.h"

namespace resnet_fused {
namespace {

std::atomic<MmaConvPlan> forced_plan{MmaConvPlan{-1, 1}};
std::atomic<MmaConvPlan> forced_wgmma_plan{MmaConvPlan{-1, 1}};

// Kernels for Hopper GPUs run only where somebody asks for them until a GPU has run them.
std::atomic<bool>& hopper_wanted() {
  static std::atomic<bool> wanted{[] {
    const char* value = std::getenv("RESNET_FUSED_HOPPER");
    return value != nullptr && std::strcmp(value, "1") == 0;
  }()};
  return wanted;
}

#ifdef RESNET_FUSED_SM90A
constexpr bool kHopperBuilt = true;
// Launches overlap only once a GPU has shown what that is worth.
constexpr bool kDependentLaunches = false;

// The plan on a Hopper GPU; a tile of -1 where its kernels do not take the convolution.
MmaConvPlan hopper_plan(const CudaCall& call, MmaConvParams p) {
  p.plan = forced_wgmma_plan;
  const bool forced = wgmma_plan_fits(p);
  if (!(forced || hopper_wanted()) || !call.hopper()) return {-1, 1};
  return forced ? p.plan : plan_wgmma_conv(p, call.multiprocessors(), batch_invariant());
}

int launch_on_hopper(const CudaCall& call, const MmaConvParams& p) {
  return launch_wgmma_conv(p, call.multiprocessors(), kDependentLaunches, call.stream());
}
#else
constexpr bool kHopperBuilt = false;

MmaConvPlan hopper_plan(const CudaCall&, const MmaConvParams&) { return {-1, 1}; }
int launch_on_hopper(const CudaCall&, const MmaConvParams&) { return -1; }
#endif

// K values: where they are, if a kernel can read them there, else as a dense fp32 copy.
ChannelVector channel_vector(const Tensor& t, std::vector<Tensor>& copies) {
  if (!t.defined()) return {nullptr, DType::f32};
  const DType dtype = dtype_of(t);
  const bool dense = t.size(0) <= 1 || t.stride(0) == 1;
  if (dense && dtype != DType::f64) return {t.data(), dtype};
  copies.push_back(laid_out(t, {1}, aoti_torch_dtype_float32()));
  return {copies.back().data(), DType::f32};
}

// A convolution and its input, as a kernel's source.
ConvSource source(const CudaCall& call, const Conv& conv, const Tensor& x,
                  std::vector<Tensor>& copies) {
  require(conv.groups == 1, call.op(), ": ", conv.name, "groups must be 1 on a GPU, got ",
          conv.groups, "; use the function resnet_fused.", call.op(),
          ", which computes grouped convolutions by plain PyTorch");
  const Tensor& w = conv.weight;
  copies.push_back(laid_out(w, channels_last_strides(w.shape()), x.dtype()));
  ConvSource s{};
  s.x = x.data();
  s.weight = copies.back().data();
  s.H = x.size(2);
  s.W = x.size(3);
  s.C = x.size(1);
  s.R = w.size(2);
  s.S = w.size(3);
  for (int i = 0; i < 2; ++i) {
    s.stride[i] = conv.stride[i];
    s.padding[i] = conv.padding[i];
    s.dilation[i] = conv.dilation[i];
  }
  s.bn = batch_norm(conv, copies);
  return s;
}

// act(conv(x) + project(start) + residual); project may be null, residual absent.
Tensor launch_conv(const CudaCall& call, const Conv& conv, const Tensor& x, const Conv* project,
                   const Tensor& start, const Tensor& residual, bool relu) {
  const DType dtype = dtype_of(x);
  const Sizes sizes = conv.out_sizes(x.shape());
  std::vector<Tensor> copies;
  MmaConvParams p{};
  p.source[0] = source(call, conv, x, copies);
  p.sources = 1;
  if (project != nullptr) {
    p.source[1] = source(call, *project, start, copies);
    p.sources = 2;
  }
  p.residual = residual.defined() ? residual.data() : nullptr;
  p.N = sizes[0];
  p.P = sizes[2];
  p.Q = sizes[3];
  p.K = sizes[1];
  p.dtype = dtype;
  p.relu = relu;
  require(mma_conv_fits(p), call.op(), ": no kernel counts as far as ", conv.name,
          "weight of shape ", Shape{conv.weight}, " on an input of shape ", Shape{x},
          " needs: sizes, strides, paddings and dilations must be from 1 (padding: 0) to 2^28");
  Tensor out = empty_strided(sizes, channels_last_strides(sizes), x.dtype(), x);
  p.out = out.mutable_data();
  p.plan = hopper_plan(call, p);
  const bool on_hopper = p.plan.tile >= 0;
  if (!on_hopper) {
    p.plan = forced_plan;
    if (!plan_fits(p)) p.plan = plan_mma_conv(p, call.multiprocessors(), batch_invariant());
  }
  const int64_t bytes = mma_conv_workspace(p);
  Tensor workspace;
  if (bytes > 0) {
    workspace = empty_strided({bytes / 4}, {1}, aoti_torch_dtype_float32(), x);
    p.workspace = static_cast<float*>(workspace.mutable_data());
  }
  call.check(on_hopper ? launch_on_hopper(call, p) : launch_mma_conv(p, call.stream()));
  return out;
}

}  // namespace

BatchNorm batch_norm(const Conv& conv, std::vector<Tensor>& copies) {
  return {channel_vector(conv.bias, copies),        channel_vector(conv.bn_weight, copies),
          channel_vector(conv.bn_bias, copies),     channel_vector(conv.running_mean, copies),
          channel_vector(conv.running_var, copies), static_cast<float>(conv.eps)};
}

Tensor run_conv_cuda(const CudaCall& call, const Conv& conv, const Tensor& x,
                     const Tensor& residual, bool relu) {
  return launch_conv(call, conv, x, nullptr, Tensor(), residual, relu);
}

// The projection is a second source of the last convolution, so its output is never written.
Tensor run_chain_cuda(const Chain& chain) {
  const Sizes sizes = check_chain(chain);
  const CudaCall call(chain.op, chain.x);
  if (sizes[0] == 0) {
    return empty_strided(sizes, channels_last_strides(sizes), chain.x.dtype(), chain.x);
  }
  const Tensor x = channels_last(chain.x);
  Tensor shortcut;
  if (chain.residual.defined()) {
    shortcut = channels_last(chain.residual);
  } else if (chain.add_x) {
    shortcut = x.share();
  }
  Tensor h = x.share();
  for (size_t i = 0; i + 1 < chain.convs.size(); ++i) {
    h = run_conv_cuda(call, chain.convs[i], h, Tensor(), true);
  }
  const Conv* project = chain.downsample.present() ? &chain.downsample : nullptr;
  return launch_conv(call, chain.convs.back(), h, project, x, shortcut, chain.relu);
}

}  // namespace resnet_fused

void resnet_fused_force_mma_plan(int tile, int splits) {
  resnet_fused::forced_plan = resnet_fused::MmaConvPlan{tile, splits};
}
void resnet_fused_force_wgmma_plan(int tile, int splits) {
  resnet_fused::forced_wgmma_plan = resnet_fused::MmaConvPlan{tile, splits};
}
void resnet_fused_set_hopper(int on) { resnet_fused::hopper_wanted() = on != 0; }
int resnet_fused_hopper() {
  return resnet_fused::kHopperBuilt && resnet_fused::hopper_wanted() ? 1 : 0;
}
#endif
