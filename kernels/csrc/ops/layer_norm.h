// Shared by the ops with a LayerNorm: the moments of a row, and the gradients of weight and bias.
#pragma once

#include <omp.h>

#include <type_traits>

#include "../ops.h"
#include "../simd.h"

namespace HDFAST_ISA {
namespace {

// Mean and 1 / deviation of R rows. Two passes over cached data, as the variance of the differences from the mean is
// accurate even where the mean is large. If the numbers of a row are almost equal, the mean's rounding error is as
// large as their differences, so it is measured and added.
template <int R, class T>
HDFAST_INLINE void moments_of_rows(const T* rows, int64_t width, float eps, float* mean, float* rstd) {
  constexpr int K = R < 4 ? 4 / R : 1;  // accumulators per row: four in all hide the latency
  const auto averages = [&](auto f, float* out) __attribute__((always_inline)) {
    Vf part[R][K] = {};
    int64_t i = 0;
    for (; i + K * W <= width; i += K * W)
      for (int r = 0; r < R; r++)
        for (int k = 0; k < K; k++) part[r][k] += f(r, i + k * W, Whole{});
    for (; i + W <= width; i += W)
      for (int r = 0; r < R; r++) part[r][0] += f(r, i, Whole{});
    if (i < width)
      for (int r = 0; r < R; r++) part[r][0] += f(r, i, Part{int(width - i)});
    for (int r = 0; r < R; r++) {
      Vf total = part[r][0];
      for (int k = 1; k < K; k++) total += part[r][k];
      out[r] = sum(total) / width;
    }
  };
  float square[R], mean_error[R];
  const auto difference = [&](int r, int64_t i, auto lanes) __attribute__((always_inline)) {
    return keep(load(rows + r * width + i, lanes) - mean[r], lanes);
  };
  const auto squared = [&](int r, int64_t i, auto lanes) __attribute__((always_inline)) {
    const Vf d = difference(r, i, lanes);
    return d * d;
  };
  averages([&](int r, int64_t i, auto lanes) { return load(rows + r * width + i, lanes); }, mean);
  averages(squared, square);
  bool close = false;
  for (int r = 0; r < R; r++) close |= square[r] < 1e-6f * mean[r] * mean[r];
  if (close) {
    averages(difference, mean_error);
    for (int r = 0; r < R; r++) mean[r] += mean_error[r];
    averages(squared, square);
  }
  for (int r = 0; r < R; r++) rstd[r] = 1.f / std::sqrt(square[r] + eps);
}

// Column sums over many rows, one accumulator per thread: in float within a block of rows, in double across blocks, so
// that no digits are lost over a convolution's million rows.
class AffineGradients {
 public:
  static constexpr int64_t block_rows = 64;

  AffineGradients(int64_t width, int threads) : width_(width), threads_(threads), sums_(2 * width * threads) {
    for (int64_t i = 0; i < 2 * width * threads; i++) sums_[i] = 0;
  }

  class Local {
   public:
    explicit Local(AffineGradients& all)
        : width_(all.width_), sums_(all.sums_ + 2 * all.width_ * omp_get_thread_num()), block_(2 * all.width_) {
      for (int64_t i = 0; i < 2 * width_; i++) block_[i] = 0;
    }
    ~Local() { flush(); }

    HDFAST_INLINE void next_rows(int count) {
      rows_ += count;
      if (rows_ >= block_rows) flush();
    }
    template <class Lanes>
    HDFAST_INLINE void add(int64_t i, Vf d_weight, Vf d_bias, Lanes lanes) {
      store(block_ + i, load(block_ + i, lanes) + d_weight, lanes);
      store(block_ + width_ + i, load(block_ + width_ + i, lanes) + d_bias, lanes);
    }

    void flush() {
      for (int64_t i = 0; i < 2 * width_; i++) {
        sums_[i] += block_[i];
        block_[i] = 0;
      }
      rows_ = 0;
    }

   private:
    const int64_t width_;
    double* const sums_;
    Scratch<float> block_;
    int rows_ = 0;
  };

  void write(float* grad_weight, float* grad_bias) {
    for (int64_t i = 0; i < width_; i++) {
      double weight = 0, bias = 0;
      for (int t = 0; t < threads_; t++) {
        weight += sums_[2 * width_ * t + i];
        bias += sums_[2 * width_ * t + width_ + i];
      }
      grad_weight[i] = weight;
      grad_bias[i] = bias;
    }
  }

 private:
  const int64_t width_;
  const int threads_;
  Scratch<double> sums_;
};

}  // namespace
}  // namespace HDFAST_ISA
