// SPDX-License-Identifier: BSD-3-Clause
#include "tile_program.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "../kernels/tile_conv.h"
#include "conv_plan.h"

namespace resnet_fused {
namespace {

constexpr int64_t kMostAhead = int64_t{512} << 10;  // fetched ahead of a thread, a part of its L2

}  // namespace

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

TileProgram::TileProgram(const std::vector<TileStep>& steps, const TileStep* project,
                         const Tensor& x, bool relu, int64_t images, bool inner)
    : products_(steps[0].products),
      item_(item_bytes(products_)),
      images_(images),
      C_(x.size(1)),
      size_{x.size(2), x.size(3)} {
  std::vector<TileLayout> layouts;
  const int64_t part = products_ == Products::fp32 ? kFmaRows : kTileRows;
  int64_t H = size_[0], W = size_[1];
  for (const TileStep& step : steps) {
    const Window w = window_of(*step.conv, H, W);
    layouts.push_back(tile_layout(w, images, inner && !(layouts.empty() && w.pointwise()), part));
    H = w.out[0];
    W = w.out[1];
  }
  out_pixels_ = H * W;
  K_ = steps.back().conv->channels();
  for (size_t i = 0; i < steps.size(); ++i) {
    const bool last = i + 1 == steps.size();
    const Stage& s =
        add(steps[i], layouts[i], last ? nullptr : &layouts[i + 1], i == 0, last ? relu : true);
    if (i == 0) continue;
    Stage& before = stages_[i - 1];
    before.target = s.source;
    before.p.whole = true;
    before.p.pixel_bytes = s.p.row_bytes;
    before.p.panel_bytes = s.chunk_bytes;
    before.p.out_low_bytes = s.p.low_bytes;
  }
  steps_ = stages_.size();
  if (project != nullptr) add_projection(*project);
  for (Stage& s : stages_) {
    s.p.step_bytes = s.step_bytes.data();
    s.p.tiles = s.map->tiles.data();
    s.p.places = s.map->places.data();
  }
  // Lines of the output per strip, so that its part of x and of the output stay in L2.
  constexpr int64_t kStripBytes = int64_t{256} << 10;
  const int64_t line = std::max(size_[1] * C_, W * K_) * item_;
  lines_ = images == 1 ? H : 0;
  strip_ = std::max<int64_t>(kStripBytes / std::max<int64_t>(line, 1), 1);
}

int64_t TileProgram::weight_bytes() const {
  int64_t bytes = 0;
  for (const Stage& s : stages_) bytes += s.weight_bytes();
  return bytes;
}

int64_t TileProgram::cost() const {
  int64_t count = 0;
  for (const Stage& s : stages_) count += s.map->parts * s.p.steps * s.panels();
  return count;
}

void TileProgram::prepare(unsigned char* scratch) const {
  for (const Stage& s : stages_) {
    if (s.projects) continue;
    const int64_t planes = s.channels / kTileK * (products_ == Products::bf16x3 ? 2 : 1);
    for (int64_t i = 0; i < planes; ++i) {
      unsigned char* plane = scratch + s.source + i * s.p.low_bytes;
      for (const Hole& h : s.map->holes)
        std::memset(plane + h.first * s.p.row_bytes, 0,
                    static_cast<size_t>(h.count * s.p.row_bytes));
    }
  }
}

bool TileProgram::run(const Operands& at, int64_t n, unsigned char* scratch,
                      const TileKernels& kernels) const {
  for (const Stage& s : stages_) {
    if (s.input == Input::copied) copy(s, at, n, scratch, 0, copied_lines(s), kernels);
  }
  Progress progress;
  const TileMap& last = *stages_[steps_ - 1].map;
  const int64_t strips = lines_ == 0 ? 1 : (lines_ + strip_ - 1) / strip_;
  const int64_t x_lines = images_ * size_[0];
  for (int64_t i = 0; i < strips; ++i) {
    const int64_t end = std::min(lines_, (i + 1) * strip_);
    // Meanwhile the next strip's part of x comes from L3 or from memory.
    progress.ahead = at.x + (n * size_[0] + x_lines * (i + 1) / strips) * size_[1] * C_ * item_;
    progress.ahead_bytes = std::min(x_lines / strips * size_[1] * C_ * item_, kMostAhead);
    const int64_t upto =
        lines_ == 0 ? last.blocks() : last.blocks_to_line[static_cast<size_t>(end - 1)];
    advance(steps_ - 1, upto, progress, at, n, scratch, kernels);
  }
  return progress.finite;
}

bool TileProgram::run_together(const Operands& at, int64_t n, unsigned char* scratch,
                               int64_t threads, const TileKernels& kernels) const {
  std::atomic<bool> finite{true};
  for (const Stage& s : stages_) {
    if (s.input != Input::copied) continue;
    parallel_for(copied_lines(s), 8,
                 [&](int64_t b, int64_t e) { copy(s, at, n, scratch, b, e, kernels); });
  }
  for (size_t i = 0; i < steps_; ++i) {
    const Stage& s = stages_[i];
    TileConvParams p, project;
    aim(s, at, n, scratch, p, project);
    const int64_t blocks = s.map->blocks(), panels = s.panels();
    const bool by_filters =
        divide_filters(blocks, panels, threads, s.weight_bytes(), s.input_bytes());
    const int64_t shared = by_filters ? panels : blocks;
    parallel_for(threads, 1, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t) {
        const int64_t b = shared * t / threads, e = shared * (t + 1) / threads;
        unsigned char* rows = scratch + scratch_ + t * s.copied_rows_bytes();
        if (!(by_filters ? sweep(s, p, 0, blocks, b, e, rows, kernels)
                         : sweep(s, p, b, e, 0, panels, rows, kernels)))
          finite = false;
      }
    });
  }
  return finite;
}

Stage& TileProgram::add(const TileStep& step, const TileLayout& layout, const TileLayout* to,
                        bool reads_x, bool relu) {
  const int64_t C = step.conv->weight.size(1);
  const bool dense = layout.dense && C % kTileK == 0;
  const bool in_place = reads_x && dense && layout.pixels() >= kTileRows;
  Stage& s = begin(step, tile_map(layout, to, in_place));
  s.layout = layout;
  if (reads_x) s.input = Input::copied;
  if (in_place) s.input = products_ == Products::bf16x3 ? Input::copied_by_rows : Input::in_place;
  s.p.relu = relu;
  s.p.steps = s.channels / kTileK * static_cast<int64_t>(s.map->taps.size());
  s.p.filters_inside = filters_inside(s.p.steps, item_, s.p.K);
  place(s, s.map->taps);
  return s;
}

void TileProgram::add_projection(const TileStep& step) {
  const TileLayout rows = stages_[steps_ - 1].layout;
  const int64_t* stride = step.conv->stride;
  Stage& s = begin(step, stages_[steps_ - 1].map);
  s.layout = rows;
  s.projects = true;
  s.p.steps = s.channels / kTileK;
  const bool dense = rows.dense && !rows.inner && step.conv->weight.size(1) % kTileK == 0;
  const bool in_place = dense && products_ != Products::bf16x3 && stride[0] == 1 &&
                        stride[1] == 1 && rows.pixels() % kTileM == 0;
  s.input = in_place ? Input::in_place : Input::copied;
  s.stride[0] = stride[0];
  s.stride[1] = stride[1];
  place(s, {0});
}

Stage& TileProgram::begin(const TileStep& step, std::shared_ptr<const TileMap> map) {
  stages_.emplace_back();
  Stage& s = stages_.back();
  s.map = std::move(map);
  s.channels = round_up(step.conv->weight.size(1), kTileK);
  s.p.products = products_;
  s.p.depth = kTileK;
  s.p.weight = step.packed->weight.data();
  s.p.scale = step.affine->scale.data();
  s.p.shift = step.affine->shift.data();
  s.p.K = step.conv->channels();
  s.p.pixel_bytes = s.p.K * item_;
  s.p.panel_bytes = kTileN * item_;
  return s;
}

void TileProgram::place(Stage& s, const std::vector<int64_t>& taps) {
  if (s.input == Input::in_place) {
    s.p.row_bytes = s.pixel_bytes();
    s.chunk_bytes = kTileK * item_;
  } else {
    s.p.row_bytes = (products_ == Products::fp32 ? 4 : 2) * kTileK;
    // An odd number of cache lines: what is read together shall not meet in L1's sets.
    s.p.low_bytes = (s.rows() | 1) * s.p.row_bytes;
    s.chunk_bytes = s.p.low_bytes * (products_ == Products::bf16x3 ? 2 : 1);
  }
  for (int64_t c = 0; c < s.channels / kTileK; ++c) {
    for (int64_t tap : taps) s.step_bytes.push_back(tap * s.p.row_bytes + c * s.chunk_bytes);
  }
  if (s.input == Input::in_place || s.input == Input::copied_by_rows) return;
  s.source = scratch_;
  scratch_ += s.channels / kTileK * s.chunk_bytes;
}

int64_t TileProgram::copied_lines(const Stage& s) const {
  return images_ * (s.projects ? s.layout.window.out[0] : size_[0]);
}

void TileProgram::copy(const Stage& s, const Operands& at, int64_t n, unsigned char* scratch,
                       int64_t begin, int64_t end, const TileKernels& kernels) const {
  const TileLayout& l = s.layout;
  const int64_t W = size_[1], pixel = C_ * item_, lines = copied_lines(s) / images_;
  const int64_t step = (l.inner ? images_ : 1) * s.p.row_bytes;
  unsigned char* to = scratch + s.source;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t g = i / lines, y = i % lines;
    const unsigned char* image = at.x + (n + g) * size_[0] * W * pixel;
    if (s.projects) {
      kernels.copy({image + y * s.stride[0] * W * pixel, to + l.row(g, y, 0) * s.p.row_bytes,
                    l.window.out[1], C_, s.stride[1] * pixel, step, s.chunk_bytes, products_,
                    s.p.low_bytes});
      continue;
    }
    const int64_t stride = l.dense ? 1 : l.window.stride[1];
    for (int64_t x = 0; x < std::min(stride, W); ++x) {
      const int64_t first = l.at(g, y, x);
      if (first < 0) continue;
      int64_t count = (W - x + stride - 1) / stride;
      if (!l.dense) count = std::min(count, l.planes.width - (x + l.window.padding[1]) / stride);
      kernels.copy({image + (y * W + x) * pixel, to + first * s.p.row_bytes, count, C_,
                    stride * pixel, step, s.chunk_bytes, products_, s.p.low_bytes});
    }
  }
}

void TileProgram::aim(const Stage& s, const Operands& at, int64_t n, unsigned char* scratch,
                      TileConvParams& p, TileConvParams& project) const {
  const auto input = [&](const Stage& stage) {
    const bool is_x = stage.input == Input::in_place || stage.input == Input::copied_by_rows;
    return is_x ? at.x + n * size_[0] * size_[1] * C_ * item_ : scratch + stage.source;
  };
  p = s.p;
  p.a = input(s);
  const int64_t skip = n * out_pixels_ * K_ * item_;
  p.out = s.target < 0 ? at.out + skip : scratch + s.target;
  if (&s != &stages_[steps_ - 1]) return;
  if (at.residual != nullptr) p.residual = at.residual + skip;
  if (stages_.size() > steps_) {
    project = stages_[steps_].p;
    project.a = input(stages_[steps_]);
    p.project = &project;
  }
}

bool TileProgram::sweep(const Stage& s, TileConvParams p, int64_t begin, int64_t end,
                        int64_t n_begin, int64_t n_end, unsigned char* rows,
                        const TileKernels& kernels) {
  const unsigned char* x = p.a;
  const int64_t most = s.most_blocks(), pieces = (end - begin + most - 1) / most;
  bool finite = true;
  for (int64_t i = 0; i < pieces; ++i) {
    const int64_t b = begin + (end - begin) * i / pieces;
    const int64_t e = begin + (end - begin) * (i + 1) / pieces;
    if (s.input == Input::copied_by_rows) {
      const auto tiles = std::minmax_element(p.tiles + 2 * b, p.tiles + 2 * e);
      const int64_t first = *tiles.first, count = *tiles.second + kTileRows - first;
      const int64_t pixel = s.pixel_bytes();
      kernels.copy({x + first * pixel, rows, count, s.channels, pixel, p.row_bytes, s.chunk_bytes,
                    p.products, p.low_bytes});
      p.a = rows - first * p.row_bytes;
    }
    finite = kernels.conv(p, b, e, n_begin, n_end) && finite;
  }
  return finite;
}

void TileProgram::advance(size_t i, int64_t to, Progress& progress, const Operands& at, int64_t n,
                          unsigned char* scratch, const TileKernels& kernels) const {
  int64_t& done = progress.done[i];
  if (to <= done) return;
  const Stage& s = stages_[i];
  if (i > 0) {
    const TileMap& before = *stages_[i - 1].map;
    const int64_t need = lines_ == 0 ? before.blocks()
                                     : before.blocks_to_line[static_cast<size_t>(
                                           s.map->last_line[static_cast<size_t>(to - 1)])];
    advance(i - 1, need, progress, at, n, scratch, kernels);
  }
  TileConvParams p, project;
  aim(s, at, n, scratch, p, project);
  if (i == 1 && stages_[0].input != Input::copied) {
    p.ahead = progress.ahead;
    p.ahead_bytes = progress.ahead_bytes;
  }
  if (!sweep(s, p, done, to, 0, s.panels(), scratch + scratch_, kernels)) progress.finite = false;
  done = to;
}

}  // namespace resnet_fused
