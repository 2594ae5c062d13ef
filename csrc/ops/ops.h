// SPDX-License-Identifier: BSD-3-Clause
// The host side of every op, in the boxed convention: reads its arguments off the stack, leaves its
// result there.
#pragma once

#include "../torch_abi.h"

namespace resnet_fused {

using Op = void(StableIValue* stack, uint64_t num_args, uint64_t num_outputs);

Op add_relu_cpu;
Op basic_block_cpu;
Op bottleneck_cpu;
Op conv_bn_act_cpu;
Op pool_linear_cpu;
Op stem_cpu;

// Where RESNET_FUSED_CUDA is defined.
Op add_relu_cuda;
Op basic_block_cuda;
Op bottleneck_cuda;
Op conv_bn_act_cuda;
Op pool_linear_cuda;
Op stem_cuda;

}  // namespace resnet_fused
