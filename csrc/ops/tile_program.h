// SPDX-License-Identifier: BSD-3-Clause
// A chain of tile convolutions for groups of so many images: what lies where, and the order of
// work.
#pragma once

#include "tile_chain.h"
#include "tile_map.h"

namespace resnet_fused {

// The shape of a convolution of an image of H x W.
Window window_of(const Conv& conv, int64_t H, int64_t W);

// The input of a convolution: x in place, or a copy of x, made at once or some rows before they are
// needed, or what the convolution before has written.
enum class Input { in_place, copied, copied_by_rows, written };

// One convolution on a group of images. Addresses in scratch are offsets in bytes.
struct Stage {
  TileConvParams p{};  // without addresses of activations
  TileLayout layout{};
  std::shared_ptr<const TileMap> map;
  std::vector<int64_t> step_bytes;
  int64_t channels = 0;     // of an input pixel, a multiple of 32
  int64_t chunk_bytes = 0;  // of the input: from 32 channels to the next
  Input input = Input::written;
  bool projects = false;            // the projection, a part of the last convolution's stage
  int64_t source = 0, target = -1;  // in scratch; a target of -1 is the output
  int64_t stride[2] = {1, 1};       // of a projection

  int64_t weight_bytes() const {
    return p.steps * p.depth * panels() * kTileN * item_bytes(p.products);
  }
  int64_t panels() const { return round_up(p.K, kTileN) / kTileN; }
  int64_t pixel_bytes() const { return channels * item_bytes(p.products); }
  int64_t input_bytes() const { return map->rows * pixel_bytes(); }
  // Rows of the input that there are at a time.
  int64_t rows() const {
    return input == Input::copied_by_rows ? std::min(most_blocks(), map->blocks()) * kTileM
                                          : map->rows;
  }
  // Blocks of rows that go through the panels together: so many that their input stays in L2.
  int64_t most_blocks() const {
    const int64_t fit = tile_input_bytes(weight_bytes()) / (kTileM * pixel_bytes());
    if (!p.filters_inside) return std::max<int64_t>(fit, 2);
    return input == Input::copied_by_rows ? std::max<int64_t>(fit / 2, 1) : map->blocks();
  }
  int64_t copied_rows_bytes() const {
    return input == Input::copied_by_rows ? chunk_bytes * (channels / kTileK) : 0;
  }
};

// Dense NHWC tensors.
struct Operands {
  const unsigned char *x, *residual;
  unsigned char* out;
};

// A chain on groups of `images` images.
class TileProgram {
 public:
  TileProgram(const std::vector<TileStep>& steps, const TileStep* project, const Tensor& x,
              bool relu, int64_t images, bool inner);
  // Memory that a run needs: with the rows that each of so many threads copies for itself.
  int64_t scratch_bytes(int64_t threads) const {
    return scratch_ + threads * stages_[0].copied_rows_bytes();
  }
  int64_t weight_bytes() const;
  // What it costs, next to other programs for the same.
  int64_t cost() const;
  // Zeros where no image is ever written; once per scratch.
  void prepare(unsigned char* scratch) const;
  // Images [n, n + images) on this thread; false if an fp32 result is NaN or infinite.
  bool run(const Operands& at, int64_t n, unsigned char* scratch, const TileKernels& kernels) const;
  // The same on all threads.
  bool run_together(const Operands& at, int64_t n, unsigned char* scratch, int64_t threads,
                    const TileKernels& kernels) const;

 private:
  static constexpr size_t kMostSteps = 3;
  struct Progress {
    int64_t done[kMostSteps] = {};  // blocks of each stage
    const unsigned char* ahead = nullptr;
    int64_t ahead_bytes = 0;
    bool finite = true;
  };

  Stage& add(const TileStep& step, const TileLayout& layout, const TileLayout* to, bool reads_x,
             bool relu);
  // The last convolution's rows are the projection's, too: its input lies where their first taps'
  // pixels lie, or is x itself if that is the same.
  void add_projection(const TileStep& step);
  Stage& begin(const TileStep& step, std::shared_ptr<const TileMap> map);
  // Where a stage's input lies, given its map, and so its k-steps, whose taps are so many rows from
  // a row.
  void place(Stage& s, const std::vector<int64_t>& taps);
  int64_t copied_lines(const Stage& s) const;
  // Lines [begin, end) of the group's images to a stage's input: lines of x, of a projection those
  // that it reads.
  void copy(const Stage& s, const Operands& at, int64_t n, unsigned char* scratch, int64_t begin,
            int64_t end, const TileKernels& kernels) const;
  // A stage's parameters with addresses; those of the projection go to `project`, which must live
  // as long.
  void aim(const Stage& s, const Operands& at, int64_t n, unsigned char* scratch, TileConvParams& p,
           TileConvParams& project) const;
  // Blocks [begin, end) times panels [n_begin, n_end), so many rows at a time that they stay in L2
  // while the panels pass by. A stage that copies x by rows has `rows` for them.
  static bool sweep(const Stage& s, TileConvParams p, int64_t begin, int64_t end, int64_t n_begin,
                    int64_t n_end, unsigned char* rows, const TileKernels& kernels);
  // Run stage i up to block `to`, and before it what it reads.
  void advance(size_t i, int64_t to, Progress& progress, const Operands& at, int64_t n,
               unsigned char* scratch, const TileKernels& kernels) const;

  std::vector<Stage> stages_;  // of the chain, and the projection
  size_t steps_ = 0;           // of the chain
  Products products_;
  int64_t item_;  // bytes of an element of x
  int64_t images_, C_, size_[2];
  int64_t out_pixels_ = 0, K_ = 0, lines_ = 0, strip_ = 1, scratch_ = 0;
};

}  // namespace resnet_fused
