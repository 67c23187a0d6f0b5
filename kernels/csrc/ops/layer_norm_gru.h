// The GRU's gates, a row at a time.
#pragma once

#include "../simd_math.h"
#include "layer_norm.h"

namespace HDFAST_ISA {
namespace {

// G is the dtype of the gates, D that of the state. If `second` is not null, it receives the next state in bfloat16.
template <class G, class D>
HDFAST_INLINE void gru_row(const G* in, const D* before, const float* weight, const float* bias, D* out, bf16* second,
                           float* mean, float* rstd, int64_t width, float eps) {
  moments_of_rows<1>(in, 3 * width, eps, mean, rstd);
  const float m = *mean, s = *rstd;
  for_lanes(width, [&](int64_t i, auto lanes) {
    const auto gate = [&](int64_t j) __attribute__((always_inline)) {
      const Vf normed = (load(in + j, lanes) - m) * s;
      return normed * load(weight + j, lanes) + load(bias + j, lanes);
    };
    const Vf cand = tanh(sigmoid(gate(i)) * gate(width + i)).value, update = sigmoid(gate(2 * width + i) - 1.f);
    const Vf state = load(before + i, lanes);
    const Vf after = state + update * (cand - state);
    store(out + i, after, lanes);
    if (second) store(second + i, after, lanes);
  });
}

// d_normed and normed are scratch of a row of gates each; the gradient may be overwritten: grad_deter may be `dy`.
template <class G, class D, class Out>
HDFAST_INLINE void gru_row_backward(const D* dy, const G* in, const D* before, const float* weight, const float* bias,
                                    float m, float s, Out* grad_gates, D* grad_deter, int64_t width, float* d_normed,
                                    float* normed, AffineGradients::Local& totals) {
  Vf sum_d = {}, sum_dn = {};
  for_lanes(width, [&](int64_t i, auto lanes) {
    const int64_t at[3] = {i, width + i, 2 * width + i};
    Vf n[3], w[3], z[3];
    for (int k = 0; k < 3; k++) {
      n[k] = (load(in + at[k], lanes) - m) * s;
      w[k] = load(weight + at[k], lanes);
      z[k] = n[k] * w[k] + load(bias + at[k], lanes);
    }
    const Vf reset = sigmoid(z[0]), update = sigmoid(z[2] - 1.f);
    const Tanh cand = tanh(reset * z[1]);
    const Vf g = load(dy + i, lanes);
    store(grad_deter + i, g * (1.f - update), lanes);
    const Vf d_product = g * update * cand.slope;
    const Vf dz[3] = {d_product * z[1] * reset * (1.f - reset), d_product * reset,
                      g * (cand.value - load(before + i, lanes)) * update * (1.f - update)};
    for (int k = 0; k < 3; k++) {
      totals.add(at[k], dz[k] * n[k], dz[k], lanes);
      const Vf d = dz[k] * w[k];
      sum_d += d;
      sum_dn += d * n[k];
      store(d_normed + at[k], d, lanes);
      store(normed + at[k], n[k], lanes);
    }
  });
  const float mean_d = sum(sum_d) / (3 * width), mean_dn = sum(sum_dn) / (3 * width);
  for_lanes(3 * width, [&](int64_t i, auto lanes) {
    const Vf d = load(d_normed + i, lanes) - mean_d - load(normed + i, lanes) * mean_dn;
    store(grad_gates + i, s * d, lanes);
  });
}

}  // namespace
}  // namespace HDFAST_ISA
