#include "sample_onehot.h"

#include "../ops.h"

namespace HDFAST_ISA {
namespace {

HDFAST_INLINE void set_one(float* at) { *at = 1.f; }
HDFAST_INLINE void set_one(bf16* at) { at->bits = 0x3f80; }

// Without Distribution, only `index` is written.
template <bool Distribution, class T>
void forward(const T* logits, const float* uniform, T* stoch, int64_t* index, float* logp, int64_t rows,
             int64_t classes, double unimix, int threads) {
  const float share = 1 - unimix, floor = unimix / classes;  // a unimix rounded to float would cost accuracy
  if (Distribution && rows) std::memset(static_cast<void*>(stoch), 0, rows * classes * sizeof(T));
#pragma omp parallel num_threads(threads)
  {
    Scratch<float> probs(W * classes);
    for_row_blocks(rows, [&](int64_t first, int count, auto) {
      const int64_t at = first * classes;
      sample_rows<Distribution>(logits + at, uniform + first, count, classes, share, floor, probs, logp + at,
                                index + first);
      if constexpr (Distribution)
        for (int64_t r = first; r < first + count; r++) set_one(stoch + r * classes + index[r]);
    });
  }
}

template <class T>
void backward(const T* grad_stoch, const float* grad_logp, const T* logits, T* grad_logits, int64_t rows,
              int64_t classes, double unimix, int threads) {
  const float share = 1 - unimix, floor = unimix / classes;
#pragma omp parallel num_threads(threads)
  {
    Scratch<float> probs(classes), d_probs(classes);
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
      const T* row = logits + r * classes;
      const float top = max_of_row(row, classes);
      Vf total = {};
      for_lanes(classes, [&](int64_t i, auto lanes) {
        const Vf e = keep(exp(load(row + i, lanes) - top), lanes);
        total += e;
        store(probs + i, e, lanes);
      });
      const float scale = 1.f / sum(total);
      Vf weighted = {};
      for_lanes(classes, [&](int64_t i, auto lanes) {
        const int64_t at = r * classes + i;
        const Vf softmax = load(probs + i, lanes) * scale;
        Vf d = share * load(grad_stoch + at, lanes) * softmax;
        const Vf d_logp = load(grad_logp + at, lanes);
        // d log p / d softmax is (1 - unimix) / p; times softmax, that is 1 without a mixture.
        d += unimix > 0 ? d_logp * (share * softmax / (share * softmax + floor)) : d_logp;
        d = keep(d, lanes);
        weighted += d;
        store(probs + i, softmax, lanes);
        store(d_probs + i, d, lanes);
      });
      const float mean = sum(weighted);
      for_lanes(classes, [&](int64_t i, auto lanes) {
        store(grad_logits + r * classes + i, load(d_probs + i, lanes) - load(probs + i, lanes) * mean, lanes);
      });
    }
  }
}

}  // namespace

void sample_onehot_forward(const void* logits, const float* uniform, void* stoch, int64_t* index, float* logp,
                           int64_t rows, int64_t classes, double unimix, bool is_bf16, int threads) {
  threads = threads_for(rows * classes, threads);
  with_dtype(is_bf16, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    forward<true>(static_cast<const T*>(logits), uniform, static_cast<T*>(stoch), index, logp, rows, classes, unimix,
                  threads);
  });
}

void sample_index_forward(const void* logits, const float* uniform, int64_t* index, int64_t rows, int64_t classes,
                          double unimix, bool is_bf16, int threads) {
  threads = threads_for(rows * classes, threads);
  with_dtype(is_bf16, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    forward<false>(static_cast<const T*>(logits), uniform, static_cast<T*>(nullptr), index, nullptr, rows, classes,
                   unimix, threads);
  });
}

void sample_onehot_backward(const void* grad_stoch, const float* grad_logp, const void* logits, void* grad_logits,
                            int64_t rows, int64_t classes, double unimix, bool is_bf16, int threads) {
  threads = threads_for(rows * classes, threads);
  with_dtype(is_bf16, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    backward(static_cast<const T*>(grad_stoch), grad_logp, static_cast<const T*>(logits), static_cast<T*>(grad_logits),
             rows, classes, unimix, threads);
  });
}

}  // namespace HDFAST_ISA
