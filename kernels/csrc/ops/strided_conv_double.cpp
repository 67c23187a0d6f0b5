#include <omp.h>

#include <algorithm>

#include "../gemm_tile.h"
#include "../ops.h"
#include "../simd.h"
#include "../strided_conv_double.h"

// The transposed convolution in bfloat16. The 3 x 3 pixels around each pixel of a block are laid out once for all
// phases; sums are rounded and stored straight from the registers.
//
// Axes: phase (4), tap (4) of a phase, n neighbours (9, with the pixel itself), m pixels of x, C channels of x, O of y.

namespace HDFAST_ISA {

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
namespace {

constexpr int64_t neighbours = 9;
constexpr int64_t block = 4 * tile_rows;        // pixels
constexpr int64_t least_pixels_of_thread = 64;  // for fewer, laying out the weights does not pay off

struct Layout {
  int64_t height, width, pixels, C, O;  // of x; channels of both
  DoubleWeights weights;

  // inputs (n, group of C, m, group), with a gap so that the nine are not a multiple of a page apart
  int64_t inputs_at(int64_t n) const { return n * (C * block + 8 * group<bf16>); }
};

// Lays out pixels [first, first + count), repeating the last pixel of x beyond its end.
void lay_inputs(const Layout& at, const bf16* x, int64_t first, int64_t count, const bf16* zeros, bf16* inputs) {
  for (int64_t m = 0; m < count; m++) {
    const int64_t pixel = std::min(first + m, at.pixels - 1);
    const int64_t row = pixel / at.width % at.height, column = pixel % at.width;
    for (int64_t n = 0; n < neighbours; n++) {
      const int64_t down = n / 3 - 1, across = n % 3 - 1;
      const bool inside =
          row + down >= 0 && row + down < at.height && column + across >= 0 && column + across < at.width;
      const bf16* const from = inside ? x + (pixel + down * at.width + across) * at.C : zeros;
      bf16* const to = inputs + at.inputs_at(n) + m * group<bf16>;
      for (int64_t c = 0; c < at.C; c += group<bf16>) _mm512_store_si512(to + c * block, _mm512_loadu_si512(from + c));
    }
  }
}

// A panel of the first `count` pixels of a tile, at most tile_rows; pixel m is stored at y + to[m].
template <int vectors, bool far>
HDFAST_INLINE void double_tile(const Layout& at, const bf16* inputs, const uint32_t* right, int64_t phase,
                               int64_t count, bf16* y, const int64_t* to) {
  Vf tile[tile_rows][vectors] = {};
  for (int64_t tap = 0; tap < taps; tap++) {
    const int64_t n = (phase / 2 + tap / 2) * 3 + phase % 2 + tap % 2;
    const bf16* left = inputs + at.inputs_at(n);
    for (int64_t c = 0; c < at.C; c += group<bf16>, left += block * group<bf16>)
      for (int64_t k = 0; k < group<bf16>; k += 2, right += panel) {
        __m512bh row[vectors];
        for (int v = 0; v < vectors; v++) row[v] = bit_cast<__m512bh>(_mm512_load_si512(right + v * W));
#pragma GCC unroll 14
        for (int m = 0; m < tile_rows; m++) {
          int32_t pair;
          std::memcpy(&pair, left + m * group<bf16> + k, sizeof(pair));
          for (int v = 0; v < vectors; v++)
            tile[m][v] = _mm512_dpbf16_ps(tile[m][v], bit_cast<__m512bh>(_mm512_set1_epi32(pair)), row[v]);
        }
      }
  }
#pragma GCC unroll 14
  for (int m = 0; m < tile_rows; m++) {
    if (m == count) break;
    bf16* const at_m = y + to[m];
    if constexpr (vectors == 1) {
      store(at_m, tile[m][0], Whole{});
    } else {
      const __m512i line = bit_cast<__m512i>(_mm512_cvtne2ps_pbh(tile[m][1], tile[m][0]));
      if constexpr (far)
        _mm512_stream_si512(reinterpret_cast<__m512i*>(at_m), line);
      else
        _mm512_storeu_si512(at_m, line);
    }
  }
}

template <bool far>
void double_block(const Layout& at, const bf16* inputs, const uint32_t* weights, int64_t count, bf16* y,
                  const int64_t* to, Prefetcher<bf16>& ahead) {
  for (int64_t phase = 0; phase < phases; phase++)
    for (int64_t p = 0; p < at.weights.panels(); p++)
      for (int64_t m = 0; m < count; m += tile_rows) {
        const bf16* const left = inputs + m * group<bf16>;
        const uint32_t* const right = weights + at.weights.at(phase, p, 0);
        bf16* const out = y + (phase / 2 * 2 * at.width + phase % 2) * at.O + p * panel;
        ahead.advance();
        if (at.O - p * panel >= panel)
          double_tile<2, far>(at, left, right, phase, count - m, out, to + m);
        else
          double_tile<1, false>(at, left, right, phase, count - m, out, to + m);
      }
}

}  // namespace

bool strided_conv_double(const void* x, const void* weight, void* y, int64_t images, int64_t height, int64_t width,
                         int64_t channels_in, int64_t channels_out, int threads) {
  const Layout at = {height, width, images * height * width, channels_in, channels_out, {channels_in, channels_out}};
  if (at.C % group<bf16> || at.O % W || at.pixels < least_pixels_of_thread * threads) return false;
  const bf16* const from = static_cast<const bf16*>(x);
  bf16* const out = static_cast<bf16*>(y);
  Scratch<uint32_t> weights(at.weights.size());
  Scratch<bf16> zeros(at.C);
  std::fill_n(static_cast<bf16*>(zeros), at.C, bf16{0});
  with_bool(is_far(out, 4 * at.pixels, at.O) && at.O % panel == 0, [&](auto far) {
#pragma omp parallel num_threads(threads)
    {
      at.weights.lay(static_cast<const bf16*>(weight), weights);
      Scratch<bf16> inputs(at.inputs_at(neighbours));
      int64_t to[block];
      const int64_t team = omp_get_num_threads(), mine = omp_get_thread_num(), last = at.pixels * (mine + 1) / team;
      for (int64_t first = at.pixels * mine / team; first < last; first += block) {
        const int64_t count = std::min(block, last - first), tiles = (count + tile_rows - 1) / tile_rows;
        lay_inputs(at, from, first, tiles * tile_rows, zeros, inputs);
        for (int64_t m = 0; m < count; m++)
          to[m] = ((first + m) / at.width * 4 * at.width + (first + m) % at.width * 2) * at.O;
        const int64_t seen = std::min(first + count + at.width + 1, at.pixels);
        const int64_t next = std::min(seen + block, at.pixels);
        Prefetcher<bf16> ahead(from + seen * at.C, from + next * at.C, phases * at.weights.panels() * tiles);
        double_block<far>(at, inputs, weights, count, out, to, ahead);
      }
      fence();
    }
  });
  return true;
}

#else

// Left to libraries: shapes that do not fill tiles, as libraries use AMX too; without bfloat16 instructions,
// everything, as nothing here is faster.
bool strided_conv_double(const void* x, const void* weight, void* y, int64_t images, int64_t height, int64_t width,
                         int64_t channels_in, int64_t channels_out, int threads) {
  return strided_conv_tiles_double(x, weight, y, images, height, width, channels_in, channels_out, threads);
}

#endif

}  // namespace HDFAST_ISA
