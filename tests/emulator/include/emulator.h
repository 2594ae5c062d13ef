// SPDX-License-Identifier: BSD-3-Clause
// What the emulator offers to kernel code. The functions stand in for instructions and may be
// called by a running CUDA thread only, except for launch().
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulator {

struct Index {
  unsigned x, y, z;
};

// Of the running thread. `const`: a fiber is one thread for life.
__attribute__((const)) Index thread_index();
__attribute__((const)) Index block_index();
__attribute__((const)) Index block_size();
__attribute__((const)) Index grid_size();

struct Site {
  const char* file;
  int line;
};

void block_barrier(Site site);
void warp_barrier(unsigned mask, Site site);

enum class Shuffle { index, exclusive_or, up, down };
uint64_t shuffle(Shuffle kind, unsigned mask, uint64_t value, int by, int width);
unsigned ballot(unsigned mask, bool predicate);

// The block's dynamic shared memory, and the address that instructions use for a place in it.
unsigned char* shared_memory();
uint32_t shared_address(const void* p);

// ldmatrix of `count` matrices (1, 2 or 4).
void load_matrix(uint32_t* registers, int count, bool transposed, uint32_t row);

enum class Product { f16, bf16, tf32 };
// d[4] += a[4] * b[2], m16n8k16 for 16 bits and m16n8k8 for tf32.
void multiply(Product product, float* d, const uint32_t* a, const uint32_t* b);

// cp.async of `size` bytes (4, 8 or 16), of which `bytes` are read and the rest is zero.
void copy_async(uint32_t shared, const void* global, int size, int bytes);
void copy_commit();
void copy_wait(int pending);

// A load or store of one instruction, aligned to its size.
void load(void* to, const void* from, size_t bytes);
void store(void* to, const void* from, size_t bytes);

struct Launch {
  const char* kernel;  // __PRETTY_FUNCTION__ of a function that names it
  int64_t grid[3];
  int threads;
  int64_t shared_bytes;
  void (*body)(void* arguments);  // the kernel's body for one thread
  void* arguments;
  size_t arguments_bytes;
  bool hopper;     // of a kernel for that GPU alone
  bool dependent;  // may begin before the kernel in front of it has ended
};
// Runs all blocks; returns a cudaError_t. What it finds wrong is kept for api.h's findings().
int launch(const Launch& launch);

}  // namespace emulator
