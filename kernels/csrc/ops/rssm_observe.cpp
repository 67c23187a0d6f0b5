// The observe scan on the CPU: T steps in one parallel region. Products divide the weights' columns among the threads,
// the stages between them divide the batch, with barriers in between. The caller then computes the weight gradients.

#include "../ops.h"
#include "../rssm_observe.h"
#include "../small_gemm.h"
#include "rssm_observe_norms.h"

#include <omp.h>

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

namespace HDFAST_ISA {
namespace {

template <class E>
void copy_to(const float* in, int64_t n, E* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) out[i] = from_float<E>(in[i]);
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
    for (int64_t s = 0; s < S; s++) {
      const E* in = static_cast<const E*>(in_stoch) + (s * K + chosen[s]) * U;
#pragma omp simd
      for (int64_t i = 0; i < U; i++) sum[i] += to_float(in[i]);
    }
    E* operand = low(gru_low) + row * (D + U);
    copy_to(deter_before(t, b), D, operand);
    norm_silu(sum, in_norm_weight, in_norm_bias, U, eps, operand + D);
  }

  void gates(int64_t t, int64_t b) const {
    const int64_t row = t * B + b;
    const float *g = gates_sum + row * 3 * D, *w = gru_norm_weight, *c = gru_norm_bias, *before = deter_before(t, b);
    const Stats s = stats_of(g, 3 * D, eps);
    float* out = deter + row * D;
    const int64_t n = D;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
      const float reset = sigmoid_of((g[i] - s.mean) * s.scale * w[i] + c[i]);
      const float candidate = tanh_of(reset * ((g[n + i] - s.mean) * s.scale * w[n + i] + c[n + i]));
      const float update = sigmoid_of((g[2 * n + i] - s.mean) * s.scale * w[2 * n + i] + c[2 * n + i] - 1.0f);
      out[i] = update * candidate + (1.0f - update) * before[i];
    }
    if (sizeof(E) == 2) copy_to(out, D, low(deter_low) + row * D);
  }

  void hidden(int64_t t, int64_t b) const {
    const int64_t row = t * B + b;
    float* sum = post_sum + row * U;
    const float* add = embed + row * U;
#pragma omp simd
    for (int64_t i = 0; i < U; i++) sum[i] += add[i];
    norm_silu(sum, post_norm_weight, post_norm_bias, U, eps, low(post_low) + row * U);
  }

  // logits -> logp, index, stoch
  void sample(int64_t t, int64_t b, float* p) const {
    const int64_t row = t * B + b, n = K;
    const float floor = unimix / double(K), share = 1 - unimix;
    for (int64_t s = 0; s < S; s++) {
      float *l = logp + (row * S + s) * n, most = -INFINITY, sum = 0;
      const float* bias = logit_bias + s * n;
#pragma omp simd reduction(max : most)
      for (int64_t k = 0; k < n; k++) {
        l[k] += bias[k];
        most = l[k] > most ? l[k] : most;
      }
#pragma omp simd reduction(+ : sum)
      for (int64_t k = 0; k < n; k++) {
        l[k] -= most;
        p[k] = exp_of(l[k]);
        sum += p[k];
      }
      const float scale = share / sum;
      if (unimix > 0) {
#pragma omp simd
        for (int64_t k = 0; k < n; k++) {
          p[k] = p[k] * scale + floor;
          l[k] = log_of(p[k]);
        }
      } else {  // the logarithm stays finite where a probability underflows
        const float total = std::log(sum);
        for (int64_t k = 0; k < n; k++) {
          p[k] *= scale;
          l[k] -= total;
        }
      }
      const float u = uniform[row * S + s];
      int64_t k = 0;
      for (float cumulative = p[0]; cumulative <= u && k < n - 1; cumulative += p[k]) k++;
      index[row * S + s] = k;
      stoch[(row * S + s) * n + k] = 1.0f;
    }
  }

  // Backward; of_x is the gradient of x. carried: the gradient of this step's stoch from the next step, or null.
  void sample_backward(int64_t t, int64_t b, const float* carried, float* p, float* grad_bias) const {
    const int64_t row = t * B + b, n = K;
    const float floor = unimix / double(K), share = 1 - unimix;
    for (int64_t s = 0; s < S; s++) {
      const int64_t at = (row * S + s) * n;
      const float* from_stoch = grad_stoch ? grad_stoch + at : nullptr;
      const float* from_logp = grad_logp ? grad_logp + at : nullptr;
      E* out = low(grad_logits_low) + at;
      float *of_p = p + n, total = 0;
      for (int64_t k = 0; k < n; k++) of_p[k] = carried ? carried[s * n + k] : 0.0f;
      if (from_stoch)
        for (int64_t k = 0; k < n; k++) of_p[k] += from_stoch[k];
#pragma omp simd reduction(+ : total)
      for (int64_t k = 0; k < n; k++) {
        const float mixed = exp_of(logp[at + k]), part = std::max(mixed - floor, 0.0f);  // part = share * softmax
        p[k] = part / share;
        of_p[k] = part * of_p[k] + (from_logp ? from_logp[k] * (unimix > 0 ? part / mixed : 1.0f) : 0.0f);
        total += of_p[k];
      }
#pragma omp simd
      for (int64_t k = 0; k < n; k++) {
        const float grad = of_p[k] - p[k] * total;
        grad_bias[s * n + k] += grad;
        out[k] = from_float<E>(grad);
      }
    }
  }

  // grad: on entry, of deter; on return, of the previous deter, without the part that the GRU's product adds.
  void gates_backward(int64_t t, int64_t b, float* grad, float* of_gates, float* grad_weight, float* grad_bias) const {
    const int64_t row = t * B + b, n = D;
    const float *g = gates_sum + row * 3 * D, *w = gru_norm_weight, *c = gru_norm_bias, *before = deter_before(t, b);
    const Stats s = stats_of(g, 3 * D, eps);
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
      const float normed_r = (g[i] - s.mean) * s.scale, normed_c = (g[n + i] - s.mean) * s.scale;
      const float normed_u = (g[2 * n + i] - s.mean) * s.scale, scaled = normed_c * w[n + i] + c[n + i];
      const float reset = sigmoid_of(normed_r * w[i] + c[i]), candidate = tanh_of(reset * scaled);
      const float update = sigmoid_of(normed_u * w[2 * n + i] + c[2 * n + i] - 1.0f);
      const float of_candidate = grad[i] * update * (1.0f - candidate * candidate);
      const float of_r = of_candidate * scaled * reset * (1.0f - reset), of_c = of_candidate * reset;
      const float of_u = grad[i] * (candidate - before[i]) * update * (1.0f - update);
      grad_weight[i] += of_r * normed_r;
      grad_weight[n + i] += of_c * normed_c;
      grad_weight[2 * n + i] += of_u * normed_u;
      grad_bias[i] += of_r;
      grad_bias[n + i] += of_c;
      grad_bias[2 * n + i] += of_u;
      of_gates[i] = of_r * w[i];
      of_gates[n + i] = of_c * w[n + i];
      of_gates[2 * n + i] = of_u * w[2 * n + i];
      grad[i] *= 1.0f - update;
    }
    norm_backward(g, s, 3 * D, of_gates);
    copy_to(of_gates, 3 * D, low(grad_gates_low) + row * 3 * D);
  }

  // Adds each step's grad_in_sum to the rows of grad_in_stoch that forward gathered, in this thread's columns.
  void scatter(int thread, int threads) const {
    const int64_t begin = U * thread / threads, end = U * (thread + 1) / threads;
    for (int64_t t = 0; t < T; t++)
      for (int64_t b = 0; b < B; b++)
        for (int64_t s = 0; s < S; s++) {
          float* out = grad_in_stoch + (s * K + index_before(t, b)[s]) * U;
          const float* in = grad_in_sum + (t * B + b) * U;
#pragma omp simd
          for (int64_t i = begin; i < end; i++) out[i] += in[i];
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
    std::vector<float> probabilities(p.K);
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
      for (int64_t b = begin; b < end; b++) scan.sample(t, b, probabilities.data());
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
  const int64_t vectors = 2 * U + 6 * D + 2 * U + SK + D;
  const int most = team(p, threads);
  std::vector<float> sums(most * vectors, 0.0f);
  E *logits_low = static_cast<E*>(p.grad_logits_low), *post_low = static_cast<E*>(p.grad_post_low);
  E* gates_low = static_cast<E*>(p.grad_gates_low);
  Barrier barrier;
#pragma omp parallel num_threads(most)
  {
    const int thread = omp_get_thread_num(), count = omp_get_num_threads();
    const int64_t begin = B * thread / count, end = B * (thread + 1) / count;
    float* of_in = sums.data() + thread * vectors;
    float *of_gru_norm = of_in + 2 * U, *of_post = of_gru_norm + 6 * D, *of_bias = of_post + 2 * U;
    float* of_start = of_bias + SK;
    std::vector<float> row(std::max(3 * D, 2 * p.K));
    logit.pack(thread, count);
    post.pack(thread, count);
    gru.pack(thread, count);
    in.pack(thread, count);
    barrier.wait(count);
    for (int64_t t = T - 1; t >= 0; t--) {
      for (int64_t b = begin; b < end; b++) {
        const bool cut = t == T - 1 || scan.first(t + 1, b);
        scan.sample_backward(t, b, cut ? nullptr : of_stoch.data() + b * SK, row.data(), of_bias);
      }
      barrier.wait(count);
      product(logits_low + t * B * SK, SK, B, logit, p.grad_post_sum + t * B * U, U, thread, count);
      barrier.wait(count);
      for (int64_t b = begin; b < end; b++) {
        const int64_t at = (t * B + b) * U;
        norm_silu_backward(p.post_sum + at, p.post_norm_weight, p.post_norm_bias, U, p.eps, p.grad_post_sum + at,
                           of_post, of_post + U);
        if (sizeof(E) == 2) copy_to(p.grad_post_sum + at, U, post_low + at);
      }
      barrier.wait(count);
      product(post_low + t * B * U, U, B, post, from_post.data(), D, thread, count);
      barrier.wait(count);
      for (int64_t b = begin; b < end; b++) {
        float *grad = of_deter.data() + b * D, *add = from_post.data() + b * D;
        const float* given = p.grad_deter ? p.grad_deter + (t * B + b) * D : nullptr;
        for (int64_t i = 0; i < D; i++) grad[i] += add[i] + (given ? given[i] : 0.0f);
        scan.gates_backward(t, b, grad, row.data(), of_gru_norm, of_gru_norm + 3 * D);
      }
      barrier.wait(count);
      product(gates_low + t * B * 3 * D, 3 * D, B, gru, of_gru.data(), D + U, thread, count);
      barrier.wait(count);
      for (int64_t b = begin; b < end; b++) {
        const int64_t at = (t * B + b) * U;
        float *grad = of_deter.data() + b * D, *add = of_gru.data() + b * (D + U);
        for (int64_t i = 0; i < D; i++) grad[i] += add[i];
        if (scan.first(t, b)) {
          for (int64_t i = 0; i < D; i++) of_start[i] += grad[i];
          std::fill_n(grad, D, 0.0f);
        }
        std::copy_n(add + D, U, p.grad_in_sum + at);
        norm_silu_backward(p.in_sum + at, p.in_norm_weight, p.in_norm_bias, U, p.eps, p.grad_in_sum + at, of_in,
                           of_in + U);
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
      p.grad_vectors[i] = sum;
    }
  }
}

}  // namespace

void rssm_observe_forward(const RssmObserve& p, int threads) {
  p.is_bfloat16 ? forward<bf16>(p, threads) : forward<float>(p, threads);
}

void rssm_observe_backward(const RssmObserve& p, int threads) {
  p.is_bfloat16 ? backward<bf16>(p, threads) : backward<float>(p, threads);
}

}  // namespace HDFAST_ISA
