// SPDX-License-Identifier: BSD-3-Clause
// Small kernels that test the emulator itself, known to Python by name.
#pragma once

#include <cstdint>
#include <map>
#include <string>

#include "../../../csrc/kernels/cuda/tensor_map.h"

namespace emulator {

struct TestArguments {
  resnet_fused::TensorMap map[3];
  void* p[8];
  int64_t n[12];
};
struct TestShape {
  int64_t grid[3];
  int threads;
  int64_t shared_bytes;
  bool hopper, dependent;
};
using TestLaunch = int (*)(const TestShape& shape, const TestArguments& arguments);

std::map<std::string, TestLaunch>& test_kernels();

struct TestKernel {
  TestKernel(const char* name, TestLaunch launch) { test_kernels()[name] = launch; }
};

}  // namespace emulator

// TEST_KERNEL(name) { body } defines a kernel with arguments `a` and makes it known.
#define TEST_KERNEL(name)                                                                         \
  __global__ void name(const emulator::TestArguments a);                                          \
  const emulator::TestKernel known_##name(                                                        \
      #name, [](const emulator::TestShape& s, const emulator::TestArguments& arguments) {         \
        const LaunchShape shape{                                                                  \
            {s.grid[0], s.grid[1], s.grid[2]}, s.threads, s.shared_bytes, s.hopper, s.dependent}; \
        return launch<name>(shape, nullptr, arguments);                                           \
      });                                                                                         \
  __global__ void name(const emulator::TestArguments a)
