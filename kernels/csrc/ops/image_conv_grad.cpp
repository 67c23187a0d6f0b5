#include <omp.h>

#include <algorithm>

#include "../gemm_tile.h"
#include "../image_conv.h"
#include "../kernel_grad.h"
#include "../ops.h"
#include "../simd.h"

// The gradient of the kernel that convolves images of few channels, see image_conv.h. In bfloat16 an instruction takes
// two neighbouring pixels of the map.

namespace HDFAST_ISA {
namespace {

constexpr int vectors = W == 16 ? 2 : 1;  // of the map's channels, in a tile with up to 12 numbers of the image

// The gradient of a row of the kernel is the sum over y and x of left[y][x][k] * map[y][x][s]; `left` is what the row
// covers of the image.
struct Factors {
  const float* left;
  int64_t row, step;  // distances in `left` from one y to the next, from one x to the next
  int64_t pixels;     // pixels in a row of the map, or pairs of them
};

class OfSingles {
 public:
  using Of = Singles;

  explicit OfSingles(const Shape& shape) : shape_(shape) {}

  template <class T>
  const T* take(const Bordered<float>& image, const T* map) {
    image_ = &image;
    return map;
  }
  Factors of_row(int64_t i) const { return {image_->row(i), 2 * shape_.row(), 2 * shape_.C, shape_.width}; }

 private:
  const Shape& shape_;
  const Bordered<float>* image_;
};

#if defined(__AVX512BF16__)
class OfPairs {
 public:
  using Of = Pairs;

  explicit OfPairs(const Shape& shape)
      : shape_(shape), pairs_((shape.width + 1) / 2), slot_((shape.depth() + W - 1) / W * W),
        image_((2 * shape.height + 2) * pairs_ * slot_), map_(shape.height * pairs_ * shape.S) {}

  const float* take(const Bordered<bf16>& image, const bf16* map) {
    uint32_t* out = image_;
    for (int64_t r = 0; r < 2 * shape_.height + 2; r++)
      for (int64_t p = 0; p < pairs_; p++, out += slot_) {
        const bf16* const from = image.row(r) + 4 * p * shape_.C;
        lay_pairs(from, 2 * p + 1 < shape_.width ? from + 2 * shape_.C : nullptr, out, slot_);
      }
    out = map_;
    for (int64_t y = 0; y < shape_.height; y++)
      for (int64_t x = 0; x < shape_.width; x += 2, out += shape_.S) {
        const bf16* const from = map + (y * shape_.width + x) * shape_.S;
        lay_pairs(from, x + 1 < shape_.width ? from + shape_.S : nullptr, out, shape_.S);
      }
    return reinterpret_cast<const float*>(static_cast<uint32_t*>(map_));
  }
  Factors of_row(int64_t i) const {
    const uint32_t* const row = image_ + i * pairs_ * slot_;
    return {reinterpret_cast<const float*>(row), 2 * pairs_ * slot_, slot_, pairs_};
  }

 private:
  const Shape& shape_;
  const int64_t pairs_, slot_;
  Scratch<uint32_t> image_, map_;
};
#endif

// Adds the gradient of R numbers of a row of the kernel, for V vectors of channels.
template <class Of, int R, int V, class T>
void grad_tile(const Shape& shape, const Factors& factors, int64_t k, const T* right, float* total) {
  Vf sums[R][V] = {};
  for (int64_t y = 0; y < shape.height; y++) {
    const float* left = factors.left + y * factors.row + k;
    for (int64_t x = 0; x < factors.pixels; x++, left += factors.step, right += shape.S) {
      Vf row[V];
      for (int v = 0; v < V; v++) row[v] = load(right + v * W, Whole{});
#pragma GCC unroll 12
      for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) sums[r][v] = Of::add(sums[r][v], splat(left[r]), row[v]);
    }
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) {
      float* const at = total + (k + r) * shape.S + v * W;
      store(at, load(at, Whole{}) + sums[r][v], Whole{});
    }
}

template <class Source, class T, class F>
void add_grad(const Shape& shape, const Source& source, const T* map, float* total, F meanwhile) {
  for (int64_t i = 0; i < 4; i++, total += shape.depth() * shape.S)
    each_vectors<vectors>(shape.S, [&](int64_t s, auto count) {
      constexpr int V = count;
      meanwhile();
      const Factors factors = source.of_row(i);
      int64_t k = 0;
      const auto add = [&](auto numbers) {
        for (; k + numbers <= shape.depth(); k += numbers)
          grad_tile<typename Source::Of, numbers, V>(shape, factors, k, map + s, total + s);
      };
      if (shape.depth() % 12 == 0) add(std::integral_constant<int, 12>{});
      add(std::integral_constant<int, 8>{});
      add(std::integral_constant<int, 4>{});
    });
}

// Adds an image's pixels to `sums`. The rows are added up first, so that the sums' error grows slowly.
template <class T>
void add_pixels(const Shape& shape, const Bordered<T>& image, float* columns, float* sums) {
  std::fill_n(columns, shape.row(), 0.f);
  for (int64_t r = 1; r <= 2 * shape.height; r++)
    for_lanes(shape.row(), [&](int64_t i, auto lanes) {
      store(columns + i, load(columns + i, lanes) + load(image.row(r) + i, lanes), lanes);
    });
  for (int64_t c = 0; c < shape.C; c++) {
    float sum = 0;
    for (int64_t i = c; i < shape.row(); i += shape.C) sum += columns[i];
    sums[c] += sum;
  }
}

template <class Source, class T>
void weight_grad(const Shape& shape, const T* images, const T* maps, float* grad, float* sums, int threads) {
  const int64_t size = 4 * shape.depth() * shape.S, slot = size + shape.C;
  Scratch<float> totals(slot * threads);
  int64_t team = 1;
#pragma omp parallel num_threads(threads)
  {
    const int64_t mine = omp_get_thread_num(), all = omp_get_num_threads();
#pragma omp single
    team = all;
    const int64_t last = shape.images * (mine + 1) / all;
    float* const total = totals + slot * mine;
    std::fill_n(total, slot, 0.f);
    Bordered<typename Source::Of::Number> image(shape);
    Source source(shape);
    Scratch<float> columns(shape.row());
    for (int64_t n = shape.images * mine / all; n < last; n++) {
      image.take(images + n * shape.of_image());
      const T *next = maps + (n + 1) * shape.of_map(), *end = maps + std::min(n + 2, last) * shape.of_map();
      Prefetcher<T> ahead(next, std::max(next, end), 4 * ((shape.S + vectors * W - 1) / (vectors * W)));
      add_grad(shape, source, source.take(image, maps + n * shape.of_map()), total, [&] { ahead.advance(); });
      if (sums) add_pixels(shape, image, columns, total + size);
    }
  }
  for (int64_t other = 1; other < team; other++)
    for (int64_t i = 0; i < slot; i++) totals[i] += totals[slot * other + i];
  for (int64_t s = 0; s < shape.S; s++)
    for (int64_t c = 0; c < shape.C; c++)
      for (int64_t place = 0; place < 16; place++)
        grad[(s * shape.C + c) * 16 + place] =
            totals[(place / 4 * shape.depth() + place % 4 * shape.C + c) * shape.S + s];
  if (sums) std::copy_n(totals + size, shape.C, sums);
}

}  // namespace

void image_conv_weight_grad(const void* images, const void* map, float* grad, float* sums, int64_t count,
                            int64_t height, int64_t width, int64_t channels, int64_t map_channels, bool is_bf16,
                            int threads) {
  const Shape shape = {count, height, width, channels, map_channels};
  threads = threads_for(count * shape.of_map(), threads);
  const auto run = [&](auto* tag, auto* source) {
    using T = std::remove_pointer_t<decltype(tag)>;
    using Source = std::remove_pointer_t<decltype(source)>;
    weight_grad<Source>(shape, static_cast<const T*>(images), static_cast<const T*>(map), grad, sums, threads);
  };
#if defined(__AVX512BF16__)
  if (is_bf16) {
    if (image_conv_tiles_grad(images, map, grad, sums, count, height, width, channels, map_channels, threads)) return;
    return run(static_cast<bf16*>(nullptr), static_cast<OfPairs*>(nullptr));
  }
#endif
  with_dtype(is_bf16, [&](auto* tag) { run(tag, static_cast<OfSingles*>(nullptr)); });
}

}  // namespace HDFAST_ISA
