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
  return gate * ((1.f + z) - z * gate);
}

constexpr int64_t silu_chunk = 64 * W;

// R rows together, so that they share the loads of weight and bias and wait for their sums at the same time.
template <int R, bool far, class T, class Out>
void forward_rows(const T* in, const float* weight, const float* bias, Out* out, int64_t out_stride, float* mean,
                  float* rstd, int64_t width, float eps) {
  moments_of_rows<R>(in, width, eps, mean, rstd);
  alignas(64) float z[R][silu_chunk];
  for (int64_t begin = 0; begin < width; begin += silu_chunk) {
    const int64_t count = width - begin < silu_chunk ? width - begin : silu_chunk;
    for_lanes(count, [&](int64_t i, auto lanes) {
      const Vf w = load(weight + begin + i, lanes), b = load(bias + begin + i, lanes);
      for (int r = 0; r < R; r++)
        store(z[r] + i, (load(in + r * width + begin + i, lanes) - mean[r]) * rstd[r] * w + b, Whole{});
    });
    for (int r = 0; r < R; r++)
      for_lanes(count, [&](int64_t i, auto lanes) {
        __builtin_prefetch(in + (R + r) * width + begin + i);
        if (!far) __builtin_prefetch(out + (R + r) * out_stride + begin + i, 1);
        put<far>(out + r * out_stride + begin + i, silu<T>(load(z[r] + i, Whole{})), lanes);
      });
  }
}

// The same for backward: the R rows also add to the column sums together. of_rows is scratch of R rows. The gradient
// may be overwritten: `out` may be `grad`.
template <int R, bool far, class T>
void backward_rows(const T* grad, const T* in, const float* weight, const float* bias, const float* mean,
                   const float* rstd, T* out, int64_t width, float* of_rows, AffineGradients::Local& totals) {
  Vf sum_d[R] = {}, sum_dn[R] = {};
  const auto normed = [&](int r, int64_t i, auto lanes) __attribute__((always_inline)) {
    return (load(in + r * width + i, lanes) - mean[r]) * rstd[r];
  };
  for_lanes(width, [&](int64_t i, auto lanes) {
    const Vf w = load(weight + i, lanes), b = load(bias + i, lanes);
    for (int r = 0; r < R; r++) store(of_rows + r * width + i, normed(r, i, lanes) * w + b, lanes);
  });
  for_lanes(R * width, [&](int64_t i, auto lanes) {
    // Prefetches what is written soon and read next, a little at a time: few cache lines can be in flight at once.
    if (!far) __builtin_prefetch(out + i, 1);
    __builtin_prefetch(in + R * width + i);
    __builtin_prefetch(grad + R * width + i);
    store(of_rows + i, silu_slope(load(of_rows + i, lanes)), lanes);
  });
  for_lanes(width, [&](int64_t i, auto lanes) {
    const Vf w = load(weight + i, lanes);
    Vf d_weight = {}, d_bias = {};
    for (int r = 0; r < R; r++) {
      float* const at = of_rows + r * width + i;
      const Vf n = normed(r, i, lanes), dz = load(grad + r * width + i, lanes) * load(at, lanes), d = dz * w;
      d_weight += dz * n;
      d_bias += dz;
      sum_d[r] += d;
      sum_dn[r] += d * n;
      store(at, d, lanes);
    }
    totals.add(i, d_weight, d_bias, lanes);
  });
  for (int r = 0; r < R; r++) {
    const float mean_d = sum(sum_d[r]) / width, slope = sum(sum_dn[r]) / width * rstd[r];
    for_lanes(width, [&](int64_t i, auto lanes) {
      const Vf centred = load(in + r * width + i, lanes) - mean[r], d = load(of_rows + r * width + i, lanes);
      put<far>(out + r * width + i, rstd[r] * (d - mean_d - slope * centred), lanes);
    });
  }
}

}  // namespace
}  // namespace HDFAST_ISA
