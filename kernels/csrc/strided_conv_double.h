// The transposed convolution of kernel 4, stride 2 and padding 1. In one dimension it has two phases,
//
//     y[2t] = w1 x[t] + w3 x[t - 1]        y[2t + 1] = w0 x[t + 1] + w2 x[t],
//
// in two dimensions four, each a product of matrices over all channels of 4 of the 3 x 3 pixels around a pixel. This is
// how its weights are laid out for bfloat16.
#pragma once

#include "gemm_tile.h"
#include "simd.h"

namespace HDFAST_ISA {
namespace {

constexpr int64_t phases = 4, taps = 4;

#if defined(__AVX512BF16__)
// Pairs of neighbouring C, as (phase, panel of O, tap, pair of C, panel); C channels of x, an even number, O of y.
struct DoubleWeights {
  int64_t C, O;

  int64_t panels() const { return (O + panel - 1) / panel; }
  int64_t at(int64_t phase, int64_t p, int64_t tap) const {
    return ((phase * panels() + p) * taps + tap) * (C / 2) * panel;
  }
  int64_t size() const { return at(phases, 0, 0); }

  // Called by all threads together. The weight is (C, 4, 4, O).
  void lay(const bf16* weight, uint32_t* out) const {
    const auto wide = [](const bf16* p) {
      return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    };
#pragma omp for schedule(static)
    for (int64_t c = 0; c < C; c += 2)
      for (int64_t phase = 0; phase < phases; phase++)
        for (int64_t tap = 0; tap < taps; tap++) {
          const int64_t i = 3 - phase / 2 - 2 * (tap / 2), j = 3 - phase % 2 - 2 * (tap % 2);
          const bf16* const from = weight + (c * 16 + i * 4 + j) * O;
          for (int64_t o = 0; o < O; o += W)
            _mm512_store_si512(out + at(phase, o / panel, tap) + c / 2 * panel + o % panel,
                               wide(from + o) | _mm512_slli_epi32(wide(from + 16 * O + o), 16));
        }
  }
};
#endif

}  // namespace
}  // namespace HDFAST_ISA
