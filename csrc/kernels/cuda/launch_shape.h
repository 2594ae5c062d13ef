// SPDX-License-Identifier: BSD-3-Clause
// The shape of a kernel launch and the limits that hold on every GPU that it is for: from sm_80 on,
// or Hopper alone. Host only, without CUDA's headers, so that plans can be tested anywhere.
#pragma once

#include <cstdint>

namespace resnet_fused {

struct LaunchShape {
  int64_t grid[3];
  int threads;
  int64_t shared_bytes;
  bool hopper = false;     // a kernel of sm_90a
  bool dependent = false;  // may begin while the kernel before it in the stream still runs
};

// 99 KB is what a block can have on the GPUs with the least (sm_86, sm_89, sm_120).
constexpr int64_t kMostShared = 99 * 1024;
constexpr int64_t kMostSharedHopper = 227 * 1024;

constexpr int64_t most_shared(const LaunchShape& s) {
  return s.hopper ? kMostSharedHopper : kMostShared;
}

constexpr bool fits_every_gpu(const LaunchShape& s) {
  return s.grid[0] >= 1 && s.grid[0] <= 0x7fffffff && s.grid[1] >= 1 && s.grid[1] <= 65535 &&
         s.grid[2] >= 1 && s.grid[2] <= 65535 && s.threads >= 1 && s.threads <= 1024 &&
         s.shared_bytes >= 0 && s.shared_bytes <= most_shared(s);
}

}  // namespace resnet_fused
