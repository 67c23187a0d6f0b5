// The ops of the CPU backend, declared once per instruction set. There is no include guard on purpose: bind.cpp
// includes this file with HDFAST_ISA set to each instruction set in turn, an op's own file with the one being compiled.
//
// Conventions: rows are contiguous; `threads` is the maximum number of OpenMP threads; ops allocate their own scratch.

#include <cstdint>

#include "rssm_observe.h"

namespace HDFAST_ISA {

// Copies windows of rows: out (length, batch, row_bytes) from storage (rows, row_bytes). A window that reaches the end
// of its ring continues at its start. If a start is outside the storage, copies nothing and returns the position of the
// first such start; otherwise returns -1.
int64_t gather_windows(const uint8_t* storage, int64_t row_bytes, int64_t rows, const int64_t* starts, int64_t batch,
                       int64_t length, int64_t ring, uint8_t* out, int threads);

// SiLU(LayerNorm(x)); x, y, grad, grad_x (rows, width) float or bfloat16; mean, rstd (rows,) pass to backward.
// The rows of y may lie further apart: y_stride numbers from one to the next.
void layer_norm_silu_forward(const void* x, const float* weight, const float* bias, void* y, int64_t y_stride,
                             float* mean, float* rstd, int64_t rows, int64_t width, float eps, bool is_bf16,
                             int threads);
void layer_norm_silu_backward(const void* grad, const void* x, const float* weight, const float* bias,
                              const float* mean, const float* rstd, void* grad_x, float* grad_weight, float* grad_bias,
                              int64_t rows, int64_t width, bool is_bf16, int threads);

// The GRU's gates: gates, grad_gates (rows, 3 * width) share a dtype; deter, next, grad, grad_deter (rows, width) too.
// The rows of next lie next_stride numbers apart. If rounded is not null, it receives next in bfloat16.
void layer_norm_gru_forward(const void* gates, const void* deter, const float* weight, const float* bias, void* next,
                            int64_t next_stride, void* rounded, int64_t rounded_stride, float* mean, float* rstd,
                            int64_t rows, int64_t width, float eps, bool gates_bf16, bool deter_bf16, int threads);
void layer_norm_gru_backward(const void* grad, const void* gates, const void* deter, const float* weight,
                             const float* bias, const float* mean, const float* rstd, void* grad_gates,
                             void* grad_deter, float* grad_weight, float* grad_bias, int64_t rows, int64_t width,
                             bool gates_bf16, bool deter_bf16, int threads);

// Two-hot cross-entropy of logits (rows, bins) with target (rows,); position, top, scale (rows,) pass to backward.
void two_hot_loss_forward(const void* logits, const float* target, float* loss, float* position, float* top,
                          float* scale, int64_t rows, int64_t bins, float low, float high, bool is_bf16, int threads);
void two_hot_loss_backward(const float* grad, const void* logits, const float* position, const float* top,
                           const float* scale, void* grad_logits, int64_t rows, int64_t bins, bool is_bf16,
                           int threads);

// symexp of the mean bin under softmax(logits); centre (rows,) is that mean, scale that of the gradient.
void two_hot_mean_forward(const void* logits, float* mean, float* centre, float* top, float* scale, int64_t rows,
                          int64_t bins, double low, double high, bool is_bf16, int threads);
void two_hot_mean_backward(const float* grad, const void* logits, const float* centre, const float* top,
                           const float* scale, void* grad_logits, int64_t rows, int64_t bins, double low, double high,
                           bool is_bf16, int threads);

// out = image / 255 - 1 / 2 for `pixels` numbers.
void image_input_forward(const uint8_t* image, void* out, int64_t pixels, bool is_bf16, int threads);

// Sum over each row of (pred - image / 255)^2.
void image_loss_forward(const void* pred, const uint8_t* image, float* loss, int64_t rows, int64_t width, bool is_bf16,
                        int threads);
void image_loss_backward(const float* grad, const void* pred, const uint8_t* image, void* grad_pred, int64_t rows,
                         int64_t width, bool is_bf16, int threads);

// Transposed convolution, kernel 4, stride 2, padding 1: x (images, height, width, inputs), weight (inputs, channels,
// 4, 4) -> y (images, 2 * height, 2 * width, channels), at most 4 channels.
void image_deconv_forward(const void* x, const float* weight, const float* bias, void* y, int64_t images,
                          int64_t height, int64_t width, int64_t inputs, int64_t channels, bool is_bf16, int threads);

// Convolution, kernel 4, stride 2, padding 1: images (count, 2 * height, 2 * width, channels), weight (map_channels,
// channels, 4, 4) -> map (count, height, width, map_channels), map_channels a multiple of 16. For bfloat16 the weights
// must be bfloat16 numbers: their lower bits are cut off.
void image_conv_forward(const void* images, const float* weight, void* map, int64_t count, int64_t height,
                        int64_t width, int64_t channels, int64_t map_channels, bool is_bf16, int threads);
// The gradient of its weight, given the gradient `map`; and, in sums (channels,) unless null, the sum of all pixels.
void image_conv_weight_grad(const void* images, const void* map, float* grad, float* sums, int64_t count,
                            int64_t height, int64_t width, int64_t channels, int64_t map_channels, bool is_bf16,
                            int threads);

// Both in bfloat16 with AMX tiles. Return false, having computed nothing, without AMX, for more than 4 channels, and if
// map_channels is not a multiple of 32.
bool image_conv_tiles(const void* images, const float* weight, void* map, int64_t count, int64_t height, int64_t width,
                      int64_t channels, int64_t map_channels, int threads);
bool image_conv_tiles_grad(const void* images, const void* map, float* grad, float* sums, int64_t count, int64_t height,
                           int64_t width, int64_t channels, int64_t map_channels, int threads);

// grad (K, M), x (K, N) -> out (M, N) = grad^T x, all float.
void linear_weight_grad(const float* grad, const float* x, float* out, int64_t K, int64_t M, int64_t N, int threads);

// Convolution, kernel 4, stride 2, padding 1: x (images, 2 * height, 2 * width, channels_in) -> y (images, height,
// width, channels_out); the transposed one if `doubling`: x (images, height, width, channels_in) -> y (images, 2 *
// height, 2 * width, channels_out). weight (channels of the smaller map, of the larger one, 4, 4). Returns false,
// having computed nothing, where libraries are faster: if a channel count is not a multiple of 16, or the maps make too
// few tiles of 2 x 2 pixels or leave too many of them partly empty.
bool strided_conv_winograd(const float* x, const float* weight, float* y, int64_t images, int64_t height, int64_t width,
                           int64_t channels_in, int64_t channels_out, bool doubling, int threads);

// The gradient of its weight, as strided_conv_weight_grad; false, having computed nothing, where that is faster.
bool strided_conv_winograd_grad(const float* large, const float* small, float* grad, int64_t images, int64_t height,
                                int64_t width, int64_t large_channels, int64_t small_channels, int threads);

// The same in bfloat16. False, having computed nothing, without AMX or if a channel count is not a multiple of 32.
bool strided_conv_tiles_grad(const void* large, const void* small, float* grad, int64_t images, int64_t height,
                             int64_t width, int64_t large_channels, int64_t small_channels, int threads);

// The transposed convolution in bfloat16, weight (channels_in, 4, 4, channels_out). Returns false, having computed
// nothing, without instructions for it, if channels_in is no multiple of 32 or channels_out of 16, or for few pixels.
bool strided_conv_double(const void* x, const void* weight, void* y, int64_t images, int64_t height, int64_t width,
                         int64_t channels_in, int64_t channels_out, int threads);

// The same with AMX tiles. False, having computed nothing, without AMX or if a channel count is not a multiple of 32.
bool strided_conv_tiles_double(const void* x, const void* weight, void* y, int64_t images, int64_t height,
                               int64_t width, int64_t channels_in, int64_t channels_out, int threads);

// Gradient of the kernel of a convolution, kernel 4, stride 2, padding 1, from large (images, 2 * height, 2 * width,
// large_channels) to small (images, height, width, small_channels), or back: grad (small_channels, large_channels, 4,
// 4). Returns false, having computed nothing, where it has no fast way: if a channel count is not a multiple of 16
// (with AMX, in bfloat16, of 32), and for bfloat16 without instructions for it.
bool strided_conv_weight_grad(const void* large, const void* small, float* grad, int64_t images, int64_t height,
                              int64_t width, int64_t large_channels, int64_t small_channels, bool is_bf16,
                              int threads);

// Unclipped KL of each row from log-probabilities (rows, width); rows whose KL is below `free` get no gradient.
void kl_balance_forward(const void* post, const void* prior, float* kl, int64_t rows, int64_t width, bool is_bf16,
                        int threads);
void kl_balance_backward(const float* grad_dyn, const float* grad_rep, const void* post, const void* prior,
                         const float* kl, void* grad_post, void* grad_prior, int64_t rows, int64_t width, float free,
                         bool is_bf16, int threads);

// One draw per row of logits (rows, classes); logp and grad_logp are float.
void sample_onehot_forward(const void* logits, const float* uniform, void* stoch, int64_t* index, float* logp,
                           int64_t rows, int64_t classes, double unimix, bool is_bf16, int threads);
void sample_index_forward(const void* logits, const float* uniform, int64_t* index, int64_t rows, int64_t classes,
                          double unimix, bool is_bf16, int threads);
void sample_onehot_backward(const void* grad_stoch, const float* grad_logp, const void* logits, void* grad_logits,
                            int64_t rows, int64_t classes, double unimix, bool is_bf16, int threads);

// Lambda-returns over (horizon, columns), time-major; cont, value, weight, grad_value (horizon + 1, columns).
void lambda_return_forward(const float* reward, const float* cont, const float* value, float* returns, float* weight,
                           int64_t horizon, int64_t columns, float discount, double lam, int threads);
void lambda_return_backward(const float* grad, const float* cont, float* grad_reward, float* grad_value,
                            int64_t horizon, int64_t columns, float discount, double lam, int threads);

// Each row of out is the sum of one row of weight (groups * classes, units) per group, chosen by index (rows, groups),
// and of onto (rows, units) unless it is null. If an index is out of range, forward computes nothing and returns the
// position of the first such index; otherwise it returns -1.
int64_t onehot_linear_forward(const int64_t* index, const void* weight, const void* onto, void* out, int64_t rows,
                              int64_t groups, int64_t classes, int64_t units, bool is_bf16, int threads);
void onehot_linear_backward(const void* grad, const int64_t* index, void* grad_weight, int64_t rows, int64_t groups,
                            int64_t classes, int64_t units, bool is_bf16, int threads);

// The harmonious total of `count` losses of `rows` rows, and its gradients by the losses' means and by log_sigma.
void harmony_loss_forward(const float* const* losses, int64_t count, int64_t rows, const float* log_sigma,
                          const int64_t* group, const float* weight, const float* regularizer, int64_t groups,
                          float* total, float* means, float* grad_means, float* grad_log_sigma);
void harmony_loss_backward(const float* grad, const float* grad_means, const float* grad_log_sigma,
                           float* scaled_log_sigma, float* grad_losses, int64_t count, int64_t rows, int64_t groups);

// One Adam step of many tensors after clipping to a global norm. Writes the norm before clipping; if it is not finite
// or *applied is false on entry, only sets *applied to false and changes nothing else.
void adam_step(float* const* params, const float* const* grads, float* const* exp_avg, float* const* exp_avg_sq,
               const int64_t* sizes, int64_t tensors, float* step, float lr, double beta1, double beta2, float eps,
               float weight_decay, float max_norm, float* norm, bool* applied, int threads);

// The observe scan of the RSSM, and its gradients except those of the matrices (rssm_observe.h).
void rssm_observe_forward(const RssmObserve& p, int threads);
void rssm_observe_backward(const RssmObserve& p, int threads);

}  // namespace HDFAST_ISA

// clang-format off
#ifndef HDFAST_OPS
// Called from Python with the arguments declared here.
#define HDFAST_OPS(X) \
  X(gather_windows) \
  X(layer_norm_silu_forward) \
  X(layer_norm_silu_backward) \
  X(layer_norm_gru_forward) \
  X(layer_norm_gru_backward) \
  X(two_hot_loss_forward) \
  X(two_hot_loss_backward) \
  X(two_hot_mean_forward) \
  X(two_hot_mean_backward) \
  X(image_input_forward) \
  X(image_loss_forward) \
  X(image_loss_backward) \
  X(image_deconv_forward) \
  X(strided_conv_winograd) \
  X(image_conv_forward) \
  X(image_conv_weight_grad) \
  X(linear_weight_grad) \
  X(strided_conv_double) \
  X(strided_conv_weight_grad) \
  X(kl_balance_forward) \
  X(kl_balance_backward) \
  X(sample_onehot_forward) \
  X(sample_onehot_backward) \
  X(sample_index_forward) \
  X(lambda_return_forward) \
  X(lambda_return_backward) \
  X(onehot_linear_forward) \
  X(onehot_linear_backward) \
  X(harmony_loss_forward) \
  X(harmony_loss_backward) \
  X(adam_step)
// Called with named fields.
#define HDFAST_STRUCT_OPS(X) \
  X(rssm_observe_forward) \
  X(rssm_observe_backward)
#endif
