// SPDX-License-Identifier: BSD-3-Clause
// Every tile and AVX-512 instruction of the tile kernels, once, with a portable body of the same
// meaning. A file that defines RESNET_FUSED_AMX before including this gets the instructions and
// must be compiled for them.
//
// Eight tiles of 16 rows x 64 bytes: 0-3 accumulate fp32, 4-5 hold A (16 pixels x 32 bf16), 6-7
// hold B (16 channel pairs x 16 filters x 2). Tile numbers are compile-time constants, as the
// instructions want.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef RESNET_FUSED_AMX
// GCC 12 takes the undefined operand inside its own intrinsics for a mistake.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#else
#include "simd.h"
#endif

#define RESNET_FUSED_ALWAYS inline __attribute__((always_inline))

namespace resnet_fused {
namespace RESNET_FUSED_TILES {

// What is added to a convolution's result.
enum class Add { nothing, residual, projected };

#ifdef RESNET_FUSED_AMX

// Into L2; never faults.
inline void prefetch(const unsigned char* p) {
  _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1);
}

struct alignas(64) Tiles {
  // Configures this thread's tiles, which clears them; the destructor gives the state back.
  Tiles() {
    struct alignas(64) Config {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    static_assert(sizeof(Config) == 64, "the instruction reads 64 bytes");
    // GCC 12 believes that only 8 bytes are read and may drop the rest.
    asm volatile("" ::"r"(&config) : "memory");
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }

  // Begin a block with its first k-step, two A tiles of 16 rows each times two B tiles of 1 KB
  // each, and store the block before it. A store behind the last product would wait for it; between
  // the next block's loads it waits for nothing. With kSplit, A's lower halves come first: so each
  // half is loaded once.
  template <bool kSplit>
  RESNET_FUSED_ALWAYS void first(const unsigned char* a0, const unsigned char* a1,
                                 int64_t row_bytes, int64_t low_bytes, const unsigned char* b,
                                 float* c) {
    _tile_loadd(4, kSplit ? a0 + low_bytes : a0, row_bytes);
    _tile_loadd(6, b, 64);
    _tile_loadd(7, b + 1024, 64);
    _tile_loadd(5, kSplit ? a1 + low_bytes : a1, row_bytes);
    _tile_stored(0, c, 128);
    _tile_zero(0);
    _tile_dpbf16ps(0, 4, 6);
    _tile_stored(1, c + 16, 128);
    _tile_zero(1);
    _tile_dpbf16ps(1, 4, 7);
    _tile_stored(2, c + 16 * 32, 128);
    _tile_zero(2);
    _tile_dpbf16ps(2, 5, 6);
    _tile_stored(3, c + 16 * 32 + 16, 128);
    _tile_zero(3);
    _tile_dpbf16ps(3, 5, 7);
    asm volatile("" ::: "memory");
    if (kSplit) upper(a0, a1, row_bytes, b);
  }
  // A further k-step.
  template <bool kSplit>
  RESNET_FUSED_ALWAYS void step(const unsigned char* a0, const unsigned char* a1, int64_t row_bytes,
                                int64_t low_bytes, const unsigned char* b) {
    _tile_loadd(4, kSplit ? a0 + low_bytes : a0, row_bytes);
    _tile_loadd(6, b, 64);
    _tile_loadd(7, b + 1024, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, kSplit ? a1 + low_bytes : a1, row_bytes);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    if (kSplit) upper(a0, a1, row_bytes, b);
  }
  // A's upper halves times B's upper ones, which are loaded, and its lower ones.
  RESNET_FUSED_ALWAYS void upper(const unsigned char* a0, const unsigned char* a1,
                                 int64_t row_bytes, const unsigned char* b) {
    _tile_loadd(4, a0, row_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a1, row_bytes);
    _tile_dpbf16ps(2, 5, 6);
    _tile_loadd(6, b + 2048, 64);
    _tile_dpbf16ps(3, 5, 7);
    _tile_loadd(7, b + 3072, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  // Accumulators as 32 rows of 32 floats.
  inline void store(float* c) {
    _tile_stored(0, c, 128);
    _tile_stored(1, c + 16, 128);
    _tile_stored(2, c + 16 * 32, 128);
    _tile_stored(3, c + 16 * 32 + 16, 128);
    asm volatile("" ::: "memory");
  }
};

// 16-bit elements [first, first + 16) as floats: each goes to the upper half of 32 bits.
template <int first>
static RESNET_FUSED_ALWAYS __m512 widen(__m512i bits) {
  const __m512i from = _mm512_set_epi16(first + 15, 0, first + 14, 0, first + 13, 0, first + 12, 0,
                                        first + 11, 0, first + 10, 0, first + 9, 0, first + 8, 0,
                                        first + 7, 0, first + 6, 0, first + 5, 0, first + 4, 0,
                                        first + 3, 0, first + 2, 0, first + 1, 0, first, 0);
  return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, from, bits));
}

// 32 values as 32 upper halves and 32 lower ones.
static RESNET_FUSED_ALWAYS void store_split(__m512 v0, __m512 v1, unsigned char* to,
                                            int64_t low_bytes) {
  const auto high = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(v1, v0));
  v0 = _mm512_sub_ps(v0, widen<0>(high));
  v1 = _mm512_sub_ps(v1, widen<16>(high));
  _mm512_storeu_si512(to, high);
  _mm512_storeu_si512(to + low_bytes, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(v1, v0)));
}

// The first `count` of 32 values at `from`, zeros behind them; fp32 is split.
template <bool kSplit>
static RESNET_FUSED_ALWAYS void copy_32(const unsigned char* from, int64_t count, unsigned char* to,
                                        int64_t low_bytes) {
  const uint32_t mask = count >= 32 ? 0xffffffffu : (1u << count) - 1u;
  if (kSplit) {
    store_split(_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), from),
                _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> 16), from + 64), to,
                low_bytes);
  } else {
    _mm512_storeu_si512(to, _mm512_maskz_loadu_epi16(mask, from));
  }
}

// BatchNorm of 32 filters as fp32 scale and shift.
struct Normed {
  __m512 scale[2], shift[2];

  RESNET_FUSED_ALWAYS Normed(const float* scale_, const float* shift_) {
    for (int h = 0; h < 2; ++h) {
      scale[h] = _mm512_loadu_ps(scale_ + 16 * h);
      shift[h] = _mm512_loadu_ps(shift_ + 16 * h);
    }
  }
  RESNET_FUSED_ALWAYS __m512 half(const float* c, int h) const {
    return _mm512_fmadd_ps(_mm512_load_ps(c + 16 * h), scale[h], shift[h]);
  }
};

// What happens to the sums of 32 filters, of which those exist whose bits are set in `mask`. With
// kWhole zeros are written where none exists. Returns which fp32 results are NaN or infinite.
template <bool kSplit, Add kAdd, bool kRelu, bool kWhole>
struct Epilogue {
  const Normed main, other;
  const uint32_t mask;

  // One pixel: 32 sums to 32 outputs.
  RESNET_FUSED_ALWAYS uint32_t operator()(const float* c, const float* projected,
                                          const unsigned char* residual, unsigned char* out,
                                          int64_t low_bytes) const {
    const auto low = static_cast<__mmask16>(mask), high = static_cast<__mmask16>(mask >> 16);
    __m512 v0 = main.half(c, 0), v1 = main.half(c, 1);
    if (kAdd == Add::projected) {
      v0 = _mm512_add_ps(v0, other.half(projected, 0));
      v1 = _mm512_add_ps(v1, other.half(projected, 1));
    }
    if (kAdd == Add::residual && kSplit) {
      v0 = _mm512_add_ps(v0, _mm512_maskz_loadu_ps(low, residual));
      v1 = _mm512_add_ps(v1, _mm512_maskz_loadu_ps(high, residual + 64));
    } else if (kAdd == Add::residual) {
      const __m512i r = _mm512_maskz_loadu_epi16(mask, residual);
      v0 = _mm512_add_ps(v0, widen<0>(r));
      v1 = _mm512_add_ps(v1, widen<16>(r));
    }
    if (kRelu) {
      // The second operand is returned if either is NaN.
      v0 = _mm512_max_ps(_mm512_setzero_ps(), v0);
      v1 = _mm512_max_ps(_mm512_setzero_ps(), v1);
    }
    if (kSplit && !kWhole) {
      _mm512_mask_storeu_ps(out, low, v0);
      _mm512_mask_storeu_ps(out + 64, high, v1);
      constexpr int kOdd = 0x99;  // quiet and signalling NaN, both infinities
      return _mm512_mask_fpclass_ps_mask(low, v0, kOdd) |
             _mm512_mask_fpclass_ps_mask(high, v1, kOdd);
    }
    if (kSplit) {
      store_split(_mm512_maskz_mov_ps(low, v0), _mm512_maskz_mov_ps(high, v1), out, low_bytes);
      return 0;
    }
    const auto rounded = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(v1, v0));
    if (kWhole) {
      _mm512_storeu_si512(out, _mm512_maskz_mov_epi16(mask, rounded));
    } else {
      _mm512_mask_storeu_epi16(out, mask, rounded);
    }
    return 0;
  }
};

#else

inline void prefetch(const unsigned char*) {}

struct Tiles {
  float acc[32 * 32] = {};

  template <bool kSplit>
  void first(const unsigned char* a0, const unsigned char* a1, int64_t row_bytes, int64_t low_bytes,
             const unsigned char* b, float* c) {
    store(c);
    std::memset(acc, 0, sizeof(acc));
    step<kSplit>(a0, a1, row_bytes, low_bytes, b);
  }
  template <bool kSplit>
  void step(const unsigned char* a0, const unsigned char* a1, int64_t row_bytes, int64_t low_bytes,
            const unsigned char* b) {
    if (kSplit) multiply(a0 + low_bytes, a1 + low_bytes, row_bytes, b);
    multiply(a0, a1, row_bytes, b);
    if (kSplit) multiply(a0, a1, row_bytes, b + 2048);
  }
  void multiply(const unsigned char* a0, const unsigned char* a1, int64_t row_bytes,
                const unsigned char* b) {
    for (int m = 0; m < 32; ++m) {
      uint16_t x[32], w[2];
      std::memcpy(x, (m < 16 ? a0 : a1) + m % 16 * row_bytes, 64);
      for (int n = 0; n < 32; ++n) {
        for (int pair = 0; pair < 16; ++pair) {
          std::memcpy(w, b + (n / 16) * 1024 + pair * 64 + (n % 16) * 4, 4);
          acc[m * 32 + n] += bf16_to_float(x[2 * pair]) * bf16_to_float(w[0]);
          acc[m * 32 + n] += bf16_to_float(x[2 * pair + 1]) * bf16_to_float(w[1]);
        }
      }
    }
  }
  void store(float* c) const { std::memcpy(c, acc, sizeof(acc)); }
};

template <bool kSplit>
void copy_32(const unsigned char* from, int64_t count, unsigned char* to, int64_t low_bytes) {
  for (int64_t i = 0; i < 32; ++i) {
    float v = 0.0f;
    uint16_t high = 0;
    if (kSplit && i < count) std::memcpy(&v, from + 4 * i, 4);
    if (!kSplit && i < count) std::memcpy(&high, from + 2 * i, 2);
    if (kSplit) high = float_to_bf16(v);
    const uint16_t low = float_to_bf16(v - bf16_to_float(high));
    std::memcpy(to + 2 * i, &high, 2);
    if (kSplit) std::memcpy(to + low_bytes + 2 * i, &low, 2);
  }
}

struct Normed {
  const float *scale, *shift;
  Normed(const float* scale_, const float* shift_) : scale(scale_), shift(shift_) {}
};

template <bool kSplit, Add kAdd, bool kRelu, bool kWhole>
struct Epilogue {
  const Normed main, other;
  const uint32_t mask;

  uint32_t operator()(const float* c, const float* projected, const unsigned char* residual,
                      unsigned char* out, int64_t low_bytes) const {
    uint32_t odd = 0;
    for (int n = 0; n < 32; ++n) {
      const bool exists = (mask >> n & 1u) != 0;
      if (!exists && !kWhole) continue;
      float v = 0.0f;
      if (exists) {
        v = c[n] * main.scale[n] + main.shift[n];
        if (kAdd == Add::projected) v += projected[n] * other.scale[n] + other.shift[n];
        if (kAdd == Add::residual) v += added(residual, n);
        if (kRelu) v = v < 0.0f ? 0.0f : v;
        if (kSplit && !kWhole && !(v - v == 0.0f)) odd |= 1u << n;
      }
      if (kSplit && !kWhole) {
        std::memcpy(out + 4 * n, &v, 4);
        continue;
      }
      const uint16_t high = float_to_bf16(v), low = float_to_bf16(v - bf16_to_float(high));
      std::memcpy(out + 2 * n, &high, 2);
      if (kSplit) std::memcpy(out + low_bytes + 2 * n, &low, 2);
    }
    return odd;
  }
  static float added(const unsigned char* residual, int n) {
    if constexpr (kSplit) {
      float value;
      std::memcpy(&value, residual + 4 * n, 4);
      return value;
    } else {
      uint16_t value;
      std::memcpy(&value, residual + 2 * n, 2);
      return bf16_to_float(value);
    }
  }
};

#endif

}  // namespace RESNET_FUSED_TILES
}  // namespace resnet_fused
