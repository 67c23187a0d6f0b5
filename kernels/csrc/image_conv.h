// Shared by the convolution of kernel 4, stride 2 and padding 1 between images of few channels and a map of half their
// size, and the gradient of its kernel. Convolution libraries work on blocks of 16 channels, but an image has 3.
// However, the 4 pixels of an image that a row of the kernel covers are 4 C numbers side by side:
//
//     map[y, x, s] = sum over i, k of rows[2 y + i][2 x C + k] * weight[i, k, s]        i < 4, k < 4 C
//
// where `rows` is the image with a border of zeros.
//
// Axes: y, x pixels of the map; i row of the kernel, k its column and channel; s channels of the map.
#pragma once

#include <cstring>
#include <vector>

#include "simd.h"

namespace HDFAST_ISA {
namespace {

struct Shape {
  int64_t images, height, width, C, S;  // of the map; channels of image and map

  int64_t depth() const { return 4 * C; }
  int64_t row() const { return (2 * width + 2) * C; }
  int64_t of_image() const { return 4 * height * width * C; }
  int64_t of_map() const { return height * width * S; }
};

// An image with a border of zeros, as numbers of type T.
template <class T>
class Bordered {
 public:
  explicit Bordered(const Shape& shape) : shape_(shape), rows_((2 * shape.height + 2) * shape.row() + W) {}

  template <class From>
  void take(const From* image) {
    const int64_t length = 2 * shape_.width * shape_.C;
    for (int64_t r = 1; r <= 2 * shape_.height; r++, image += length) {
      T* const to = rows_.data() + r * shape_.row() + shape_.C;
      for_lanes(length, [&](int64_t i, auto lanes) { store(to + i, load(image + i, lanes), lanes); });
    }
  }

  const T* row(int64_t r) const { return rows_.data() + r * shape_.row(); }

 private:
  const Shape& shape_;
  std::vector<T> rows_;  // initially zeros; padded so that vectors may start anywhere in the image
};

struct Singles {
  using Number = float;
  static constexpr int64_t taken = 1;  // numbers of a row that one multiplication takes

  static float pack(const float* number, int64_t) { return *number; }
  static HDFAST_INLINE Vf spread(const float* number) { return splat(*number); }
  static HDFAST_INLINE Vf add(Vf sum, Vf left, Vf right) { return sum + left * right; }
};

#if defined(__AVX512BF16__)
struct Pairs {
  using Number = bf16;
  static constexpr int64_t taken = 2;

  static float pack(const float* numbers, int64_t distance) {
    const uint32_t first = bit_cast<uint32_t>(*numbers), second = bit_cast<uint32_t>(numbers[distance]);
    return bit_cast<float>(first >> 16 | (second & 0xffff0000));
  }
  static HDFAST_INLINE Vf spread(const bf16* numbers) {
    int32_t pair;
    std::memcpy(&pair, numbers, sizeof(pair));
    return bit_cast<Vf>(_mm512_set1_epi32(pair));
  }
  static HDFAST_INLINE Vf add(Vf sum, Vf left, Vf right) {
    return _mm512_dpbf16_ps(sum, bit_cast<__m512bh>(left), bit_cast<__m512bh>(right));
  }
};
#endif

// f(s, V) for tiles of V vectors of channels starting at s, V at most `vectors`.
template <int vectors, class F>
HDFAST_INLINE void each_vectors(int64_t S, F f) {
  int64_t s = 0;
  for (; s + vectors * W <= S; s += vectors * W) f(s, std::integral_constant<int, vectors>{});
  for (; s < S; s += W) f(s, std::integral_constant<int, 1>{});
}

}  // namespace
}  // namespace HDFAST_ISA
