#include "../ops.h"
#include "../row_sums.h"
#include "../simd_math.h"

namespace HDFAST_ISA {
namespace {

// The positions of targets among the bins, counted from the first and clamped to the end bins; NaN for NaN.
HDFAST_INLINE Vf position_of(Vf target, float low, float high, int64_t bins) {
  const Vf size = min(abs(target), splat(1e38f));  // the logarithm takes no infinity
  const Vf symlog = copysign(log1p(size), target), clamped = min(max(symlog, splat(low)), splat(high));
  const Vf position = (clamped - low) * float((bins - 1) / (double(high) - low));
  return target == target ? position : target;
}

// The two-hot code of a position: weight 1 - above on bin `below`, `above` on the next. NaN gives NaN weights.
struct Code {
  Code(float position, int64_t bins)
      : below(position >= bins - 2 ? bins - 2 : position >= 0 ? int64_t(position) : 0), above(position - below) {}
  const int64_t below;
  const float above;
};

template <class T>
HDFAST_INLINE float sum_of_exp(const T* row, int64_t n, float top) {
  return sum_lanes(n, [&](int64_t i, auto lanes) { return keep(exp(load(row + i, lanes) - top), lanes); });
}

HDFAST_INLINE float value(float x) { return x; }
HDFAST_INLINE float value(bf16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }

constexpr int64_t ahead = 2;  // how many rows ahead to prefetch

// In blocks of W rows, whose logarithms are taken together.
template <class T>
void loss_forward(const T* logits, const float* target, float* loss, float* position, float* top, float* scale,
                  int64_t rows, int64_t bins, float low, float high, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t first = 0; first < rows; first += W) {
    const int count = int(rows - first < W ? rows - first : W);
    const auto block = [&](auto lanes) {
      store(position + first, position_of(load(target + first, lanes), low, high, bins), lanes);
      float total[W], picked[W];
      for (int k = 0; k < W; k++) total[k] = 1.f, picked[k] = 0.f;
      for (int k = 0; k < count; k++) {
        const int64_t r = first + k;
        const T* row = logits + r * bins;
        prefetch_to_read(row + ahead * bins, bins);
        const float m = top[r] = max_of_row(row, bins);
        total[k] = sum_of_exp(row, bins, m);
        const Code code(position[r], bins);
        const float below = value(row[code.below]) - m, above = value(row[code.below + 1]) - m;
        picked[k] = below + code.above * (above - below);
      }
      const Vf all = load(total, Whole{}), lse = log(all);
      store(loss + first, lse - load(picked, Whole{}), lanes);
      store(scale + first, 1.f / all, lanes);
    };
    if (count == W)
      block(Whole{});
    else
      block(Part{count});
  }
}

template <class T>
void loss_backward(const float* grad, const T* logits, const float* position, const float* top, const float* scale,
                   T* grad_logits, int64_t rows, int64_t bins, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    const T* row = logits + r * bins;
    T* out = grad_logits + r * bins;
    prefetch_to_read(row + ahead * bins, bins);
    prefetch_to_write(out + ahead * bins, bins);
    const float m = top[r], s = scale[r] * grad[r];
    const Code code(position[r], bins);
    Vf picked = {};  // the two bins' gradients, computed in float before rounding
    for (int k = 0; k < 2; k++) picked[k] = value(row[code.below + k]) - m;
    picked = s * exp(picked);
    for_lanes(bins, [&](int64_t i, auto lanes) { store(out + i, s * exp(load(row + i, lanes) - m), lanes); });
    picked[0] -= grad[r] * (1.f - code.above);
    picked[1] -= grad[r] * code.above;
    store(out + code.below, picked, Part{2});
  }
}

// The bins, from the centre outwards in double: symmetric bins are exactly symmetric, and ends rounded to float first
// would leave those in the middle few correct digits.
void fill_bins(float* values, int64_t bins, double low, double high) {
  const double centre = (low + high) / 2, distance = (high - low) / (bins - 1);
  for (int64_t i = 0; i < bins; i++) values[i] = centre + (i - (bins - 1) / 2.) * distance;
}

struct Sums {
  float total, weighted;
};

// Sums over a row of e^(logit - top), and of that times its bin. The latter nearly cancel, so no float sum has more
// than 16 terms.
template <class T>
HDFAST_INLINE Sums sums_of_row(const T* row, const float* values, int64_t bins, float top) {
  constexpr int K = 4;  // accumulators
  constexpr int64_t block = 16 * K * W;
  double total_sum = 0, weighted_sum = 0;
  int64_t i = 0;
  do {
    const int64_t end = bins - i < block ? bins : i + block;
    Vf total[K] = {}, weighted[K] = {};
    const auto add = [&](int k, int64_t at, auto lanes) __attribute__((always_inline)) {
      const Vf e = keep(exp(load(row + at, lanes) - top), lanes);
      total[k] += e;
      weighted[k] += e * load(values + at, lanes);
    };
    for (; i + K * W <= end; i += K * W)
      for (int k = 0; k < K; k++) add(k, i + k * W, Whole{});
    for (; i + W <= end; i += W) add(0, i, Whole{});
    if (i < end) add(1, i, Part{int(end - i)});
    const Vf block_total = (total[0] + total[1]) + (total[2] + total[3]);
    const Vf block_weighted = (weighted[0] + weighted[1]) + (weighted[2] + weighted[3]);
    if (bins <= block) return {sum(block_total), sum(block_weighted)};
    total_sum += sum(block_total);
    weighted_sum += sum_in_double(block_weighted);
    i = end;
  } while (i < bins);
  return {float(total_sum), float(weighted_sum)};
}

template <class T>
void mean_forward(const T* logits, float* mean, float* centre, float* top, float* scale, int64_t rows, int64_t bins,
                  double low, double high, int threads) {
  Scratch<float> scratch(bins);
  float* const values = scratch;
  fill_bins(values, bins, low, high);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    const T* row = logits + r * bins;
    const float m = max_of_row(row, bins);
    const Sums sums = sums_of_row(row, values, bins, m);
    const float s = 1.f / sums.total, c = sums.weighted * s;
    mean[r] = std::copysign(std::expm1(std::fabs(c)), c);
    centre[r] = c;
    top[r] = m;
    scale[r] = s;
  }
}

template <class T>
void mean_backward(const float* grad, const T* logits, const float* centre, const float* top, const float* scale,
                   T* grad_logits, int64_t rows, int64_t bins, double low, double high, int threads) {
  Scratch<float> scratch(bins);
  float* const values = scratch;
  fill_bins(values, bins, low, high);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    const T* row = logits + r * bins;
    const float m = top[r], c = centre[r], s = grad[r] * std::exp(std::fabs(c)) * scale[r];
    for_lanes(bins, [&](int64_t i, auto lanes) {
      const Vf d = s * exp(load(row + i, lanes) - m) * (load(values + i, lanes) - c);
      store(grad_logits + r * bins + i, d, lanes);
    });
  }
}

}  // namespace

void two_hot_loss_forward(const void* logits, const float* target, float* loss, float* position, float* top,
                          float* scale, int64_t rows, int64_t bins, float low, float high, bool is_bf16, int threads) {
  threads = threads_for(rows * bins, threads);
  with_dtype(is_bf16, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    loss_forward(static_cast<const T*>(logits), target, loss, position, top, scale, rows, bins, low, high, threads);
  });
}

void two_hot_loss_backward(const float* grad, const void* logits, const float* position, const float* top,
                           const float* scale, void* grad_logits, int64_t rows, int64_t bins, bool is_bf16,
                           int threads) {
  threads = threads_for(rows * bins, threads);
  with_dtype(is_bf16, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    loss_backward(grad, static_cast<const T*>(logits), position, top, scale, static_cast<T*>(grad_logits), rows, bins,
                  threads);
  });
}

void two_hot_mean_forward(const void* logits, float* mean, float* centre, float* top, float* scale, int64_t rows,
                          int64_t bins, double low, double high, bool is_bf16, int threads) {
  threads = threads_for(rows * bins, threads);
  with_dtype(is_bf16, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    mean_forward(static_cast<const T*>(logits), mean, centre, top, scale, rows, bins, low, high, threads);
  });
}

void two_hot_mean_backward(const float* grad, const void* logits, const float* centre, const float* top,
                           const float* scale, void* grad_logits, int64_t rows, int64_t bins, double low, double high,
                           bool is_bf16, int threads) {
  threads = threads_for(rows * bins, threads);
  with_dtype(is_bf16, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    mean_backward(grad, static_cast<const T*>(logits), centre, top, scale, static_cast<T*>(grad_logits), rows, bins,
                  low, high, threads);
  });
}

}  // namespace HDFAST_ISA
