#include "../ops.h"
#include "../simd.h"

namespace HDFAST_ISA {

void lambda_return_forward(const float* reward, const float* cont, const float* value, float* returns, float* weight,
                           int64_t horizon, int64_t columns, float discount, double lam, int threads) {
  threads = threads_for(horizon * columns, threads);
  const float share = lam, rest = 1 - lam;  // 1 - lam, with lam rounded to float first, would have few correct digits
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t start = 0; start < columns; start += W) {
    for_lanes(columns - start < W ? columns - start : W, [&](int64_t, auto lanes) {
      Vf product = load(cont + start, lanes);
      store(weight + start, product, lanes);
      for (int64_t t = 1; t <= horizon; t++) {
        product *= discount * load(cont + t * columns + start, lanes);
        store(weight + t * columns + start, product, lanes);
      }
      Vf next = load(value + horizon * columns + start, lanes);
      for (int64_t t = horizon - 1; t >= 0; t--) {
        const int64_t at = (t + 1) * columns + start;
        const Vf mixed = rest * load(value + at, lanes) + share * next;
        next = load(reward + t * columns + start, lanes) + discount * load(cont + at, lanes) * mixed;
        store(returns + t * columns + start, next, lanes);
      }
    });
  }
}

void lambda_return_backward(const float* grad, const float* cont, float* grad_reward, float* grad_value,
                            int64_t horizon, int64_t columns, float discount, double lam, int threads) {
  threads = threads_for(horizon * columns, threads);
  const float share = lam, rest = 1 - lam;  // 1 - lam, with lam rounded to float first, would have few correct digits
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t start = 0; start < columns; start += W) {
    for_lanes(columns - start < W ? columns - start : W, [&](int64_t, auto lanes) {
      store(grad_value + start, Vf{}, lanes);
      Vf carried = {};  // the part of the gradient of returns[t] that comes from returns[t - 1]
      for (int64_t t = 0; t < horizon; t++) {
        const int64_t at = (t + 1) * columns + start;
        const Vf d = load(grad + t * columns + start, lanes) + carried;
        const Vf d_mixed = d * (discount * load(cont + at, lanes));
        store(grad_reward + t * columns + start, d, lanes);
        carried = share * d_mixed;
        store(grad_value + at, t + 1 < horizon ? rest * d_mixed : d_mixed, lanes);
      }
    });
  }
}

}  // namespace HDFAST_ISA
