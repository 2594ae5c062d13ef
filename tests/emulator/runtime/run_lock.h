// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <mutex>

namespace emulator {

// Held by a launch, and by whoever changes what a launch looks at.
std::mutex& run_lock();

// Called by the constructors of instrumented code.
void set_instrumented();

}  // namespace emulator
