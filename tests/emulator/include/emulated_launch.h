// SPDX-License-Identifier: BSD-3-Clause
// launch.cuh's launch() on a CPU; included by it.
#pragma once

#include <tuple>

namespace resnet_fused {

template <auto kKernel, typename... Args>
cudaError_t launch(const LaunchShape& shape, cudaStream_t, Args... args) {
  if (!fits_every_gpu(shape)) return cudaErrorInvalidConfiguration;
  std::tuple<Args...> arguments(args...);
  const auto body = [](void* p) { std::apply(kKernel, *static_cast<std::tuple<Args...>*>(p)); };
  return emulator::launch({__PRETTY_FUNCTION__,
                           {shape.grid[0], shape.grid[1], shape.grid[2]},
                           shape.threads,
                           shape.shared_bytes,
                           body,
                           &arguments,
                           sizeof(arguments),
                           shape.hopper,
                           shape.dependent});
}

}  // namespace resnet_fused
