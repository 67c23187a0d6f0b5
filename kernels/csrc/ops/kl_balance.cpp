#include "../ops.h"
#include "../row_sums.h"
#include "../simd_math.h"

namespace HDFAST_ISA {
namespace {

template <class T>
void forward(const T* post, const T* prior, float* kl, int64_t rows, int64_t width, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    kl[r] = sum_blocks(width, [&](int64_t i, auto lanes) {
      const Vf p = load(post + r * width + i, lanes), q = load(prior + r * width + i, lanes);
      return exp(p) * (p - q);  // zero where both are zero, as in inactive lanes
    });
  }
}

template <class T>
void backward(const float* grad_dyn, const float* grad_rep, const T* post, const T* prior, const float* kl,
              T* grad_post, T* grad_prior, int64_t rows, int64_t width, float free, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    const bool clipped = kl[r] < free;
    const float dyn = clipped ? 0.f : grad_dyn[r], rep = clipped ? 0.f : grad_rep[r];
    for_lanes(width, [&](int64_t i, auto lanes) {
      const int64_t at = r * width + i;
      const Vf p = load(post + at, lanes), prob = clipped ? Vf{} : exp(p);
      store(grad_prior + at, -dyn * prob, lanes);
      store(grad_post + at, rep * prob * (p - load(prior + at, lanes) + 1.f), lanes);
    });
  }
}

}  // namespace

void kl_balance_forward(const void* post, const void* prior, float* kl, int64_t rows, int64_t width, bool is_bf16,
                        int threads) {
  threads = threads_for(rows * width, threads);
  with_dtype(is_bf16, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    forward(static_cast<const T*>(post), static_cast<const T*>(prior), kl, rows, width, threads);
  });
}

void kl_balance_backward(const float* grad_dyn, const float* grad_rep, const void* post, const void* prior,
                         const float* kl, void* grad_post, void* grad_prior, int64_t rows, int64_t width, float free,
                         bool is_bf16, int threads) {
  threads = threads_for(rows * width, threads);
  with_dtype(is_bf16, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    backward(grad_dyn, grad_rep, static_cast<const T*>(post), static_cast<const T*>(prior), kl,
             static_cast<T*>(grad_post), static_cast<T*>(grad_prior), rows, width, free, threads);
  });
}

}  // namespace HDFAST_ISA
