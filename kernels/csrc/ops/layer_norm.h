// Shared by the ops with a LayerNorm: the moments of a row, and the gradients of weight and bias.
//
// What these ops do with a row takes several steps, each a loop of its own that leaves its results in scratch memory. In
// one loop, results would wait for each other in a chain that is longer than what a processor looks ahead in (some
// hundred instructions): a Zen 5 took up to 1.7 times as long.
#pragma once

#include <omp.h>

#include <type_traits>

#include "../ops.h"
#include "../simd.h"

namespace HDFAST_ISA {
namespace {

// Numbers of a row that are added up in one sum: the error of a sum grows with its length.
constexpr int64_t block_of_row = 64 * W;

#if defined(__AVX512BF16__)
// Means of R rows of bfloat16 numbers and of their squares: products of pairs take a quarter of the instructions of
// widening them.
template <int R>
HDFAST_INLINE void means_of_rows(const bf16* rows, int64_t width, float* mean, float* square) {
  constexpr int K = R < 4 ? 4 / R : 1, pairs = 2 * W;
  const __m512bh ones = bit_cast<__m512bh>(_mm512_set1_epi32(0x3f803f80));
  Vf total[R] = {}, total_square[R] = {};
  for (int64_t i = 0; i < width;) {
    const int64_t end = width - i < block_of_row ? width : i + block_of_row;
    Vf part[R][K] = {}, part_square[R][K] = {};
    const auto add = [&](int r, int k, __m512i numbers) __attribute__((always_inline)) {
      const __m512bh x = bit_cast<__m512bh>(numbers);
      part[r][k] = _mm512_dpbf16_ps(part[r][k], x, ones);
      part_square[r][k] = _mm512_dpbf16_ps(part_square[r][k], x, x);
    };
    for (; i + K * pairs <= end; i += K * pairs)
      for (int r = 0; r < R; r++)
        for (int k = 0; k < K; k++) add(r, k, _mm512_loadu_si512(rows + r * width + i + k * pairs));
    for (; i < end; i += pairs) {
      const __mmask32 left = end - i < pairs ? (1u << (end - i)) - 1 : ~0u;
      for (int r = 0; r < R; r++) add(r, 0, _mm512_maskz_loadu_epi16(left, rows + r * width + i));
    }
    for (int r = 0; r < R; r++)
      for (int k = 0; k < K; k++) total[r] += part[r][k], total_square[r] += part_square[r][k];
  }
  for (int r = 0; r < R; r++) mean[r] = sum(total[r]) / width, square[r] = sum(total_square[r]) / width;
}
#endif

// Mean and 1 / deviation of R rows. Two passes over cached data, as the variance of the differences from the mean is
// accurate even where the mean is large. If the numbers of a row are almost equal, the mean's rounding error is as
// large as their differences, so it is measured and added.
template <int R, class T>
HDFAST_INLINE void moments_of_rows(const T* rows, int64_t width, float eps, float* mean, float* rstd) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, bf16>) {
    float square[R];
    bool near = true;  // no mean is so large that the difference of the squares would lose digits
    means_of_rows<R>(rows, width, mean, square);
    for (int r = 0; r < R; r++) near &= square[r] > 2 * mean[r] * mean[r];
    if (near) {
      for (int r = 0; r < R; r++) rstd[r] = 1.f / std::sqrt(square[r] - mean[r] * mean[r] + eps);
      return;
    }
  }
#endif
  constexpr int K = R < 4 ? 4 / R : 1;  // accumulators per row: four in all hide the latency
  const auto averages = [&](auto f, float* out) __attribute__((always_inline)) {
    Vf total[R] = {};
    for (int64_t i = 0; i < width;) {
      const int64_t end = width - i < block_of_row ? width : i + block_of_row;
      Vf part[R][K] = {};
      for (; i + K * W <= end; i += K * W)
        for (int r = 0; r < R; r++)
          for (int k = 0; k < K; k++) part[r][k] += f(r, i + k * W, Whole{});
      for (; i + W <= end; i += W)
        for (int r = 0; r < R; r++) part[r][0] += f(r, i, Whole{});
      if (i < end)
        for (int r = 0; r < R; r++) part[r][0] += f(r, i, Part{int(end - i)});
      i = end;
      for (int r = 0; r < R; r++)
        for (int k = 0; k < K; k++) total[r] += part[r][k];
    }
    for (int r = 0; r < R; r++) out[r] = sum(total[r]) / width;
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

// f(first, count) for blocks of R rows, then for single remaining rows; the count is a compile-time constant.
template <int R, class F>
HDFAST_INLINE void for_rows(int64_t rows, F f) {
#pragma omp for schedule(static)
  for (int64_t first = 0; first < rows; first += R) {
    if (first + R <= rows)
      f(first, std::integral_constant<int, R>{});
    else
      for (int64_t r = first; r < rows; r++) f(r, std::integral_constant<int, 1>{});
  }
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
