// The GRU's gates, a row at a time.
#pragma once

#include "../simd_math.h"
#include "layer_norm.h"

namespace HDFAST_ISA {
namespace {

// Columns that take one step after the other, see layer_norm.h, and rows that do so together in backward.
constexpr int64_t gru_columns = 32 * W, gru_columns_backward = 8 * W;
constexpr int gru_together = 4;

// G is the dtype of the gates, D that of the state. If `second` is not null, it receives the next state in bfloat16.
template <class G, class D>
HDFAST_INLINE void gru_row(const G* in, const D* before, const float* weight, const float* bias, D* out, bf16* second,
                           float* mean, float* rstd, int64_t width, float eps) {
  moments_of_rows<1>(in, 3 * width, eps, mean, rstd);
  const float m = *mean, s = *rstd;
  alignas(64) float z[3][gru_columns];
  for (int64_t first = 0; first < width; first += gru_columns) {
    const int64_t count = width - first < gru_columns ? width - first : gru_columns;
    for_lanes(count, [&](int64_t i, auto lanes) {
      for (int k = 0; k < 3; k++) {
        const int64_t at = k * width + first + i;
        __builtin_prefetch(in + 3 * width + at);
        const Vf normed = (load(in + at, lanes) - m) * s;
        store(z[k] + i, normed * load(weight + at, lanes) + load(bias + at, lanes), Whole{});
      }
    });
    for_lanes(count, [&](int64_t i, auto) {
      store(z[1] + i, sigmoid(load(z[0] + i, Whole{})) * load(z[1] + i, Whole{}), Whole{});
      store(z[2] + i, sigmoid(load(z[2] + i, Whole{}) - 1.f), Whole{});
    });
    for_lanes(count, [&](int64_t i, auto lanes) {
      __builtin_prefetch(before + width + first + i);
      __builtin_prefetch(out + width + first + i, 1);
      const Vf state = load(before + first + i, lanes), cand = tanh(load(z[1] + i, Whole{})).value;
      const Vf after = state + load(z[2] + i, Whole{}) * (cand - state);
      store(out + first + i, after, lanes);
      if (second) store(second + first + i, after, lanes);
    });
  }
}

// R rows together, so that they share the loads of weight and bias and add to the column sums together. d_normed is
// scratch of as many rows of gates. The gradient may be overwritten: grad_deter may be `dy`.
template <int R, class G, class D, class Out>
HDFAST_INLINE void gru_rows_backward(const D* dy, const G* in, const D* before, const float* weight, const float* bias,
                                     const float* mean, const float* rstd, Out* grad_gates, D* grad_deter,
                                     int64_t width, float* d_normed, AffineGradients::Local& totals) {
  Vf sum_d[R] = {}, sum_dn[R] = {};
  alignas(64) float z[R][3][gru_columns_backward], cand[R][gru_columns_backward], slope[R][gru_columns_backward];
  for (int64_t first = 0; first < width; first += gru_columns_backward) {
    const int64_t count = width - first < gru_columns_backward ? width - first : gru_columns_backward;
    const auto normed = [&](int r, int64_t j, auto lanes) __attribute__((always_inline)) {
      return (load(in + r * 3 * width + j, lanes) - mean[r]) * rstd[r];
    };
    for_lanes(count, [&](int64_t i, auto lanes) {
      for (int k = 0; k < 3; k++) {
        const int64_t at = k * width + first + i;
        const Vf w = load(weight + at, lanes), b = load(bias + at, lanes);
        for (int r = 0; r < R; r++) store(z[r][k] + i, normed(r, at, lanes) * w + b, Whole{});
      }
    });
    for (int r = 0; r < R; r++) {
      for_lanes(count, [&](int64_t i, auto) {
        for (int k = 0; k < 3; k++) {
          const int64_t at = (r * 3 + k) * width + first + i;
          __builtin_prefetch(in + R * 3 * width + at);
          __builtin_prefetch(grad_gates + at, 1);
        }
        const Vf open = sigmoid(load(z[r][0] + i, Whole{}));
        store(z[r][0] + i, open, Whole{});
        store(cand[r] + i, open * load(z[r][1] + i, Whole{}), Whole{});
        store(z[r][2] + i, sigmoid(load(z[r][2] + i, Whole{}) - 1.f), Whole{});
      });
      for_lanes(count, [&](int64_t i, auto) {
        const int64_t next = (R + r) * width + first + i;
        __builtin_prefetch(dy + next);
        __builtin_prefetch(before + next);
        __builtin_prefetch(grad_deter + next, 1);
        const Tanh of = tanh(load(cand[r] + i, Whole{}));
        store(cand[r] + i, of.value, Whole{});
        store(slope[r] + i, of.slope, Whole{});
      });
    }
    for_lanes(count, [&](int64_t i, auto lanes) {
      const int64_t at[3] = {first + i, width + first + i, 2 * width + first + i};
      Vf d_weight[3] = {}, d_bias[3] = {}, w[3];
      for (int k = 0; k < 3; k++) w[k] = load(weight + at[k], lanes);
      for (int r = 0; r < R; r++) {
        const int64_t row = r * width;
        const Vf g = load(dy + row + at[0], lanes), open = load(z[r][0] + i, Whole{}), u = load(z[r][2] + i, Whole{});
        const Vf kept = g * (1.f - u), d_product = g * u * load(slope[r] + i, Whole{});
        const Vf dz[3] = {d_product * load(z[r][1] + i, Whole{}) * open * (1.f - open), d_product * open,
                          (load(cand[r] + i, Whole{}) - load(before + row + at[0], lanes)) * u * kept};
        store(grad_deter + row + at[0], kept, lanes);
        Vf n[3], d[3];
        for (int k = 0; k < 3; k++) {
          n[k] = normed(r, at[k], lanes), d[k] = dz[k] * w[k];
          d_weight[k] += dz[k] * n[k];
          d_bias[k] += dz[k];
          store(d_normed + 3 * row + at[k], d[k], lanes);
        }
        sum_d[r] += d[0] + d[1] + d[2];
        sum_dn[r] += d[0] * n[0] + d[1] * n[1] + d[2] * n[2];
      }
      for (int k = 0; k < 3; k++) totals.add(at[k], d_weight[k], d_bias[k], lanes);
    });
  }
  for (int r = 0; r < R; r++) {
    const float s = rstd[r], level = s * sum(sum_d[r]) / (3 * width), tilt = s * s * sum(sum_dn[r]) / (3 * width);
    for_lanes(3 * width, [&](int64_t i, auto lanes) {
      const int64_t at = r * 3 * width + i;
      const Vf lost = (load(in + at, lanes) - mean[r]) * tilt + level;
      store(grad_gates + at, s * load(d_normed + at, lanes) - lost, lanes);
    });
  }
}

}  // namespace
}  // namespace HDFAST_ISA
