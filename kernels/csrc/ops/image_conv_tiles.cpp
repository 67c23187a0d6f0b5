#include <omp.h>

#include <algorithm>

#include "../amx.h"
#include "../gemm_tile.h"
#include "../image_conv.h"
#include "../ops.h"
#include "../simd.h"

// The convolution of images of few channels, see image_conv.h, in bfloat16 with the processor's tiles. What two rows of
// the kernel cover is a line of 64 bytes: 2 x 16 numbers, the last of which belong to another pixel. A pixel of the map
// takes just two lines, `width` lines apart. An image's lines are in the order of the pixels of its map.

namespace HDFAST_ISA {

#if defined(__AMX_BF16__)
namespace {

constexpr int64_t half = depth / 2;  // numbers in a line for a row of the kernel; the first 4 C count
constexpr int64_t sums_size = wide * wide;

bool fits(const Shape& shape) { return shape.depth() <= half && shape.S % wide == 0; }

class Lines {
 public:
  explicit Lines(const Shape& shape)
      : shape_(shape), image_(shape), lines_(((shape.height + 1) * shape.width + wide) * depth) {}

  void take(const bf16* image) {
    image_.take(image);
    bf16* out = lines_;
    for (int64_t y = 0; y <= shape_.height; y++)
      for (int64_t x = 0; x < shape_.width; x++, out += depth)
        for (int64_t i = 0; i < 2; i++)
          std::memcpy(out + i * half, image_.row(2 * y + i) + 2 * x * shape_.C, half * sizeof(bf16));
  }
  // The line that rows 2 h and 2 h + 1 of the kernel cover at pixel q of the map.
  const bf16* at(int64_t h, int64_t q) const { return lines_ + (h * shape_.width + q) * depth; }

 private:
  const Shape& shape_;
  Bordered<bf16> image_;
  Scratch<bf16> lines_;
};

// The position in a kernel (C, 4, 4) that number k of line h belongs to, or -1.
int64_t place(const Shape& shape, int64_t h, int64_t k) {
  const int64_t i = 2 * h + k / half, j = k % half / shape.C, c = k % half % shape.C;
  return j < 4 ? c * 16 + i * 4 + j : -1;
}

// Lays out weight (S, C, 4, 4) as right tiles (block of 32 s, h, pair of k, s).
void lay_weight(const Shape& shape, const float* weight, uint32_t* out) {
  const auto number = [&](int64_t s, int64_t h, int64_t k) -> uint32_t {
    const int64_t at = place(shape, h, k);
    return at < 0 ? 0 : bit_cast<uint32_t>(weight[s * shape.C * 16 + at]) >> 16;
  };
  for (int64_t s = 0; s < shape.S; s += wide)
    for (int64_t h = 0; h < 2; h++)
      for (int64_t k = 0; k < depth; k += 2)
        for (int64_t n = 0; n < wide; n++) *out++ = number(s + n, h, k) | number(s + n, h, k + 1) << 16;
}

template <bool far>
void halve(const Shape& shape, const Lines& lines, const uint32_t* weight, bf16* map) {
  const int64_t pixels = shape.height * shape.width, of_weight = tile * wide;
  alignas(64) float sums[sums_size];
  for (int64_t q = 0; q < pixels; q += wide)
    for (int64_t s = 0; s < shape.S; s += wide) {
      zero_sums();
      for (int64_t h = 0; h < 2; h++)
        add_products(lines.at(h, q), tile * 64, 64, weight + (s / wide * 2 + h) * of_weight, 64, wide * 4);
      store_sums(sums, 2 * tile * tile, tile * tile);
      for (int64_t m = 0; m < std::min(wide, pixels - q); m++)
        round_sums<far>(sums, m, map + (q + m) * shape.S + s);
    }
}

// Each image is summed separately, because a sum's error grows with its length.
class Grad {
 public:
  // sums (block of 32 s, the last block being that of the ones; h; 2 x 2 tiles)
  explicit Grad(const Shape& shape)
      : shape_(shape),
        steps_((shape.height * shape.width + depth - 1) / depth),
        left_(shape.S * steps_ * tile),
        right_(2 * steps_ * tile * wide) {
    for (int64_t k = 0; k < tile; k++) ones_[k] = 0x3f803f80;
  }
  static int64_t size(const Shape& shape) { return (shape.S / wide + 1) * 2 * sums_size; }

  // `end` is the end of all maps: the next map is prefetched meanwhile.
  void add(const Lines& lines, const bf16* map, const bf16* end, bool pixels_too, float* total) {
    const int64_t pixels = shape_.height * shape_.width, area = tile * tile;
    const auto at = [&](const bf16* first, int64_t distance, int64_t q) {
      return q < pixels ? first + q * distance : nullptr;
    };
    for (int64_t step = 0; step < steps_; step++) {
      const bf16* rows[depth];
      for (int64_t k = 0; k < depth; k++) rows[k] = at(map, shape_.S, step * depth + k);
      for (int64_t s = 0; s < shape_.S; s += tile) lay_left(rows, s, left_ + (s * steps_ + step * tile) * tile);
    }
    uint32_t* out = right_;
    for (int64_t h = 0; h < 2; h++)
      for (int64_t q = 0; q < steps_ * depth; q += 2, out += wide)
        lay_right(at(lines.at(h, 0), depth, q), at(lines.at(h, 0), depth, q + 1), out, wide);
    const int64_t last = shape_.S + (pixels_too ? wide : 0);
    const bf16* const next = map + shape_.of_map();
    Prefetcher<bf16> ahead(next, std::min(next + shape_.of_map(), end), last / wide * 2 * steps_);
    for (int64_t s = 0; s < last; s += wide)
      for (int64_t h = 0; h < 2; h++, total += sums_size) {
        const bool weights = s < shape_.S;
        const uint32_t *a = weights ? left_ + s * steps_ * tile : ones_, *b = right_ + h * steps_ * tile * wide;
        zero_sums();
        for (int64_t step = 0; step < steps_; step++, a += weights ? area : 0, b += tile * wide) {
          add_products(a, weights ? steps_ * area * 4 : 0, 64, b, 64, wide * 4);
          ahead.advance();
        }
        alignas(64) float sums[sums_size];
        store_sums(sums, 2 * area, area);
        for (int64_t i = 0; i < sums_size; i += W)
          store(total + i, load(total + i, Whole{}) + load(sums + i, Whole{}), Whole{});
      }
  }

  // The sum of channel s times number k of line h; s = S stands for the ones.
  static float sum(const float* total, int64_t s, int64_t h, int64_t k) {
    const int64_t column = column_at(k);
    return total[(s / wide * 2 + h) * sums_size + (s % wide / tile * 2 + column / tile) * tile * tile +
                 s % tile * tile + column % tile];
  }

 private:
  const Shape& shape_;
  const int64_t steps_;
  Scratch<uint32_t> left_, right_;
  alignas(64) uint32_t ones_[tile * tile] = {};
};

}  // namespace

bool image_conv_tiles(const void* images, const float* weight, void* map, int64_t count, int64_t height, int64_t width,
                      int64_t channels, int64_t map_channels, int threads) {
  const Shape shape = {count, height, width, channels, map_channels};
  if (!fits(shape)) return false;
  const bf16* const from = static_cast<const bf16*>(images);
  bf16* const to = static_cast<bf16*>(map);
  Scratch<uint32_t> laid(shape.S * depth);
  lay_weight(shape, weight, laid);
  with_bool(is_far(to, count * height * width, shape.S), [&](auto far) {
#pragma omp parallel num_threads(threads)
    {
      Lines lines(shape);
      const Tiles tiles;
#pragma omp for schedule(static)
      for (int64_t n = 0; n < count; n++) {
        lines.take(from + n * shape.of_image());
        halve<far>(shape, lines, laid, to + n * shape.of_map());
      }
      fence();
    }
  });
  return true;
}

bool image_conv_tiles_grad(const void* images, const void* map, float* grad, float* sums, int64_t count, int64_t height,
                           int64_t width, int64_t channels, int64_t map_channels, int threads) {
  const Shape shape = {count, height, width, channels, map_channels};
  if (!fits(shape)) return false;
  const int64_t size = Grad::size(shape);
  const bf16* const maps = static_cast<const bf16*>(map);
  Scratch<float> totals(size * threads);
  std::fill_n(static_cast<float*>(totals), size * threads, 0.f);
#pragma omp parallel num_threads(threads)
  {
    Lines lines(shape);
    Grad of_thread(shape);
    const Tiles tiles;
#pragma omp for schedule(static)
    for (int64_t n = 0; n < count; n++) {
      lines.take(static_cast<const bf16*>(images) + n * shape.of_image());
      of_thread.add(lines, maps + n * shape.of_map(), maps + count * shape.of_map(), sums,
                    totals + size * omp_get_thread_num());
    }
  }
  for (int other = 1; other < threads; other++)
    for (int64_t i = 0; i < size; i++) totals[i] += totals[size * other + i];
  if (sums) std::fill_n(sums, channels, 0.f);
  for (int64_t h = 0; h < 2; h++)
    for (int64_t k = 0; k < depth; k++) {
      const int64_t at = place(shape, h, k);
      if (at < 0) continue;
      for (int64_t s = 0; s < shape.S; s++) grad[s * channels * 16 + at] = Grad::sum(totals, s, h, k);
      const int64_t i = at % 16 / 4, j = at % 4;  // the middle of the kernel covers every pixel once
      if (sums && (i == 1 || i == 2) && (j == 1 || j == 2)) sums[at / 16] += Grad::sum(totals, shape.S, h, k);
    }
  return true;
}

#else

bool image_conv_tiles(const void*, const float*, void*, int64_t, int64_t, int64_t, int64_t, int64_t, int) {
  return false;
}
bool image_conv_tiles_grad(const void*, const void*, float*, float*, int64_t, int64_t, int64_t, int64_t, int64_t, int) {
  return false;
}

#endif

}  // namespace HDFAST_ISA
