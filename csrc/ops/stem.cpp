// SPDX-License-Identifier: BSD-3-Clause
#include "../kernels/stem.h"

#include "conv_plan.h"
#include "conv_runner.h"
#include "ops.h"

namespace resnet_fused {

void stem_cpu(StableIValue* stack, uint64_t, uint64_t) {
  Args args(stack);
  Chain chain;
  chain.op = "stem";
  chain.x = args.tensor();
  chain.convs.push_back(read_conv(args, "conv."));
  const Sizes conv_sizes = check_chain(chain);
  const int64_t N = conv_sizes[0], K = conv_sizes[1], H = conv_sizes[2], W = conv_sizes[3];
  const Sizes sizes{N, K, (H + 1) / 2, (W + 1) / 2};
  const DType dtype = dtype_of(chain.x);
  Tensor y = empty_channels_last(sizes, dtype, chain.x);
  if (N > 0) {
    const Tensor x = to_channels_last(chain.x);
    const ConvRunner conv(chain.convs[0], x.shape(), dtype);
    uint32_t threads = 1;
    check_torch(torch_get_num_threads(&threads), "thread count");
    const int64_t piece = images_per_piece(N, K * H * W * item_size(dtype), threads);
    for (int64_t n = 0; n < N; n += piece) {
      const int64_t count = std::min(piece, N - n);
      const Tensor h = conv(images(x, n, count), Tensor(), false, Tensor(), kUnbounded);
      const Tensor out = images(y, n, count);
      const ReluMaxPoolParams p{h.data(), out.mutable_data(), count, H, W, K, dtype};
      parallel_for(count * sizes[2], 1, [&](int64_t b, int64_t e) { relu_max_pool_cpu(p, b, e); });
    }
  }
  stack[0] = boxed(std::move(y));
}

}  // namespace resnet_fused
