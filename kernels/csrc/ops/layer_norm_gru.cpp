#include "../simd_math.h"
#include "layer_norm.h"

namespace HDFAST_ISA {
namespace {

// G is the dtype of the gates, D that of the state.
template <class G, class D>
void forward(const G* gates, const D* deter, const float* weight, const float* bias, D* next, int64_t next_stride,
             bf16* rounded, int64_t rounded_stride, float* mean, float* rstd, int64_t rows, int64_t width, float eps,
             int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    const G* in = gates + r * 3 * width;
    const D* before = deter + r * width;
    D* out = next + r * next_stride;
    bf16* second = rounded ? rounded + r * rounded_stride : nullptr;
    moments_of_rows<1>(in, 3 * width, eps, mean + r, rstd + r);
    const float m = mean[r], s = rstd[r];
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
}

template <class G, class D>
void backward(const D* grad, const G* gates, const D* deter, const float* weight, const float* bias, const float* mean,
              const float* rstd, G* grad_gates, D* grad_deter, float* grad_weight, float* grad_bias, int64_t rows,
              int64_t width, int threads) {
  AffineGradients totals(3 * width, threads);
#pragma omp parallel num_threads(threads)
  {
    AffineGradients::Local local(totals);
    Scratch<float> d_normed(3 * width), normed(3 * width);
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
      const G* in = gates + r * 3 * width;
      const D *before = deter + r * width, *dy = grad + r * width;
      const float m = mean[r], s = rstd[r];
      local.next_rows(1);
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
        store(grad_deter + r * width + i, g * (1.f - update), lanes);
        const Vf d_product = g * update * cand.slope;
        const Vf dz[3] = {d_product * z[1] * reset * (1.f - reset), d_product * reset,
                          g * (cand.value - load(before + i, lanes)) * update * (1.f - update)};
        for (int k = 0; k < 3; k++) {
          local.add(at[k], dz[k] * n[k], dz[k], lanes);
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
        store(grad_gates + r * 3 * width + i, s * d, lanes);
      });
    }
  }
  totals.write(grad_weight, grad_bias);
}

}  // namespace

void layer_norm_gru_forward(const void* gates, const void* deter, const float* weight, const float* bias, void* next,
                            int64_t next_stride, void* rounded, int64_t rounded_stride, float* mean, float* rstd,
                            int64_t rows, int64_t width, float eps, bool gates_bf16, bool deter_bf16, int threads) {
  threads = threads_for(rows * 3 * width, threads);
  with_dtype(gates_bf16, [&](auto* gate_tag) {
    with_dtype(deter_bf16, [&](auto* deter_tag) {
      using G = std::remove_pointer_t<decltype(gate_tag)>;
      using D = std::remove_pointer_t<decltype(deter_tag)>;
      forward(static_cast<const G*>(gates), static_cast<const D*>(deter), weight, bias, static_cast<D*>(next),
              next_stride, static_cast<bf16*>(rounded), rounded_stride, mean, rstd, rows, width, eps, threads);
    });
  });
}

void layer_norm_gru_backward(const void* grad, const void* gates, const void* deter, const float* weight,
                             const float* bias, const float* mean, const float* rstd, void* grad_gates,
                             void* grad_deter, float* grad_weight, float* grad_bias, int64_t rows, int64_t width,
                             bool gates_bf16, bool deter_bf16, int threads) {
  threads = threads_for(rows * 3 * width, threads);
  with_dtype(gates_bf16, [&](auto* gate_tag) {
    with_dtype(deter_bf16, [&](auto* deter_tag) {
      using G = std::remove_pointer_t<decltype(gate_tag)>;
      using D = std::remove_pointer_t<decltype(deter_tag)>;
      backward(static_cast<const D*>(grad), static_cast<const G*>(gates), static_cast<const D*>(deter), weight, bias,
               mean, rstd, static_cast<G*>(grad_gates), static_cast<D*>(grad_deter), grad_weight, grad_bias, rows,
               width, threads);
    });
  });
}

}  // namespace HDFAST_ISA
