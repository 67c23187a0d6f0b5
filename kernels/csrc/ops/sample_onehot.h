// Drawing a class from a row of logits.
#pragma once

#include "../row_sums.h"
#include "../simd_math.h"

namespace HDFAST_ISA {
namespace {

// The number of classes whose cumulative probability is at most `uniform`, but no more than classes - 1. Like PyTorch's
// cumsum on the CPU, it sums in double in the order of the classes and rounds each sum to float.
HDFAST_INLINE int64_t draw(const float* probs, int64_t classes, float uniform) {
  double cdf = 0;
  int64_t index = 0;
  for (int64_t k = 0; k < classes; k++) {
    cdf += probs[k];
    index += float(cdf) <= uniform;
  }
  return index < classes ? index : classes - 1;
}

#if defined(__AVX512F__)
// The same for W rows at once.
HDFAST_INLINE void draw_together(const float* probs, int64_t classes, const float* uniform, int64_t* index) {
  const Vf limits = load(uniform, Whole{});
  __m512d low = _mm512_setzero_pd(), high = _mm512_setzero_pd();  // the cumulative probabilities of 8 rows each
  Vi below = {};
  for (int64_t first = 0; first < classes; first += W) {
    const int count = int(classes - first < W ? classes - first : W);
    __m512i columns[W];
    for (int r = 0; r < W; r++) columns[r] = bit_cast<__m512i>(load(probs + r * classes + first, Part{count}));
    transpose(columns);
    for (int k = 0; k < count; k++) {
      low = _mm512_add_pd(low, _mm512_cvtps_pd(_mm256_castsi256_ps(_mm512_castsi512_si256(columns[k]))));
      high = _mm512_add_pd(high, _mm512_cvtps_pd(_mm256_castsi256_ps(_mm512_extracti64x4_epi64(columns[k], 1))));
      const __m512 rounded =
          _mm512_castpd_ps(_mm512_insertf64x4(_mm512_castps_pd(_mm512_castps256_ps512(_mm512_cvtpd_ps(low))),
                                              _mm256_castps_pd(_mm512_cvtpd_ps(high)), 1));
      below -= Vf(rounded) <= limits;
    }
  }
  for (int r = 0; r < W; r++) index[r] = below[r] < classes ? below[r] : classes - 1;
}
#endif

// Draws a class for each of up to W rows, and writes the classes' probabilities: share * softmax(row) + floor. With
// Distribution, logp receives their logarithms; it may be the rows.
template <bool Distribution, class T>
HDFAST_INLINE void sample_rows(const T* rows, const float* uniform, int count, int64_t classes, float share,
                               float floor, float* probs, float* logp, int64_t* index) {
  Vf part[W] = {};
  for (int r = 0; r < count; r++) part[r] = max_of_lanes(rows + r * classes, classes);
  const Vf tops = maxima(part);
  for (int r = 0; r < count; r++) {
    const float top = tops[r];
    part[r] = sum_of_lanes(classes, [&](int64_t i, auto some) {
      const Vf e = keep(exp(load(rows + r * classes + i, some) - top), some);
      store(probs + r * classes + i, e, some);
      return e;
    });
  }
  const Vf totals = sums(part), scales = share / totals, logarithms = Distribution ? log(totals) : Vf{};
  for (int r = 0; r < count; r++) {
    const float scale = scales[r], top = tops[r], log_z = logarithms[r];
    for_lanes(classes, [&](int64_t i, auto some) {
      const int64_t at = r * classes + i;
      const Vf p = load(probs + at, some) * scale + floor;
      store(probs + at, p, some);
      // Without a mixture, a probability may underflow where its logarithm stays finite.
      if constexpr (Distribution) store(logp + at, floor > 0 ? log(p) : load(rows + at, some) - top - log_z, some);
    });
  }
#if defined(__AVX512F__)
  if (count == W) return draw_together(probs, classes, uniform, index);
#endif
  for (int r = 0; r < count; r++) index[r] = draw(probs + r * classes, classes, uniform[r]);
}

}  // namespace
}  // namespace HDFAST_ISA
