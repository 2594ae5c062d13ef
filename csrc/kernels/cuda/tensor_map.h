// SPDX-License-Identifier: BSD-3-Clause
// A tensor map, which tells a Hopper GPU's copy unit where a tensor lies: opaque bytes that the
// driver encodes. Kernels take it in a parameter that is `const __grid_constant__`.
#pragma once

namespace resnet_fused {

struct alignas(64) TensorMap {
  unsigned char bytes[128];
};

}  // namespace resnet_fused
