#include "layer_norm_gru.h"

namespace HDFAST_ISA {
namespace {

// G is the dtype of the gates, D that of the state.
template <class G, class D>
void forward(const G* gates, const D* deter, const float* weight, const float* bias, D* next, int64_t next_stride,
             bf16* rounded, int64_t rounded_stride, float* mean, float* rstd, int64_t rows, int64_t width, float eps,
             int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    bf16* second = rounded ? rounded + r * rounded_stride : nullptr;
    gru_row(gates + r * 3 * width, deter + r * width, weight, bias, next + r * next_stride, second, mean + r, rstd + r,
            width, eps);
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
    Scratch<float> d_normed(gru_together * 3 * width);
    for_rows<gru_together>(rows, [&](int64_t r, auto count) {
      const int64_t at = r * width;
      gru_rows_backward<count>(grad + at, gates + 3 * at, deter + at, weight, bias, mean + r, rstd + r,
                               grad_gates + 3 * at, grad_deter + at, width, d_normed, local);
      local.next_rows(count);
    });
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
