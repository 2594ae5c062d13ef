// SPDX-License-Identifier: BSD-3-Clause
#include "conv_cuda.h"
#include "ops.h"

namespace resnet_fused {

namespace {

Chain read(StableIValue* stack) {
  Args args(stack);
  Chain chain;
  chain.op = "conv_bn_act";
  chain.x = args.tensor();
  chain.convs.push_back(read_conv(args, "conv."));
  chain.residual = args.optional_tensor();
  chain.relu = args.boolean();
  chain.bf16x3 = args.boolean();
  return chain;
}

}  // namespace

void conv_bn_act_cpu(StableIValue* stack, uint64_t, uint64_t) {
  stack[0] = boxed(run_chain(read(stack)));
}

#ifdef RESNET_FUSED_CUDA
void conv_bn_act_cuda(StableIValue* stack, uint64_t, uint64_t) {
  stack[0] = boxed(run_chain_cuda(read(stack)));
}
#endif

}  // namespace resnet_fused
