#include <omp.h>

#include <algorithm>

#include "../amx.h"
#include "../ops.h"
#include "../simd.h"

// The gradient of a 4 x 4 kernel, stride 2 and padding 1 (strided_conv.cpp) in bfloat16 with the processor's tiles: for
// each of the 16 places (i, j) of the kernel, a product of matrices over all pixels,
//
//     grad[s, l, i, j] = sum over y, n, x of small[n, y, x, s] * large[n, 2 y + i - 1, 2 x + j - 1, l].
//
// A block of images, or of rows of one image, is laid out so that corresponding pixels of both maps follow each other
// at constant distances: the small map once, with its channels as rows; the large map as pairs of pixels, for one
// parity of its rows and the columns that j covers, which serves two values of i. Rows come before images there, so
// that the distance to the next row is the same everywhere.

namespace HDFAST_ISA {

#if defined(__AMX_BF16__)
namespace {

constexpr int64_t pixels_of_block = 512;  // 32 channels of that many pixels of the small map fit in the L1 cache

struct Shape {
  int64_t height, width, large, small;  // of the small map; channels of both

  int64_t rows() const { return std::clamp<int64_t>(pixels_of_block / width, 1, height); }
  int64_t images() const { return std::max<int64_t>(1, pixels_of_block / (height * width)); }
  int64_t pairs() const { return (width + 1) / 2; }
};

struct Block {
  int64_t image, images, top, rows;  // rows of the small map
};

class Layout {
 public:
  explicit Layout(const Shape& shape)
      : shape_(shape),
        steps_((shape.images() * shape.rows() * shape.pairs() + tile - 1) / tile),
        small_(shape.small * steps_ * depth),
        large_((steps_ * tile + shape.images() * shape.pairs()) * shape.large) {}

  int64_t steps(const Block& block) const { return (block.images * block.rows * shape_.pairs() + tile - 1) / tile; }

  // Tiles (16 channels of the small map, step): a row per channel, of 32 pixels.
  const uint32_t* small_at(int64_t s) const { return small_ + s * steps_ * tile; }
  // Rows of pairs of pixels.
  const uint32_t* large_at(const Block& block, int64_t i) const {
    return large_ + i / 2 * block.images * shape_.pairs() * shape_.large;
  }

  void lay_small(const bf16* small, const Block& block) {
    const int64_t steps = this->steps(block), count = block.images * block.rows * shape_.pairs();
    for (int64_t step = 0; step < steps; step++) {
      const bf16* pixels[depth];
      for (int64_t k = 0; k < tile; k++) {
        const int64_t q = step * tile + k, x = q % shape_.pairs() * 2, n = q / shape_.pairs() % block.images;
        const int64_t y = q / shape_.pairs() / block.images;
        const bf16* const pixel =
            small + (((block.image + n) * shape_.height + block.top + y) * shape_.width + x) * shape_.small;
        pixels[2 * k] = q < count ? pixel : nullptr;
        pixels[2 * k + 1] = q < count && x + 1 < shape_.width ? pixel + shape_.small : nullptr;
      }
      for (int64_t s = 0; s < shape_.small; s += tile)
        lay_left(pixels, s, small_ + (s * steps_ + step * tile) * tile);
    }
  }

  // Lays out columns 2 x + j - 1 of rows 2 y + parity - 1.
  void lay_large(const bf16* large, const Block& block, int64_t parity, int64_t j) {
    const int64_t width = 2 * shape_.width, pairs = shape_.pairs();
    uint32_t* out = large_;
    for (int64_t k = 0; k <= block.rows; k++) {
      const int64_t y = 2 * (block.top + k) + parity - 1;
      for (int64_t n = 0; n < block.images; n++) {
        const bf16* const row = large + ((block.image + n) * 2 * shape_.height + y) * width * shape_.large;
        const bool inside = y >= 0 && y < 2 * shape_.height;
        for (int64_t p = 0; p < pairs; p++, out += shape_.large) {
          const int64_t x = 4 * p + j - 1;
          lay_right(inside && x >= 0 && x < width ? row + x * shape_.large : nullptr,
                    inside && x + 2 < width ? row + (x + 2) * shape_.large : nullptr, out, shape_.large);
        }
      }
    }
    // What the last step reads beyond the block is multiplied by zeros, so it must be finite.
    const int64_t end = steps(block) * tile + block.images * pairs;
    std::fill(out, large_ + end * shape_.large, 0);
  }

 private:
  const Shape shape_;
  const int64_t steps_;
  Scratch<uint32_t> small_, large_;
};

}  // namespace

bool strided_conv_tiles_grad(const void* large, const void* small, float* grad, int64_t images, int64_t height,
                             int64_t width, int64_t large_channels, int64_t small_channels, int threads) {
  const Shape shape = {height, width, large_channels, small_channels};
  if (large_channels % wide || small_channels % wide) return false;
  const int64_t size = 16 * shape.large * shape.small, area = tile * tile;
  // sums (thread, place, 16 of S, 16 of L, tile)
  const auto sums_at = [&](int64_t place, int64_t s, int64_t l) {
    return ((place * shape.small + s) * shape.large + l * tile);
  };
  Scratch<float> sums(size * threads);
#pragma omp parallel num_threads(threads)
  {
    const int team = omp_get_num_threads(), mine = omp_get_thread_num();
    float* const total = sums + size * mine;
    std::fill_n(total, size, 0.f);
    Layout layout(shape);
    const Tiles tiles;
    const int64_t last = images * (mine + 1) / team;
    for (int64_t n = images * mine / team; n < last; n += shape.images())
      for (int64_t top = 0; top < shape.height; top += shape.rows()) {
        const Block block = {n, std::min(shape.images(), last - n), top, std::min(shape.rows(), shape.height - top)};
        const int64_t steps = layout.steps(block);
        layout.lay_small(static_cast<const bf16*>(small), block);
        for (int64_t parity = 0; parity < 2; parity++)
          for (int64_t j = 0; j < 4; j++) {
            layout.lay_large(static_cast<const bf16*>(large), block, parity, j);
            for (int64_t s = 0; s < shape.small; s += wide)
              for (int64_t i = parity; i < 4; i += 2)
                for (int64_t l = 0; l < shape.large; l += wide) {
                  float* const sum = total + sums_at(4 * i + j, s, l);
                  const uint32_t *a = layout.small_at(s), *b = layout.large_at(block, i) + l;
                  const int64_t down = (layout.small_at(tile) - layout.small_at(0)) * 4;
                  load_sums(sum, tile * shape.large, area);
                  for (int64_t step = 0; step < steps; step++, a += area, b += tile * shape.large)
                    add_products(a, down, 64, b, 64, shape.large * 4);
                  store_sums(sum, tile * shape.large, area);
                }
          }
      }
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t s = 0; s < shape.small; s++)
      for (int64_t l = 0; l < shape.large; l += wide) {
        float kernels[wide][16];
        for (int64_t place = 0; place < 16; place++) {
          float all[wide];
          for (int64_t k = 0; k < wide; k += W) {
            Vf sum = {};
            for (int t = 0; t < team; t++)
              sum += load(sums + size * t + sums_at(place, s / tile * tile, l + k) + s % tile * tile, Whole{});
            store(all + k, sum, Whole{});
          }
          for (int64_t c = 0; c < wide; c++) kernels[c][place] = all[column_at(c)];
        }
        std::memcpy(grad + (s * shape.large + l) * 16, kernels, sizeof(kernels));
      }
  }
  return true;
}

#else

bool strided_conv_tiles_grad(const void*, const void*, float*, int64_t, int64_t, int64_t, int64_t, int64_t, int) {
  return false;
}

#endif

}  // namespace HDFAST_ISA
