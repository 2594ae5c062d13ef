// SPDX-License-Identifier: BSD-3-Clause
#include "../kernels/stem.h"

#include "conv_cuda.h"
#include "conv_plan.h"
#include "conv_runner.h"
#include "layout.h"
#include "ops.h"
#include "tile_stem.h"

namespace resnet_fused {

namespace {

Chain read(StableIValue* stack) {
  Args args(stack);
  Chain chain;
  chain.op = "stem";
  chain.x = args.tensor();
  chain.convs.push_back(read_conv(args, "conv."));
  chain.bf16x3 = args.boolean();
  return chain;
}

// The convolution's output is written to memory, for some images at a time.
void convolve_and_pool(const Conv& conv, const Tensor& any_x, bool bf16x3, const Tensor& y) {
  const Tensor x = to_channels_last(any_x);
  const DType dtype = dtype_of(x);
  const Sizes sizes = conv.out_sizes(x.shape());
  const int64_t N = sizes[0], K = sizes[1], H = sizes[2], W = sizes[3];
  Sizes in = x.shape();
  if (batch_invariant()) in[0] = 1;
  const ConvRunner runner(conv, in, dtype, bf16x3);
  uint32_t threads = 1;
  check_torch(torch_get_num_threads(&threads), "thread count");
  const int64_t piece =
      batch_invariant() ? 1 : images_per_piece(N, K * H * W * item_size(dtype), threads);
  for (int64_t n = 0; n < N; n += piece) {
    const int64_t count = std::min(piece, N - n);
    const Tensor h = runner(images(x, n, count), Tensor(), false, Tensor(), kUnbounded);
    const Tensor out = images(y, n, count);
    const ReluMaxPoolParams p{h.data(), out.mutable_data(), count, H, W, K, dtype};
    parallel_for(count * y.size(2), 1, [&](int64_t b, int64_t e) { relu_max_pool_cpu(p, b, e); });
  }
}

void run_stem(const Conv& conv, const Tensor& x, bool bf16x3, const Tensor& y) {
  const DType dtype = dtype_of(x);
  const bool split = dtype == DType::f32 && bf16x3 && tiles_available();
  const bool floats = dtype == DType::f32 && !split && fma_available();
  const bool tiles = dtype == DType::bf16 && tiles_available();
  if (!(split || floats || tiles) || !tile_stem_fits(conv, x.shape()))
    return convolve_and_pool(conv, x, bf16x3, y);
  const Form form = split ? Form::split_windows : floats ? Form::float_windows : Form::tile_windows;
  const auto packed = pack(conv, x.shape(), form);
  for (int64_t n : run_tile_stem(conv, *packed, read_affine(conv), products_of(form), x, y)) {
    const Tensor image = images(x, n, 1), out = images(y, n, 1);
    split ? run_stem(conv, image, false, out) : convolve_and_pool(conv, image, false, out);
  }
}

}  // namespace

void stem_cpu(StableIValue* stack, uint64_t, uint64_t) {
  const Chain chain = read(stack);
  const Sizes s = check_chain(chain);
  const int64_t N = s[0];
  const Sizes sizes{N, s[1], (s[2] + 1) / 2, (s[3] + 1) / 2};
  Tensor y = empty_channels_last(sizes, dtype_of(chain.x), chain.x);
  if (N > 0) run_stem(chain.convs[0], chain.x, chain.bf16x3, y);
  stack[0] = boxed(std::move(y));
}

#ifdef RESNET_FUSED_CUDA
namespace {

// The whole stem in one kernel, which reads x and the weight where they are.
void run_stem_kernel(const CudaCall& call, const Conv& conv, const Tensor& x, const Tensor& y) {
  const Tensor& w = conv.weight;
  const Tensor weight =
      w.dtype() == x.dtype() ? w.share() : laid_out(w, contiguous_strides(w.shape()), x.dtype());
  std::vector<Tensor> copies;
  StemParams p{};
  p.x = x.data();
  p.weight = weight.data();
  for (int i = 0; i < 4; ++i) {
    p.x_strides[i] = x.stride(i);
    p.weight_strides[i] = weight.stride(i);
  }
  p.bn = batch_norm(conv, copies);
  p.out = y.mutable_data();
  p.N = x.size(0);
  p.C = x.size(1);
  p.H = x.size(2);
  p.W = x.size(3);
  p.K = w.size(0);
  p.dtype = dtype_of(x);
  p.most_blocks = 2 * call.multiprocessors();  // all resident at once
  call.check(launch_stem_cuda(p, call.stream()));
}

}  // namespace

void stem_cuda(StableIValue* stack, uint64_t, uint64_t) {
  const Chain chain = read(stack);
  const Conv& conv = chain.convs[0];
  const Sizes s = check_chain(chain);
  const CudaCall call(chain.op, chain.x);
  const Sizes sizes{s[0], s[1], (s[2] + 1) / 2, (s[3] + 1) / 2};
  const Tensor& x = chain.x;
  Tensor y = empty_strided(sizes, channels_last_strides(sizes), x.dtype(), x);
  const Tensor& w = conv.weight;
  if (s[0] == 0) {
    // nothing to compute
  } else if (stem_fits(x.size(1), s[1], w.size(2), w.size(3), conv.stride, conv.padding,
                       conv.dilation, conv.groups)) {
    run_stem_kernel(call, conv, x, y);
  } else {
    // The ReLU comes with the maximum.
    const Tensor h = run_conv_cuda(call, conv, channels_last(x), Tensor(), false);
    call.check(launch_relu_max_pool_cuda(
        {h.data(), y.mutable_data(), s[0], s[2], s[3], s[1], dtype_of(x)}, call.stream()));
  }
  stack[0] = boxed(std::move(y));
}
#endif

}  // namespace resnet_fused
