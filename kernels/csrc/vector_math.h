// Scalar functions that the compiler turns into vector code inside `#pragma omp simd` loops, and bfloat16.
//
// They are in the namespace of the instruction set, so that the linker never mixes those of two sets.

#pragma once

#include <cstdint>
#include <limits>

#include "simd.h"

namespace HDFAST_ISA {
namespace {

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return __builtin_bit_cast(float, uint32_t(x.bits) << 16); }

template <class E>
E from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bf16 from_float<bf16>(float x) {  // to nearest, ties to even; NaN stays NaN
  const uint32_t u = __builtin_bit_cast(uint32_t, x);
  const uint32_t rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16;
  return {uint16_t(x == x ? rounded : 0x7FC0)};
}

struct Exp {
  float scale, excess;
};

// exp(x) = scale * (1 + excess) to about 1 ulp where the result is a normal number; beyond that it saturates. NaN stays
// NaN. The two parts give exp(x) - 1 without cancellation.
inline Exp exp_parts(float x) {
  x = x > 88.0f ? 88.0f : x;
  x = x < -87.0f ? -87.0f : x;
  const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer in the low bits
  const int32_t exponent = __builtin_bit_cast(int32_t, shifted) - 0x4B400000;
  const float n = shifted - 12582912.0f;
  float r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return {__builtin_bit_cast(float, (exponent + 127) << 23), p * r * r + r};
}

inline float exp_of(float x) {
  const Exp e = exp_parts(x);
  return (e.excess + 1.0f) * e.scale;
}

// log to about 1 ulp for positive normal numbers; NaN and infinity stay.
inline float log_of(float x) {
  const int32_t bits = __builtin_bit_cast(int32_t, x) - 0x3F3504F3;  // sqrt(1/2): mantissa in [sqrt(1/2), sqrt(2))
  const float exponent = float(bits >> 23);
  const float m = __builtin_bit_cast(float, (bits & 0x007FFFFF) + 0x3F3504F3) - 1.0f;
  float p = 7.0376836292e-2f;
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  const float square = m * m;
  p = p * m * square - exponent * 2.12194440e-4f - 0.5f * square;
  const float result = m + p + exponent * 0.693359375f;
  return x < std::numeric_limits<float>::infinity() ? result : x;
}

inline float sigmoid_of(float x) { return 1.0f / (1.0f + exp_of(-x)); }
inline float tanh_of(float x) {  // (1 - e) / (1 + e); near zero scale is one, so 1 - scale vanishes
  const Exp e = exp_parts(-2.0f * x);
  const float change = e.scale * e.excess;
  return ((1.0f - e.scale) - change) / (1.0f + (e.scale + change));
}

}  // namespace
}  // namespace HDFAST_ISA
