// Vectors of W floats in the instruction set at hand, built on the vector extensions of GCC and clang: loads and stores
// of float, bfloat16 and uint8 rows with a masked last part, and reductions.
//
// Everything has internal linkage, as this header is compiled once per instruction set.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace HDFAST_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float Vf __attribute__((vector_size(4 * W)));
typedef int32_t Vi __attribute__((vector_size(4 * W)));
typedef uint32_t Vu __attribute__((vector_size(4 * W)));
typedef uint16_t Vh __attribute__((vector_size(2 * W)));
typedef uint8_t Vb __attribute__((vector_size(W)));

struct bf16 {
  uint16_t bits;
};

#define HDFAST_INLINE inline __attribute__((always_inline))

template <class To, class From>
HDFAST_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

HDFAST_INLINE Vf splat(float value) { return Vf{} + value; }

// Which lanes of a vector are active: all, or the first n.
struct Whole {};
struct Part {
  int n;
};

HDFAST_INLINE Vi lane_numbers() {
  Vi lanes;
  for (int i = 0; i < W; i++) lanes[i] = i;
  return lanes;
}

// The vector with `other` in the inactive lanes.
HDFAST_INLINE Vf keep(Vf v, Whole) { return v; }
HDFAST_INLINE Vf keep(Vf v, Part part, float other = 0) { return lane_numbers() < part.n ? v : splat(other); }

template <class T>
struct Raw;
template <>
struct Raw<float> {
  using type = Vf;
};
template <>
struct Raw<bf16> {
  using type = Vh;
};
template <>
struct Raw<uint8_t> {
  using type = Vb;
};

HDFAST_INLINE Vf widen(Vf v) { return v; }
HDFAST_INLINE Vf widen(Vh v) {
#if defined(__AVX512F__)
  const Vu bits = bit_cast<Vu>(_mm512_cvtepu16_epi32(bit_cast<__m256i>(v)));
#elif defined(__AVX2__)
  const Vu bits = bit_cast<Vu>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(v)));
#else
  const Vu bits = __builtin_convertvector(v, Vu);
#endif
  return bit_cast<Vf>(bits << 16);
}
HDFAST_INLINE Vf widen(Vb v) {
#if defined(__AVX512F__)
  const Vi whole = bit_cast<Vi>(_mm512_cvtepu8_epi32(bit_cast<__m128i>(v)));
#elif defined(__AVX2__)
  const Vi whole = bit_cast<Vi>(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bit_cast<int64_t>(v))));
#else
  const Vi whole = __builtin_convertvector(v, Vi);
#endif
  return __builtin_convertvector(whole, Vf);
}

HDFAST_INLINE Vf narrow(Vf v, float) { return v; }
HDFAST_INLINE Vh narrow(Vf v, bf16) {
#if defined(__AVX512BF16__)
  return bit_cast<Vh>(_mm512_cvtneps_pbh(v));
#else
  const Vu bits = bit_cast<Vu>(v);
  const Vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return __builtin_convertvector(v == v ? rounded : Vu{} + 0x7fc0, Vh);
#endif
}

template <class T>
HDFAST_INLINE Vf load(const T* p, Whole) {
  typename Raw<T>::type raw;
  std::memcpy(&raw, p, sizeof(raw));
  return widen(raw);
}

// Inactive lanes read nothing and get `other`.
template <class T>
HDFAST_INLINE Vf load(const T* p, Part part, float other = 0) {
  typename Raw<T>::type raw = {};
  std::memcpy(&raw, p, part.n * sizeof(T));
  return keep(widen(raw), part, other);
}

template <class T>
HDFAST_INLINE void store(T* p, Vf v, Whole) {
  const auto raw = narrow(v, T{});
  std::memcpy(p, &raw, sizeof(raw));
}

template <class T>
HDFAST_INLINE void store(T* p, Vf v, Part part) {
  const auto raw = narrow(v, T{});
  std::memcpy(p, &raw, part.n * sizeof(T));
}

#if defined(__AVX512F__)
HDFAST_INLINE Vf load(const float* p, Part part, float other = 0) {
  return _mm512_mask_loadu_ps(splat(other), __mmask16((1u << part.n) - 1), p);
}
HDFAST_INLINE void store(float* p, Vf v, Part part) { _mm512_mask_storeu_ps(p, __mmask16((1u << part.n) - 1), v); }
HDFAST_INLINE Vf load(const bf16* p, Part part, float other = 0) {
  const __m256i raw = _mm256_maskz_loadu_epi16(__mmask16((1u << part.n) - 1), p);
  return keep(widen(bit_cast<Vh>(raw)), part, other);
}
HDFAST_INLINE void store(bf16* p, Vf v, Part part) {
  _mm256_mask_storeu_epi16(p, __mmask16((1u << part.n) - 1), bit_cast<__m256i>(narrow(v, bf16{})));
}
#elif defined(__AVX2__)
HDFAST_INLINE Vf load(const float* p, Part part, float other = 0) {
  const Vi mask = lane_numbers() < part.n;
  return mask ? Vf(_mm256_maskload_ps(p, __m256i(mask))) : splat(other);
}
HDFAST_INLINE void store(float* p, Vf v, Part part) { _mm256_maskstore_ps(p, __m256i(lane_numbers() < part.n), v); }
#endif

// Stores that bypass the caches, for outputs larger than they are: a line is not read first only to be overwritten. The
// address must be a multiple of the stored size; fence() makes the thread's stores visible to others.
#if defined(__AVX512F__)
HDFAST_INLINE void stream(float* p, Vf v) { _mm512_stream_ps(p, v); }
HDFAST_INLINE void stream(bf16* p, Vf v) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bit_cast<__m256i>(narrow(v, bf16{})));
}
HDFAST_INLINE void fence() { _mm_sfence(); }
#elif defined(__AVX2__)
HDFAST_INLINE void stream(float* p, Vf v) { _mm256_stream_ps(p, v); }
HDFAST_INLINE void stream(bf16* p, Vf v) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), bit_cast<__m128i>(narrow(v, bf16{})));
}
HDFAST_INLINE void fence() { _mm_sfence(); }
#else
template <class T>
HDFAST_INLINE void stream(T* p, Vf v) {
  store(p, v, Whole{});
}
HDFAST_INLINE void fence() {}
#endif

constexpr int64_t far_bytes = 32 << 20;  // an output this large will have left the caches before it is read

// Whether rows of `width` elements starting at p can and should be streamed.
template <class T>
HDFAST_INLINE bool is_far(const T* p, int64_t rows, int64_t width) {
  return rows * width * int64_t(sizeof(T)) >= far_bytes && reinterpret_cast<uintptr_t>(p) % 64 == 0 && width % W == 0;
}

template <bool far, class T, class Lanes>
HDFAST_INLINE void put(T* p, Vf v, Lanes lanes) {
  if constexpr (far && std::is_same_v<Lanes, Whole>)
    stream(p, v);
  else
    store(p, v, lanes);
}

// Prefetches a row's cache lines. Otherwise long rows that are read, worked on and written wait for memory: the
// hardware predicts neither a new row nor what will be written.
template <class T>
HDFAST_INLINE void prefetch_to_read(const T* p, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(p + i, 0);
}
template <class T>
HDFAST_INLINE void prefetch_to_write(T* p, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(p + i, 1);
}

template <class F>
HDFAST_INLINE void with_bool(bool value, F f) {
  if (value)
    f(std::true_type{});
  else
    f(std::false_type{});
}

// f(i, lanes) for i = 0, W, 2W ... below n.
template <class F>
HDFAST_INLINE void for_lanes(int64_t n, F f) {
  int64_t i = 0;
  for (; i + W <= n; i += W) f(i, Whole{});
  if (i < n) f(i, Part{int(n - i)});
}

HDFAST_INLINE Vf max(Vf a, Vf b) { return a > b ? a : b; }
HDFAST_INLINE Vf min(Vf a, Vf b) { return a < b ? a : b; }
HDFAST_INLINE Vf abs(Vf v) { return bit_cast<Vf>(bit_cast<Vi>(v) & 0x7fffffff); }
HDFAST_INLINE Vf copysign(Vf size, Vf sign) {
  return bit_cast<Vf>((bit_cast<Vi>(size) & 0x7fffffff) | (bit_cast<Vi>(sign) & int32_t(0x80000000)));
}

HDFAST_INLINE Vf sqrt(Vf v) {
#if defined(__AVX512F__)
  return _mm512_sqrt_ps(v);
#elif defined(__AVX2__)
  return _mm256_sqrt_ps(v);
#else
  for (int i = 0; i < W; i++) v[i] = std::sqrt(v[i]);
  return v;
#endif
}

HDFAST_INLINE float sum(Vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(v);
#else
  float total[W];
  std::memcpy(total, &v, sizeof(v));
  for (int width = W / 2; width; width /= 2)
    for (int i = 0; i < width; i++) total[i] += total[i + width];
  return total[0];
#endif
}

HDFAST_INLINE double sum_in_double(Vf v) {
  typedef double Vd __attribute__((vector_size(8 * W)));
  const Vd wide = __builtin_convertvector(v, Vd);
  double total[W];
  std::memcpy(total, &wide, sizeof(wide));
  for (int width = W / 2; width; width /= 2)
    for (int i = 0; i < width; i++) total[i] += total[i + width];
  return total[0];
}

#if defined(__AVX512F__)
// Row k of 16 becomes column k; numbers of 4 bytes.
HDFAST_INLINE void transpose(__m512i (&a)[16]) {
  __m512i b[16];
  for (int k = 0; k < 16; k += 2) {
    b[k] = _mm512_unpacklo_epi32(a[k], a[k + 1]);
    b[k + 1] = _mm512_unpackhi_epi32(a[k], a[k + 1]);
  }
  for (int k = 0; k < 16; k += 4)
    for (int h = 0; h < 2; h++) {
      a[k + 2 * h] = _mm512_unpacklo_epi64(b[k + h], b[k + h + 2]);
      a[k + 2 * h + 1] = _mm512_unpackhi_epi64(b[k + h], b[k + h + 2]);
    }
  for (int k = 0; k < 4; k++) {  // a[4 r + k] has columns k, k + 4, k + 8 and k + 12 of four rows
    b[k] = _mm512_shuffle_i32x4(a[k], a[4 + k], 0x88), b[4 + k] = _mm512_shuffle_i32x4(a[k], a[4 + k], 0xdd);
    b[8 + k] = _mm512_shuffle_i32x4(a[8 + k], a[12 + k], 0x88);
    b[12 + k] = _mm512_shuffle_i32x4(a[8 + k], a[12 + k], 0xdd);
  }
  for (int k = 0; k < 4; k++) {
    a[k] = _mm512_shuffle_i32x4(b[k], b[8 + k], 0x88), a[8 + k] = _mm512_shuffle_i32x4(b[k], b[8 + k], 0xdd);
    a[4 + k] = _mm512_shuffle_i32x4(b[4 + k], b[12 + k], 0x88);
    a[12 + k] = _mm512_shuffle_i32x4(b[4 + k], b[12 + k], 0xdd);
  }
}
#endif

// One number for each of W vectors, that of v[k] in lane k: f(a, b) of all its lanes. This takes fewer operations than
// reducing one vector after the other, and no waiting.
template <class F>
HDFAST_INLINE Vf across(const Vf* v, F f) {
#if defined(__AVX2__)
  Vf quarter[4];  // partial results, four lanes for each of W / 4 rows
#if defined(__AVX512F__)
  for (int i = 0; i < 4; i++) {
    Vf half[2];
    for (int k = 0; k < 2; k++) {
      const Vf a = v[i + 4 * k], b = v[i + 4 * k + 8];
      half[k] = f(Vf(_mm512_shuffle_f32x4(a, b, 0x44)), Vf(_mm512_shuffle_f32x4(a, b, 0xee)));
    }
    quarter[i] = f(Vf(_mm512_shuffle_f32x4(half[0], half[1], 0x88)), Vf(_mm512_shuffle_f32x4(half[0], half[1], 0xdd)));
  }
#else
  for (int i = 0; i < 4; i++)
    quarter[i] = f(Vf(_mm256_permute2f128_ps(v[i], v[i + 4], 0x20)), Vf(_mm256_permute2f128_ps(v[i], v[i + 4], 0x31)));
#endif
  const auto pairs = [f](Vf a, Vf b, auto low, auto high) __attribute__((always_inline)) {
#if defined(__AVX512F__)
    return f(Vf(_mm512_shuffle_ps(a, b, low)), Vf(_mm512_shuffle_ps(a, b, high)));
#else
    return f(Vf(_mm256_shuffle_ps(a, b, low)), Vf(_mm256_shuffle_ps(a, b, high)));
#endif
  };
  using std::integral_constant;
  const integral_constant<int, 0x44> first{};
  const integral_constant<int, 0xee> second{};
  const Vf even = pairs(quarter[0], quarter[2], first, second), odd = pairs(quarter[1], quarter[3], first, second);
  const Vf mixed = pairs(even, odd, integral_constant<int, 0x88>{}, integral_constant<int, 0xdd>{});
#if defined(__AVX512F__)
  const Vi order = {0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15};
  return _mm512_permutexvar_ps(__m512i(order), mixed);
#else
  const Vi order = {0, 2, 1, 3, 4, 6, 5, 7};
  return _mm256_permutevar8x32_ps(mixed, __m256i(order));
#endif
#else
  // W is 4: the transposed vectors
  const Vf a = {v[0][0], v[1][0], v[2][0], v[3][0]}, b = {v[0][1], v[1][1], v[2][1], v[3][1]};
  const Vf c = {v[0][2], v[1][2], v[2][2], v[3][2]}, d = {v[0][3], v[1][3], v[2][3], v[3][3]};
  return f(f(a, b), f(c, d));
#endif
}
HDFAST_INLINE Vf sums(const Vf* v) {
  return across(v, [](Vf a, Vf b) { return a + b; });
}
HDFAST_INLINE Vf maxima(const Vf* v) {
  return across(v, [](Vf a, Vf b) { return max(a, b); });
}

HDFAST_INLINE float max(Vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(v);
#else
  float top = v[0];
  for (int i = 1; i < W; i++) top = v[i] > top ? v[i] : top;
  return top;
#endif
}

// Scratch memory of one call, aligned to a cache line, not initialised.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t n) : data_(static_cast<T*>(std::aligned_alloc(64, (n * sizeof(T) + 63) / 64 * 64 + 64))) {
    if (!data_) std::abort();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  operator T*() const { return data_; }

 private:
  T* data_;
};

// One thread for little work: waking the others costs as much as some ten thousand elements.
HDFAST_INLINE int threads_for(int64_t elements, int threads) { return elements < 1 << 14 ? 1 : threads; }

// Calls f with `number`, clamped to between one and four, as a compile-time constant.
template <class F>
HDFAST_INLINE void with_one_to_four(int64_t number, F f) {
  if (number >= 4)
    f(std::integral_constant<int, 4>{});
  else if (number == 3)
    f(std::integral_constant<int, 3>{});
  else if (number == 2)
    f(std::integral_constant<int, 2>{});
  else
    f(std::integral_constant<int, 1>{});
}

// Calls f with a null pointer of the element type: with_dtype(is_bf16, [&](auto* tag) { using T = ... }).
template <class F>
HDFAST_INLINE void with_dtype(bool is_bf16, F f) {
  if (is_bf16)
    f(static_cast<bf16*>(nullptr));
  else
    f(static_cast<float*>(nullptr));
}

}  // namespace
}  // namespace HDFAST_ISA
