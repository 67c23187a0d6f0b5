#include <omp.h>

#include <algorithm>

#include "../gemm_tile.h"
#include "../kernel_grad.h"
#include "../ops.h"
#include "../winograd.h"

// The gradient of the kernel by Winograd's algorithm, see winograd.h: x is the large map, with the phases of halving,
// and h the small one. Each of the 36 products is a matrix (large, small) that is summed over the tiles.
//
// Axes: phase (4), f products of a tile (9), t tiles, l large channels, s small ones.

namespace HDFAST_ISA {
namespace {

constexpr int64_t block = 128;                    // tiles; with fewer, sums are read and written too often
constexpr int64_t least_tiles_of_thread = 64;     // for fewer, transforming the sums does not pay off
constexpr int64_t most_bytes_of_sums = 16 << 20;  // of a thread

struct Layout {
  int64_t height, width, large, small;  // of the small map; channels of both
  Tiles tiles;

  Layout(int64_t images, int64_t height, int64_t width, int64_t large, int64_t small)
      : height(height), width(width), large(large), small(small), tiles(images, height, width) {}

  // Whether this is faster than direct products.
  bool pays(int threads) const {
    return large % 16 == 0 && small % 16 == 0 && tiles.count >= least_tiles_of_thread * threads &&
           3 * tiles.down * tiles.across <= height * width &&
           sums_at(phases, 0) * int64_t(sizeof(float)) <= most_bytes_of_sums;
  }

  // sums (phase, f, l, s), inputs (f, vector of l, t, W), gradients (f, tile of s, t, vectors of the tile)
  int64_t sums_at(int64_t phase, int64_t f) const { return (phase * products_of_tile + f) * large * small; }
  int64_t inputs_at(int64_t f) const { return f * (large * block + 8 * W); }
  int64_t gradients_at(int64_t f) const { return f * (small * block + 8 * W); }
};

void transform_large(const Layout& at, const float* large, int64_t phase, int64_t first, int64_t count,
                     const float* zeros, float* inputs) {
  for (int64_t t = 0; t < count; t++)
    transform_inputs(large, Tile(at.tiles, first + t), 2 * at.height, 2 * at.width, at.large, 2, phase, zeros,
                     [&](int64_t f, int64_t l, Vf numbers) {
                       store(inputs + at.inputs_at(f) + l * block + t * W, numbers, Whole{});
                     });
}

void transform_small(const Layout& at, const float* small, int64_t first, int64_t count, float* gradients) {
  for (int64_t t = 0; t < count; t++) {
    const Tile tile(at.tiles, first + t);
    const int64_t row = 2 * tile.down, column = 2 * tile.across;
    const bool below = row + 1 < at.height, right = column + 1 < at.width;
    const float* const from = small + ((tile.image * at.height + row) * at.width + column) * at.small;
    for (int64_t s = 0; s < at.small; s += W) {
      const auto pixel = [&](bool there, int64_t distance) {
        return there ? load(from + distance * at.small + s, Whole{}) : Vf{};
      };
      const Vf h[2][2] = {{pixel(true, 0), pixel(right, 1)},
                          {pixel(below, at.width), pixel(below && right, at.width + 1)}};
      const int64_t of_tile = s / (broad * W) * (broad * W), wide = std::min<int64_t>(broad * W, at.small - of_tile);
      float* const out = gradients + of_tile * block + t * wide + s - of_tile;
      const Vf rows[3][2] = {{h[0][0], h[0][1]}, {h[0][0] + h[1][0], h[0][1] + h[1][1]}, {-h[1][0], -h[1][1]}};
      for (int64_t i = 0; i < 3; i++) {
        store(out + at.gradients_at(3 * i), rows[i][0], Whole{});
        store(out + at.gradients_at(3 * i + 1), rows[i][0] + rows[i][1], Whole{});
        store(out + at.gradients_at(3 * i + 2), -rows[i][1], Whole{});
      }
    }
  }
}

template <class F>
void multiply(const Layout& at, const float* inputs, const float* gradients, int64_t count, float* sums, F meanwhile) {
  for (int64_t f = 0; f < products_of_tile; f++)
    each_tile(at.large, at.small, [&](int64_t l, int64_t s, auto vectors) {
      constexpr int K = vectors;
      meanwhile();
      const float* a = inputs + at.inputs_at(f) + l / W * W * block + l % W;
      const float* b = gradients + at.gradients_at(f) + s * block;
      add_to_tile<K>(sums + at.sums_at(0, f) + l * at.small + s, at.small, [&](Vf(&tile)[tall][K]) {
        for (int64_t n = 0; n < count; n++, a += W, b += K * W) {
          Vf row[K];
          for (int k = 0; k < K; k++) row[k] = load(b + k * W, Whole{});
          for (int i = 0; i < tall; i++)
            for (int k = 0; k < K; k++) tile[i][k] += a[i] * row[k];
        }
      });
    });
}

// The kernel's gradient from the sums of all threads. Called by all threads together.
void transform_sums(const Layout& at, const float* sums, int64_t team, float* grad) {
#pragma omp for schedule(static)
  for (int64_t l = 0; l < at.large; l++)
    for (int64_t s = 0; s < at.small; s += W) {
      Vf kernel[16];
      for (int64_t phase = 0; phase < phases; phase++) {
        Vf p[3][3], rows[2][3];
        for (int64_t f = 0; f < products_of_tile; f++) {
          p[f / 3][f % 3] = Vf{};
          for (int64_t of = 0; of < team; of++)
            p[f / 3][f % 3] += load(sums + at.sums_at(phases * of + phase, f) + l * at.small + s, Whole{});
        }
        for (int j = 0; j < 3; j++) rows[0][j] = p[0][j] + p[1][j], rows[1][j] = p[1][j] + p[2][j];
        for (int64_t i = 0; i < 2; i++)
          for (int64_t j = 0; j < 2; j++)
            kernel[(phase / 2 + 2 * i) * 4 + phase % 2 + 2 * j] = rows[i][j] + rows[i][j + 1];
      }
      store_kernels(grad, at.large, s, l, kernel);
    }
}

// The start of the first row of pixels that tile t takes from a map with `width` numbers per row and `scale` rows for
// each row of the small map.
const float* start_of(const Layout& at, const float* map, int64_t scale, int64_t width, int64_t t) {
  const Tile tile(at.tiles, t);
  return map + (tile.image * at.height + 2 * tile.down) * scale * width;
}

}  // namespace

bool strided_conv_winograd_grad(const float* large, const float* small, float* grad, int64_t images, int64_t height,
                                int64_t width, int64_t large_channels, int64_t small_channels, int threads) {
  const Layout at(images, height, width, large_channels, small_channels);
  if (!at.pays(threads)) return false;
  const int64_t size = at.sums_at(phases, 0);
  Scratch<float> sums(size * threads), zeros(at.large);
  std::fill_n(static_cast<float*>(zeros), at.large, 0.f);
#pragma omp parallel num_threads(threads)
  {
    const int64_t team = omp_get_num_threads(), mine = omp_get_thread_num(), last = at.tiles.count * (mine + 1) / team;
    float* const total = sums + size * mine;
    std::fill_n(total, size, 0.f);
    Scratch<float> inputs(at.inputs_at(products_of_tile)), gradients(at.gradients_at(products_of_tile));
    for (int64_t first = at.tiles.count * mine / team; first < last; first += block) {
      const int64_t count = std::min(block, last - first), next = first + count;
      const int64_t calls = phases * products_of_tile * (at.large / tall) * ((at.small + broad * W - 1) / (broad * W));
      const auto ahead_of = [&](const float* map, int64_t scale, int64_t channels) {
        const int64_t numbers = scale * at.width * channels;
        return Prefetcher<float>(start_of(at, map, scale, numbers, next),
                                 start_of(at, map, scale, numbers, std::min(next + block, last)), calls);
      };
      Prefetcher<float> of_large = ahead_of(large, 2, at.large), of_small = ahead_of(small, 1, at.small);
      transform_small(at, small, first, count, gradients);
      for (int64_t phase = 0; phase < phases; phase++) {
        transform_large(at, large, phase, first, count, zeros, inputs);
        multiply(at, inputs, gradients, count, total + at.sums_at(phase, 0),
                 [&] { of_large.advance(), of_small.advance(); });
      }
    }
#pragma omp barrier
    transform_sums(at, sums, team, grad);
  }
  return true;
}

}  // namespace HDFAST_ISA
