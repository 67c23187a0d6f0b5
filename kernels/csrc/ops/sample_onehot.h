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

// Returns the class that `uniform` draws, and writes the classes' probabilities: share * softmax(row) + floor. With
// Distribution, logp receives their logarithms; it may be the row.
template <bool Distribution, class T>
HDFAST_INLINE int64_t sample_row(const T* row, float uniform, int64_t classes, float share, float floor, float* probs,
                                 float* logp) {
  const float top = max_of_row(row, classes);
  Vf total = {};
  for_lanes(classes, [&](int64_t i, auto lanes) {
    const Vf e = keep(exp(load(row + i, lanes) - top), lanes);
    total += e;
    store(probs + i, e, lanes);
  });
  const float z = sum(total), scale = share / z;
  const float log_z = Distribution ? std::log(z) : 0.f;
  for_lanes(classes, [&](int64_t i, auto lanes) {
    const Vf p = load(probs + i, lanes) * scale + floor;
    store(probs + i, p, lanes);
    // Without a mixture, a probability may underflow where its logarithm stays finite.
    if constexpr (Distribution) store(logp + i, floor > 0 ? log(p) : load(row + i, lanes) - top - log_z, lanes);
  });
  return draw(probs, classes, uniform);
}

}  // namespace
}  // namespace HDFAST_ISA
