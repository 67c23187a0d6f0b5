// What the two ops with a LayerNorm share: the moments of a row, and the gradients of weight and bias.
#pragma once

#include <omp.h>

#include <type_traits>

#include "../ops.h"
#include "../simd.h"

namespace HDFAST_ISA {
namespace {

struct Moments {
  float mean, rstd;
};

// Two passes over a row that is in the cache: the variance of the differences loses nothing where the mean is large.
template <class T>
HDFAST_INLINE Moments row_moments(const T* row, int64_t width, float eps) {
  const float mean = sum_lanes(width, [&](int64_t i, auto lanes) { return load(row + i, lanes); }) / width;
  const float square = sum_lanes(width, [&](int64_t i, auto lanes) {
    const Vf d = keep(load(row + i, lanes) - mean, lanes);
    return d * d;
  });
  return {mean, 1.f / std::sqrt(square / width + eps)};
}

// Column sums over many rows, one accumulator per thread: float over a block of rows, double over the blocks, so that
// a million rows of a convolution lose no digits.
class AffineGradients {
 public:
  static constexpr int64_t block_rows = 512;

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
