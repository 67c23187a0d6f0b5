// The few vector functions that the ops need: reciprocal, exponentials, logarithms, sigmoid, tanh.
#pragma once

#include <limits>

#include "simd.h"

namespace HDFAST_ISA {
namespace {

// 1 / x within 1 ulp, for x whose inverse is a normal number.
HDFAST_INLINE Vf reciprocal(Vf x) {
#if defined(__AVX512F__)  // a division takes the vector unit for 16 cycles
  const Vf guess = _mm512_rcp14_ps(x);
  return guess + guess * (1.f - x * guess);
#else
  return 1.f / x;
#endif
}

// x = n log(2) + r with an integer n and |r| <= log(2) / 2: n, as a number and as an integer, and e^r - 1. Cody-Waite
// reduction, minimax polynomial of Cephes expf.
struct ExpParts {
  Vf n;
  Vi exponent;
  Vf rest;
};
HDFAST_INLINE ExpParts exp_parts(Vf x) {
#if defined(__AVX512F__)
  const Vf n = _mm512_roundscale_ps(x * 1.44269504088896341f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Vi exponent = __builtin_convertvector(n, Vi);
#else
  const float magic = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer, in the low bits
  const Vf shifted = x * 1.44269504088896341f + magic;
  const Vf n = shifted - magic;
  const Vi exponent = bit_cast<Vi>(shifted) - bit_cast<int32_t>(magic);
#endif
  Vf r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  const Vf square = r * r;
  Vf p = (1.9875691500e-4f * r + 1.3981999507e-3f) * square + (8.3334519073e-3f * r + 4.1665795894e-2f);
  p = p * square + (1.6666665459e-1f * r + 5.0000001201e-1f);
  return {n, exponent, p * square + r};
}

// e^x within 1 ulp for x <= 88; zero below -87, NaN for NaN.
HDFAST_INLINE Vf exp(Vf x) {
#if defined(__AVX512F__)
  const ExpParts parts = exp_parts(_mm512_max_ps(splat(-104.f), x));  // NaN stays
  return _mm512_scalef_ps(parts.rest + 1.f, parts.n);
#else
  const ExpParts parts = exp_parts(x);
  const Vf result = (parts.rest + 1.f) * bit_cast<Vf>((parts.exponent + 127) << 23);
  return x < -87.f ? Vf{} : result;
#endif
}

// e^x - 1 within 2 ulp for x >= 0. NaN stays.
HDFAST_INLINE Vf expm1(Vf x) {
  const ExpParts parts = exp_parts(min(splat(89.f), x));
  const Vf half = bit_cast<Vf>((parts.exponent + 126) << 23);  // 2^128 would overflow before the result does
  return 2.f * (half * parts.rest + (half - 0.5f));
}

// log((1 + m) 2^e) within 1 ulp for 1 + m in [sqrt(1/2), sqrt(2)). Polynomial of Cephes logf.
HDFAST_INLINE Vf log_of_parts(Vf m, Vf e) {
  Vf p = splat(7.0376836292e-2f);
  p = p * m + -1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m + -1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m + -1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m + -2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  const Vf square = m * m;
  Vf tail = p * (m * square) + e * -2.12194440e-4f;
  tail = tail - 0.5f * square;
  return (m + tail) + e * 0.693359375f;
}

// log(x) within 1 ulp for normal x > 0; NaN and infinity stay.
HDFAST_INLINE Vf log(Vf x) {
  // Split off the exponent so that the mantissa lies in [sqrt(1/2), sqrt(2)).
  const Vi bits = bit_cast<Vi>(x) - 0x3f3504f3;
  const Vf m = bit_cast<Vf>((bits & 0x7fffff) + 0x3f3504f3) - 1.f;
  const Vf result = log_of_parts(m, __builtin_convertvector(bits >> 23, Vf));
  return x < std::numeric_limits<float>::infinity() ? result : x;
}

// log(1 + x) within 2 ulp for finite x >= 0: what the sum lost to rounding (all of a small x) is added back.
HDFAST_INLINE Vf log1p(Vf x) {
  const Vf above = 1.f + x, lost = x - (above - 1.f);
  const Vi bits = bit_cast<Vi>(above) - 0x3f3504f3, e = bits >> 23;
  const Vf m = bit_cast<Vf>((bits & 0x7fffff) + 0x3f3504f3) - 1.f;
  return log_of_parts(m + lost * bit_cast<Vf>((127 - e) << 23), __builtin_convertvector(e, Vf));
}

// A minimax polynomial of 2^f on [-1/2, 1/2] is 1 + exp2_slope * f + exp2_rest * f^2.
HDFAST_INLINE Vf exp2_rest(Vf f, Vf square) {
  return (1.5353361816e-4f * square + (1.3398874445e-3f * f + 9.6184373583e-3f)) * square +
         (5.5503324710e-2f * f + 2.4022647914e-1f);
}
constexpr float exp2_slope = 6.9314720286e-1f;

// 2^t for -126 <= t <= 126 (with AVX-512, for any t <= 126): within 1 ulp by that polynomial, or with a relative error
// of 3e-6 if `rough`. Minus infinity gives NaN unless `infinite`, with AVX-512 only: that costs a little.
template <bool rough, bool infinite = false>
HDFAST_INLINE Vf exp2(Vf t) {
#if defined(__AVX512F__)
  const Vf n = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Vf f = infinite ? Vf(_mm512_reduce_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)) : t - n;
#else
  const Vf shifted = t + 12582912.f, n = shifted - 12582912.f;  // 1.5 * 2^23, as in exp
  const Vf f = t - n;
#endif
  Vf p;
  if constexpr (rough) {
    p = splat(9.5828528675e-3f);
    p = p * f + 5.5906424925e-2f;
    p = p * f + 2.4024098617e-1f;
    p = p * f + 6.9312419336e-1f;
    p = p * f + 1.f;
  } else {
    const Vf square = f * f;
    p = exp2_rest(f, square) * square + (exp2_slope * f + 1.f);
  }
#if defined(__AVX512F__)
  return _mm512_scalef_ps(p, n);
#else
  const Vf result = bit_cast<Vf>(bit_cast<Vi>(p) + (bit_cast<Vi>(shifted) << 23));
  return t == t ? result : t;
#endif
}

// t with 2^t = e^-x, limited so that neither 2^t nor 1 / (1 + 2^t) is denormal, which would be slow. NaN stays.
HDFAST_INLINE Vf sigmoid_exponent(Vf x) {
  const Vf t = x * -1.44269504088896341f;
#if defined(__AVX512F__)
  return _mm512_min_ps(splat(126.f), t);
#else
  return t > 126.f ? splat(126.f) : t < -126.f ? splat(-126.f) : t;
#endif
}

// 1 / (1 + e^-x), never below 2^-126.
HDFAST_INLINE Vf sigmoid(Vf x) { return reciprocal(1.f + exp2<false>(sigmoid_exponent(x))); }

// The same with a relative error below 1e-4: a thirtieth of bfloat16's rounding error, for two thirds of the work.
HDFAST_INLINE Vf rough_sigmoid(Vf x) {
  const Vf below = 1.f + exp2<true>(sigmoid_exponent(x));
#if defined(__AVX512F__)
  return _mm512_rcp14_ps(below);
#else
  return 1.f / below;
#endif
}

struct Tanh {
  Vf value, slope;
};

// tanh(x) = (1 - e) / (1 + e) with e = 2^t = scale + change, within 4 ulp and never beyond 1. Near zero 1 - e would be
// mostly rounding error, but scale is one there, so 1 - scale vanishes. The derivative has a relative error below 1e-6:
// better than 1 - tanh(x)^2, which cancels where tanh saturates. NaN stays.
HDFAST_INLINE Tanh tanh(Vf x) {
  const Vf t = sigmoid_exponent(2.f * abs(x));
#if defined(__AVX512F__)
  const Vf n = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Vf scale = _mm512_scalef_ps(splat(1.f), n);
#else
  const Vf shifted = t + 12582912.f, n = shifted - 12582912.f;  // 1.5 * 2^23, as in exp
  const Vf scale = bit_cast<Vf>((bit_cast<Vi>(shifted) << 23) + bit_cast<int32_t>(1.f));
#endif
  const Vf f = t - n, square = f * f;
  const Vf change = scale * (exp2_rest(f, square) * square + exp2_slope * f);
  const Vf e = scale + change, inverse = reciprocal(1.f + e);
  return {copysign(((1.f - scale) - change) * inverse, x), 4.f * e * (inverse * inverse)};
}

}  // namespace
}  // namespace HDFAST_ISA
