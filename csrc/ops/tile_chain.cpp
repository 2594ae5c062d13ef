// SPDX-License-Identifier: BSD-3-Clause
#include "tile_chain.h"

#include <algorithm>
#include <optional>

#include "../kernels/conv_bn_act.h"
#include "conv_plan.h"
#include "tile_program.h"

namespace resnet_fused {
namespace {

const unsigned char* bytes_of(const Tensor& t) {
  return t.defined() ? static_cast<const unsigned char*>(t.data()) : nullptr;
}

}  // namespace

std::vector<int64_t> run_tile_chain(const std::vector<TileStep>& steps, const TileStep* project,
                                    const Tensor& x, const Tensor& residual, bool relu,
                                    const Tensor& out) {
  const int64_t N = x.size(0);
  uint32_t threads_now = 1;
  check_torch(torch_get_num_threads(&threads_now), "thread count");
  const int64_t threads = threads_now;
  Operands at{bytes_of(x), bytes_of(residual), static_cast<unsigned char*>(out.mutable_data())};
  if (project != nullptr && !window_of(*project->conv, x.size(2), x.size(3)).unpadded_1x1()) {
    // An unusual projection: its result is a residual, which lies where the output will. What is
    // not finite in it stays so.
    run_tile_chain({*project}, nullptr, x, Tensor(), false, out);
    project = nullptr;
    at.residual = at.out;
  }
  const auto program = [&](int64_t images, bool inner) {
    return TileProgram(steps, project, x, relu, images, inner);
  };
  const TileKernels& kernels = tile_kernels(steps[0].products);
  std::vector<char> finite(static_cast<size_t>(N), 1);
  const auto mark = [&](int64_t n, int64_t count) {
    std::fill_n(finite.begin() + n, count, char{0});
  };

  // Whole images for each thread, as long as there is one for each.
  const int64_t each = N / threads, rest = N - each * threads;
  if (each > 0) {
    const TileProgram single = program(1, false);
    const int64_t group = images_per_group(each, single.scratch_bytes(1), single.weight_bytes());
    std::optional<TileProgram> grouped;
    if (group > 1) {
      TileProgram outer = program(group, false), inner = program(group, true);
      grouped = inner.cost() < outer.cost() ? std::move(inner) : std::move(outer);
    }
    // Groups of one size; what is left over comes image by image.
    const TileProgram& main = grouped.has_value() ? *grouped : single;
    const int64_t bytes =
        round_up(std::max(main.scratch_bytes(1), single.scratch_bytes(1)), 4096) + 64;
    const Scratch scratch(static_cast<size_t>(bytes * threads));
    parallel_for(threads, 1, [&](int64_t b, int64_t e) {
      for (int64_t t = b; t < e; ++t) {
        unsigned char* memory = scratch.data() + t * bytes;
        int64_t n = t * each;
        const int64_t end = n + each;
        main.prepare(memory);
        for (; n + group <= end; n += group) {
          if (!main.run(at, n, memory, kernels)) mark(n, group);
        }
        if (n < end && group > 1) single.prepare(memory);
        for (; n < end; ++n) {
          if (!single.run(at, n, memory, kernels)) mark(n, 1);
        }
      }
    });
  }
  if (rest > 0) {
    const TileProgram together = program(rest, false);
    const Scratch scratch(static_cast<size_t>(together.scratch_bytes(threads)));
    together.prepare(scratch.data());
    if (!together.run_together(at, N - rest, scratch.data(), threads, kernels))
      mark(N - rest, rest);
  }

  std::vector<int64_t> odd;
  const int64_t image = out.size(1) * out.size(2) * out.size(3);
  for (int64_t n = 0; n < N; ++n) {
    if (finite[static_cast<size_t>(n)] == 0 &&
        !all_finite_cpu(at.out + n * image * 4, DType::f32, image))
      odd.push_back(n);
  }
  return odd;
}

}  // namespace resnet_fused
