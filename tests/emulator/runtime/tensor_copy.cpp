// SPDX-License-Identifier: BSD-3-Clause
// Copies between tensors and shared memory. Whether and when one that is under way has landed is
// left to chance; what it may touch is checked when it is issued.
#include <algorithm>
#include <cstring>

#include "block.h"
#include "hopper.h"
#include "memory.h"

namespace emulator {
namespace {

int64_t clip(int64_t v, int64_t low, int64_t high) { return std::min(std::max(v, low), high); }

// fp32 to TF32, to the nearest; of a tie, to any.
uint32_t to_tf32(uint32_t bits, Random& random) {
  if ((bits & 0x7fffffffu) > 0x7f800000u) return (bits | 0x00400000u) & ~0x1fffu;
  const uint32_t low = bits & 0x1fffu;
  const bool up = low > 0x1000u || (low == 0x1000u && random.below(2) == 0);
  return (bits & ~0x1fffu) + (up ? 0x2000u : 0);
}

// A row of the box: `count` elements from coordinate `c` on, of the line at `line`, of which those
// at first..last - 1 are in the tensor.
struct BoxRow {
  const unsigned char* line;
  int64_t first, last;
};

size_t rows_of(const MapFields& m) {
  if (m.columns != 0) return m.pixels;
  size_t rows = 1;
  for (int i = 1; i < m.rank; ++i) rows *= (m.box[i] + m.steps[i] - 1) / m.steps[i];
  return rows;
}
int64_t row_elements(const MapFields& m) { return m.columns != 0 ? m.channels : m.box[0]; }

// Row number r of what is copied from `place` on.
BoxRow row_of(const MapFields& m, const int* place, const uint16_t* offsets, size_t r) {
  int64_t at[5];
  if (m.columns == 0) {
    for (int i = 1; i < m.rank; ++i) {
      const size_t count = (m.box[i] + m.steps[i] - 1) / m.steps[i];
      at[i] = place[i] + static_cast<int64_t>(r % count) * m.steps[i];
      r /= count;
    }
  } else {
    // The base pixel, r steps through the bounding box; each dimension starts again at its lower
    // corner and carries into the next, images are the last one.
    for (int i = 1; i < m.rank; ++i) at[i] = place[i];
    const int images = m.rank - 1;
    auto steps = static_cast<int64_t>(r);
    for (int i = 1; i < images && steps > 0; ++i) {
      const int64_t low = m.lower[i - 1], high = int64_t{m.last[i]} + m.upper[i - 1];
      const int64_t left = at[i] > high ? 0 : (high - at[i]) / m.steps[i];
      if (steps <= left) {
        at[i] += steps * m.steps[i];
        steps = 0;
      } else {
        const int64_t beyond = steps - left - 1, each = (high - low) / m.steps[i] + 1;
        at[i] = low + beyond % each * m.steps[i];
        steps = beyond / each + 1;
      }
    }
    at[images] += steps;
    for (int i = 1; i < images; ++i) at[i] += offsets[i - 1];
  }
  const auto* line = reinterpret_cast<const unsigned char*>(m.address);
  for (int i = 1; i < m.rank; ++i) {
    if (at[i] < 0 || at[i] > int64_t{m.last[i]}) return {nullptr, 0, 0};
    line += static_cast<uint64_t>(at[i]) * m.strides[i - 1];
  }
  const int64_t size = int64_t{m.last[0]} + 1, count = row_elements(m);
  return {line, clip(-int64_t{place[0]}, 0, count), clip(size - place[0], 0, count)};
}

// Where chunk number `chunk` (of 16 bytes) of row r lies, `pitch` bytes a row.
uint32_t chunk_at(const MapFields& m, uint32_t shared, size_t r, size_t pitch, size_t chunk) {
  const auto at = static_cast<uint32_t>(shared + r * pitch + chunk * 16);
  const uint32_t chunks = m.swizzle == 0 ? 1 : static_cast<uint32_t>(swizzle_span(m.swizzle)) / 16;
  return at ^ (at >> 7 & (chunks - 1)) << 4;
}

}  // namespace

MapFields Hopper::read_map(const void* map) {
  MapFields m;
  std::memcpy(&m, map, sizeof(m));
  if (reinterpret_cast<uintptr_t>(map) % 64 != 0) {
    block_.fail("misaligned", "a tensor map that is not on a multiple of 64");
  }
  if (m.magic != kMapMagic) block_.fail("tensor-map", "bytes that no driver has encoded");
  return m;
}

void Hopper::check_place(const MapFields& m, uint32_t shared, const char* what) {
  const size_t span = swizzle_span(m.swizzle), align = span == 0 ? 128 : 8 * span;
  if (shared % align != 0) {
    block_.fail("misaligned", std::string(what) + ": " + byte(shared) + " is at shared address " +
                                  std::to_string(shared) + ", no multiple of " +
                                  std::to_string(align));
  }
  const size_t row = row_elements(m) * map_type_size(m.type);
  if (span != 0 && row != span) {
    block_.fail("emulator-limit", "a box whose rows are not as long as the swizzle");
  }
}

void Hopper::tensor_prefetch(const void* map) {
  begin("tensor_map_prefetch");
  read_map(map);
}

void Hopper::tensor_load(uint32_t shared, const void* map, int rank, const int* place,
                         const uint16_t* offsets, uint32_t at) {
  const size_t number = object_at(at, "a copy from a tensor");
  TensorLoad load{};
  load.map = read_map(map);
  const MapFields& m = load.map;
  if (m.rank != rank || (m.columns != 0) != (offsets != nullptr)) {
    block_.fail("tensor-map", "a copy of another kind or rank than the map's");
  }
  check_place(m, shared, "a copy from a tensor");
  std::copy_n(place, rank, load.place);
  if (offsets != nullptr) {
    std::copy_n(offsets, rank - 2, load.offsets);
    for (int i = 0; i < rank - 2; ++i) {
      if (rank == 4 && offsets[i] > 255) {
        block_.fail("instruction", "an offset of " + std::to_string(offsets[i]) + " pixels");
      }
    }
  }
  Clocks& clocks = block_.clocks();
  const int thread = block_.self().thread;
  BarrierObject& o = objects_[number];
  if (clocks.fine() && !clocks.fenced(Clocks::kInit, o.thread, o.tick, clocks.row(thread))) {
    block_.fail("proxy", "a copy for a barrier object that was made without barrier_init_fence");
  }
  load.shared = shared;
  load.barrier = number;
  load.phase = o.phase;
  const size_t rows = rows_of(m), pitch = row_elements(m) * map_type_size(m.type);
  load.bytes = static_cast<int64_t>(rows * pitch);
  unsigned char* to = block_.arena() + shared;
  const int64_t first = to - block_.shared_begin();
  if (first + load.bytes > static_cast<int64_t>(block_.shared_bytes())) {
    block_.fail("out-of-bounds", "a copy of " + std::to_string(load.bytes) + " bytes to " +
                                     byte(shared) + " of " + std::to_string(block_.shared_bytes()));
  }
  if (clocks.fine()) {
    block_.check_agent(shared, load.bytes, true, Stamp::of(o.agent, o.phase), clocks.row(thread));
  }
  if (block_.launch().dependent) check_grid_fence();
  for (size_t r = 0; r < rows; ++r) {
    const BoxRow row = row_of(m, load.place, load.offsets, r);
    if (row.last <= row.first) continue;
    const auto size = static_cast<int64_t>(map_type_size(m.type));
    block_.check_global(row.line + (place[0] + row.first) * size, (row.last - row.first) * size,
                        false, block_.self().program);
  }
  ++o.copies;
  o.filled = std::max(o.filled, o.phase + 1);
  ++block_.counters().tensor_loads;
  block_.counters().tensor_bytes += load.bytes;
  std::memset(to, 0xff, load.bytes);
  if (block_.random().below(10) < 3) {
    land(load);
  } else {
    loads_.push_back(load);
  }
}

void Hopper::land(const TensorLoad& load) {
  const MapFields& m = load.map;
  const size_t rows = rows_of(m), size = map_type_size(m.type), pitch = row_elements(m) * size;
  const auto each = static_cast<int64_t>(16 / size);
  for (size_t r = 0; r < rows; ++r) {
    const BoxRow row = row_of(m, load.place, load.offsets, r);
    for (size_t chunk = 0; chunk < pitch / 16; ++chunk) {
      unsigned char bytes[16] = {};
      const auto begin = static_cast<int64_t>(chunk) * each;
      const int64_t first = std::max(begin, row.first), last = std::min(begin + each, row.last);
      if (first < last) {
        std::memcpy(bytes + (first - begin) * size, row.line + (load.place[0] + first) * size,
                    (last - first) * size);
      }
      if (m.type == kMapTf32) {
        uint32_t words[4];
        std::memcpy(words, bytes, 16);
        for (uint32_t& word : words) word = to_tf32(word, block_.random());
        std::memcpy(bytes, words, 16);
      }
      std::memcpy(block_.arena() + chunk_at(m, load.shared, r, pitch, chunk), bytes, 16);
    }
  }
  BarrierObject& o = objects_[load.barrier];
  --o.copies;
  o.bytes -= load.bytes;
  settle(o);
}

bool Hopper::land_something() {
  if (loads_.empty()) return false;
  const size_t which = block_.random().below(static_cast<uint32_t>(loads_.size()));
  std::swap(loads_[which], loads_.back());
  const TensorLoad load = loads_.back();
  loads_.pop_back();
  land(load);
  return true;
}

// ------------------------------------------------------------------------------- copies to tensors
void Hopper::tensor_store(const void* map, uint32_t shared, int rank, const int* place) {
  begin("a copy to a tensor");
  ThreadState& t = me();
  TensorStore store{};
  store.map = read_map(map);
  const MapFields& m = store.map;
  if (m.rank != rank || m.columns != 0) {
    block_.fail("tensor-map", "a copy of another kind or rank than the map's");
  }
  check_place(m, shared, "a copy to a tensor");
  std::copy_n(place, rank, store.place);
  store.shared = shared;
  store.group = t.store_groups;
  Clocks& clocks = block_.clocks();
  const Fiber& f = block_.self();
  if (t.store_agent < 0) {
    t.store_agent = new_agent("a copy to a tensor by thread " + std::to_string(f.thread));
  }
  const size_t rows = rows_of(m), size = map_type_size(m.type), pitch = row_elements(m) * size;
  store.data.resize(rows * pitch);
  const auto first = block_.arena() + shared - block_.shared_begin();
  if (first + rows * pitch > block_.shared_bytes()) {
    block_.fail("out-of-bounds", "a copy of " + std::to_string(rows * pitch) + " bytes from " +
                                     byte(shared) + " of " + std::to_string(block_.shared_bytes()));
  }
  if (block_.launch().dependent) check_grid_fence();
  // What lies outside of the tensor is not copied, and need not have been written.
  for (size_t r = 0; r < rows; ++r) {
    const BoxRow row = row_of(m, store.place, nullptr, r);
    if (row.last <= row.first) continue;
    block_.check_global(row.line + (place[0] + row.first) * size, (row.last - row.first) * size,
                        true, f.program);
    if (!clocks.fine()) continue;
    const size_t begin = row.first * size, end = row.last * size;
    for (size_t at = begin / 16 * 16; at < end; at += 16) {
      const size_t low = std::max(at, begin), high = std::min(at + 16, end);
      block_.check_agent(chunk_at(m, shared, r, pitch, at / 16) + (low - at), high - low, false,
                         Stamp::of(t.store_agent, store.group), clocks.row(f.thread));
    }
  }
  ++block_.counters().tensor_stores;
  block_.counters().tensor_bytes += rows * pitch;
  if (block_.random().below(2) == 0) capture(store);
  t.stores.push_back(std::move(store));
}

void Hopper::capture(TensorStore& store) {
  std::memcpy(store.data.data(), block_.arena() + store.shared, store.data.size());
  store.read = true;
}

void Hopper::write_out(const TensorStore& store) {
  const MapFields& m = store.map;
  const size_t rows = rows_of(m), size = map_type_size(m.type), pitch = row_elements(m) * size;
  for (size_t r = 0; r < rows; ++r) {
    const BoxRow row = row_of(m, store.place, nullptr, r);
    for (int64_t e = row.first; e < row.last; ++e) {
      const size_t at = e * size;
      const uint32_t from = chunk_at(m, store.shared, r, pitch, at / 16) - store.shared + at % 16;
      auto* to = const_cast<unsigned char*>(row.line) + (store.place[0] + e) * size;
      std::memcpy(to, store.data.data() + from, size);
    }
  }
}

void Hopper::tensor_store_commit() {
  begin("tensor_store_commit");
  ++me().store_groups;
}

void Hopper::tensor_store_wait(int pending, bool read_only) {
  begin("tensor_store_wait");
  ThreadState& t = me();
  const auto over = static_cast<int64_t>(t.store_groups) - pending;
  auto& stores = t.stores;
  for (TensorStore& store : stores) {
    if (store.group >= over) continue;
    if (!store.read) capture(store);
    store.waited = true;
  }
  // What has been read may have been written, or not yet.
  const auto waits = [&](const TensorStore& store) {
    return store.group >= over || (read_only && block_.random().below(2) == 0);
  };
  const auto done = std::stable_partition(stores.begin(), stores.end(), waits);
  for (auto it = done; it != stores.end(); ++it) write_out(*it);
  stores.erase(done, stores.end());
  if (t.store_agent >= 0 && over > 0 && block_.clocks().fine()) {
    block_.clocks().learn(block_.self().thread, t.store_agent, static_cast<uint32_t>(over));
  }
}

}  // namespace emulator
