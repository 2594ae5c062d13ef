// SPDX-License-Identifier: BSD-3-Clause
#include "conv.h"
#include "ops.h"

namespace resnet_fused {

void bottleneck_cpu(StableIValue* stack, uint64_t, uint64_t) {
  Args args(stack);
  Chain chain;
  chain.op = "bottleneck";
  chain.x = args.tensor();
  for (const char* name : {"conv1.", "conv2.", "conv3."})
    chain.convs.push_back(read_conv(args, name));
  chain.downsample = read_optional_conv(args, "downsample.");
  chain.add_x = !chain.downsample.present();
  stack[0] = boxed(run_chain(chain));
}

}  // namespace resnet_fused
