// SPDX-License-Identifier: BSD-3-Clause
// The kernels of the Hopper convolution and their launch for one element type.
#pragma once

#include "launch.cuh"
#include "wgmma_consume.cuh"
#include "wgmma_produce.cuh"

namespace resnet_fused {

template <typename T, int kTile>
__global__ void __launch_bounds__(kWgmmaThreads, 1)
    wgmma_conv_kernel(const __grid_constant__ WgmmaConvArgs a) {
  RESNET_FUSED_SHARED(memory);
  const WgmmaShared<T, kTile> shared(memory);
  if (threadIdx.x == 0) shared.make_barriers();
  __syncthreads();
  // Weights and BatchNorm may be results of the kernel before, too, which may have stored them
  // itself.
  if (a.dependent) {
    ptx::grid_wait();
    ptx::fence_async_global();
  }

  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  if (warp < kWarpgroup / 32) {
    ptx::registers_down<kProducerRegisters>();
    if (warp == 0 && lane == 0) load_operands<T, kTile>(a, shared);
    if (warp == 1 && lane == 0 && a.conv.plan.splits == 1) move_tiles<T, kTile>(a, shared);
  } else {
    ptx::registers_up<kConsumerRegisters>();
    consume<T, kTile>(a, shared);
  }
}

// On a plan that is valid.
template <typename T, int kTile = 0>
cudaError_t launch_wgmma_conv_as(const WgmmaConvArgs& a, const LaunchShape& shape,
                                 cudaStream_t stream) {
  if constexpr (kTile < kWgmmaTileCount) {
    if (a.conv.plan.tile != kTile) {
      return launch_wgmma_conv_as<T, kTile + 1>(a, shape, stream);
    }
    if constexpr (kWgmmaTiles[kTile].exists(sizeof(T))) {
      return launch<wgmma_conv_kernel<T, kTile>>(shape, stream, a);
    }
  }
  return cudaErrorInvalidValue;
}

// One file instantiates each type, so that they compile side by side.
extern template cudaError_t launch_wgmma_conv_as<Half>(const WgmmaConvArgs& a,
                                                       const LaunchShape& shape,
                                                       cudaStream_t stream);
extern template cudaError_t launch_wgmma_conv_as<BFloat>(const WgmmaConvArgs& a,
                                                         const LaunchShape& shape,
                                                         cudaStream_t stream);
extern template cudaError_t launch_wgmma_conv_as<float>(const WgmmaConvArgs& a,
                                                        const LaunchShape& shape,
                                                        cudaStream_t stream);

}  // namespace resnet_fused
