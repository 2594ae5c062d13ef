// SPDX-License-Identifier: BSD-3-Clause
#include "tile_map.h"

#include <map>
#include <mutex>

namespace resnet_fused {
namespace {

struct Row {
  int64_t image, y, x;  // of the output
};

// Tiles in the order of output lines.
class Builder {
 public:
  Builder(const TileLayout& from, const TileLayout* to) : from_(from), to_(to) {}

  // Rows [first, first + 16) of the input, of which row i is output pixel `row(i)`, or none if its
  // image is -1.
  template <typename F>
  void tile(int64_t first, F&& row) {
    map.tiles.push_back(static_cast<int32_t>(first));
    for (int64_t i = 0; i < kTileRows; ++i) {
      const Row r = row(i);
      map.places.push_back(static_cast<int32_t>(r.image < 0 ? -1 : place(r)));
      if (r.image >= 0) lines_.emplace_back(r.y);
    }
    ends_.push_back(lines_.size());
  }

  TileMap finish() {
    const Window& w = from_.window;
    if (map.tiles.size() % 2 != 0) {
      map.tiles.push_back(map.tiles.back());
      map.places.insert(map.places.end(), kTileRows, -1);
      ends_.push_back(lines_.size());
    }
    for (int64_t r = 0; r < w.size[0]; ++r) {
      for (int64_t s = 0; s < w.size[1]; ++s) map.taps.push_back(from_.tap(r, s));
    }
    map.rows =
        std::max(from_.pixels(), *std::max_element(map.tiles.begin(), map.tiles.end()) + kTileRows +
                                     *std::max_element(map.taps.begin(), map.taps.end()));
    for (auto at = map.places.begin(); at != map.places.end(); at += from_.part) {
      // Blocks are made whole in 16 rows a tile.
      const bool made = from_.part == kTileRows ||
                        std::any_of(at, at + from_.part, [](int32_t place) { return place >= 0; });
      map.parts += made ? 1 : 0;
    }
    find_holes();
    if (from_.images == 1) find_lines();
    return std::move(map);
  }

  TileMap map;

 private:
  int64_t place(const Row& r) const {
    return to_ != nullptr ? to_->at(r.image, r.y, r.x)
                          : (r.image * from_.window.out[0] + r.y) * from_.window.out[1] + r.x;
  }

  void find_holes() {
    if (from_.dense) return;
    const Window& w = from_.window;
    std::vector<char> used(static_cast<size_t>(from_.pixels()));
    for (int64_t g = 0; g < from_.images; ++g) {
      for (int64_t y = 0; y < w.in[0]; ++y) {
        for (int64_t x = 0; x < w.in[1]; ++x) {
          const int64_t at = from_.at(g, y, x);
          if (at >= 0) used[static_cast<size_t>(at)] = 1;
        }
      }
    }
    for (size_t i = 0; i < used.size(); ++i) {
      if (used[i] != 0) continue;
      if (i == 0 || used[i - 1] != 0) map.holes.push_back({static_cast<int64_t>(i), 0});
      ++map.holes.back().count;
    }
  }

  void find_lines() {
    const Window& w = from_.window;
    map.blocks_to_line.assign(static_cast<size_t>(w.out[0]), 0);
    size_t at = 0;
    int64_t line = 0;
    for (int64_t b = 0; b < map.blocks(); ++b) {
      for (; at < ends_[static_cast<size_t>(2 * b + 1)]; ++at) {
        line = lines_[at];
        map.blocks_to_line[static_cast<size_t>(line)] = static_cast<int32_t>(b + 1);
      }
      const int64_t last = line * w.stride[0] + (w.size[0] - 1) * w.dilation[0] - w.padding[0];
      map.last_line.push_back(
          static_cast<int32_t>(std::min(std::max<int64_t>(last, 0), w.in[0] - 1)));
    }
  }

  const TileLayout& from_;
  const TileLayout* to_;
  std::vector<int64_t> lines_;  // of the rows that exist, in order
  std::vector<size_t> ends_;    // of each tile, in lines_
};

constexpr int64_t parts_for(int64_t rows, int64_t part) { return (rows + part - 1) / part; }

// Rows follow each other line by line, `pitch` pixels apart, `count` images at each pixel.
void add_planes(Builder& builder, int64_t first, int64_t image, int64_t count,
                const TileLayout& from) {
  const Window& w = from.window;
  const int64_t pitch = from.planes.pitch;
  const int64_t line = w.out[1] * count, flat = (w.out[0] - 1) * pitch * count + line;
  const bool by_line = w.out[0] * parts_for(line, from.part) <= parts_for(flat, from.part);
  const auto row = [&](int64_t at) {
    const int64_t y = at / (pitch * count), x = at / count % pitch;
    const bool exists = at < flat && x < w.out[1];
    return exists ? Row{image + at % count, y, x} : Row{-1, 0, 0};
  };
  for (int64_t y = 0; y < (by_line ? w.out[0] : 1); ++y) {
    const int64_t begin = y * pitch * count, end = begin + (by_line ? line : flat);
    for (int64_t at = begin; at < end; at += kTileRows) {
      builder.tile(first + at,
                   [&](int64_t i) { return at + i < end ? row(at + i) : Row{-1, 0, 0}; });
    }
  }
}

void add_dense(Builder& builder, const TileLayout& from, bool in_place) {
  const Window& w = from.window;
  const int64_t each = w.out[0] * w.out[1], rows = from.images * each;
  for (int64_t at = 0; at < rows; at += kTileRows) {
    // A tile that would read beyond the last row moves back, and only its new rows count.
    const int64_t back = in_place ? std::max<int64_t>(at + kTileRows - rows, 0) : 0;
    builder.tile(at - back, [&](int64_t i) {
      const int64_t r = at - back + i;
      if (r < at || r >= rows) return Row{-1, 0, 0};
      const int64_t image = from.inner ? r % from.images : r / each;
      const int64_t pixel = from.inner ? r / from.images : r % each;
      return Row{image, pixel / w.out[1], pixel % w.out[1]};
    });
  }
}

}  // namespace

TileLayout tile_layout(const Window& window, int64_t images, bool inner, int64_t part) {
  TileLayout layout{window, images, window.pointwise(), inner && images > 1, part, {}};
  if (!layout.dense) {
    layout.planes =
        plan_planes(window.in[0], window.in[1], window.out[0], window.out[1], window.size[0],
                    window.size[1], window.stride, window.padding, window.dilation);
  }
  return layout;
}

TileMap make_tile_map(const TileLayout& from, const TileLayout* to, bool in_place) {
  Builder builder(from, to);
  if (from.dense) {
    add_dense(builder, from, in_place);
  } else if (from.inner) {
    add_planes(builder, 0, 0, from.images, from);
  } else {
    const int64_t each = from.pixels() / from.images;
    for (int64_t g = 0; g < from.images; ++g) add_planes(builder, g * each, g, 1, from);
  }
  return builder.finish();
}

std::shared_ptr<const TileMap> tile_map(const TileLayout& from, const TileLayout* to,
                                        bool in_place) {
  constexpr size_t kMostRows = size_t{4} << 20;  // 16 MB of tables
  static std::mutex mutex;
  static auto* maps = new std::map<std::vector<int64_t>, std::shared_ptr<const TileMap>>;
  static size_t rows = 0;
  std::vector<int64_t> key{in_place};
  for (const TileLayout* l : {&from, to}) {
    if (l == nullptr) continue;
    key.insert(key.end(), {l->images, l->inner, l->part});
    const Window& w = l->window;
    for (const auto& pair : {w.in, w.out, w.size, w.stride, w.padding, w.dilation})
      key.insert(key.end(), pair, pair + 2);
  }
  {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = maps->find(key);
    if (found != maps->end()) return found->second;
  }
  auto made = std::make_shared<const TileMap>(make_tile_map(from, to, in_place));
  const std::lock_guard<std::mutex> lock(mutex);
  if (rows + made->places.size() > kMostRows) {
    maps->clear();
    rows = 0;
  }
  if (maps->emplace(std::move(key), made).second) rows += made->places.size();
  return made;
}

}  // namespace resnet_fused
