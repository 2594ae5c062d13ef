// SPDX-License-Identifier: BSD-3-Clause
#include "conv.h"

#include <atomic>

#include "../kernels/conv_bn_act.h"
#include "conv_plan.h"
#include "conv_runner.h"

namespace resnet_fused {
namespace {

std::atomic<bool> invariant{false};

bool is_channels_last(const Tensor& t) {
  const Sizes want = channels_last_strides(t.shape());
  for (int64_t i = 0; i < 4; ++i) {
    if (t.size(i) > 1 && t.stride(i) != want[static_cast<size_t>(i)]) return false;
  }
  return true;
}

// True if every element of an input of sizes `in` goes into at least one output of each filter.
bool reads_all(const Conv& conv, const Sizes& in) {
  bool all = conv.groups == 1;
  for (int i = 0; i < 2; ++i) {
    const int64_t size = in[static_cast<size_t>(2 + i)];
    all = all && windows_cover(size, conv.out_size(i, size), conv.weight.size(2 + i),
                               conv.stride[i], conv.padding[i], conv.dilation[i]);
  }
  return all;
}

// ReLU of a dense fp32 tensor in place; returns the largest magnitude that was in it, infinite or
// NaN if one was.
double relu_max_abs(Tensor& t) {
  auto* data = static_cast<float*>(t.mutable_data());
  constexpr int64_t kParts = 64;
  const int64_t n = t.numel();
  float most[kParts] = {};
  parallel_for(kParts, 1, [&](int64_t begin, int64_t end) {
    const int64_t first = n * begin / kParts;
    most[begin] = relu_max_abs_cpu(data + first, n * end / kParts - first);
  });
  return max_abs_cpu(most, kParts);
}

}  // namespace

bool batch_invariant() { return invariant.load(std::memory_order_relaxed); }

Tensor to_channels_last(const Tensor& x) {
  if (is_channels_last(x)) {
    // Strides of size-1 dimensions are free; give them the usual values.
    const Sizes sizes = x.shape();
    return view(x, sizes, channels_last_strides(sizes), 0);
  }
  Tensor copy = empty_channels_last(x.shape(), dtype_of(x), x);
  check_torch(aoti_torch_copy_(copy.handle(), x.handle(), 0), "layout conversion");
  return copy;
}

namespace {

Conv read_rest(Args& args, const char* name, Tensor weight) {
  Conv c;
  c.name = name;
  c.weight = std::move(weight);
  c.bias = args.optional_tensor();
  c.bn_weight = args.optional_tensor();
  c.bn_bias = args.optional_tensor();
  c.running_mean = args.optional_tensor();
  c.running_var = args.optional_tensor();
  c.eps = args.number();
  const Sizes g = args.integers();
  if (!c.present()) return c;
  require(g.size() == 7, name,
          "geometry must be 7 integers (stride, padding, dilation of H and W, groups), got ",
          g.size());
  for (size_t i = 0; i < 2; ++i) {
    c.stride[i] = g[i];
    c.padding[i] = g[2 + i];
    c.dilation[i] = g[4 + i];
  }
  c.groups = g[6];
  return c;
}

}  // namespace

Conv read_conv(Args& args, const char* name) { return read_rest(args, name, args.tensor()); }
Conv read_optional_conv(Args& args, const char* name) {
  return read_rest(args, name, args.optional_tensor());
}

namespace {

// The chain on dense NHWC tensors.
Tensor run_dense(const Chain& chain, const Tensor& x, const Tensor& residual, bool bf16x3) {
  const DType dtype = dtype_of(x);
  const int64_t N = x.size(0);
  std::vector<ConvRunner> runners;
  Sizes sizes = x.shape();
  if (batch_invariant()) sizes[0] = 1;  // oneDNN's layouts may depend on it
  const Sizes in = sizes;
  int64_t most = 0;  // elements per image of the largest input and output pair
  for (const Conv& conv : chain.convs) {
    runners.emplace_back(conv, sizes, dtype, bf16x3);
    const Sizes next = conv.out_sizes(sizes);
    most = std::max(most, sizes[1] * sizes[2] * sizes[3] + next[1] * next[2] * next[3]);
    sizes = next;
  }
  Sizes out_sizes = sizes;
  out_sizes[0] = N;
  std::vector<ConvRunner> project;
  if (chain.downsample.present()) project.emplace_back(chain.downsample, in, dtype, bf16x3);

  const auto on_tiles = [](const ConvRunner& r) { return r.on_tiles(); };
  if (std::all_of(runners.begin(), runners.end(), on_tiles) &&
      std::all_of(project.begin(), project.end(), on_tiles)) {
    std::vector<TileStep> steps;
    for (const ConvRunner& r : runners) steps.push_back(r.tile_step());
    const TileStep step = project.empty() ? TileStep{} : project[0].tile_step();
    Tensor out = empty_channels_last(out_sizes, dtype, x);
    for (int64_t n : run_tile_chain(steps, project.empty() ? nullptr : &step, x,
                                    chain.add_x ? x : residual, chain.relu, out)) {
      const Tensor again = run_dense(chain, images(x, n, 1),
                                     residual.defined() ? images(residual, n, 1) : Tensor(), false);
      check_torch(aoti_torch_copy_(images(out, n, 1).handle(), again.handle(), 0), "a result");
    }
    return out;
  }

  uint32_t threads = 1;
  check_torch(torch_get_num_threads(&threads), "thread count");
  const int64_t piece =
      batch_invariant() ? 1 : images_per_piece(N, most * item_size(dtype), threads);
  // A chain in one piece needs no output of its own: the last convolution's is the result.
  Tensor y = piece < N ? empty_channels_last(out_sizes, dtype, x) : Tensor();
  Tensor last;
  for (int64_t n = 0; n < N; n += piece) {
    const int64_t count = std::min(piece, N - n);
    const Tensor xs = images(x, n, count);
    Tensor h = xs.share();
    double bound = kUnbounded;
    for (size_t i = 0; i + 1 < runners.size(); ++i) {
      if (i == 0 && dtype == DType::f32) {
        // The pass over the first output tells how large it is, and so spares the later ones.
        h = runners[0](h, Tensor(), false, Tensor(), kUnbounded);
        bound = relu_max_abs(h);
      } else {
        h = runners[i](h, Tensor(), true, Tensor(), bound);
        bound = runners[i].out_bound(bound);
      }
    }
    Tensor shortcut;
    if (!project.empty()) {
      shortcut = project[0](xs, Tensor(), false, Tensor(), kUnbounded);
    } else if (residual.defined()) {
      shortcut = images(residual, n, count);
    } else if (chain.add_x) {
      shortcut = xs.share();
    }
    // A pixel that is NaN or infinite makes every sum it goes into so.
    const bool finite = chain.add_x && project.empty() && reads_all(chain.convs[0], x.shape());
    if (shortcut.defined() && !finite) bound = kUnbounded;
    last = runners.back()(h, shortcut, chain.relu, y.defined() ? images(y, n, count) : Tensor(),
                          bound);
  }
  return y.defined() ? std::move(y) : std::move(last);
}

}  // namespace

Tensor run_chain(const Chain& chain) {
  const Sizes out_sizes = check_chain(chain);
  if (out_sizes[0] == 0) return empty_channels_last(out_sizes, dtype_of(chain.x), chain.x);
  const Tensor x = to_channels_last(chain.x);
  return run_dense(chain, x, chain.residual.defined() ? to_channels_last(chain.residual) : Tensor(),
                   chain.bf16x3);
}

}  // namespace resnet_fused

void resnet_fused_set_batch_invariant(int on) {
  resnet_fused::invariant.store(on != 0, std::memory_order_relaxed);
}
