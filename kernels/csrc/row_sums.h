// Sums and maxima of rows of any length.
#pragma once

#include "simd.h"

namespace HDFAST_ISA {
namespace {

// The sum of f(i, lanes) over a row; f must be zero in inactive lanes. Four accumulators hide the latency.
template <class F>
HDFAST_INLINE float sum_lanes(int64_t n, F f) {
  Vf a = {}, b = {}, c = {}, d = {};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    a += f(i, Whole{});
    b += f(i + W, Whole{});
    c += f(i + 2 * W, Whole{});
    d += f(i + 3 * W, Whole{});
  }
  for (; i + W <= n; i += W) a += f(i, Whole{});
  if (i < n) b += f(i, Part{int(n - i)});
  return sum((a + b) + (c + d));
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

template <class T>
HDFAST_INLINE float max_of_row(const T* row, int64_t n) {
  Vf top[4];
  for (Vf& t : top) t = splat(-INFINITY);
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W)
    for (int k = 0; k < 4; k++) top[k] = max(load(row + i + k * W, Whole{}), top[k]);
  for (; i + W <= n; i += W) top[0] = max(load(row + i, Whole{}), top[0]);
  if (i < n) top[1] = max(load(row + i, Part{int(n - i)}, -INFINITY), top[1]);
  return max(max(max(top[0], top[1]), max(top[2], top[3])));
}

}  // namespace
}  // namespace HDFAST_ISA
