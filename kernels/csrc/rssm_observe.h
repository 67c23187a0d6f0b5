// The arguments of rssm_observe's C++: named addresses and sizes, the same for every instruction set.
//
// Axes: T time, B batch, D deter, U units, S groups, K classes. Arrays named *_low have the dtype of the matrices:
// bfloat16 if `is_bfloat16` is set, else float32. All arrays are contiguous, time-major.

#pragma once

#include <cstdint>

// clang-format off
#define RSSM_OBSERVE_SIZES(X) X(T) X(B) X(D) X(U) X(S) X(K) X(is_bfloat16)

#define RSSM_OBSERVE_WEIGHTS(X)                                                                        \
  X(const uint8_t, is_first) X(const float, initial_deter) X(const int64_t, initial_index)             \
  X(const void, in_stoch) X(const float, in_norm_weight) X(const float, in_norm_bias)                  \
  X(const void, gru) X(const float, gru_norm_weight) X(const float, gru_norm_bias)                     \
  X(const void, post_deter) X(const float, post_norm_weight) X(const float, post_norm_bias)            \
  X(const void, logit_weight) X(const float, logit_bias)

// Computed by forward, read by backward. *_sum are the inputs of the layer norms, *_low operands of the GEMMs.
#define RSSM_OBSERVE_STATE(X)                                                                          \
  X(float, deter)     /* (T, B, D) */      X(int64_t, index)   /* (T, B, S) */                         \
  X(float, logp)      /* (T, B, S, K) */   X(float, in_sum)    /* (T, B, U) */                         \
  X(float, gates_sum) /* (T, B, 3D) */     X(float, post_sum)  /* (T, B, U) */                         \
  X(void, gru_low)    /* (T, B, D + U) */  X(void, deter_low)  /* (T, B, D) */                         \
  X(void, post_low)   /* (T, B, U) */

#define RSSM_OBSERVE_FORWARD(X)                                                                        \
  X(const float, embed) X(const float, action) X(const float, uniform)                                 \
  X(float, stoch)     /* (T, B, S, K): zero on entry */

// Gradients of the outputs (null means zero), then all others. *_low are operands of the GEMMs for the weights'
// gradients; grad_in_sum and grad_post_sum are also the gradients of action and embed.
#define RSSM_OBSERVE_BACKWARD(X)                                                                       \
  X(const float, grad_deter) X(const float, grad_stoch) X(const float, grad_logp)                      \
  X(float, grad_in_sum)    /* (T, B, U) */  X(float, grad_post_sum)  /* (T, B, U) */                   \
  X(void, grad_post_low)   /* (T, B, U) */  X(void, grad_gates_low)  /* (T, B, 3D) */                  \
  X(void, grad_logits_low) /* (T, B, S*K) */                                                           \
  X(float, grad_in_stoch)  /* (S*K, U): zero on entry */                                               \
  X(float, grad_vectors)   /* in_norm_weight, in_norm_bias, gru_norm_.., post_norm_.., logit_bias, initial_deter */
// clang-format on

struct RssmObserve {
#define RSSM_OBSERVE_SIZE(name) int64_t name;
#define RSSM_OBSERVE_FIELD(type, name) type* name;
  RSSM_OBSERVE_SIZES(RSSM_OBSERVE_SIZE)
  RSSM_OBSERVE_WEIGHTS(RSSM_OBSERVE_FIELD)
  RSSM_OBSERVE_STATE(RSSM_OBSERVE_FIELD)
  RSSM_OBSERVE_FORWARD(RSSM_OBSERVE_FIELD)
  RSSM_OBSERVE_BACKWARD(RSSM_OBSERVE_FIELD)
#undef RSSM_OBSERVE_SIZE
#undef RSSM_OBSERVE_FIELD
  double unimix;  // not rounded to float before 1 - unimix
  float eps;
};
