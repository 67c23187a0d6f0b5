// Products of a few rows with a weight matrix that is used many times: C (rows, N) = A (rows, depth) weight (depth, N).
//
// The weight is packed once into contiguous panels of `columns` columns, so that a product streams it from cache in
// order; each thread owns some panels, so it keeps reading the same part of the weight. bfloat16 panels hold pairs of
// consecutive depths side by side, as vdpbf16ps and the AMX tiles read them. Sums are float32.

#pragma once

#include <cstring>
#include <vector>

#include "simd.h"

namespace HDFAST_ISA {
namespace {

constexpr int tile_rows = W == 16 ? 8 : 4;
constexpr int columns = 2 * W;        // of a panel
constexpr int64_t depth_block = 128;  // depths of a panel: they stay in the L1 cache while the rows pass

// A weight (depth, N) whose element (k, n) is source[k * depth_stride + n * column_stride].
template <class E>
struct Packed {
  const E* source = nullptr;
  int64_t depth, N, depth_stride, column_stride;
  std::vector<E>* memory = nullptr;

  Packed(const void* source, int64_t depth, int64_t N, int64_t depth_stride, int64_t column_stride,
         std::vector<E>* memory)
      : source(static_cast<const E*>(source)), depth(depth), N(N), depth_stride(depth_stride),
        column_stride(column_stride), memory(memory) {
    memory->resize(panels() * panel_size());
  }

  static constexpr int64_t group = sizeof(E) == 2 ? 2 : 1;  // depths stored side by side
  int64_t panels() const { return (N + columns - 1) / columns; }
  int64_t panel_size() const { return (depth + group - 1) / group * group * columns; }
  const E* panel(int64_t i) const { return memory->data() + i * panel_size(); }

  void pack(int thread, int threads) const {
    for (int64_t i = panels() * thread / threads; i < panels() * (thread + 1) / threads; i++) {
      E* out = memory->data() + i * panel_size();
      const int64_t width = N - i * columns < columns ? N - i * columns : columns;
      if (width < columns || depth % group) std::memset(static_cast<void*>(out), 0, panel_size() * sizeof(E));
      const E* in = source + i * columns * column_stride;
      for (int64_t k0 = 0; k0 < depth; k0 += 16) {
        const int64_t k1 = k0 + 16 < depth ? k0 + 16 : depth;
        if (column_stride == 1) {
          for (int64_t k = k0; k < k1; k++)
            for (int64_t n = 0; n < width; n++)
              out[(k / group * columns + n) * group + k % group] = in[k * depth_stride + n];
        } else {
          for (int64_t n = 0; n < width; n++)
            for (int64_t k = k0; k < k1; k++)
              out[(k / group * columns + n) * group + k % group] = in[k * depth_stride + n * column_stride];
        }
      }
    }
  }
};

// A pair of bfloat16 numbers, or a vector of pairs.
template <class Pair>
HDFAST_INLINE Pair load_pairs(const bf16* p) {
  Pair pairs;
  std::memcpy(&pairs, p, sizeof(pairs));
  return pairs;
}

HDFAST_INLINE Vf add_products(Vf sum, uint32_t pair, Vu weights) {
#if defined(__AVX512BF16__)
  return _mm512_dpbf16_ps(sum, bit_cast<__m512bh>(_mm512_set1_epi32(int(pair))), bit_cast<__m512bh>(weights));
#else
  sum += bit_cast<float>(pair << 16) * bit_cast<Vf>(weights << 16);
  return sum + bit_cast<float>(pair & 0xffff0000u) * bit_cast<Vf>(weights & 0xffff0000u);
#endif
}

// One tile: `rows` rows times one panel over depths [0, depth), added to C or, if `fresh`, stored there.
template <int rows, class E>
void tile(const E* A, int64_t lda, const E* panel, int64_t depth, float* C, int64_t ldc, bool fresh) {
  Vf sum[rows][2];
  for (int m = 0; m < rows; m++)
    for (int v = 0; v < 2; v++) sum[m][v] = fresh ? Vf{} : load(C + m * ldc + v * W, Whole{});
  if constexpr (std::is_same_v<E, float>) {
    for (int64_t k = 0; k < depth; k++) {
      const Vf low = load(panel + k * columns, Whole{}), high = load(panel + k * columns + W, Whole{});
      for (int m = 0; m < rows; m++) {
        sum[m][0] += A[m * lda + k] * low;
        sum[m][1] += A[m * lda + k] * high;
      }
    }
  } else {
    const auto add = [&](int64_t k, auto pair_of) {
      const Vu low = load_pairs<Vu>(panel + k * columns), high = load_pairs<Vu>(panel + k * columns + columns);
      for (int m = 0; m < rows; m++) {
        const uint32_t pair = pair_of(A + m * lda + k);
        sum[m][0] = add_products(sum[m][0], pair, low);
        sum[m][1] = add_products(sum[m][1], pair, high);
      }
    };
    for (int64_t k = 0; k + 1 < depth; k += 2) add(k, [](const bf16* pair) { return load_pairs<uint32_t>(pair); });
    if (depth % 2) add(depth - 1, [](const bf16* last) { return uint32_t(last->bits); });
  }
  for (int m = 0; m < rows; m++)
    for (int v = 0; v < 2; v++) store(C + m * ldc + v * W, sum[m][v], Whole{});
}

template <class E, int rows = tile_rows>
inline void tile_of(int64_t left, const E* A, int64_t lda, const E* panel, int64_t depth, float* C, int64_t ldc,
                    bool fresh) {
  if constexpr (rows > 1)
    if (left < rows) return tile_of<E, rows - 1>(left, A, lda, panel, depth, C, ldc, fresh);
  tile<rows>(A, lda, panel, depth, C, ldc, fresh);
}

// One panel, all rows.
template <class E>
inline void panel_product(const E* A, int64_t lda, int64_t rows, const Packed<E>& weight, int64_t i, float* C,
                          int64_t ldc) {
  for (int64_t k = 0; k < weight.depth; k += depth_block) {
    const int64_t depth = weight.depth - k < depth_block ? weight.depth - k : depth_block;
    for (int64_t m = 0; m < rows; m += tile_rows)
      tile_of<E>(rows - m, A + m * lda + k, lda, weight.panel(i) + k * columns, depth, C + m * ldc, ldc, k == 0);
  }
}

#if defined(__AMX_BF16__)
struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// `count` (1 or 2) panels, 16 rows at a time. Tiles 0-3 hold sums, 4 rows of A, 5-6 weights.
inline void amx_product(const bf16* A, int64_t lda, int64_t rows, const Packed<bf16>& weight, int64_t i, int count,
                        float* C, int64_t ldc) {
  for (int64_t m = 0; m < rows; m += 16) {
    TileConfig config;
    for (int t = 0; t < 7; t++) {
      config.row_bytes[t] = 64;
      config.rows[t] = uint8_t(t >= 5 || rows - m >= 16 ? 16 : rows - m);
    }
    _tile_loadconfig(&config);
    const bf16 *a = A + m * lda, *left = weight.panel(i), *right = left + (count - 1) * weight.panel_size();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < weight.depth; k += 32) {
      _tile_loadd(4, a + k, lda * 2);
      _tile_loadd(5, left + k * columns, columns * 4);
      _tile_loadd(6, left + k * columns + columns, columns * 4);
      _tile_dpbf16ps(0, 4, 5);
      _tile_dpbf16ps(1, 4, 6);
      if (count == 2) {
        _tile_loadd(5, right + k * columns, columns * 4);
        _tile_loadd(6, right + k * columns + columns, columns * 4);
        _tile_dpbf16ps(2, 4, 5);
        _tile_dpbf16ps(3, 4, 6);
      }
    }
    float* c = C + m * ldc;
    _tile_stored(0, c, ldc * 4);
    _tile_stored(1, c + W, ldc * 4);
    if (count == 2) {
      _tile_stored(2, c + columns, ldc * 4);
      _tile_stored(3, c + columns + W, ldc * 4);
    }
  }
}
#endif

// This thread's panels of C (rows, N) = A (rows, depth) weight.
template <class E>
inline void product(const E* A, int64_t lda, int64_t rows, const Packed<E>& weight, float* C, int64_t ldc, int thread,
                    int threads) {
  int64_t i = weight.panels() * thread / threads;
  const int64_t end = weight.panels() * (thread + 1) / threads, whole = weight.N / columns;
#if defined(__AMX_BF16__)
  if constexpr (sizeof(E) == 2)
    if (weight.depth % 32 == 0) {
      while (i < end && i < whole) {
        const int count = i + 1 < end && i + 1 < whole ? 2 : 1;
        amx_product(A, lda, rows, weight, i, count, C + i * columns, ldc);
        i += count;
      }
      _tile_release();
    }
#endif
  for (; i < end; i++) {
    if (i < whole) {
      panel_product(A, lda, rows, weight, i, C + i * columns, ldc);
    } else {  // the last columns, through a buffer as wide as a whole panel
      std::vector<float> wide(rows * columns);
      panel_product(A, lda, rows, weight, i, wide.data(), columns);
      for (int64_t m = 0; m < rows; m++)
        std::memcpy(C + m * ldc + i * columns, wide.data() + m * columns, (weight.N - i * columns) * sizeof(float));
    }
  }
}

}  // namespace
}  // namespace HDFAST_ISA
