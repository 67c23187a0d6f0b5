#include <vector>

#include "../ops.h"
#include "../simd.h"

namespace HDFAST_ISA {
namespace {

// An input pixel affects 4 x 4 output pixels: a tile of 4 * C neighbouring numbers in each of 4 rows. In an input row,
// the tiles of the even pixels lie side by side without overlap, and so do those of the odd ones. Each set gets its
// own rows, so nothing is added in memory. An output row is the sum of four such rows: even and odd, of two input rows.
//
// A band is the contribution of one input row, [even, odd][4 output rows][length]. Its rows begin one output pixel to
// the left of the image.
template <int V>  // vectors that hold a tile
struct Deconv {
  static constexpr int tile_pixels = W == 16 ? 4 : 1;  // pixels whose sums fit in the registers
  int64_t height, width, inputs, channels;
  int64_t length = (2 * width + 2) * channels + V * W;
  std::vector<float> weight = {};  // (inputs, 4, V * W): the rows of the kernel, padded with zeros
  std::vector<float> bias = {};    // of an output row

  template <int P>
  HDFAST_INLINE void tiles(const float* row, int64_t x, float* band) const {
    Vf sums[P][4][V] = {};
    const float* w = weight.data();
    for (int64_t i = 0; i < inputs; i++)
#pragma GCC unroll 4
      for (int k = 0; k < 4; k++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++, w += W) {
          const Vf some = load(w, Whole{});
#pragma GCC unroll 4
          for (int p = 0; p < P; p++) sums[p][k][v] += row[(x + 2 * p) * inputs + i] * some;
        }
    for (int p = 0; p < P; p++)
      for (int k = 0; k < 4; k++)
        for (int v = 0; v < V; v++)  // zeros beyond the tile, which the next tile, if any, overwrites
          store(band + k * length + 2 * (x + 2 * p) * channels + v * W, sums[p][k][v], Whole{});
  }

  template <class T>
  void image(const T* x, T* y, float* row, float* bands) const {
    const int64_t out_width = 2 * width * channels;
    const float* none = bands + 16 * length;  // zeros
    const auto emit = [&](int64_t at, const float* upper, const float* lower) {
      const int64_t odd = 4 * length;
      for_lanes(out_width, [&](int64_t i, auto lanes) {
        const int64_t j = i + channels;
        Vf sum = load(bias.data() + i, lanes) + (load(upper + j, lanes) + load(upper + odd + j, lanes));
        sum += load(lower + j, lanes) + load(lower + odd + j, lanes);
        store(y + at * out_width + i, sum, lanes);
      });
    };
    const float* above = none;
    for (int64_t r = 0; r < height; r++) {
      for_lanes(width * inputs, [&](int64_t i, auto lanes) {
        store(row + i, load(x + r * width * inputs + i, lanes), lanes);
      });
      float* band = bands + (r & 1) * 8 * length;
      for (int64_t parity = 0; parity < 2; parity++) {
        float* half = band + parity * 4 * length;
        int64_t at = parity;
        for (; at + 2 * (tile_pixels - 1) < width; at += 2 * tile_pixels) tiles<tile_pixels>(row, at, half);
        for (; at < width; at += 2) tiles<1>(row, at, half);
      }
      if (r > 0) emit(2 * r - 1, above + 2 * length, band);
      emit(2 * r, above == none ? none : above + 3 * length, band + length);
      above = band;
    }
    if (height > 0) emit(2 * height - 1, above + 2 * length, none);
  }

  template <class T>
  void run(const T* x, T* y, int64_t images, int threads) const {
#pragma omp parallel num_threads(threads)
    {
      std::vector<float> row(width * inputs), bands(21 * length);
#pragma omp for schedule(static)
      for (int64_t n = 0; n < images; n++)
        image(x + n * height * width * inputs, y + n * 4 * height * width * channels, row.data(), bands.data());
    }
  }
};

template <int V>
void run(const void* x, const float* weight, const float* bias, void* y, int64_t images, int64_t height, int64_t width,
         int64_t inputs, int64_t channels, bool is_bf16, int threads) {
  Deconv<V> deconv{height, width, inputs, channels};
  deconv.weight.resize(inputs * 4 * V * W);
  for (int64_t i = 0; i < inputs; i++)
    for (int64_t c = 0; c < channels; c++)
      for (int64_t k = 0; k < 16; k++)
        deconv.weight[(i * 4 + k / 4) * V * W + k % 4 * channels + c] = weight[(i * channels + c) * 16 + k];
  for (int64_t i = 0; i < 2 * width * channels; i++) deconv.bias.push_back(bias[i % channels]);
  with_dtype(is_bf16, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    deconv.run(static_cast<const T*>(x), static_cast<T*>(y), images, threads);
  });
}

}  // namespace

void image_deconv_forward(const void* x, const float* weight, const float* bias, void* y, int64_t images,
                          int64_t height, int64_t width, int64_t inputs, int64_t channels, bool is_bf16, int threads) {
  threads = threads_for(images * height * width * inputs, threads);
  with_one_to_four((4 * channels + W - 1) / W, [&](auto vectors) {
    run<decltype(vectors)::value>(x, weight, bias, y, images, height, width, inputs, channels, is_bf16, threads);
  });
}

}  // namespace HDFAST_ISA
