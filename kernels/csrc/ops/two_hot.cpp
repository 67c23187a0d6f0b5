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

// e^x for x <= 0, also for minus infinity. The relative error grows with -x, but not beyond an ulp of 1.
template <bool rough = false>
HDFAST_INLINE Vf weight_of(Vf x) {
#if defined(__AVX512F__)
  return exp2<rough, true>(x * 1.44269504088896341f);
#else
  return exp(x);
#endif
}

HDFAST_INLINE float value(float x) { return x; }
HDFAST_INLINE float value(bf16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }

constexpr int64_t ahead = 2;  // how many rows ahead to prefetch

// The two-hot codes of up to W rows: weight 1 - above on bin `below`, `above` on the next, and the logits of these two
// bins. A position that is NaN gives NaN weights.
template <class T>
struct Codes {
  Codes(Vf position, const T* logits, int64_t bins, int count) {
    const float last = bins - 2;
    const Vf whole = position >= last ? splat(last) : position >= 0.f ? position : Vf{};
    const Vi bin = __builtin_convertvector(whole, Vi);
    above = position - __builtin_convertvector(bin, Vf);
    std::memcpy(below, &bin, sizeof(bin));
    float at_low[W] = {}, at_high[W] = {};
    for (int k = 0; k < count; k++, logits += bins)
      at_low[k] = value(logits[below[k]]), at_high[k] = value(logits[below[k] + 1]);
    low = load(at_low, Whole{}), high = load(at_high, Whole{});
  }

  int32_t below[W];
  Vf above, low, high;
};

template <class T>
void loss_forward(const T* logits, const float* target, float* loss, float* position, float* top, float* scale,
                  int64_t rows, int64_t bins, float low, float high, int threads) {
#pragma omp parallel num_threads(threads)
  for_row_blocks(rows, [&](int64_t first, int count, auto lanes) {
    const T* const block = logits + first * bins;
    Vf part[W] = {};
    for (int k = 0; k < count; k++) {
      part[k] = max_of_lanes(block + k * bins, bins);
    }
    const Vf most = maxima(part), place = position_of(load(target + first, lanes), low, high, bins);
    store(top + first, most, lanes);
    store(position + first, place, lanes);
    for (int k = 0; k < count; k++) {
      const T* const row = block + k * bins;
      const float m = top[first + k];
      part[k] = sum_of_lanes(bins, [&](int64_t i, auto some) {
        __builtin_prefetch(row + W * bins + i);
        return keep(weight_of(load(row + i, some) - m), some);
      });
    }
    const Vf total = sums(part);
    const Codes<T> codes(place, block, bins, count);
    store(loss + first, log(total) - ((codes.low - most) + codes.above * (codes.high - codes.low)), lanes);
    store(scale + first, 1.f / total, lanes);
  });
}

template <class T>
void loss_backward(const float* grad, const T* logits, const float* position, const float* top, const float* scale,
                   T* grad_logits, int64_t rows, int64_t bins, int threads) {
#pragma omp parallel num_threads(threads)
  for_row_blocks(rows, [&](int64_t first, int count, auto lanes) {
    const T* const block = logits + first * bins;
    const Codes<T> codes(load(position + first, lanes), block, bins, count);
    const Vf g = load(grad + first, lanes), m = load(top + first, lanes), s = g * load(scale + first, lanes);
    T low[W], high[W];  // the two bins' gradients, computed in float before rounding
    store(low, s * weight_of(codes.low - m) - g * (1.f - codes.above), Whole{});
    store(high, s * weight_of(codes.high - m) - g * codes.above, Whole{});
    for (int k = 0; k < count; k++) {
      const T* const row = block + k * bins;
      T* const out = grad_logits + (first + k) * bins;
      for_lanes(bins, [&](int64_t i, auto some) {
        __builtin_prefetch(row + ahead * bins + i);
        __builtin_prefetch(out + ahead * bins + i, 1);
        store(out + i, s[k] * weight_of<std::is_same_v<T, bf16>>(load(row + i, some) - m[k]), some);
      });
      out[codes.below[k]] = low[k];
      out[codes.below[k] + 1] = high[k];
    }
  });
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
#pragma omp parallel num_threads(threads)
  for_row_blocks(rows, [&](int64_t first, int count, auto lanes) {
    Vf part[W] = {};
    for (int k = 0; k < count; k++) part[k] = max_of_lanes(logits + (first + k) * bins, bins);
    store(top + first, maxima(part), lanes);
    float total[W] = {}, weighted[W] = {};
    for (int k = 0; k < count; k++) {
      const Sums sums = sums_of_row(logits + (first + k) * bins, values, bins, top[first + k]);
      total[k] = sums.total, weighted[k] = sums.weighted;
    }
    const Vf s = 1.f / load(total, Whole{}), c = load(weighted, Whole{}) * s, size = expm1(abs(c));
    store(mean + first, copysign(size, c), lanes);
    store(centre + first, c, lanes);
    store(scale + first, s * (size + 1.f), lanes);
  });
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
    const float m = top[r], c = centre[r], s = grad[r] * scale[r];
    for_lanes(bins, [&](int64_t i, auto lanes) {
      const Vf d = s * weight_of(load(row + i, lanes) - m) * (load(values + i, lanes) - c);
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
