#include "../ops.h"
#include "../row_sums.h"

namespace HDFAST_ISA {
namespace {

constexpr int64_t block = 1 << 14;  // elements that a thread processes at a time

// Calls f(tensor, first, count) for every block of every tensor, spread over the threads.
template <class F>
void for_blocks(const int64_t* sizes, int64_t tensors, int threads, F f) {
#pragma omp parallel num_threads(threads)
  for (int64_t j = 0; j < tensors; j++) {
    const int64_t blocks = (sizes[j] + block - 1) / block;
#pragma omp for schedule(static) nowait
    for (int64_t b = 0; b < blocks; b++) {
      const int64_t first = b * block, left = sizes[j] - first;
      f(j, first, left < block ? left : block);
    }
  }
}

}  // namespace

void adam_step(float* const* params, const float* const* grads, float* const* exp_avg, float* const* exp_avg_sq,
               const int64_t* sizes, int64_t tensors, float* step, float lr, double beta1, double beta2, float eps,
               float weight_decay, float max_norm, float* norm, bool* applied, int threads) {
  int64_t blocks = 0;
  for (int64_t j = 0; j < tensors; j++) blocks += (sizes[j] + block - 1) / block;
  threads = blocks < 2 ? 1 : threads;

  // One partial sum per block, added in block order: the result is the same for any number of threads.
  Scratch<double> squares(blocks);
  Scratch<int64_t> first_block(tensors);
  for (int64_t j = 0, b = 0; j < tensors; b += (sizes[j] + block - 1) / block, j++) first_block[j] = b;
  for_blocks(sizes, tensors, threads, [&](int64_t j, int64_t first, int64_t count) {
    const float* g = grads[j] + first;
    squares[first_block[j] + first / block] = sum_blocks(count, [&](int64_t i, auto lanes) {
      const Vf v = load(g + i, lanes);
      return v * v;
    });
  });
  double square = 0;
  for (int64_t b = 0; b < blocks; b++) square += squares[b];
  *norm = std::sqrt(square);
  *applied = *applied && std::isfinite(*norm);
  if (!*applied) return;

  *step += 1;
  const double bias1 = 1 - std::pow(beta1, double(*step)), bias2 = 1 - std::pow(beta2, double(*step));
  // Rounded after the subtraction: in 1 - beta, a beta rounded to float would leave few correct digits.
  const float rest1 = 1 - beta1, rest2 = 1 - beta2, keep2 = beta2;
  const float clip = *norm > max_norm ? max_norm / *norm : 1.f;
  const float rate = lr / bias1, inverse_root = 1 / std::sqrt(bias2);
  for_blocks(sizes, tensors, threads, [&](int64_t j, int64_t first, int64_t count) {
    float *p = params[j] + first, *m = exp_avg[j] + first, *v = exp_avg_sq[j] + first;
    const float* g = grads[j] + first;
    for_lanes(count, [&](int64_t i, auto lanes) {
      const Vf param = load(p + i, lanes), grad = load(g + i, lanes) * clip + weight_decay * param;
      const Vf average = load(m + i, lanes), square = load(v + i, lanes);
      const Vf mean = average + rest1 * (grad - average);
      const Vf variance = keep2 * square + rest2 * (grad * grad);
      store(m + i, mean, lanes);
      store(v + i, variance, lanes);
      store(p + i, param - rate * mean / (sqrt(variance) * inverse_root + eps), lanes);
    });
  });
}

}  // namespace HDFAST_ISA
