// The observe scan on the CPU: T steps in one parallel region. Products divide the weights' columns among the threads,
// the stages between them divide the batch, with barriers in between. The caller then computes the weight gradients.

#include "../ops.h"
#include "../rssm_observe.h"
#include "../small_gemm.h"
#include "layer_norm_gru.h"
#include "layer_norm_silu.h"
#include "sample_onehot.h"

#include <omp.h>

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <vector>

namespace HDFAST_ISA {
namespace {

template <class E>
void copy_to(const float* in, int64_t n, E* out) {
  for_lanes(n, [&](int64_t i, auto lanes) { store(out + i, load(in + i, lanes), lanes); });
}

template <class E>
void add_to(const E* in, int64_t n, float* sums) {
  for_lanes(n, [&](int64_t i, auto lanes) { store(sums + i, load(sums + i, lanes) + load(in + i, lanes), lanes); });
}

// The stages of a step, row by row, and where the step's inputs come from.
template <class E>
struct Scan : RssmObserve {
  explicit Scan(const RssmObserve& p) : RssmObserve(p) {}

  bool first(int64_t t, int64_t b) const { return t == 0 || is_first[t * B + b]; }
  const float* deter_before(int64_t t, int64_t b) const {
    return first(t, b) ? initial_deter : deter + ((t - 1) * B + b) * D;
  }
  const int64_t* index_before(int64_t t, int64_t b) const {
    return first(t, b) ? initial_index : index + ((t - 1) * B + b) * S;
  }
  E* low(void* array) const { return static_cast<E*>(array); }

  // Forward. Writes the GRU's operand: the previous deter beside x = SiLU(LN(in_stoch[stoch] + action)).
  void enter(int64_t t, int64_t b) const {
    const int64_t row = t * B + b;
    const int64_t* chosen = index_before(t, b);
    float* sum = in_sum + row * U;
    std::copy_n(action + row * U, U, sum);
    for (int64_t s = 0; s < S; s++) add_to(static_cast<const E*>(in_stoch) + (s * K + chosen[s]) * U, U, sum);
    E* operand = low(gru_low) + row * (D + U);
    copy_to(deter_before(t, b), D, operand);
    norm_silu(sum, in_norm_weight, in_norm_bias, operand + D);
  }

  void gates(int64_t t, int64_t b) const {
    const int64_t row = t * B + b;
    bf16* const rounded = sizeof(E) == 2 ? static_cast<bf16*>(deter_low) + row * D : nullptr;
    float mean, rstd;
    gru_row(gates_sum + row * 3 * D, deter_before(t, b), gru_norm_weight, gru_norm_bias, deter + row * D, rounded,
            &mean, &rstd, D, eps);
  }

  void hidden(int64_t t, int64_t b) const {
    const int64_t row = t * B + b;
    add_to(embed + row * U, U, post_sum + row * U);
    norm_silu(post_sum + row * U, post_norm_weight, post_norm_bias, low(post_low) + row * U);
  }

  void norm_silu(const float* sum, const float* weight, const float* bias, E* out) const {
    float mean, rstd;
    forward_rows<1, false>(sum, weight, bias, out, U, &mean, &rstd, U, eps);
  }

  // logits -> logp, index, stoch
  void sample(int64_t t, int64_t b, float* p) const {
    const int64_t row = t * B + b;
    const float floor = unimix / double(K), share = 1 - unimix;
    add_to(logit_bias, S * K, logp + row * S * K);
    for (int64_t s = row * S; s < (row + 1) * S; s += W) {
      const int count = int(std::min<int64_t>(W, (row + 1) * S - s));
      sample_rows<true>(logp + s * K, uniform + s, count, K, share, floor, p, logp + s * K, index + s);
      for (int64_t g = s; g < s + count; g++) stoch[g * K + index[g]] = 1.0f;
    }
  }

  // Backward; of_x is the gradient of x. carried: the gradient of this step's stoch from the next step, or null.
  void sample_backward(int64_t t, int64_t b, const float* carried, float* p, float* grad_bias) const {
    const int64_t row = t * B + b;
    const float floor = unimix / double(K), share = 1 - unimix;
    for (int64_t s = 0; s < S; s++) {
      const int64_t at = (row * S + s) * K;
      float* const of_p = p + K;
      Vf products = {};
      for_lanes(K, [&](int64_t k, auto lanes) {
        const Vf mixed = exp(load(logp + at + k, lanes)), part = max(Vf{}, mixed - floor);  // part = share * softmax
        Vf d = carried ? load(carried + s * K + k, lanes) : Vf{};
        if (grad_stoch) d += load(grad_stoch + at + k, lanes);
        d *= part;
        if (grad_logp) d += load(grad_logp + at + k, lanes) * (unimix > 0 ? part / mixed : splat(1.0f));
        d = keep(d, lanes);
        products += d;
        store(p + k, part / share, lanes);
        store(of_p + k, d, lanes);
      });
      const float total = sum(products);
      for_lanes(K, [&](int64_t k, auto lanes) {
        const Vf grad = load(of_p + k, lanes) - load(p + k, lanes) * total;
        float* const of_bias = grad_bias + s * K + k;
        store(of_bias, load(of_bias, lanes) + grad, lanes);
        store(low(grad_logits_low) + at + k, grad, lanes);
      });
    }
  }

  // grad: on entry, of deter; on return, of the previous deter, without the part that the GRU's product adds.
  void gates_backward(int64_t t, int64_t b, float* grad, float* scratch, AffineGradients::Local& of_norm) const {
    const int64_t row = t * B + b;
    const float* in = gates_sum + row * 3 * D;
    float mean, rstd;
    moments_of_rows<1>(in, 3 * D, eps, &mean, &rstd);
    of_norm.next_rows(1);
    gru_rows_backward<1>(grad, in, deter_before(t, b), gru_norm_weight, gru_norm_bias, &mean, &rstd,
                         low(grad_gates_low) + row * 3 * D, grad, D, scratch, of_norm);
  }

  // grad: on entry, of the output; on return, of the sum.
  void norm_silu_backward(const float* sum, const float* weight, const float* bias, float* grad, float* scratch,
                          AffineGradients::Local& of_norm) const {
    float mean, rstd;
    moments_of_rows<1>(sum, U, eps, &mean, &rstd);
    of_norm.next_rows(1);
    backward_rows<1, false>(grad, sum, weight, bias, &mean, &rstd, grad, U, scratch, of_norm);
  }

  // Adds each step's grad_in_sum to the rows of grad_in_stoch that forward gathered, in this thread's columns.
  void scatter(int thread, int threads) const {
    const int64_t begin = U * thread / threads, end = U * (thread + 1) / threads;
    for (int64_t t = 0; t < T; t++)
      for (int64_t b = 0; b < B; b++)
        for (int64_t s = 0; s < S; s++) {
          float* out = grad_in_stoch + (s * K + index_before(t, b)[s]) * U;
          add_to(grad_in_sum + (t * B + b) * U + begin, end - begin, out + begin);
        }
  }
};

// Memory of packed weights, kept between calls: fresh pages would cost as much as the packing.
template <class E>
std::vector<E>* scratch(int which) {
  static thread_local std::vector<E> kept[4];
  return &kept[which];
}

// Stages take microseconds, so threads wait actively. But in case cores are shared, a thread that has waited for some
// ten microseconds offers its core to others (OpenMP's own barrier keeps spinning for milliseconds).
class Barrier {
 public:
  void wait(int threads) {
    const int round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (unsigned spins = 0; round_.load(std::memory_order_acquire) == round; spins++) {
      if (spins > 200) sched_yield();
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
  }

 private:
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> round_{0};
};

int team(const RssmObserve& p, int threads) { return int(std::min<int64_t>(threads, std::max<int64_t>(p.D / 64, 1))); }

template <class E>
void forward(const RssmObserve& p, int threads) {
  const Scan<E> scan(p);
  const int64_t T = p.T, B = p.B, D = p.D, U = p.U, SK = p.S * p.K;
  const Packed<E> gru(p.gru, D + U, 3 * D, 1, D + U, scratch<E>(0));
  const Packed<E> post(p.post_deter, D, U, 1, D, scratch<E>(1));
  const Packed<E> logit(p.logit_weight, U, SK, 1, U, scratch<E>(2));
  E* deter_low = static_cast<E*>(p.deter_low);  // for float32, the same array as deter
  Barrier barrier;
#pragma omp parallel num_threads(team(p, threads))
  {
    const int thread = omp_get_thread_num(), count = omp_get_num_threads();
    const int64_t begin = B * thread / count, end = B * (thread + 1) / count;
    Scratch<float> probabilities(W * p.K);
    gru.pack(thread, count);
    post.pack(thread, count);
    logit.pack(thread, count);
    for (int64_t t = 0; t < T; t++) {
      for (int64_t b = begin; b < end; b++) scan.enter(t, b);
      barrier.wait(count);
      product(scan.low(p.gru_low) + t * B * (D + U), D + U, B, gru, p.gates_sum + t * B * 3 * D, 3 * D, thread, count);
      barrier.wait(count);
      for (int64_t b = begin; b < end; b++) scan.gates(t, b);
      barrier.wait(count);
      product(deter_low + t * B * D, D, B, post, p.post_sum + t * B * U, U, thread, count);
      barrier.wait(count);
      for (int64_t b = begin; b < end; b++) scan.hidden(t, b);
      barrier.wait(count);
      product(scan.low(p.post_low) + t * B * U, U, B, logit, p.logp + t * B * SK, SK, thread, count);
      barrier.wait(count);
      for (int64_t b = begin; b < end; b++) scan.sample(t, b, probabilities);
    }
  }
}

template <class E>
void backward(const RssmObserve& p, int threads) {
  const Scan<E> scan(p);
  const int64_t T = p.T, B = p.B, D = p.D, U = p.U, SK = p.S * p.K;
  const Packed<E> logit(p.logit_weight, SK, U, U, 1, scratch<E>(0));
  const Packed<E> post(p.post_deter, U, D, D, 1, scratch<E>(1));
  const Packed<E> gru(p.gru, 3 * D, D + U, D + U, 1, scratch<E>(2));
  const Packed<E> in(p.in_stoch, U, SK, 1, U, scratch<E>(3));
  std::vector<float> of_stoch(B * SK), of_deter(B * D, 0.0f), from_post(B * D), of_gru(B * (D + U));
  std::vector<E> in_low(B * U);
  const int64_t vectors = SK + D;
  const int most = team(p, threads);
  AffineGradients in_norm(U, most), gru_norm(3 * D, most), post_norm(U, most);
  std::vector<float> sums(most * vectors, 0.0f);
  E *logits_low = static_cast<E*>(p.grad_logits_low), *post_low = static_cast<E*>(p.grad_post_low);
  E* gates_low = static_cast<E*>(p.grad_gates_low);
  Barrier barrier;
#pragma omp parallel num_threads(most)
  {
    const int thread = omp_get_thread_num(), count = omp_get_num_threads();
    const int64_t begin = B * thread / count, end = B * (thread + 1) / count;
    AffineGradients::Local of_in(in_norm), of_gru_norm(gru_norm), of_post(post_norm);
    float *of_bias = sums.data() + thread * vectors, *of_start = of_bias + SK;
    Scratch<float> row(std::max({6 * D, U, 2 * p.K}));
    logit.pack(thread, count);
    post.pack(thread, count);
    gru.pack(thread, count);
    in.pack(thread, count);
    barrier.wait(count);
    for (int64_t t = T - 1; t >= 0; t--) {
      for (int64_t b = begin; b < end; b++) {
        const bool cut = t == T - 1 || scan.first(t + 1, b);
        scan.sample_backward(t, b, cut ? nullptr : of_stoch.data() + b * SK, row, of_bias);
      }
      barrier.wait(count);
      product(logits_low + t * B * SK, SK, B, logit, p.grad_post_sum + t * B * U, U, thread, count);
      barrier.wait(count);
      for (int64_t b = begin; b < end; b++) {
        const int64_t at = (t * B + b) * U;
        scan.norm_silu_backward(p.post_sum + at, p.post_norm_weight, p.post_norm_bias, p.grad_post_sum + at, row,
                                of_post);
        if (sizeof(E) == 2) copy_to(p.grad_post_sum + at, U, post_low + at);
      }
      barrier.wait(count);
      product(post_low + t * B * U, U, B, post, from_post.data(), D, thread, count);
      barrier.wait(count);
      for (int64_t b = begin; b < end; b++) {
        float* grad = of_deter.data() + b * D;
        add_to(from_post.data() + b * D, D, grad);
        if (p.grad_deter) add_to(p.grad_deter + (t * B + b) * D, D, grad);
        scan.gates_backward(t, b, grad, row, of_gru_norm);
      }
      barrier.wait(count);
      product(gates_low + t * B * 3 * D, 3 * D, B, gru, of_gru.data(), D + U, thread, count);
      barrier.wait(count);
      for (int64_t b = begin; b < end; b++) {
        const int64_t at = (t * B + b) * U;
        float *grad = of_deter.data() + b * D, *add = of_gru.data() + b * (D + U);
        add_to(add, D, grad);
        if (scan.first(t, b)) {
          add_to(grad, D, of_start);
          std::fill_n(grad, D, 0.0f);
        }
        std::copy_n(add + D, U, p.grad_in_sum + at);
        scan.norm_silu_backward(p.in_sum + at, p.in_norm_weight, p.in_norm_bias, p.grad_in_sum + at, row, of_in);
        copy_to(p.grad_in_sum + at, U, in_low.data() + b * U);
      }
      barrier.wait(count);
      if (t > 0) product(in_low.data(), U, B, in, of_stoch.data(), SK, thread, count);
      barrier.wait(count);
    }
    scan.scatter(thread, count);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < vectors; i++) {
      float sum = 0;
      for (int k = 0; k < most; k++) sum += sums[k * vectors + i];
      p.grad_vectors[4 * U + 6 * D + i] = sum;
    }
  }
  float* out = p.grad_vectors;
  in_norm.write(out, out + U);
  gru_norm.write(out + 2 * U, out + 2 * U + 3 * D);
  post_norm.write(out + 2 * U + 6 * D, out + 3 * U + 6 * D);
}

}  // namespace

void rssm_observe_forward(const RssmObserve& p, int threads) {
  p.is_bfloat16 ? forward<bf16>(p, threads) : forward<float>(p, threads);
}

void rssm_observe_backward(const RssmObserve& p, int threads) {
  p.is_bfloat16 ? backward<bf16>(p, threads) : backward<float>(p, threads);
}

}  // namespace HDFAST_ISA
