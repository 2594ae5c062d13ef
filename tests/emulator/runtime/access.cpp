// SPDX-License-Identifier: BSD-3-Clause
// Loads, stores and cp.async: bounds, alignment, races, and copies that land late.
#include <cstring>

#include "block.h"
#include "memory.h"

namespace emulator {
namespace {

const char* verb(bool write) { return write ? "writes " : "reads "; }

}  // namespace

void Block::check_shared(const unsigned char* p, size_t bytes, bool write, int thread,
                         const void* program) {
  const auto at = static_cast<int64_t>(p - shared_begin());
  if (at < 0 || at + static_cast<int64_t>(bytes) > static_cast<int64_t>(shared_bytes_)) {
    fail("out-of-bounds",
         verb(write) + std::to_string(bytes) + " bytes at byte " + std::to_string(at) + " of " +
             std::to_string(shared_bytes_) + " bytes of shared memory",
         thread, program);
  }
  if (!instrumented()) return;
  check_result(
      write ? shadow_.write(at, bytes, thread, clocks_) : shadow_.read(at, bytes, thread, clocks_),
      at, bytes, write, thread, program);
}

void Block::check_agent(uint32_t shared, size_t bytes, bool write, Stamp now, const uint32_t* row) {
  const size_t at = arena_ + shared - shared_begin();
  check_result(write ? shadow_.agent_write(at, bytes, now, row, clocks_)
                     : shadow_.agent_read(at, bytes, now, row, clocks_),
               at, bytes, write, self_->thread, self_->program);
}

void Block::check_result(const Conflict& c, size_t at, size_t bytes, bool write, int thread,
                         const void* program) {
  if (c.kind == nullptr) return;
  std::string text = verb(write) + std::string("shared memory at byte ") + std::to_string(at) +
                     " (" + std::to_string(bytes) + " bytes): ";
  if (c.other >= kMostThreads) {
    text += hopper_.agent_name(c.other) + ": ";
  } else if (c.other >= 0) {
    text += "thread " + std::to_string(c.other) + ": ";
  }
  fail(c.kind, text + c.text + " byte " + std::to_string(c.at), thread, program);
}

void Block::check_global(const unsigned char* p, size_t bytes, bool write, const void* program) {
  const auto& all = buffers();
  const auto inside = [&](int i) {
    return i >= 0 && static_cast<size_t>(p - all[i]->begin) < all[i]->bytes;
  };
  if (!inside(last_buffer_)) {
    const int found = find_buffer(p);
    if (found < 0) {
      const auto* arguments = static_cast<const unsigned char*>(launch_->arguments);
      const bool is_argument = p >= arguments && p < arguments + launch_->arguments_bytes;
      if (!write && (is_argument || in_own_image(p))) return;
      if (!settings().strict && !beside_buffer(p)) return;
      fail("out-of-bounds", verb(write) + std::to_string(bytes) + " bytes at " + describe(p),
           self_->thread, program);
    }
    last_buffer_ = found;
  }
  if (launch_->dependent) hopper_.check_grid_wait();
  Buffer& b = *all[last_buffer_];
  const size_t at = p - b.begin;
  const auto wrong = [&](const char* kind, const std::string& why) {
    fail(kind, verb(write) + std::to_string(bytes) + " bytes at " + describe(p) + why,
         self_->thread, program);
  };
  if (at + bytes > b.bytes) wrong("out-of-bounds", "");
  (write ? counters_.written_bytes : counters_.read_bytes) += bytes;
  if (!b.elements.empty()) {
    for (size_t u = at / 2; u <= (at + bytes - 1) / 2; ++u) {
      if (b.elements[u] == 0) wrong("out-of-bounds", ", between two rows of elements");
    }
  }
  if (b.kind == BufferKind::input) {
    if (write) wrong("input-written", "");
    return;
  }
  if (!instrumented()) return;
  const Owner me = owner_of(launch_number_, number_, self_->thread);
  for (size_t u = at / 2; u <= (at + bytes - 1) / 2; ++u) {
    Owner& owner = b.owners[u];
    const Owner was = __atomic_load_n(&owner, __ATOMIC_RELAXED);
    const bool now = was != 0 && same_launch(was, me);
    const auto who = [&] {
      return "thread " + std::to_string(thread_of(was)) + " of block number " +
             std::to_string(block_of(was));
    };
    // Nothing orders two blocks of a launch.
    const uint32_t then = __atomic_load_n(&b.ticks[u], __ATOMIC_RELAXED);
    const bool ordered =
        !now || (same_block(was, me) && clocks_.ordered(thread_of(was), then, self_->thread));
    if (!write) {
      if (was == 0) wrong("uninitialised", ", which nothing has written");
      if (!ordered) wrong("race", ", which " + who() + " has written in the same launch");
      continue;
    }
    if (now && (b.kind == BufferKind::output || !ordered)) {
      wrong("double-write", ", which " + who() + " has written in the same launch");
    }
    __atomic_store_n(&owner, me, __ATOMIC_RELAXED);
    __atomic_store_n(&b.ticks[u], clocks_.clock(self_->thread), __ATOMIC_RELAXED);
  }
}

void Block::check(const void* pointer, size_t bytes, bool write, const void* program) {
  const auto* p = static_cast<const unsigned char*>(pointer);
  if (in_arena(p)) {
    check_shared(p, bytes, write, self_->thread, program);
  } else if (static_cast<size_t>(p - stacks_) >= stacks_bytes_) {
    check_global(p, bytes, write, program);
  } else if (hopper_.used()) {
    hopper_.check_stack(p, bytes, write);
  }
}

void Block::copy_async(uint32_t shared, const void* global, int size, int bytes) {
  Fiber& f = *self_;
  const auto* from = static_cast<const unsigned char*>(global);
  if (bytes < 0 || bytes > size) {
    fail("instruction",
         "cp.async of " + std::to_string(size) + " bytes is told to read " + std::to_string(bytes));
  }
  if (shared % size != 0 || reinterpret_cast<uintptr_t>(from) % size != 0) {
    fail("misaligned", "cp.async of " + std::to_string(size) + " bytes to shared address " +
                           std::to_string(shared) + " from " + describe(from));
  }
  unsigned char* to = arena_ + shared;
  check_shared(to, size, true, f.thread, f.program);
  if (bytes > 0) {
    const uint64_t plain = counters_.read_bytes;
    check_global(from, bytes, false, f.program);
    counters_.read_bytes = plain;
    counters_.copied_bytes += bytes;
  }
  // Until it is waited for, the destination may hold anything: what was copied, or not yet. It is
  // not to be looked at either way.
  const Copy copy{shared, from, size, bytes, f.groups};
  if (random_.below(10) < 3) {
    land(copy);
  } else {
    std::memset(to, 0xff, size);
  }
  if (instrumented()) shadow_.begin_copy(to - shared_begin(), size);
  f.copies.push_back(copy);
}

void Block::land(const Copy& copy) {
  unsigned char* to = arena_ + copy.shared;
  if (copy.bytes > 0) std::memcpy(to, copy.global, copy.bytes);
  std::memset(to + copy.bytes, 0, copy.size - copy.bytes);
}

void Block::copy_wait(int pending) {
  Fiber& f = *self_;
  size_t done = 0;
  for (; done < f.copies.size(); ++done) {
    const Copy& copy = f.copies[done];
    if (static_cast<int64_t>(copy.group) >= static_cast<int64_t>(f.groups) - pending) break;
    land(copy);
    if (instrumented()) {
      shadow_.end_copy(arena_ + copy.shared - shared_begin(), copy.size, f.thread, clocks_);
    }
  }
  f.copies.erase(f.copies.begin(), f.copies.begin() + static_cast<int64_t>(done));
}

}  // namespace emulator
