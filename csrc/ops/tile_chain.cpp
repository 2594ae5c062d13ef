// SPDX-License-Identifier: BSD-3-Clause
#include "tile_chain.h"

#include <algorithm>
#include <cstring>

#include "../kernels/tile_conv.h"
#include "conv_plan.h"
#include "tile_map.h"

namespace resnet_fused {
namespace {

constexpr size_t kMostSteps = 3;
constexpr int64_t kMostAhead = int64_t{512} << 10;  // fetched ahead of a thread, a part of its L2

Window window_of(const Conv& conv, int64_t H, int64_t W) {
  Window w{};
  const int64_t in[2] = {H, W};
  for (int i = 0; i < 2; ++i) {
    w.in[i] = in[i];
    w.out[i] = conv.out_size(i, in[i]);
    w.size[i] = conv.weight.size(2 + i);
    w.stride[i] = conv.stride[i];
    w.padding[i] = conv.padding[i];
    w.dilation[i] = conv.dilation[i];
  }
  return w;
}

const uint16_t* bf16(const Tensor& t) {
  return t.defined() ? static_cast<const uint16_t*>(t.data()) : nullptr;
}

// One convolution on a group of images. Addresses in scratch are offsets in bytes.
struct Stage {
  TileConvParams p{};  // without addresses of activations
  TileLayout layout{};
  std::shared_ptr<const TileMap> map;
  std::vector<int64_t> tap_bytes;
  int64_t channels = 0;                   // of an input pixel
  bool in_place = false, copies = false;  // the input is x, or a copy of x
  bool projects = false;                  // the projection, a part of the last convolution's stage
  int64_t source = 0, target = -1;        // in scratch; a target of -1 is the output
  int64_t stride[2] = {1, 1};             // of a projection

  int64_t weight_bytes() const { return p.taps * p.c_steps * kTileK * panels() * kTileN * 2; }
  int64_t panels() const { return round_up(p.K, kTileN) / kTileN; }
  int64_t input_bytes() const { return map->rows * p.row_bytes; }
};

struct Operands {
  const uint16_t *x, *residual;
  uint16_t* out;
};

// A chain on groups of `images` images.
class Program {
 public:
  Program(const std::vector<TileStep>& steps, const TileStep* project, const Tensor& x, bool relu,
          int64_t images, bool inner)
      : images_(images), C_(x.size(1)), size_{x.size(2), x.size(3)} {
    std::vector<TileLayout> layouts;
    int64_t H = size_[0], W = size_[1];
    for (const TileStep& step : steps) {
      const Window w = window_of(*step.conv, H, W);
      layouts.push_back(tile_layout(w, images, inner && !(layouts.empty() && w.pointwise())));
      H = w.out[0];
      W = w.out[1];
    }
    out_pixels_ = H * W;
    K_ = steps.back().conv->channels();
    for (size_t i = 0; i < steps.size(); ++i) {
      const bool last = i + 1 == steps.size();
      Stage& s =
          add(steps[i], layouts[i], last ? nullptr : &layouts[i + 1], i == 0, last ? relu : true);
      if (!last) {
        s.p.whole = true;
        s.p.pitch = round_up(s.p.K, kTileN);
        s.target = scratch_;  // where the next stage's input will be
      }
    }
    steps_ = stages_.size();
    if (project != nullptr) add_projection(*project);
    for (Stage& s : stages_) {
      s.p.tap_bytes = s.tap_bytes.data();
      s.p.tiles = s.map->tiles.data();
      s.p.places = s.map->places.data();
    }
    // Lines of the output per strip, so that its part of x and of the output stay in L2.
    constexpr int64_t kStripBytes = int64_t{256} << 10;
    const int64_t line = std::max(size_[1] * C_, W * K_) * 2;
    lines_ = images == 1 ? H : 0;
    strip_ = std::max<int64_t>(kStripBytes / std::max<int64_t>(line, 1), 1);
  }

  int64_t scratch_bytes() const { return scratch_; }
  int64_t weight_bytes() const {
    int64_t bytes = 0;
    for (const Stage& s : stages_) bytes += s.weight_bytes();
    return bytes;
  }
  int64_t blocks() const {
    int64_t count = 0;
    for (const Stage& s : stages_) count += s.map->blocks() * s.p.taps * s.p.c_steps * s.panels();
    return count;
  }

  // Zeros where no image is ever written; once per scratch.
  void prepare(unsigned char* scratch) const {
    for (const Stage& s : stages_) {
      if (s.projects) continue;
      for (const Hole& h : s.map->holes)
        std::memset(scratch + s.source + h.first * s.p.row_bytes, 0,
                    static_cast<size_t>(h.count * s.p.row_bytes));
    }
  }

  // Images [n, n + images) on this thread.
  template <typename Kernel>
  void run(const Operands& at, int64_t n, unsigned char* scratch, Kernel* kernel) const {
    for (const Stage& s : stages_) {
      if (s.copies) copy(s, at, n, scratch, 0, copied_lines(s));
    }
    Progress progress;
    const TileMap& last = *stages_[steps_ - 1].map;
    const int64_t strips = lines_ == 0 ? 1 : (lines_ + strip_ - 1) / strip_;
    const int64_t x_lines = images_ * size_[0];
    for (int64_t i = 0; i < strips; ++i) {
      const int64_t end = std::min(lines_, (i + 1) * strip_);
      // Meanwhile the next strip's part of x comes from L3 or from memory.
      progress.ahead = at.x + (n * size_[0] + x_lines * (i + 1) / strips) * size_[1] * C_;
      progress.ahead_bytes = std::min(x_lines / strips * size_[1] * C_ * 2, kMostAhead);
      const int64_t upto =
          lines_ == 0 ? last.blocks() : last.blocks_to_line[static_cast<size_t>(end - 1)];
      advance(steps_ - 1, upto, progress, at, n, scratch, kernel);
    }
  }

  // Images [n, n + images) on all threads.
  template <typename Kernel>
  void run_together(const Operands& at, int64_t n, unsigned char* scratch, int64_t threads,
                    Kernel* kernel) const {
    for (const Stage& s : stages_) {
      if (!s.copies) continue;
      parallel_for(copied_lines(s), 8,
                   [&](int64_t b, int64_t e) { copy(s, at, n, scratch, b, e); });
    }
    for (size_t i = 0; i < steps_; ++i) {
      const Stage& s = stages_[i];
      TileConvParams p, project;
      aim(s, at, n, scratch, p, project);
      const int64_t blocks = s.map->blocks(), panels = s.panels();
      if (divide_filters(blocks, panels, threads, s.weight_bytes(), s.input_bytes())) {
        parallel_for(panels, 1,
                     [&](int64_t b, int64_t e) { sweep(s, p, 0, blocks, b, e, kernel); });
      } else {
        parallel_for(blocks, 1,
                     [&](int64_t b, int64_t e) { sweep(s, p, b, e, 0, panels, kernel); });
      }
    }
  }

 private:
  Stage& add(const TileStep& step, const TileLayout& layout, const TileLayout* to, bool reads_x,
             bool relu) {
    const int64_t C = step.conv->weight.size(1);
    const bool dense = layout.dense && C % kTileK == 0;
    const bool in_place = reads_x && dense && layout.pixels() >= kTileRows;
    Stage& s = begin(step, tile_map(layout, to, in_place));
    s.layout = layout;
    s.in_place = in_place;
    s.copies = reads_x && !in_place;
    for (int64_t tap : s.map->taps) s.tap_bytes.push_back(tap * s.p.row_bytes);
    s.p.taps = static_cast<int64_t>(s.tap_bytes.size());
    s.p.relu = relu;
    s.p.filters_inside = filters_inside(s.p.taps, s.channels, s.p.K);
    place(s);
    return s;
  }

  // The last convolution's rows are the projection's, too: its input lies where their first taps'
  // pixels lie, or is x itself if that is the same.
  void add_projection(const TileStep& step) {
    const TileLayout rows = stages_[steps_ - 1].layout;
    const int64_t* stride = step.conv->stride;
    Stage& s = begin(step, stages_[steps_ - 1].map);
    s.layout = rows;
    s.projects = true;
    s.tap_bytes = {0};
    s.p.taps = 1;
    const bool dense = rows.dense && !rows.inner && step.conv->weight.size(1) % kTileK == 0;
    s.in_place = dense && stride[0] == 1 && stride[1] == 1 && rows.pixels() % kTileM == 0;
    s.copies = !s.in_place;
    s.stride[0] = stride[0];
    s.stride[1] = stride[1];
    place(s);
  }

  Stage& begin(const TileStep& step, std::shared_ptr<const TileMap> map) {
    stages_.emplace_back();
    Stage& s = stages_.back();
    s.map = std::move(map);
    s.channels = round_up(step.conv->weight.size(1), kTileK);
    s.p.row_bytes = 2 * s.channels;
    s.p.c_steps = s.channels / kTileK;
    s.p.weight = bf16(step.packed->weight);
    s.p.scale = step.affine->scale.data();
    s.p.shift = step.affine->shift.data();
    s.p.K = s.p.pitch = step.conv->channels();
    return s;
  }

  // Gives a stage that does not read x itself its place in scratch.
  void place(Stage& s) {
    if (s.in_place) return;
    s.source = scratch_;
    // Not a multiple of 4 KB: buffers that are read together shall not meet in L1's sets.
    scratch_ += round_up(s.input_bytes(), 4096) + 320;
  }

  int64_t copied_lines(const Stage& s) const {
    return images_ * (s.projects ? s.layout.window.out[0] : size_[0]);
  }

  // Lines [begin, end) of the group's images to a stage's input: lines of x, of a projection those
  // that it reads.
  void copy(const Stage& s, const Operands& at, int64_t n, unsigned char* scratch, int64_t begin,
            int64_t end) const {
    const TileLayout& l = s.layout;
    const int64_t W = size_[1], step = l.inner ? images_ : 1, lines = copied_lines(s) / images_;
    auto* to = reinterpret_cast<uint16_t*>(scratch + s.source);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t g = i / lines, y = i % lines;
      const uint16_t* image = at.x + (n + g) * size_[0] * W * C_;
      if (s.projects) {
        copy_pixels_cpu({image + y * s.stride[0] * W * C_, to + l.row(g, y, 0) * s.channels,
                         l.window.out[1], C_, s.channels, s.stride[1], step});
        continue;
      }
      const int64_t stride = l.dense ? 1 : l.window.stride[1];
      for (int64_t x = 0; x < std::min(stride, W); ++x) {
        const int64_t first = l.at(g, y, x);
        if (first < 0) continue;
        int64_t count = (W - x + stride - 1) / stride;
        if (!l.dense) count = std::min(count, l.planes.width - (x + l.window.padding[1]) / stride);
        copy_pixels_cpu({image + (y * W + x) * C_, to + first * s.channels, count, C_, s.channels,
                         stride, step});
      }
    }
  }

  // A stage's parameters with addresses; those of the projection go to `project`, which must live
  // as long.
  void aim(const Stage& s, const Operands& at, int64_t n, unsigned char* scratch, TileConvParams& p,
           TileConvParams& project) const {
    const auto input = [&](const Stage& stage) {
      return stage.in_place
                 ? reinterpret_cast<const unsigned char*>(at.x + n * size_[0] * size_[1] * C_)
                 : scratch + stage.source;
    };
    p = s.p;
    p.a = input(s);
    const int64_t skip = n * out_pixels_ * K_;
    p.out = s.target < 0 ? at.out + skip : reinterpret_cast<uint16_t*>(scratch + s.target);
    if (&s != &stages_[steps_ - 1]) return;
    if (at.residual != nullptr) p.residual = at.residual + skip;
    if (stages_.size() > steps_) {
      project = stages_[steps_].p;
      project.a = input(stages_[steps_]);
      p.project = &project;
    }
  }

  // Blocks [begin, end) times panels [n_begin, n_end), so many rows at a time that they stay in L2
  // while the panels pass by.
  template <typename Kernel>
  static void sweep(const Stage& s, const TileConvParams& p, int64_t begin, int64_t end,
                    int64_t n_begin, int64_t n_end, Kernel* kernel) {
    const int64_t fit = tile_input_bytes(s.weight_bytes()) / (kTileM * p.row_bytes);
    const int64_t most = p.filters_inside ? end - begin : std::max<int64_t>(fit, 2);
    const int64_t pieces = (end - begin + most - 1) / std::max<int64_t>(most, 1);
    for (int64_t i = 0; i < pieces; ++i) {
      kernel(p, begin + (end - begin) * i / pieces, begin + (end - begin) * (i + 1) / pieces,
             n_begin, n_end);
    }
  }

  struct Progress {
    int64_t done[kMostSteps] = {};  // blocks of each stage
    const uint16_t* ahead = nullptr;
    int64_t ahead_bytes = 0;
  };

  // Run stage i up to block `to`, and before it what it reads.
  template <typename Kernel>
  void advance(size_t i, int64_t to, Progress& progress, const Operands& at, int64_t n,
               unsigned char* scratch, Kernel* kernel) const {
    int64_t& done = progress.done[i];
    if (to <= done) return;
    const Stage& s = stages_[i];
    if (i > 0) {
      const TileMap& before = *stages_[i - 1].map;
      const int64_t need = lines_ == 0 ? before.blocks()
                                       : before.blocks_to_line[static_cast<size_t>(
                                             s.map->last_line[static_cast<size_t>(to - 1)])];
      advance(i - 1, need, progress, at, n, scratch, kernel);
    }
    TileConvParams p, project;
    aim(s, at, n, scratch, p, project);
    if (i == 1 && stages_[0].in_place) {
      p.ahead = reinterpret_cast<const unsigned char*>(progress.ahead);
      p.ahead_bytes = progress.ahead_bytes;
    }
    sweep(s, p, done, to, 0, s.panels(), kernel);
    done = to;
  }

  std::vector<Stage> stages_;  // of the chain, and the projection
  size_t steps_ = 0;           // of the chain
  int64_t images_, C_, size_[2];
  int64_t out_pixels_ = 0, K_ = 0, lines_ = 0, strip_ = 1, scratch_ = 0;
};

}  // namespace

void run_tile_chain(const std::vector<TileStep>& steps, const TileStep* project, const Tensor& x,
                    const Tensor& residual, bool relu, const Tensor& out) {
  const int64_t N = x.size(0);
  uint32_t threads_now = 1;
  check_torch(torch_get_num_threads(&threads_now), "thread count");
  const int64_t threads = threads_now;
  Operands at{bf16(x), bf16(residual), static_cast<uint16_t*>(out.mutable_data())};
  if (project != nullptr && !window_of(*project->conv, x.size(2), x.size(3)).unpadded_1x1()) {
    // An unusual projection: its result is a residual, which lies where the output will.
    run_tile_chain({*project}, nullptr, x, Tensor(), false, out);
    project = nullptr;
    at.residual = at.out;
  }
  const auto program = [&](int64_t images, bool inner) {
    return Program(steps, project, x, relu, images, inner);
  };
  TileKernel* kernel = tile_kernel();

  // Whole images for each thread, as long as there is one for each.
  const int64_t each = N / threads, rest = N - each * threads;
  if (each > 0) {
    Program main = program(1, false);
    const int64_t group = images_per_group(each, main.scratch_bytes(), main.weight_bytes());
    if (group > 1) {
      Program outer = program(group, false), inner = program(group, true);
      main = inner.blocks() < outer.blocks() ? std::move(inner) : std::move(outer);
    }
    // Groups of one size; what is left over comes image by image.
    const Program single = program(1, false);
    const int64_t bytes =
        round_up(std::max(main.scratch_bytes(), single.scratch_bytes()), 4096) + 64;
    const Scratch scratch(static_cast<size_t>(bytes * threads));
    parallel_for(threads, 1, [&](int64_t b, int64_t e) {
      for (int64_t t = b; t < e; ++t) {
        unsigned char* memory = scratch.data() + t * bytes;
        int64_t n = t * each;
        const int64_t end = n + each;
        main.prepare(memory);
        for (; n + group <= end; n += group) main.run(at, n, memory, kernel);
        if (n < end && group > 1) single.prepare(memory);
        for (; n < end; ++n) single.run(at, n, memory, kernel);
      }
    });
  }
  if (rest > 0) {
    const Program together = program(rest, false);
    const Scratch scratch(static_cast<size_t>(together.scratch_bytes()));
    together.prepare(scratch.data());
    together.run_together(at, N - rest, scratch.data(), threads, kernel);
  }
}

}  // namespace resnet_fused
