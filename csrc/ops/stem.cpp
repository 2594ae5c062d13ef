// SPDX-License-Identifier: BSD-3-Clause
#include "../kernels/stem.h"

#include "../kernels/normalise.h"
#include "conv_cuda.h"
#include "conv_plan.h"
#include "conv_runner.h"
#include "layout.h"
#include "ops.h"
#include "tile_stem.h"

namespace resnet_fused {

namespace {

struct Stem {
  Chain chain;  // of one convolution
  Tensor norm;  // scale and shift [2, C] of an image of bytes; absent: x is normalised already
  DType dtype;  // in which it is computed: x's, or the weight's beside bytes

  const Conv& conv() const { return chain.convs[0]; }
};

Stem read(StableIValue* stack) {
  Args args(stack);
  Stem stem;
  stem.chain.op = "stem";
  stem.chain.x = args.tensor();
  stem.chain.convs.push_back(read_conv(args, "conv."));
  stem.chain.bf16x3 = args.boolean();
  stem.norm = args.optional_tensor();
  stem.dtype = dtype_of(stem.norm.defined() ? stem.conv().weight : stem.chain.x);
  return stem;
}

// Throw unless all arguments fit; returns the sizes of the convolution's output.
Sizes check(const Stem& stem) {
  const Tensor &x = stem.chain.x, &norm = stem.norm;
  const bool bytes = x.dtype() == aoti_torch_dtype_uint8();
  require(bytes == norm.defined(), "stem: x must be uint8 if norm is given, and only then");
  if (!bytes) return check_chain(stem.chain);
  require(x.dim() == 4, "stem: x must have 4 dimensions [N, C, H, W], got shape ", Shape{x});
  require(same_device(norm, x), "stem: norm must be on x's device");
  require(dtype_of(norm) == DType::f32, "stem: norm must be float32, got another dtype");
  require(same_sizes(norm, {2, x.size(1)}), "stem: norm must have shape [2, ", x.size(1),
          "], scale and shift of x's channels, got ", Shape{norm});
  check_conv(stem.conv(), x.shape(), x, "stem");
  require(stem.dtype != DType::f64,
          "stem: conv.weight must be float32, bfloat16 or float16 for x of uint8, got float64");
  return stem.conv().out_sizes(x.shape());
}

// What each byte stands for; `finite` if all are.
struct ByteTable {
  ByteTable(const Tensor& norm, ByteForm form) {
    const int64_t C = norm.size(1);
    const Tensor dense = laid_out(norm, {C, 1}, aoti_torch_dtype_float32());
    const auto* scale = static_cast<const float*>(dense.data());
    values.resize(static_cast<size_t>(C * kByteValues));
    finite = make_byte_table_cpu(scale, scale + C, C, form, values.data());
  }
  std::vector<uint32_t> values;
  bool finite;
};

ByteForm form_of(DType dtype) {
  if (dtype == DType::f32) return ByteForm::f32;
  return dtype == DType::bf16 ? ByteForm::bf16 : ByteForm::f16;
}

// Images of bytes as dense NHWC of `dtype`.
Tensor normalised(const Tensor& x, const Tensor& norm, DType dtype) {
  const ByteTable table(norm, form_of(dtype));
  Tensor y = empty_channels_last(x.shape(), dtype, x);
  const auto* from = static_cast<const uint8_t*>(x.data());
  auto* to = static_cast<unsigned char*>(y.mutable_data());
  const int64_t C = x.size(1), H = x.size(2), W = x.size(3), item = item_size(dtype);
  const int64_t n = x.stride(0), c = x.stride(1), h = x.stride(2), w = x.stride(3);
  parallel_for(x.size(0) * H, 16, [&](int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line) {
      look_up_line_cpu({from + line / H * n + line % H * h, table.values.data(),
                        to + line * W * C * item, item, C, W, c, w});
    }
  });
  return y;
}

// The convolution's output is written to memory, for some images at a time.
void convolve_and_pool(const Stem& stem, const Tensor& any_x, bool bf16x3, const Tensor& y) {
  const bool bytes = stem.norm.defined();
  const Tensor x = bytes ? any_x.share() : to_channels_last(any_x);
  const Sizes sizes = stem.conv().out_sizes(x.shape());
  const int64_t N = sizes[0], K = sizes[1], H = sizes[2], W = sizes[3];
  Sizes in = x.shape();
  if (batch_invariant()) in[0] = 1;
  const ConvRunner runner(stem.conv(), in, stem.dtype, bf16x3);
  uint32_t threads = 1;
  check_torch(torch_get_num_threads(&threads), "thread count");
  const int64_t piece =
      batch_invariant() ? 1 : images_per_piece(N, K * H * W * item_size(stem.dtype), threads);
  for (int64_t n = 0; n < N; n += piece) {
    const int64_t count = std::min(piece, N - n);
    const Tensor some = images(x, n, count);
    const Tensor h = runner(bytes ? normalised(some, stem.norm, stem.dtype) : some.share(),
                            Tensor(), false, Tensor(), kUnbounded);
    const Tensor out = images(y, n, count);
    const ReluMaxPoolParams p{h.data(), out.mutable_data(), count, H, W, K, stem.dtype};
    parallel_for(count * y.size(2), 1, [&](int64_t b, int64_t e) { relu_max_pool_cpu(p, b, e); });
  }
}

void run_stem(const Stem& stem, const Tensor& x, bool bf16x3, const Tensor& y) {
  const Conv& conv = stem.conv();
  const bool split = stem.dtype == DType::f32 && bf16x3 && tiles_available();
  const bool floats = stem.dtype == DType::f32 && !split && fma_available();
  const bool tiles = stem.dtype == DType::bf16 && tiles_available();
  if (!(split || floats || tiles) || !tile_stem_fits(conv, x.shape()))
    return convolve_and_pool(stem, x, bf16x3, y);
  std::unique_ptr<ByteTable> table;
  if (stem.norm.defined()) {
    table.reset(new ByteTable(stem.norm, split ? ByteForm::split : form_of(stem.dtype)));
    if (!table->finite) return convolve_and_pool(stem, x, false, y);
  }
  const Form form = split ? Form::split_windows : floats ? Form::float_windows : Form::tile_windows;
  const auto packed = pack(conv, x.shape(), form);
  const auto others = run_tile_stem(conv, *packed, read_affine(conv), products_of(form), x,
                                    table ? table->values.data() : nullptr, y);
  for (int64_t n : others) {
    const Tensor image = images(x, n, 1), out = images(y, n, 1);
    split ? run_stem(stem, image, false, out) : convolve_and_pool(stem, image, false, out);
  }
}

}  // namespace

void stem_cpu(StableIValue* stack, uint64_t, uint64_t) {
  const Stem stem = read(stack);
  const Sizes s = check(stem);
  const int64_t N = s[0];
  const Sizes sizes{N, s[1], (s[2] + 1) / 2, (s[3] + 1) / 2};
  Tensor y = empty_channels_last(sizes, stem.dtype, stem.chain.x);
  if (N > 0) run_stem(stem, stem.chain.x, stem.chain.bf16x3, y);
  stack[0] = boxed(std::move(y));
}

#ifdef RESNET_FUSED_CUDA
namespace {

// The whole stem in one kernel, which reads x and the weight where they are.
void run_stem_kernel(const CudaCall& call, const Stem& stem, const Tensor& y) {
  const Conv& conv = stem.conv();
  const Tensor &x = stem.chain.x, &w = conv.weight;
  const Tensor weight =
      w.dtype() == y.dtype() ? w.share() : laid_out(w, contiguous_strides(w.shape()), y.dtype());
  std::vector<Tensor> copies;
  StemParams p{};
  p.x = x.data();
  Tensor norm;
  if (stem.norm.defined()) {
    norm = laid_out(stem.norm, {x.size(1), 1}, aoti_torch_dtype_float32());
    p.norm = static_cast<const float*>(norm.data());
  }
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
  p.dtype = stem.dtype;
  p.most_blocks = 2 * call.multiprocessors();  // all resident at once
  call.check(launch_stem_cuda(p, call.stream()));
}

}  // namespace

void stem_cuda(StableIValue* stack, uint64_t, uint64_t) {
  const Stem stem = read(stack);
  const Conv& conv = stem.conv();
  const Sizes s = check(stem);
  const Tensor &x = stem.chain.x, &w = conv.weight;
  const CudaCall call(stem.chain.op, x);
  const Sizes sizes{s[0], s[1], (s[2] + 1) / 2, (s[3] + 1) / 2};
  Tensor y = empty_strided(sizes, channels_last_strides(sizes), torch_dtype(stem.dtype), x);
  if (s[0] == 0) {
    // nothing to compute
  } else if (stem_fits(x.size(1), s[1], w.size(2), w.size(3), conv.stride, conv.padding,
                       conv.dilation, conv.groups)) {
    run_stem_kernel(call, stem, y);
  } else {
    require(!stem.norm.defined(), "stem: on a GPU, x of uint8 needs a 7x7 convolution of stride 2 ",
            "and padding 3 to at most 128 filters, a multiple of 8; use resnet_fused.stem, which ",
            "normalises x beforehand");
    // The ReLU comes with the maximum.
    const Tensor h = run_conv_cuda(call, conv, channels_last(x), Tensor(), false);
    call.check(launch_relu_max_pool_cuda(
        {h.data(), y.mutable_data(), s[0], s[2], s[3], s[1], dtype_of(x)}, call.stream()));
  }
  stack[0] = boxed(std::move(y));
}
#endif

}  // namespace resnet_fused
