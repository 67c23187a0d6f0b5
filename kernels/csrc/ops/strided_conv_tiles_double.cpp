#include <omp.h>

#include <algorithm>

#include "../amx.h"
#include "../ops.h"
#include "../simd.h"
#include "../strided_conv_double.h"

// The transposed convolution in bfloat16 with the processor's tiles. A block of images, or of rows of one image, is
// laid out three times, with each pixel replaced by its left neighbour, as it is, and replaced by its right one, always
// between rows of zeros or neighbours. Rows come before images there, so that the distances to a pixel's neighbours are
// the same everywhere.

namespace HDFAST_ISA {

#if defined(__AMX_BF16__)
namespace {

constexpr int64_t numbers_of_block = 1 << 16;  // three copies of a block fit in the L2 cache
constexpr int64_t depth_of_chunk = 512;        // 32 columns of weights of this depth fit in the L1 cache

struct Shape {
  int64_t height, width, C, O;  // of x; channels of both

  int64_t pixels() const { return std::max<int64_t>(wide, numbers_of_block / C); }
  int64_t rows() const { return std::clamp<int64_t>(pixels() / width, 1, height); }
  int64_t images() const { return std::max<int64_t>(1, pixels() / (height * width)); }
  int64_t copy() const { return (images() * (rows() + 2) * width + wide) * C; }  // the last tile overruns
};

struct Block {
  int64_t image, images, top, rows;
};

void lay_inputs(const Shape& shape, const bf16* x, const Block& block, bf16* out) {
  const int64_t line = shape.width * shape.C;
  for (int64_t across = 0; across < 3; across++) {
    bf16* to = out + across * shape.copy();
    for (int64_t row = -1; row <= block.rows; row++)
      for (int64_t n = 0; n < block.images; n++, to += line) {
        const int64_t y = block.top + row, before = across == 0 ? shape.C : 0, after = across == 2 ? shape.C : 0;
        if (y < 0 || y >= shape.height) {
          std::memset(to, 0, line * sizeof(bf16));
          continue;
        }
        const bf16* const from = x + ((block.image + n) * shape.height + y) * line;
        std::memset(to, 0, before * sizeof(bf16));
        std::memcpy(to + before, from + after, (line - before - after) * sizeof(bf16));
        std::memset(to + line - after, 0, after * sizeof(bf16));
      }
  }
}

template <bool far>
void double_block(const Shape& shape, const Block& block, const bf16* inputs, const DoubleWeights& at,
                  const uint32_t* weights, float* sums, bf16* y, const int64_t* to) {
  const int64_t count = block.images * block.rows * shape.width;
  const int64_t taps_of_chunk = std::clamp<int64_t>(depth_of_chunk / shape.C, 1, taps);
  for (int64_t phase = 0; phase < phases; phase++)
    for (int64_t p = 0; p < at.panels(); p++)
      for (int64_t first = 0; first < taps; first += taps_of_chunk)
        for (int64_t m = 0; m < count; m += wide) {
          float* const sum = sums + m / wide * wide * wide;
          if (first)
            load_sums(sum, 2 * tile * tile, tile * tile);
          else
            zero_sums();
          const int64_t end = std::min(first + taps_of_chunk, taps);
          for (int64_t tap = first; tap < end; tap++) {
            const int64_t down = phase / 2 + tap / 2, across = phase % 2 + tap % 2;
            const bf16* left =
                inputs + across * shape.copy() + (down * block.images * shape.width + m) * shape.C;
            const uint32_t* right = weights + at.at(phase, p, tap);
            for (int64_t c = 0; c < shape.C; c += depth, left += depth, right += tile * panel)
              add_products(left, tile * shape.C * 2, shape.C * 2, right, 64, panel * 4);
          }
          store_sums(sum, 2 * tile * tile, tile * tile);
          if (end < taps) continue;
          bf16* const out = y + (phase / 2 * 2 * shape.width + phase % 2) * shape.O + p * panel;
          for (int64_t i = 0; i < std::min(wide, count - m); i++) round_sums<far>(sum, i, out + to[m + i]);
        }
}

}  // namespace

bool strided_conv_tiles_double(const void* x, const void* weight, void* y, int64_t images, int64_t height,
                               int64_t width, int64_t channels_in, int64_t channels_out, int threads) {
  const Shape shape = {height, width, channels_in, channels_out};
  if (shape.C % depth || shape.O % wide) return false;
  const DoubleWeights at = {shape.C, shape.O};
  bf16* const out = static_cast<bf16*>(y);
  Scratch<uint32_t> weights(at.size());
  with_bool(is_far(out, 4 * images * height * width, shape.O), [&](auto far) {
#pragma omp parallel num_threads(threads)
    {
      at.lay(static_cast<const bf16*>(weight), weights);
      const int64_t most = (shape.images() * shape.rows() * width + wide - 1) / wide * wide;
      Scratch<bf16> inputs(3 * shape.copy());
      Scratch<float> sums(most * wide);
      Scratch<int64_t> to(most);
      const Tiles tiles;
      const int64_t team = omp_get_num_threads(), mine = omp_get_thread_num(), last = images * (mine + 1) / team;
      for (int64_t n = images * mine / team; n < last; n += shape.images())
        for (int64_t top = 0; top < height; top += shape.rows()) {
          const Block block = {n, std::min(shape.images(), last - n), top, std::min(shape.rows(), height - top)};
          lay_inputs(shape, static_cast<const bf16*>(x), block, inputs);
          int64_t m = 0;
          for (int64_t row = 0; row < block.rows; row++)
            for (int64_t image = 0; image < block.images; image++)
              for (int64_t column = 0; column < width; column++)
                to[m++] = (((n + image) * height + top + row) * 4 * width + 2 * column) * shape.O;
          double_block<far>(shape, block, inputs, at, weights, sums, out, to);
        }
      fence();
    }
  });
  return true;
}

#else

bool strided_conv_tiles_double(const void*, const void*, void*, int64_t, int64_t, int64_t, int64_t, int64_t, int) {
  return false;
}

#endif

}  // namespace HDFAST_ISA
