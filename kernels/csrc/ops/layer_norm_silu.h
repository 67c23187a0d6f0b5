// SiLU(LayerNorm(x)), some rows at a time.
#pragma once

#include "../simd_math.h"
#include "layer_norm.h"

namespace HDFAST_ISA {
namespace {

// silu(z), as accurately as T can hold it.
template <class T>
HDFAST_INLINE Vf silu(Vf z) {
  return z * (std::is_same_v<T, bf16> ? rough_sigmoid(z) : sigmoid(z));
}

// The derivative of silu.
HDFAST_INLINE Vf silu_slope(Vf z) {
  const Vf gate = sigmoid(z);
  return gate * (1.f + z * (1.f - gate));
}

// R rows together, so that they share the loads of weight and bias and wait for their sums at the same time.
template <int R, bool far, class T, class Out>
void forward_rows(const T* in, const float* weight, const float* bias, Out* out, int64_t out_stride, float* mean,
                  float* rstd, int64_t width, float eps) {
  moments_of_rows<R>(in, width, eps, mean, rstd);
  for_lanes(width, [&](int64_t i, auto lanes) {
    const Vf w = load(weight + i, lanes), b = load(bias + i, lanes);
    for (int r = 0; r < R; r++) {
      __builtin_prefetch(in + (R + r) * width + i);
      const Vf normed = (load(in + r * width + i, lanes) - mean[r]) * rstd[r];
      put<far>(out + r * out_stride + i, silu<T>(normed * w + b), lanes);
    }
  });
}

// The same for backward: the R rows also add to the column sums together. d_normed is scratch of R rows. The gradient
// may be overwritten: `out` may be `grad`.
template <int R, bool far, class T>
void backward_rows(const T* grad, const T* in, const float* weight, const float* bias, const float* mean,
                   const float* rstd, T* out, int64_t width, float* d_normed, AffineGradients::Local& totals) {
  Vf sum_d[R] = {}, sum_dn[R] = {};
  for_lanes(width, [&](int64_t i, auto lanes) {
    const Vf w = load(weight + i, lanes), b = load(bias + i, lanes);
    Vf d_weight = {}, d_bias = {};
    for (int r = 0; r < R; r++) {
      // Prefetches what is written soon and read next, a little at a time: few cache lines can be in flight at once.
      if (!far) __builtin_prefetch(out + r * width + i, 1);
      __builtin_prefetch(in + (R + r) * width + i);
      __builtin_prefetch(grad + (R + r) * width + i);
      const Vf n = (load(in + r * width + i, lanes) - mean[r]) * rstd[r];
      const Vf dz = load(grad + r * width + i, lanes) * silu_slope(n * w + b), d = dz * w;
      d_weight += dz * n;
      d_bias += dz;
      sum_d[r] += d;
      sum_dn[r] += d * n;
      store(d_normed + r * width + i, d, lanes);
    }
    totals.add(i, d_weight, d_bias, lanes);
  });
  for (int r = 0; r < R; r++) {
    const float mean_d = sum(sum_d[r]) / width, slope = sum(sum_dn[r]) / width * rstd[r];
    for_lanes(width, [&](int64_t i, auto lanes) {
      const Vf centred = load(in + r * width + i, lanes) - mean[r], d = load(d_normed + r * width + i, lanes);
      put<far>(out + r * width + i, rstd[r] * (d - mean_d - slope * centred), lanes);
    });
  }
}

}  // namespace
}  // namespace HDFAST_ISA
