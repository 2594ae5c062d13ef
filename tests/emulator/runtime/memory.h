// SPDX-License-Identifier: BSD-3-Clause
// Device buffers: exact bounds, who wrote what, and what lies between.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "api.h"

namespace emulator {

// The writer of a unit of two bytes: 0, or launch, block and thread.
using Owner = uint64_t;
constexpr Owner owner_of(uint64_t launch, uint64_t block, int thread) {
  return launch << 42 | (block & 0xffffffffu) << 10 | static_cast<uint64_t>(thread);
}
constexpr bool same_launch(Owner a, Owner b) { return a >> 42 == b >> 42; }
constexpr bool same_block(Owner a, Owner b) { return a >> 10 == b >> 10; }
constexpr int thread_of(Owner a) { return static_cast<int>(a & 1023); }
constexpr uint64_t block_of(Owner a) { return a >> 10 & 0xffffffffu; }

struct Buffer {
  unsigned char* begin;
  size_t bytes;
  BufferKind kind;
  unsigned char* mapping;  // with kMargin bytes of 0xff on both sides of the buffer
  size_t mapping_bytes;
  std::vector<Owner> owners;            // per unit, of an output or scratch
  std::vector<uint32_t> ticks;          // of the writer's warp clock
  std::vector<unsigned char> elements;  // per unit; empty: all
};

constexpr size_t kMargin = 4096;

// All buffers, by address. Changes only while nothing runs.
const std::vector<std::unique_ptr<Buffer>>& buffers();
// The index of the buffer that holds the byte, or -1.
int find_buffer(const unsigned char* p);
bool beside_buffer(const unsigned char* p);    // or in it
std::string describe(const unsigned char* p);  // for a message
bool in_own_image(const void* p);              // constants that the compiler made
uint64_t program_offset(const void* p);        // within this library

const Settings& settings();
void record(Finding finding);  // thread-safe
bool instrumented();

}  // namespace emulator
