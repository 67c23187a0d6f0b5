#include "../ops.h"
#include "../row_sums.h"
#include "../simd_math.h"

namespace HDFAST_ISA {

void harmony_loss_forward(const float* const* losses, int64_t count, int64_t rows, const float* log_sigma,
                          const int64_t* group, const float* weight, const float* regularizer, int64_t groups,
                          float* total, float* means, float* grad_means, float* grad_log_sigma) {
  double sum_of_terms = 0;
  for (int64_t g = 0; g < groups; g++) {
    const double s = log_sigma[g], softplus = s > 0 ? s + std::log1p(std::exp(-s)) : std::log1p(std::exp(s));
    sum_of_terms += regularizer[g] * softplus;
    grad_log_sigma[g] = regularizer[g] / (1 + std::exp(-s));
  }
  for (int64_t l = 0; l < count; l++) {
    const float* loss = losses[l];
    const double mean = sum_blocks(rows, [&](int64_t i, auto lanes) { return load(loss + i, lanes); }) / rows;
    const double factor = group[l] < 0 ? weight[l] : weight[l] * std::exp(-double(log_sigma[group[l]]));
    means[l] = mean;
    sum_of_terms += factor * mean;
    grad_means[l] = factor;
    if (group[l] >= 0) grad_log_sigma[group[l]] -= factor * mean;
  }
  *total = sum_of_terms;
}

void harmony_loss_backward(const float* grad, const float* grad_means, const float* grad_log_sigma,
                           float* scaled_log_sigma, float* grad_losses, int64_t count, int64_t rows, int64_t groups) {
  for (int64_t g = 0; g < groups; g++) scaled_log_sigma[g] = *grad * grad_log_sigma[g];
  for (int64_t l = 0; l < count; l++) {
    const float value = *grad * grad_means[l] / rows;
    for (int64_t r = 0; r < rows; r++) grad_losses[l * rows + r] = value;
  }
}

}  // namespace HDFAST_ISA
