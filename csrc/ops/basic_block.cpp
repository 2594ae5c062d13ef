// SPDX-License-Identifier: BSD-3-Clause
#include "conv_cuda.h"
#include "ops.h"

namespace resnet_fused {

namespace {

Chain read(StableIValue* stack) {
  Args args(stack);
  Chain chain;
  chain.op = "basic_block";
  chain.x = args.tensor();
  for (const char* name : {"conv1.", "conv2."}) chain.convs.push_back(read_conv(args, name));
  chain.downsample = read_optional_conv(args, "downsample.");
  chain.add_x = !chain.downsample.present();
  chain.bf16x3 = args.boolean();
  return chain;
}

}  // namespace

void basic_block_cpu(StableIValue* stack, uint64_t, uint64_t) {
  stack[0] = boxed(run_chain(read(stack)));
}

#ifdef RESNET_FUSED_CUDA
void basic_block_cuda(StableIValue* stack, uint64_t, uint64_t) {
  stack[0] = boxed(run_chain_cuda(read(stack)));
}
#endif

}  // namespace resnet_fused
