// The layer norms of rssm_observe, row by row, and their gradients.
#pragma once

#include <cmath>

#include "../vector_math.h"

namespace HDFAST_ISA {
namespace {

struct Stats {
  float mean, scale;  // scale = 1 / sqrt(variance + eps)
};

float mean_square(const float* x, int64_t n, float mean) {
  float squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < n; i++) squares += (x[i] - mean) * (x[i] - mean);
  return squares / float(n);
}

// As moments_of_rows in layer_norm.h: if the numbers are almost equal, the mean's rounding error is measured and added.
Stats stats_of(const float* x, int64_t n, float eps) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; i++) sum += x[i];
  float mean = sum / float(n), variance = mean_square(x, n, mean);
  if (variance < 1e-6f * mean * mean) {
    float differences = 0;
#pragma omp simd reduction(+ : differences)
    for (int64_t i = 0; i < n; i++) differences += x[i] - mean;
    mean += differences / float(n);
    variance = mean_square(x, n, mean);
  }
  return {mean, 1.0f / std::sqrt(variance + eps)};
}

template <class E>
void norm_silu(const float* x, const float* weight, const float* bias, int64_t n, float eps, E* out) {
  const Stats s = stats_of(x, n, eps);
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    const float y = (x[i] - s.mean) * s.scale * weight[i] + bias[i];
    out[i] = from_float<E>(y * sigmoid_of(y));
  }
}

// grad: on entry, of the normalised x (already multiplied by the weight); on return, of x.
void norm_backward(const float* x, Stats s, int64_t n, float* grad) {
  float sum = 0, product = 0;
#pragma omp simd reduction(+ : sum, product)
  for (int64_t i = 0; i < n; i++) {
    sum += grad[i];
    product += grad[i] * (x[i] - s.mean);
  }
  const float mean = sum / float(n), slope = product * s.scale * s.scale / float(n);
#pragma omp simd
  for (int64_t i = 0; i < n; i++) grad[i] = s.scale * (grad[i] - mean - (x[i] - s.mean) * slope);
}

// grad: on entry, of the output; on return, of x.
void norm_silu_backward(const float* x, const float* weight, const float* bias, int64_t n, float eps, float* grad,
                        float* grad_weight, float* grad_bias) {
  const Stats s = stats_of(x, n, eps);
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    const float normed = (x[i] - s.mean) * s.scale, y = normed * weight[i] + bias[i], gate = sigmoid_of(y);
    const float slope = grad[i] * gate * (1.0f + y * (1.0f - gate));
    grad_weight[i] += slope * normed;
    grad_bias[i] += slope;
    grad[i] = slope * weight[i];
  }
  norm_backward(x, s, n, grad);
}

}  // namespace
}  // namespace HDFAST_ISA
