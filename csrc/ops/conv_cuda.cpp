// SPDX-License-Identifier: BSD-3-Clause
#ifdef RESNET_FUSED_CUDA
#include "conv_cuda.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#include "../kernels/cuda/wgmma_pair_plan.h"
#include "../kernels/wgmma_conv.h"
#include "layout.h"

namespace resnet_fused {
namespace {

std::atomic<MmaConvPlan> forced_plan{MmaConvPlan{-1, 1}};
std::atomic<MmaConvPlan> forced_wgmma_plan{MmaConvPlan{-1, 1}};

std::atomic<bool> forced_pairs{false};

// Kernels for Hopper GPUs run only where somebody asks for them until a GPU has run them: those of
// single convolutions (1), or those that run two as one as well (2).
std::atomic<int>& hopper_wanted() {
  static std::atomic<int> wanted{[] {
    const char* value = std::getenv("RESNET_FUSED_HOPPER");
    if (value == nullptr) return 0;
    return std::strcmp(value, "pairs") == 0 ? 2 : std::strcmp(value, "1") == 0 ? 1 : 0;
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
  if (!(forced || hopper_wanted() > 0) || !call.hopper()) return {-1, 1};
  return forced ? p.plan : plan_wgmma_conv(p, call.multiprocessors(), batch_invariant());
}

// The tile of the kernel that runs both as one; -1 where none is to.
int pair_tile(const CudaCall& call, const MmaConvParams& first, const MmaConvParams& last) {
  if (!(forced_pairs || hopper_wanted() > 1) || !call.hopper()) return -1;
  return forced_pairs ? wgmma_pair_tile(first, last)
                      : plan_wgmma_pair(first, last, call.multiprocessors(), batch_invariant());
}

int launch_on_hopper(const CudaCall& call, const MmaConvParams& p) {
  return launch_wgmma_conv(p, call.multiprocessors(), kDependentLaunches, call.stream());
}
int launch_on_hopper(const CudaCall& call, const WgmmaPairParams& p) {
  return launch_wgmma_pair(p, call.multiprocessors(), kDependentLaunches, call.stream());
}
#else
constexpr bool kHopperBuilt = false;

MmaConvPlan hopper_plan(const CudaCall&, const MmaConvParams&) { return {-1, 1}; }
int pair_tile(const CudaCall&, const MmaConvParams&, const MmaConvParams&) { return -1; }
int launch_on_hopper(const CudaCall&, const MmaConvParams&) { return -1; }
int launch_on_hopper(const CudaCall&, const WgmmaPairParams&) { return -1; }
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

// A convolution of an input of sizes `in`, as a kernel's source; x is still to be set.
ConvSource source(const CudaCall& call, const Conv& conv, const Sizes& in, int32_t dtype,
                  std::vector<Tensor>& copies) {
  require(conv.groups == 1, call.op(), ": ", conv.name, "groups must be 1 on a GPU, got ",
          conv.groups, "; use the function resnet_fused.", call.op(),
          ", which computes grouped convolutions by plain PyTorch");
  const Tensor& w = conv.weight;
  copies.push_back(laid_out(w, channels_last_strides(w.shape()), dtype));
  ConvSource s{};
  s.weight = copies.back().data();
  s.H = in[2];
  s.W = in[3];
  s.C = in[1];
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

// A convolution with all that is known before it has an input, an output and a plan.
struct Prepared {
  MmaConvParams p{};
  Sizes out;
  std::vector<Tensor> copies;
};

// act(conv(an input of sizes `in`) + project(start) + residual); project may be null, residual
// absent. `like`: a tensor of the same dtype and device.
Prepared prepare(const CudaCall& call, const Conv& conv, const Sizes& in, const Conv* project,
                 const Tensor& start, const Tensor& residual, bool relu, const Tensor& like) {
  Prepared c;
  c.out = conv.out_sizes(in);
  MmaConvParams& p = c.p;
  p.source[0] = source(call, conv, in, like.dtype(), c.copies);
  p.sources = 1;
  if (project != nullptr) {
    p.source[1] = source(call, *project, start.shape(), like.dtype(), c.copies);
    p.source[1].x = start.data();
    p.sources = 2;
  }
  p.residual = residual.defined() ? residual.data() : nullptr;
  p.N = c.out[0];
  p.P = c.out[2];
  p.Q = c.out[3];
  p.K = c.out[1];
  p.dtype = dtype_of(like);
  p.relu = relu;
  require(mma_conv_fits(p), call.op(), ": no kernel counts as far as ", conv.name,
          "weight of shape ", Shape{conv.weight}, " on an input of shape ", in,
          " needs: sizes, strides, paddings and dilations must be from 1 (padding: 0) to 2^28");
  return c;
}

Tensor empty_output(const Prepared& c, const Tensor& like) {
  return empty_strided(c.out, channels_last_strides(c.out), like.dtype(), like);
}

// A prepared convolution of x.
Tensor launch_conv(const CudaCall& call, Prepared c, const Tensor& x) {
  MmaConvParams& p = c.p;
  Tensor out = empty_output(c, x);
  p.source[0].x = x.data();
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

// Two of them, the second on what the first makes of x: one kernel where that is faster.
Tensor launch_two(const CudaCall& call, Prepared first, Prepared last, Tensor x) {
  first.p.source[0].x = x.data();
  const int tile = pair_tile(call, first.p, last.p);
  if (tile < 0) {
    const Tensor between = launch_conv(call, std::move(first), x);
    x = Tensor();  // its memory may be the next output's
    return launch_conv(call, std::move(last), between);
  }
  Tensor out = empty_output(last, x);
  last.p.out = out.mutable_data();
  call.check(launch_on_hopper(call, WgmmaPairParams{first.p, last.p, tile}));
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
  Prepared c = prepare(call, conv, x.shape(), nullptr, Tensor(), residual, relu, x);
  return launch_conv(call, std::move(c), x);
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
  const std::vector<Conv>& convs = chain.convs;
  Tensor h = x.share();
  for (size_t i = 0; i + 2 < convs.size(); ++i)
    h = run_conv_cuda(call, convs[i], h, Tensor(), true);
  const Conv* project = chain.downsample.present() ? &chain.downsample : nullptr;
  const auto last = [&](const Sizes& in) {
    return prepare(call, convs.back(), in, project, x, shortcut, chain.relu, x);
  };
  if (convs.size() == 1) return launch_conv(call, last(h.shape()), h);
  Prepared before =
      prepare(call, convs[convs.size() - 2], h.shape(), nullptr, Tensor(), Tensor(), true, x);
  Prepared end = last(before.out);
  return launch_two(call, std::move(before), std::move(end), std::move(h));
}

}  // namespace resnet_fused

void resnet_fused_force_mma_plan(int tile, int splits) {
  resnet_fused::forced_plan = resnet_fused::MmaConvPlan{tile, splits};
}
void resnet_fused_force_wgmma_plan(int tile, int splits) {
  resnet_fused::forced_wgmma_plan = resnet_fused::MmaConvPlan{tile, splits};
}
void resnet_fused_force_wgmma_pairs(int on) { resnet_fused::forced_pairs = on != 0; }
void resnet_fused_set_hopper(int level) { resnet_fused::hopper_wanted() = level; }
int resnet_fused_hopper() {
  return resnet_fused::kHopperBuilt ? resnet_fused::hopper_wanted().load() : 0;
}
#endif
