// Sums and maxima of rows of any length.
#pragma once

#include "simd.h"

namespace HDFAST_ISA {
namespace {

// The sum of f(i, lanes) over a row, still spread over the lanes; f must be zero in inactive ones. Four accumulators
// hide the latency.
template <class F>
HDFAST_INLINE Vf sum_of_lanes(int64_t n, F f) {
  Vf a = {}, b = {}, c = {}, d = {};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    a += f(i, Whole{});
    b += f(i + W, Whole{});
    c += f(i + 2 * W, Whole{});
    d += f(i + 3 * W, Whole{});
  }
  if (i + W <= n) a += f(i, Whole{}), i += W;
  if (i + W <= n) b += f(i, Whole{}), i += W;
  if (i + W <= n) c += f(i, Whole{}), i += W;
  if (i < n) d += f(i, Part{int(n - i)});
  return (a + b) + (c + d);
}
template <class F>
HDFAST_INLINE float sum_lanes(int64_t n, F f) {
  return sum(sum_of_lanes(n, f));
}

// The same over long rows: in float within a block, in double across blocks, since a float sum of a million terms stops
// growing.
template <class F>
HDFAST_INLINE double sum_blocks(int64_t n, F f) {
  constexpr int64_t block = 1024;
  double total = 0;
  for (int64_t first = 0; first < n; first += block) {
    const int64_t count = n - first < block ? n - first : block;
    total += sum_lanes(count, [&](int64_t i, auto lanes) { return f(first + i, lanes); });
  }
  return total;
}

// The maximum of a row, still spread over the lanes.
template <class T>
HDFAST_INLINE Vf max_of_lanes(const T* row, int64_t n) {
  Vf top[4];
  for (Vf& t : top) t = splat(-INFINITY);
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W)
    for (int k = 0; k < 4; k++) top[k] = max(load(row + i + k * W, Whole{}), top[k]);
  for (; i + W <= n; i += W) top[0] = max(load(row + i, Whole{}), top[0]);
  if (i < n) top[1] = max(load(row + i, Part{int(n - i)}, -INFINITY), top[1]);
  return max(max(top[0], top[1]), max(top[2], top[3]));
}
template <class T>
HDFAST_INLINE float max_of_row(const T* row, int64_t n) {
  return max(max_of_lanes(row, n));
}

// f(first, count, lanes) for blocks of W rows, shared among the threads that call this together. What an op finds of each
// row, such as its maximum and sum, then makes a vector, so that no row waits for another.
template <class F>
HDFAST_INLINE void for_row_blocks(int64_t rows, F f) {
#pragma omp for schedule(static)
  for (int64_t first = 0; first < rows; first += W) {
    if (first + W <= rows)
      f(first, W, Whole{});
    else
      f(first, int(rows - first), Part{int(rows - first)});
  }
}

}  // namespace
}  // namespace HDFAST_ISA
