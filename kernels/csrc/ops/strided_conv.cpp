#include <omp.h>

#include <algorithm>

#include "../kernel_grad.h"
#include "../ops.h"
#include "../simd.h"

// The gradient of a 4 x 4 kernel, stride 2 and padding 1, between a large map and one of half its size: for each of the
// 16 places of the kernel, a matrix product over all pixels,
//
//     grad[s, l, i, j] = sum over n, y, x of small[n, y, x, s] * large[n, 2 y + i - 1, 2 x + j - 1, l].
//
// Libraries first transpose both maps. Here a block of pixels that fits in the caches is multiplied as it is, in tiles
// of 4 large channels x a few vectors of small channels, and the results are added to the thread's sums.

namespace HDFAST_ISA {
namespace {

constexpr int64_t pixels_of_block = 128;  // of the small map

struct Shape {
  int64_t height, width, large, small;  // of the small map; channels of both

  int64_t rows() const { return std::clamp<int64_t>(pixels_of_block / width, 1, height); }
  int64_t images() const { return std::max<int64_t>(1, pixels_of_block / (height * width)); }
};

struct Block {
  int64_t image, images, top, rows;  // rows of the small map

  // f(image of the block, row of the block, row of the large map) where row i of the kernel is inside the large map.
  template <class F>
  HDFAST_INLINE void each_row(const Shape& shape, int64_t i, F f) const {
    for (int64_t n = 0; n < images; n++)
      for (int64_t r = 0; r < rows; r++) {
        const int64_t y = 2 * (top + r) + i - 1;
        if (y >= 0 && y < 2 * shape.height) f(n, r, y);
      }
  }
};

// float: multiplies the maps in place.
class Direct {
 public:
  explicit Direct(const Shape& shape) : shape_(shape) {}

  void take(const float* large, const float* small, const Block& block) {
    large_ = large, small_ = small, block_ = block;
  }

  template <int K>
  HDFAST_INLINE void add(Vf (&sums)[tall][K], int64_t i, int64_t j, int64_t l, int64_t s) const {
    const int64_t first = j == 0, last = shape_.width - (j == 3);
    block_.each_row(shape_, i, [&](int64_t n, int64_t r, int64_t y) {
      const int64_t image = block_.image + n, row = image * shape_.height + block_.top + r;
      const float* a = large_ + ((image * 2 * shape_.height + y) * 2 * shape_.width + j - 1) * shape_.large + l;
      const float* b = small_ + row * shape_.width * shape_.small + s;
      for (int64_t x = first; x < last; x++) {
        Vf right[K];
        for (int k = 0; k < K; k++) right[k] = load(b + x * shape_.small + k * W, Whole{});
        for (int t = 0; t < tall; t++)
          for (int k = 0; k < K; k++) sums[t][k] += a[2 * x * shape_.large + t] * right[k];
      }
    });
  }

 private:
  const Shape shape_;
  const float *large_, *small_;
  Block block_;
};

#if defined(__AVX512BF16__)
// bfloat16: an instruction multiplies pairs of neighbours, so the numbers of two pixels are interleaved.
class Pairs {
 public:
  explicit Pairs(const Shape& shape)
      : shape_(shape),
        pairs_((shape.width + 1) / 2),
        reach_(2 * shape.rows() + 2),
        small_(shape.images() * shape.rows() * pairs_ * shape.small),
        large_(4 * shape.images() * reach_ * pairs_ * shape.large) {}

  void take(const bf16* large, const bf16* small, const Block& block) {
    block_ = block;
    const int64_t width = shape_.width;
    for (int64_t n = 0; n < block.images; n++) {
      for (int64_t r = 0; r < block.rows; r++) {
        const bf16* row = small + ((block.image + n) * shape_.height + block.top + r) * width * shape_.small;
        for (int64_t p = 0; p < pairs_; p++)
          for (int64_t s = 0; s < shape_.small; s += broad * W)
            lay_pairs(pixel(row, 2 * p, width, shape_.small) + s,
                      2 * p + 1 < width ? pixel(row, 2 * p + 1, width, shape_.small) + s : nullptr,
                      small_at(n, r, p, s), std::min<int64_t>(broad * W, shape_.small - s));
      }
      for (int64_t k = 0; k < 2 * block.rows + 2; k++) {
        const int64_t y = 2 * block.top + k - 1;
        if (y < 0 || y >= 2 * shape_.height) continue;
        const bf16* row = large + ((block.image + n) * 2 * shape_.height + y) * 2 * width * shape_.large;
        for (int64_t j = 0; j < 4; j++)
          for (int64_t p = 0; p < pairs_; p++) {
            const int64_t x = 4 * p + j - 1;
            lay_pairs(pixel(row, x, 2 * width, shape_.large), pixel(row, x + 2, 2 * width, shape_.large),
                 large_at(j, n, k, p), shape_.large);
          }
      }
    }
  }

  template <int K>
  HDFAST_INLINE void add(Vf (&sums)[tall][K], int64_t i, int64_t j, int64_t l, int64_t s) const {
    block_.each_row(shape_, i, [&](int64_t n, int64_t r, int64_t) {
      const uint32_t *a = large_at(j, n, 2 * r + i, 0) + l, *b = small_at(n, r, 0, s);
      for (int64_t p = 0; p < pairs_; p++, a += shape_.large, b += K * W) {
        __m512bh right[K];
        for (int k = 0; k < K; k++) right[k] = bit_cast<__m512bh>(_mm512_load_si512(b + k * W));
        for (int t = 0; t < tall; t++) {
          const __m512bh left = bit_cast<__m512bh>(_mm512_set1_epi32(int32_t(a[t])));
          for (int k = 0; k < K; k++) sums[t][k] = _mm512_dpbf16_ps(sums[t][k], left, right[k]);
        }
      }
    });
  }

 private:
  // Null outside the row.
  static const bf16* pixel(const bf16* row, int64_t x, int64_t width, int64_t channels) {
    return x >= 0 && x < width ? row + x * channels : nullptr;
  }

  // Small channels [s, s + broad * W) of all pixels are stored together.
  uint32_t* small_at(int64_t n, int64_t r, int64_t p, int64_t s) const {
    const int64_t wide = std::min<int64_t>(broad * W, shape_.small - s);
    return small_ + s * shape_.images() * shape_.rows() * pairs_ + ((n * shape_.rows() + r) * pairs_ + p) * wide;
  }
  uint32_t* large_at(int64_t j, int64_t n, int64_t k, int64_t p) const {
    return large_ + (((j * shape_.images() + n) * reach_ + k) * pairs_ + p) * shape_.large;
  }

  const Shape shape_;
  const int64_t pairs_, reach_;
  Block block_;
  Scratch<uint32_t> small_, large_;
};
#endif

template <class Source, class T>
void weight_grad(const T* large, const T* small, float* grad, int64_t images, const Shape& shape, int threads) {
  const int64_t size = 16 * shape.large * shape.small;
  Scratch<float> sums(size * threads);
#pragma omp parallel num_threads(threads)
  {
    const int team = omp_get_num_threads(), mine = omp_get_thread_num();
    float* const total = sums + size * mine;
    std::fill_n(total, size, 0.f);
    Source source(shape);
    const int64_t last = images * (mine + 1) / team;
    for (int64_t n = images * mine / team; n < last; n += shape.images())
      for (int64_t top = 0; top < shape.height; top += shape.rows()) {
        source.take(large, small,
                    {n, std::min(shape.images(), last - n), top, std::min(shape.rows(), shape.height - top)});
        for (int64_t place = 0; place < 16; place++)
          each_tile(shape.large, shape.small, [&](int64_t l, int64_t s, auto vectors) {
            constexpr int K = vectors;
            add_to_tile<K>(total + (place * shape.large + l) * shape.small + s, shape.small, [&](Vf(&tile)[tall][K]) {
              source.template add<K>(tile, place / 4, place % 4, l, s);
            });
          });
      }
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t l = 0; l < shape.large; l++)
      for (int64_t s = 0; s < shape.small; s += W) {
        Vf kernel[16];
        for (int64_t place = 0; place < 16; place++) {
          kernel[place] = Vf{};
          for (int t = 0; t < team; t++)
            kernel[place] += load(sums + size * t + (place * shape.large + l) * shape.small + s, Whole{});
        }
        store_kernels(grad, shape.large, s, l, kernel);
      }
  }
}

}  // namespace

bool strided_conv_weight_grad(const void* large, const void* small, float* grad, int64_t images, int64_t height,
                              int64_t width, int64_t large_channels, int64_t small_channels, bool is_bf16,
                              int threads) {
  const Shape shape = {height, width, large_channels, small_channels};
  if (large_channels % 16 || small_channels % 16) return false;
  threads = std::min<int64_t>(threads_for(images * height * width * large_channels, threads),
                              std::max<int64_t>(1, images / shape.images()));
  if (!is_bf16) {
    const float *of_large = static_cast<const float*>(large), *of_small = static_cast<const float*>(small);
    if (!strided_conv_winograd_grad(of_large, of_small, grad, images, height, width, large_channels, small_channels,
                                    threads))
      weight_grad<Direct>(of_large, of_small, grad, images, shape, threads);
    return true;
  }
#if defined(__AMX_BF16__)
  return strided_conv_tiles_grad(large, small, grad, images, height, width, large_channels, small_channels, threads);
#elif defined(__AVX512BF16__)
  weight_grad<Pairs>(static_cast<const bf16*>(large), static_cast<const bf16*>(small), grad, images, shape, threads);
  return true;
#else
  return false;
#endif
}

}  // namespace HDFAST_ISA
