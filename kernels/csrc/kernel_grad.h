// Shared by the ways to compute the gradient of a 4 x 4 kernel: the tile of sums, and how the gradient is stored.
#pragma once

#include <algorithm>
#include <cstring>

#include "simd.h"

namespace HDFAST_ISA {
namespace {

constexpr int tall = 4;                 // large channels of a tile
constexpr int broad = W == 16 ? 4 : 2;  // vectors of small channels of a tile: as many as fit in the registers

// f(l, s, K) for tiles of `tall` large channels starting at l and K vectors of small channels starting at s.
template <class F>
HDFAST_INLINE void each_tile(int64_t large, int64_t small, F f) {
  for (int64_t s = 0; s < small; s += broad * W)
    with_one_to_four(std::min<int64_t>(broad, (small - s) / W), [&](auto vectors) {
      for (int64_t l = 0; l < large; l += tall) f(l, s, vectors);
    });
}

// Has products(tile) add to a tile of `sums` in registers; `small` is the length of a row of `sums`.
template <int K, class F>
HDFAST_INLINE void add_to_tile(float* sums, int64_t small, F products) {
  Vf tile[tall][K];
  for (int t = 0; t < tall; t++)
    for (int k = 0; k < K; k++) tile[t][k] = load(sums + t * small + k * W, Whole{});
  products(tile);
  for (int t = 0; t < tall; t++)
    for (int k = 0; k < K; k++) store(sums + t * small + k * W, tile[t][k], Whole{});
}

#if defined(__AVX512BF16__)
// out[c] = (a[c], b[c]) for `channels`, a multiple of W; null stands for zeros. `out` is aligned.
inline void lay_pairs(const bf16* a, const bf16* b, uint32_t* out, int64_t channels) {
  const auto wide = [](const bf16* from) {
    return from ? _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))
                : _mm512_setzero_si512();
  };
  for (int64_t c = 0; c < channels; c += W)
    _mm512_store_si512(out + c, _mm512_or_si512(wide(a ? a + c : a), _mm512_slli_epi32(wide(b ? b + c : b), 16)));
}
#endif

// Stores the gradient for W small channels and one large channel, numbers[4 * i + j] at row i and column j of the
// kernel; grad is (small, large, 4, 4).
HDFAST_INLINE void store_kernels(float* grad, int64_t large, int64_t s, int64_t l, const Vf (&numbers)[16]) {
  for (int k = 0; k < W; k++) {
    float turned[16];
    for (int place = 0; place < 16; place++) turned[place] = numbers[place][k];
    std::memcpy(grad + ((s + k) * large + l) * 16, turned, sizeof(turned));
  }
}

}  // namespace
}  // namespace HDFAST_ISA
