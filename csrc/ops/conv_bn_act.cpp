// SPDX-License-Identifier: BSD-3-Clause
#include "conv.h"
#include "ops.h"

namespace resnet_fused {

void conv_bn_act_cpu(StableIValue* stack, uint64_t, uint64_t) {
  Args args(stack);
  Chain chain;
  chain.op = "conv_bn_act";
  chain.x = args.tensor();
  chain.convs.push_back(read_conv(args, "conv."));
  chain.residual = args.optional_tensor();
  chain.relu = args.boolean();
  stack[0] = boxed(run_chain(chain));
}

}  // namespace resnet_fused
