// SPDX-License-Identifier: BSD-3-Clause
// The kernels that run two convolutions as one, and their launch for one element type.
#pragma once

#include "launch.cuh"
#include "wgmma_consume.cuh"
#include "wgmma_pair_tile.cuh"
#include "wgmma_produce.cuh"

namespace resnet_fused {

// Operands in the order in which the consumers take turns.
template <typename T, int kTile>
struct PairProducer {
  using Shared = PairShared<kTile>;
  static constexpr WgmmaPairTile kShape = Shared::kShape;

  const WgmmaPairArgs& a;
  const Shared& shared;
  const PairWork work;
  RingPlace<Shared::kStages> at;

  __device__ __forceinline__ PairProducer(const WgmmaPairArgs& args, const Shared& s)
      : a(args), shared(s), work(args) {}

  // A turn of the first convolution of tile i.
  __device__ __forceinline__ void first(int i, int turn) {
    if (i >= work.tiles) return;
    const FirstPixel pixel(a.pair.first, work.tile(i) * kShape.rows);
    load_steps<T>(a.source, &a.image, &a.weight, pixel, 0, work.before(turn), work.before(turn + 1),
                  kShape.step_bytes(), shared, at);
  }
  // A part of the second one.
  __device__ __forceinline__ void second(int i, int part) {
    if (i < 0) return;
    constexpr int kChannels = kStepBytes / static_cast<int>(sizeof(T));
    const int k0 = part * kShape.columns;
    ptx::barrier_wait(shared.empty(at.stage), at.parity ^ 1);
    const uint32_t full = shared.full(at.stage);
    ptx::barrier_arrive_expect(full, kShape.filter_bytes());
#pragma unroll
    for (int block = 0; block < kShape.blocks(); ++block) {
      ptx::tensor_load_3d(shared.part_filters(at.stage, block), &a.filters, block * kChannels, 0,
                          k0, full);
    }
    at.next();
    if constexpr (kShape.sources == 2) {
      const FirstPixel pixel(a.pair.last, work.tile(i) * kShape.rows);
      load_steps<T>(a.project, &a.project_image, &a.project_weight, pixel, k0, 0,
                    work.project_steps, kShape.projection_bytes(), shared, at);
    }
  }

  __device__ __forceinline__ void run() {
    ptx::tensor_map_prefetch(&a.image);
    ptx::tensor_map_prefetch(&a.weight);
    ptx::tensor_map_prefetch(&a.filters);
    for (int round = 0; round <= work.tiles; ++round) {
      for (int turn = 0; turn < work.parts; ++turn) {
        // Consumer 0 comes first, whichever of the two it makes.
        if (round % 2 != 0) second(round - 1, turn);
        first(round, turn);
        if (round % 2 == 0) second(round - 1, turn);
      }
    }
    if (a.dependent) ptx::grid_launch();
  }
};

template <int kTile>
__device__ __forceinline__ void move_parts(const WgmmaPairArgs& a,
                                           const PairShared<kTile>& shared) {
  struct Corner {
    int m0, k0;
  };
  const PairWork work(a);
  const MmaConvParams& last = a.pair.last;
  move_outputs(shared, last.residual != nullptr ? &a.residual : nullptr, &a.out,
               static_cast<int>(last.K), work.tiles * work.parts, [&](int i) {
                 const int tile = i / work.parts, part = i - tile * work.parts;
                 return Corner{work.tile(tile) * kWgmmaPairTiles[kTile].rows,
                               part * kWgmmaPairTiles[kTile].columns};
               });
}

// All scales and shifts, by all consumers; 0 behind the last column.
template <int kTile>
__device__ __forceinline__ void make_pair_affine(const WgmmaPairArgs& a,
                                                 const PairShared<kTile>& shared) {
  constexpr int kThreads = kConsumers * kWarpgroup, kMiddle = PairShared<kTile>::kShape.middle;
  const int self = static_cast<int>(threadIdx.x) - kWarpgroup;
  const auto make = [&](const BatchNorm& bn, int64_t columns, int table, float* to) {
    for (int i = self; i < table; i += kThreads) {
      float scale = 0.0f, shift = 0.0f;
      if (i < columns) channel_affine(bn, i, scale, shift);
      to[i] = scale;
      to[table + i] = shift;
    }
  };
  make(a.pair.first.source[0].bn, kMiddle, kMiddle, shared.first_affine());
  for (int i = 0; i < PairShared<kTile>::kShape.sources; ++i) {
    make(a.pair.last.source[i].bn, a.pair.last.K, kMostPairColumns,
         shared.last_affine() + i * 2 * kMostPairColumns);
  }
  ptx::barrier_sync(1 + kConsumers, kThreads);
}

// A consumer's tiles of the block.
template <typename T, int kTile>
struct PairConsumer {
  using Shared = PairShared<kTile>;
  static constexpr WgmmaPairTile kShape = Shared::kShape;

  const WgmmaPairArgs& a;
  const Shared& shared;
  const ConsumerThread self;
  const PairWork work;
  RingPlace<Shared::kStages> at;
  RingPlace<Shared::kPlaces> place;
  uint32_t parity = 0;  // of turns

  __device__ __forceinline__ PairConsumer(const WgmmaPairArgs& args, const Shared& s)
      : a(args), shared(s), work(args) {}

  // The ring's barriers tell two phases apart, no more: a consumer looks at them only in its turn,
  // when all stages before its own have been seen. The first turn is nobody's to wait for.
  // `others`: stages of the other consumer in this turn.
  __device__ __forceinline__ void begin_turn(int others) {
    ptx::barrier_wait(shared.turn(self.consumer), self.consumer == 0 ? parity ^ 1 : parity);
    if (self.consumer == 1) at.skip(others);
  }
  __device__ __forceinline__ void end_turn(int others) {
    __syncwarp();
    if (self.lane == 0) ptx::barrier_arrive(shared.turn(1 - self.consumer));
    if (self.consumer == 0) at.skip(others);
    parity ^= 1;
  }
  // A round in which the other one works alone: the first, or behind this one's last tile.
  __device__ __forceinline__ void idle_round(int i) {
#pragma unroll 1
    for (int turn = 0; turn < work.parts; ++turn) {
      const int others = work.first_stages(i, turn);
      begin_turn(others);
      end_turn(others);
    }
  }

  // The first convolution of tile i, into this consumer's tile between.
  __device__ __forceinline__ void first(int i) {
    float sums[1][kShape.groups()][kShape.middle / 2];
    begin_sums(sums[0]);
    const int others = work.last_stages(i - 1);
#pragma unroll 1
    for (int turn = 0; turn < work.parts; ++turn) {
      int last = -1;
      begin_turn(others);
      multiply_steps<T>(shared, self, 0, work.before(turn), work.before(turn + 1), at, last,
                        sums[0]);
      end_turn(others);
#pragma unroll
      for (int g = 0; g < kShape.groups(); ++g) ptx::wgmma_wait<0>(sums[0][g]);
      if (last >= 0 && self.lane == 0) ptx::barrier_arrive(shared.empty(last));
    }
    // All warps have multiplied what the last tile left there: a wait speaks for its own warp
    // alone.
    ptx::barrier_sync(1 + self.consumer, kWarpgroup);
    finish_sums<T, kShape.rows, kStepBytes, kShape.middle>(Finish{false, a.pair.first.relu}, self,
                                                           self.row, shared.first_affine(),
                                                           shared.middle(self.consumer), sums);
    ptx::fence_async_shared();
    ptx::barrier_sync(1 + self.consumer, kWarpgroup);
  }

  // The second one, part by part.
  __device__ __forceinline__ void second(int i) {
    const Finish finish{a.pair.last.residual != nullptr, a.pair.last.relu};
#pragma unroll 1
    for (int part = 0; part < work.parts; ++part) {
      float sums[kShape.sources][kShape.groups()][kShape.columns / 2];
#pragma unroll
      for (int source = 0; source < kShape.sources; ++source) begin_sums(sums[source]);
      const int others = work.first_stages(i + 1, part);
      begin_turn(others);
      ptx::barrier_wait(shared.full(at.stage), at.parity);
#pragma unroll
      for (int block = 0; block < kShape.blocks(); ++block) {
        multiply_step<T>(ptx::wgmma_descriptor(shared.middle_step(self.consumer, block)),
                         ptx::wgmma_descriptor(shared.part_filters(at.stage, block)), block > 0,
                         sums[0]);
      }
      int last = at.stage;
      at.next();
      if constexpr (kShape.sources == 2) {
        multiply_steps<T>(shared, self, 0, 0, work.project_steps, at, last, sums[1]);
      }
      end_turn(others);
#pragma unroll
      for (int source = 0; source < kShape.sources; ++source) {
#pragma unroll
        for (int g = 0; g < kShape.groups(); ++g) ptx::wgmma_wait<0>(sums[source][g]);
      }
      if (self.lane == 0) ptx::barrier_arrive(shared.empty(last));

      ptx::barrier_wait(shared.open(place.stage), place.parity);
      finish_sums<T, kShape.rows, Shared::kPanel, kMostPairColumns>(
          finish, self, self.row, shared.last_affine() + part * kShape.columns,
          shared.outputs(place.stage), sums);
      ptx::fence_async_shared();
      __syncwarp();
      if (self.lane == 0) ptx::barrier_arrive(shared.done(place.stage));
      place.next();
    }
  }

  __device__ __forceinline__ void run() {
    if (self.consumer == 1) {
      idle_round(0);
      place.skip(work.parts);
    }
#pragma unroll 1
    for (int i = self.consumer; i < work.tiles; i += kConsumers) {
      first(i);
      second(i);
      place.skip(work.parts);  // the other one's, of tile i + 1
    }
    if (work.tiles % kConsumers == self.consumer) idle_round(work.tiles);
  }
};

template <typename T, int kTile>
__global__ void __launch_bounds__(kWgmmaThreads, 1)
    wgmma_pair_kernel(const __grid_constant__ WgmmaPairArgs a) {
  RESNET_FUSED_SHARED(memory);
  const PairShared<kTile> shared(memory);
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
    if (warp == 0 && lane == 0) PairProducer<T, kTile>(a, shared).run();
    if (warp == 1 && lane == 0) move_parts<kTile>(a, shared);
  } else {
    ptx::registers_up<kConsumerRegisters>();
    make_pair_affine<kTile>(a, shared);
    PairConsumer<T, kTile>(a, shared).run();
  }
}

// On a tile that fits.
template <typename T, int kTile = 0>
cudaError_t launch_wgmma_pair_as(const WgmmaPairArgs& a, const LaunchShape& shape,
                                 cudaStream_t stream) {
  if constexpr (kTile < kWgmmaPairTileCount) {
    if (a.pair.tile != kTile) return launch_wgmma_pair_as<T, kTile + 1>(a, shape, stream);
    return launch<wgmma_pair_kernel<T, kTile>>(shape, stream, a);
  }
  return cudaErrorInvalidValue;
}

extern template cudaError_t launch_wgmma_pair_as<Half>(const WgmmaPairArgs& a,
                                                       const LaunchShape& shape,
                                                       cudaStream_t stream);
extern template cudaError_t launch_wgmma_pair_as<BFloat>(const WgmmaPairArgs& a,
                                                         const LaunchShape& shape,
                                                         cudaStream_t stream);

}  // namespace resnet_fused
