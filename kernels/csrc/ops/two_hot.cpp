#include "../ops.h"
#include "../simd.h"

namespace HDFAST_ISA {
namespace {

// Where a target lies among the bins, counted from the first, clamped to the end bins; NaN for NaN.
float position_of(float target, float low, float high, int64_t bins) {
  const float symlog = std::copysign(std::log1p(std::fabs(target)), target);
  const double clamped = symlog < low ? low : symlog > high ? high : symlog;
  return (clamped - low) * ((bins - 1) / (double(high) - low));
}

// The two-hot code of a position: weight 1 - above on bin `below`, above on the next. NaN gives NaN weights.
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

template <class T>
void loss_forward(const T* logits, const float* target, float* loss, float* position, float* top, float* scale,
                  int64_t rows, int64_t bins, float low, float high, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    const T* row = logits + r * bins;
    const float m = max_of_row(row, bins), total = sum_of_exp(row, bins, m);
    const Code code(position[r] = position_of(target[r], low, high, bins), bins);
    const float below = value(row[code.below]) - m, above = value(row[code.below + 1]) - m;
    loss[r] = std::log(total) - (below + code.above * (above - below));
    top[r] = m;
    scale[r] = 1.f / total;
  }
}

template <class T>
void loss_backward(const float* grad, const T* logits, const float* position, const float* top, const float* scale,
                   T* grad_logits, int64_t rows, int64_t bins, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    const T* row = logits + r * bins;
    T* out = grad_logits + r * bins;
    const float m = top[r], s = scale[r] * grad[r];
    for_lanes(bins, [&](int64_t i, auto lanes) { store(out + i, s * exp(load(row + i, lanes) - m), lanes); });
    const Code code(position[r], bins);
    for (int64_t k = 0; k < 2; k++) {
      const int64_t at = code.below + k;
      const float weight = grad[r] * (k ? code.above : 1.f - code.above);
      if constexpr (std::is_same_v<T, float>)
        out[at] -= weight;
      else  // what is in `out` has been rounded
        store(out + at, splat(s * std::exp(value(row[at]) - m) - weight), Part{1});
    }
  }
}

// The bins, from the centre outwards in double: symmetric ones are exactly symmetric.
void fill_bins(float* values, int64_t bins, float low, float high) {
  const double centre = (double(low) + high) / 2, distance = (double(high) - low) / (bins - 1);
  for (int64_t i = 0; i < bins; i++) values[i] = centre + (i - (bins - 1) / 2.) * distance;
}

template <class T>
void mean_forward(const T* logits, float* mean, float* centre, float* top, float* scale, int64_t rows, int64_t bins,
                  float low, float high, int threads) {
  Scratch<float> scratch(bins);
  float* const values = scratch;
  fill_bins(values, bins, low, high);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    const T* row = logits + r * bins;
    const float m = max_of_row(row, bins);
    Vf total = {}, weighted = {};
    for_lanes(bins, [&](int64_t i, auto lanes) {
      const Vf e = keep(exp(load(row + i, lanes) - m), lanes);
      total += e;
      weighted += e * load(values + i, lanes);
    });
    const float s = 1.f / sum(total), c = sum(weighted) * s;
    mean[r] = std::copysign(std::expm1(std::fabs(c)), c);
    centre[r] = c;
    top[r] = m;
    scale[r] = s;
  }
}

template <class T>
void mean_backward(const float* grad, const T* logits, const float* centre, const float* top, const float* scale,
                   T* grad_logits, int64_t rows, int64_t bins, float low, float high, int threads) {
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
                          int64_t bins, float low, float high, bool is_bf16, int threads) {
  threads = threads_for(rows * bins, threads);
  with_dtype(is_bf16, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    mean_forward(static_cast<const T*>(logits), mean, centre, top, scale, rows, bins, low, high, threads);
  });
}

void two_hot_mean_backward(const float* grad, const void* logits, const float* centre, const float* top,
                           const float* scale, void* grad_logits, int64_t rows, int64_t bins, float low, float high,
                           bool is_bf16, int threads) {
  threads = threads_for(rows * bins, threads);
  with_dtype(is_bf16, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    mean_backward(grad, static_cast<const T*>(logits), centre, top, scale, static_cast<T*>(grad_logits), rows, bins,
                  low, high, threads);
  });
}

}  // namespace HDFAST_ISA
