#include "layer_norm_silu.h"

namespace HDFAST_ISA {
namespace {

// W rows of V vectors, as of a convolution with few channels: the sums of the rows fit in one vector.
template <int V, bool far, class T>
void forward_narrow(const T* x, const float* weight, const float* bias, T* y, float* mean, float* rstd, float eps) {
  constexpr int width = V * W;
  if (!far) prefetch_to_write(y + W * width, W * width);
  Vf part[W];
  for (int r = 0; r < W; r++) {
    part[r] = load(x + r * width, Whole{});
    for (int v = 1; v < V; v++) part[r] += load(x + r * width + v * W, Whole{});
  }
  store(mean, sums(part) * (1.f / width), Whole{});
  for (int r = 0; r < W; r++) {
    part[r] = Vf{};
    for (int v = 0; v < V; v++) {
      const Vf d = load(x + r * width + v * W, Whole{}) - mean[r];
      part[r] += d * d;
    }
  }
  store(rstd, 1.f / sqrt(sums(part) * (1.f / width) + eps), Whole{});
  Vf w[V], b[V];
  for (int v = 0; v < V; v++) w[v] = load(weight + v * W, Whole{}), b[v] = load(bias + v * W, Whole{});
  Vf z[W * V];
  for (int r = 0; r < W; r++)
    for (int v = 0; v < V; v++)
      z[r * V + v] = (load(x + r * width + v * W, Whole{}) - mean[r]) * rstd[r] * w[v] + b[v];
  for (int i = 0; i < W * V; i++) put<far>(y + i * W, silu<T>(z[i]), Whole{});
}

template <int V, bool far, class T>
void backward_narrow(const T* grad, const T* x, const float* weight, const float* bias, const float* mean,
                     const float* rstd, T* grad_x, Vf* d_weight, Vf* d_bias) {
  constexpr int width = V * W;
  if (!far) prefetch_to_write(grad_x + W * width, W * width);
  Vf d[W][V], sum_d[W], sum_dn[W], w[V], b[V];
  Vf even[2][V] = {}, odd[2][V] = {};  // of d_weight and d_bias: in two sums fewer digits are lost
  for (int v = 0; v < V; v++) w[v] = load(weight + v * W, Whole{}), b[v] = load(bias + v * W, Whole{});
  for (int r = 0; r < W; r++)
    for (int v = 0; v < V; v++) d[r][v] = (load(x + r * width + v * W, Whole{}) - mean[r]) * rstd[r] * w[v] + b[v];
  for (int r = 0; r < W; r++) {
    prefetch_to_read(x + (2 * W + r) * width, width);
    prefetch_to_read(grad + (2 * W + r) * width, width);
    for (int v = 0; v < V; v++) d[r][v] = silu_slope(d[r][v]);
  }
  for (int r = 0; r < W; r++) {
    auto& part = r % 2 ? odd : even;
    sum_d[r] = sum_dn[r] = Vf{};
    for (int v = 0; v < V; v++) {
      const int64_t at = r * width + v * W;
      const Vf n = (load(x + at, Whole{}) - mean[r]) * rstd[r];
      const Vf dz = load(grad + at, Whole{}) * d[r][v];
      part[0][v] += dz * n;
      part[1][v] += dz;
      d[r][v] = dz * w[v];
      sum_d[r] += d[r][v];
      sum_dn[r] += d[r][v] * n;
    }
  }
  for (int v = 0; v < V; v++) d_weight[v] = even[0][v] + odd[0][v], d_bias[v] = even[1][v] + odd[1][v];
  const Vf s = load(rstd, Whole{}), mean_d = sums(sum_d) * (1.f / width), slope = sums(sum_dn) * (1.f / width) * s;
  for (int r = 0; r < W; r++)
    for (int v = 0; v < V; v++) {
      const int64_t at = r * width + v * W;
      const Vf centred = load(x + at, Whole{}) - mean[r];
      put<far>(grad_x + at, s[r] * (d[r][v] - mean_d[r] - slope[r] * centred), Whole{});
    }
}

constexpr int together = 4;  // wide rows: one alone would wait for its sums

template <int V, bool far, class T>
void forward_all(const T* x, const float* weight, const float* bias, T* y, int64_t y_stride, float* mean, float* rstd,
                 int64_t rows, int64_t width, float eps, int threads) {
#pragma omp parallel num_threads(threads)
  {
    for_rows<V ? W : together>(rows, [&](int64_t r, auto count) {
      const int64_t at = r * width;
      if constexpr (V && count > 1)
        forward_narrow<V, far>(x + at, weight, bias, y + at, mean + r, rstd + r, eps);
      else
        forward_rows<count, far>(x + at, weight, bias, y + r * y_stride, y_stride, mean + r, rstd + r, width, eps);
    });
    if (far) fence();
  }
}

template <int V, bool far, class T>
void backward_all(const T* grad, const T* x, const float* weight, const float* bias, const float* mean,
                  const float* rstd, T* grad_x, int64_t rows, int64_t width, AffineGradients& all, int threads) {
#pragma omp parallel num_threads(threads)
  {
    AffineGradients::Local totals(all);
    Scratch<float> d_normed(together * width);
    for_rows<V ? W : together>(rows, [&](int64_t r, auto count) {
      const int64_t at = r * width;
      if constexpr (V && count > 1) {
        Vf d_weight[V], d_bias[V];
        backward_narrow<V, far>(grad + at, x + at, weight, bias, mean + r, rstd + r, grad_x + at, d_weight, d_bias);
        for (int v = 0; v < V; v++) totals.add(v * W, d_weight[v], d_bias[v], Whole{});
      } else {
        backward_rows<count, far>(grad + at, x + at, weight, bias, mean + r, rstd + r, grad_x + at, width, d_normed,
                                  totals);
      }
      totals.next_rows(count);
    });
    if (far) fence();
  }
}

// Calls f with the number of vectors in a row if it is 1, 2 or 4, so that a row can stay in registers, and with zero for
// every other width.
template <class F>
void with_vectors(int64_t width, F f) {
  if (width == W)
    f(std::integral_constant<int, 1>{});
  else if (width == 2 * W)
    f(std::integral_constant<int, 2>{});
  else if (width == 4 * W)
    f(std::integral_constant<int, 4>{});
  else
    f(std::integral_constant<int, 0>{});
}

template <class T>
void forward(const T* x, const float* weight, const float* bias, T* y, int64_t y_stride, float* mean, float* rstd,
             int64_t rows, int64_t width, float eps, int threads) {
  if (y_stride != width)  // some columns of a larger matrix
    return forward_all<0, false>(x, weight, bias, y, y_stride, mean, rstd, rows, width, eps, threads);
  with_bool(is_far(y, rows, width), [&](auto far) {
    with_vectors(width, [&](auto vectors) {
      forward_all<vectors, far>(x, weight, bias, y, width, mean, rstd, rows, width, eps, threads);
    });
  });
}

template <class T>
void backward(const T* grad, const T* x, const float* weight, const float* bias, const float* mean, const float* rstd,
              T* grad_x, int64_t rows, int64_t width, AffineGradients& all, int threads) {
  with_bool(is_far(grad_x, rows, width), [&](auto far) {
    with_vectors(width, [&](auto vectors) {
      backward_all<vectors, far>(grad, x, weight, bias, mean, rstd, grad_x, rows, width, all, threads);
    });
  });
}

}  // namespace

void layer_norm_silu_forward(const void* x, const float* weight, const float* bias, void* y, int64_t y_stride,
                             float* mean, float* rstd, int64_t rows, int64_t width, float eps, bool is_bf16,
                             int threads) {
  threads = threads_for(rows * width, threads);
  with_dtype(is_bf16, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    forward(static_cast<const T*>(x), weight, bias, static_cast<T*>(y), y_stride, mean, rstd, rows, width, eps,
            threads);
  });
}

void layer_norm_silu_backward(const void* grad, const void* x, const float* weight, const float* bias,
                              const float* mean, const float* rstd, void* grad_x, float* grad_weight, float* grad_bias,
                              int64_t rows, int64_t width, bool is_bf16, int threads) {
  threads = threads_for(rows * width, threads);
  AffineGradients all(width, threads);
  with_dtype(is_bf16, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    backward(static_cast<const T*>(grad), static_cast<const T*>(x), weight, bias, mean, rstd, static_cast<T*>(grad_x),
             rows, width, all, threads);
  });
  all.write(grad_weight, grad_bias);
}

}  // namespace HDFAST_ISA
