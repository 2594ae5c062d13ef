// SPDX-License-Identifier: BSD-3-Clause
// Functions that are compiled for several instruction sets, the best of which is taken.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define EMULATOR_VECTORISED __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define EMULATOR_VECTORISED
#endif
