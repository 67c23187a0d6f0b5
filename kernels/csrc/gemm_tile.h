// The inner loops of a product of matrices whose operands were laid out for it, near the peak of the machine: a tile of
// sums stays in registers, and all distances within it are constants, so that each operand needs only one pointer.
#pragma once

#include <algorithm>

#include "simd.h"

namespace HDFAST_ISA {
namespace {

constexpr int tile_rows = W == 16 ? 14 : 6;  // two vectors each; these fill the registers
constexpr int64_t panel = 2 * W;             // columns of `right` and `sums`; the second half may be empty
template <class T>
constexpr int64_t group = 64 / sizeof(T);  // consecutive depths of `left` stored together: a cache line
// Groups that are summed separately: a sum's error grows with its length, and the cost of adding up the sums is hidden.
constexpr int64_t chain = 2;

// sums[m, n] = sum over k of left[k / group, m, k % group] * right[k, n]        m < tile_rows, n < vectors * W
//
// Groups of `left` are `left_step` apart; the template gives the steps between rows m and between depths k of a group.
// The sums are added to those in `sums`, or overwrite them if `fresh`.
template <int vectors, int64_t step_of_row = group<float>, int64_t step_of_depth = 1>
HDFAST_INLINE void multiply_tile(const float* left, int64_t left_step, const float* right, int64_t groups, float* sums,
                                 bool fresh) {
  for (; groups > 0; groups -= chain, fresh = false) {
    Vf tile[tile_rows][vectors] = {};
    for (int64_t i = std::min(groups, chain); i > 0; i--, left += left_step)
      for (int64_t k = 0; k < group<float>; k++, right += panel) {
        Vf row[vectors];
        for (int v = 0; v < vectors; v++) row[v] = load(right + v * W, Whole{});
#pragma GCC unroll 14
        for (int m = 0; m < tile_rows; m++)
          for (int v = 0; v < vectors; v++) tile[m][v] += left[m * step_of_row + k * step_of_depth] * row[v];
      }
#pragma GCC unroll 14
    for (int m = 0; m < tile_rows; m++)
      for (int v = 0; v < vectors; v++) {
        float* const sum = sums + m * panel + v * W;
        store(sum, fresh ? tile[m][v] : tile[m][v] + load(sum, Whole{}), Whole{});
      }
  }
}

// Prefetches what is needed next, a few lines on each of `calls` calls, while products leave the memory idle: the
// hardware does not predict data that is read in another order than it is stored in.
template <class T>
class Prefetcher {
 public:
  Prefetcher(const T* next, const T* end, int64_t calls) : next_(next), end_(end), step_((end - next) / calls + 1) {}

  HDFAST_INLINE void advance() {
    for (const T* const to = std::min(next_ + step_, end_); next_ < to; next_ += group<T>)
      __builtin_prefetch(next_, 0, 2);
  }

 private:
  const T *next_, *end_;
  const int64_t step_;
};

}  // namespace
}  // namespace HDFAST_ISA
