// SPDX-License-Identifier: BSD-3-Clause
#include "memory.h"

#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <new>

#include "run_lock.h"

namespace emulator {
namespace {

struct State {
  Settings settings;
  std::vector<std::unique_ptr<Buffer>> buffers;
  std::vector<Finding> findings;
  std::mutex findings_mutex;
  bool instrumented = false;
};
State& state() {
  static State s;
  return s;
}

const char* name(BufferKind kind) {
  if (kind == BufferKind::input) return "an input";
  return kind == BufferKind::output ? "an output" : "a scratch";
}

bool all_set(const unsigned char* p, size_t bytes) {
  return std::all_of(p, p + bytes, [](unsigned char b) { return b == 0xff; });
}

struct Image {
  uintptr_t begin = 0, end = 0, base = 0;
};
const Image& own_image() {
  static const Image image = [] {
    Image found;
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* to) {
          Image i;
          i.base = info->dlpi_addr;
          i.begin = ~uintptr_t{0};
          for (int h = 0; h < info->dlpi_phnum; ++h) {
            const auto& header = info->dlpi_phdr[h];
            if (header.p_type != PT_LOAD) continue;
            i.begin = std::min<uintptr_t>(i.begin, i.base + header.p_vaddr);
            i.end = std::max<uintptr_t>(i.end, i.base + header.p_vaddr + header.p_memsz);
          }
          const auto here = reinterpret_cast<uintptr_t>(&state);
          if (here < i.begin || here >= i.end) return 0;
          *static_cast<Image*>(to) = i;
          return 1;
        },
        &found);
    return found;
  }();
  return image;
}

}  // namespace

std::mutex& run_lock() {
  static std::mutex m;
  return m;
}

const Settings& settings() { return state().settings; }
void configure(const Settings& s) {
  const std::lock_guard lock(run_lock());
  state().settings = s;
}

bool instrumented() { return state().instrumented; }
void set_instrumented() { state().instrumented = true; }
bool checks_every_access() { return instrumented(); }

void record(Finding finding) {
  const std::lock_guard lock(state().findings_mutex);
  state().findings.push_back(std::move(finding));
}
void report(const std::string& kind, const std::string& text) {
  record({kind, text, "", {0, 0, 0}, -1, 0});
}
std::vector<Finding> take_findings() {
  const std::lock_guard lock(state().findings_mutex);
  return std::move(state().findings);
}

const std::vector<std::unique_ptr<Buffer>>& buffers() { return state().buffers; }

int find_buffer(const unsigned char* p) {
  const auto& all = state().buffers;
  auto after = std::upper_bound(all.begin(), all.end(), p,
                                [](const auto* q, const auto& b) { return q < b->begin; });
  if (after == all.begin()) return -1;
  --after;
  if (static_cast<size_t>(p - (*after)->begin) >= (*after)->bytes) return -1;
  return static_cast<int>(after - all.begin());
}

bool beside_buffer(const unsigned char* p) {
  for (const auto& b : state().buffers) {
    if (p >= b->mapping && p < b->mapping + b->mapping_bytes) return true;
  }
  return false;
}

std::string describe(const unsigned char* p) {
  for (const auto& b : state().buffers) {
    if (p < b->mapping || p >= b->mapping + b->mapping_bytes) continue;
    return "byte " + std::to_string(p - b->begin) + " of " + name(b->kind) + " buffer of " +
           std::to_string(b->bytes) + " bytes";
  }
  char text[40];
  std::snprintf(text, sizeof(text), "address %p", static_cast<const void*>(p));
  return text;
}

bool in_own_image(const void* p) {
  const auto at = reinterpret_cast<uintptr_t>(p);
  return at >= own_image().begin && at < own_image().end;
}
uint64_t program_offset(const void* p) {
  return in_own_image(p) ? reinterpret_cast<uintptr_t>(p) - own_image().base : 0;
}

unsigned char* allocate(size_t bytes, BufferKind kind, size_t misalign) {
  const std::lock_guard lock(run_lock());
  auto b = std::make_unique<Buffer>();
  b->mapping_bytes = (bytes + misalign + 2 * kMargin + 4095) / 4096 * 4096;
  void* mapping =
      mmap(nullptr, b->mapping_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping == MAP_FAILED) throw std::bad_alloc();
  std::memset(mapping, 0xff, b->mapping_bytes);
  b->mapping = static_cast<unsigned char*>(mapping);
  b->begin = b->mapping + kMargin + misalign;
  b->bytes = bytes;
  b->kind = kind;
  if (kind != BufferKind::input) {
    b->owners.assign((bytes + 1) / 2, 0);
    b->ticks.assign((bytes + 1) / 2, 0);
  }
  auto& all = state().buffers;
  unsigned char* begin = b->begin;
  all.insert(std::upper_bound(all.begin(), all.end(), begin,
                              [](const auto* q, const auto& o) { return q < o->begin; }),
             std::move(b));
  return begin;
}

void release_buffers() {
  const std::lock_guard lock(run_lock());
  for (const auto& b : state().buffers) {
    const auto behind = b->begin + b->bytes;
    if (!all_set(b->mapping, b->begin - b->mapping) ||
        !all_set(behind, b->mapping + b->mapping_bytes - behind)) {
      report("out-of-bounds", std::string("memory beside ") + name(b->kind) + " buffer of " +
                                  std::to_string(b->bytes) + " bytes was written");
    }
    munmap(b->mapping, b->mapping_bytes);
  }
  state().buffers.clear();
}

void mark_elements(const void* p, const unsigned char* units, size_t count) {
  const std::lock_guard lock(run_lock());
  const int i = find_buffer(static_cast<const unsigned char*>(p));
  if (i >= 0) state().buffers[i]->elements.assign(units, units + count);
}

size_t count_unwritten(const void* p) {
  const std::lock_guard lock(run_lock());
  const int i = find_buffer(static_cast<const unsigned char*>(p));
  if (i < 0 || !instrumented()) return 0;
  const Buffer& b = *state().buffers[i];
  size_t count = 0;
  for (size_t u = 0; u < b.owners.size(); ++u) {
    count += b.owners[u] == 0 && (b.elements.empty() || b.elements[u] != 0);
  }
  return count;
}

}  // namespace emulator
