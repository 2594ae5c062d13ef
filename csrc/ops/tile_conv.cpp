// SPDX-License-Identifier: BSD-3-Clause
#include "tile_conv.h"

#include <algorithm>
#include <atomic>

#include "../kernels/conv_bn_act.h"
#include "../kernels/tile_conv.h"
#include "conv_plan.h"

namespace resnet_fused {
namespace {

enum Path { kAuto, kOneDnn, kPortable };
std::atomic<int> path{kAuto};

using Kernel = void(const TileConvParams&, int64_t, int64_t, int64_t, int64_t);
Kernel* kernel() {
  return path.load(std::memory_order_relaxed) == kPortable ? tile_conv_portable : tile_conv_amx;
}

int64_t thread_count() {
  uint32_t threads = 1;
  check_torch(torch_get_num_threads(&threads), "thread count");
  return threads;
}

int64_t weight_bytes(const TileConvParams& p) {
  return p.taps * p.c_steps * kTileK * round_up(p.K, kTileN) * 2;
}

// Rows [0, rows) on all threads, all filters; or, where rows are few, all rows and filters divided.
void divide(const TileConvParams& p) {
  const int64_t threads = thread_count(), blocks = round_up(p.K, kTileN) / kTileN;
  Kernel* run = kernel();
  if (p.rows >= 2 * kTileM * threads) {
    const int64_t chunk =
        rows_per_chunk(p.rows, p.row_bytes, tile_input_bytes(weight_bytes(p)), threads);
    parallel_for((p.rows + chunk - 1) / chunk, 1, [&](int64_t b, int64_t e) {
      for (int64_t i = b; i < e; ++i)
        run(p, i * chunk, std::min(p.rows, (i + 1) * chunk), 0, blocks);
    });
  } else {
    parallel_for(blocks, 1, [&](int64_t b, int64_t e) { run(p, 0, p.rows, b, e); });
  }
}

const uint16_t* bf16(const Tensor& t) {
  return t.defined() ? static_cast<const uint16_t*>(t.data()) : nullptr;
}

Tensor scratch(int64_t elements, const Tensor& like) {
  return empty_strided({elements}, {1}, aoti_torch_dtype_bfloat16(), like);
}

// A 1x1 convolution of stride 1 without padding reads x as it is.
bool in_place(const Conv& conv, const Tensor& x, int64_t rows) {
  return conv.weight.size(2) == 1 && conv.weight.size(3) == 1 && conv.stride[0] == 1 &&
         conv.stride[1] == 1 && conv.padding[0] == 0 && conv.padding[1] == 0 &&
         x.size(1) % kTileK == 0 && rows >= kTileM;
}

}  // namespace

bool tiles_available() {
  const int now = path.load(std::memory_order_relaxed);
  return now == kPortable || (now == kAuto && amx_available());
}

Affine read_affine(const Conv& conv) {
  const int64_t K = conv.channels();
  Affine a;
  a.scale.resize(static_cast<size_t>(round_up(K, kTileN)));
  a.shift.resize(a.scale.size());
  const Tensor* fields[] = {&conv.bias, &conv.bn_weight, &conv.bn_bias, &conv.running_mean,
                            &conv.running_var};
  Tensor copies[5];
  const float* values[5] = {};
  for (int i = 0; i < 5; ++i) {
    const Tensor& t = *fields[i];
    if (!t.defined()) continue;
    if (dtype_of(t) == DType::f32 && (K == 1 || t.stride(0) == 1)) {
      values[i] = static_cast<const float*>(t.data());
      continue;
    }
    copies[i] = empty_strided({K}, {1}, aoti_torch_dtype_float32(), t);
    check_torch(aoti_torch_copy_(copies[i].handle(), t.handle(), 0), "reading a parameter");
    values[i] = static_cast<const float*>(copies[i].data());
  }
  fold_cpu({values[0], values[1], values[2], values[3], values[4], static_cast<float>(conv.eps),
            a.scale.data(), a.shift.data(), K});
  return a;
}

void run_tile_conv(const Conv& conv, const Tensor& packed, const Affine& affine, const Tensor& x,
                   const Tensor& residual, bool relu, bool stream, const Tensor& out) {
  const int64_t N = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3);
  const int64_t K = conv.channels(), R = conv.weight.size(2), S = conv.weight.size(3);
  const int64_t P = conv.out_size(0, H), Q = conv.out_size(1, W);
  TileConvParams p{};
  p.weight = bf16(packed);
  p.scale = affine.scale.data();
  p.shift = affine.shift.data();
  p.K = K;
  p.relu = relu;
  p.taps = R * S;
  p.c_steps = round_up(C, kTileK) / kTileK;
  p.filters_inside = filters_inside(p.taps, p.c_steps * kTileK, K);
  const uint16_t* rest = bf16(residual);
  auto* to = static_cast<uint16_t*>(out.mutable_data());
  p.stream = stream && K % kTileN == 0 && reinterpret_cast<uintptr_t>(to) % 64 == 0;

  if (in_place(conv, x, N * P * Q)) {
    const int64_t zero = 0;
    p.a = static_cast<const unsigned char*>(x.data());
    p.row_bytes = 2 * C;
    p.tap_bytes = &zero;
    p.residual = rest;
    p.out = to;
    p.rows = p.pitch = p.Q = N * P * Q;
    divide(p);
    return;
  }

  const Planes plan = plan_planes(H, W, P, Q, R, S, conv.stride, conv.padding, conv.dilation);
  PlaneParams planes{};
  planes.H = H;
  planes.W = W;
  planes.C = C;
  planes.channels = p.c_steps * kTileK;
  for (int i = 0; i < 2; ++i) {
    planes.stride[i] = conv.stride[i];
    planes.padding[i] = conv.padding[i];
    planes.phases[i] = plan.phases[i];
  }
  planes.lines = plan.lines;
  planes.width = plan.width;
  planes.pitch = plan.pitch;
  planes.plane_pixels = plan.pixels;
  std::vector<int64_t> taps;
  for (int64_t r = 0; r < R; ++r) {
    for (int64_t s = 0; s < S; ++s) {
      taps.push_back(plan.tap_pixel(r * conv.dilation[0], s * conv.dilation[1], conv.stride) *
                     planes.channels * 2);
    }
  }
  p.tap_bytes = taps.data();
  p.row_bytes = 2 * planes.channels;
  p.pitch = plan.pitch;
  p.Q = Q;
  p.rows = (P - 1) * plan.pitch + Q;

  const int64_t lines = plan.phases[0] * plan.phases[1] * plan.lines, threads = thread_count();
  const int64_t size = plan.phases[0] * plan.phases[1] * plan.pixels * planes.channels;
  const int64_t blocks = round_up(K, kTileN) / kTileN;
  // Whole images per thread, as long as every thread has one: planes stay in the cache of the
  // thread that filled them. Weights that do not fit beside them pass by once per `pass` images.
  const int64_t each = N / threads, whole = each * threads;
  const int64_t fit = std::max<int64_t>(tile_input_bytes(weight_bytes(p)) / (2 * size), 1);
  const int64_t pass = std::max<int64_t>(std::min(each, fit), 1), groups = whole > 0 ? threads : 1;
  const Tensor memory = scratch(groups * pass * size, x);
  auto* base = static_cast<uint16_t*>(memory.mutable_data());
  // Point planes and convolution at image n and scratch `at`.
  const auto aim = [&](int64_t n, uint16_t* at, PlaneParams& f, TileConvParams& g) {
    f.x = bf16(x) + n * H * W * C;
    f.planes = at;
    g.a = reinterpret_cast<const unsigned char*>(at);
    g.residual = rest != nullptr ? rest + n * P * Q * K : nullptr;
    g.out = to + n * P * Q * K;
  };
  if (whole > 0) {
    parallel_for(groups, 1, [&](int64_t b, int64_t e) {
      for (int64_t g = b; g < e; ++g) {
        for (int64_t first = g * each; first < (g + 1) * each; first += pass) {
          const int64_t count = std::min(pass, (g + 1) * each - first);
          PlaneParams f = planes;
          TileConvParams q = p;
          for (int64_t i = 0; i < count; ++i) {
            aim(first + i, base + (g * pass + i) * size, f, q);
            fill_planes_cpu(f, 0, lines);
          }
          const int64_t panels = count > 1 ? 1 : blocks;  // per call
          for (int64_t n = 0; n < blocks; n += panels) {
            for (int64_t i = 0; i < count; ++i) {
              aim(first + i, base + (g * pass + i) * size, f, q);
              kernel()(q, 0, q.rows, n, n + panels);
            }
          }
        }
      }
    });
  }
  for (int64_t n = whole; n < N; ++n) {
    aim(n, base, planes, p);
    parallel_for(lines, 8, [&](int64_t b, int64_t e) { fill_planes_cpu(planes, b, e); });
    divide(p);
  }
}

}  // namespace resnet_fused

void resnet_fused_cpu_path(int value) {
  resnet_fused::path.store(value, std::memory_order_relaxed);
}
