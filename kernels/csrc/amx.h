// The processor's AMX tiles: products of 16 rows of 32 bfloat16 numbers with 32 rows of 16, summed in float32.
#pragma once

#if defined(__AMX_BF16__)
#include <immintrin.h>

#include "simd.h"

namespace HDFAST_ISA {
namespace {

constexpr int64_t tile = 16;   // rows and columns of a tile of sums
constexpr int64_t depth = 32;  // terms of a sum: a row of the left tile; a line of the right one holds two of its rows
constexpr int64_t wide = 2 * tile;

// Configures the thread's eight tiles to their full size while it lives, then restores the previous configuration,
// because libraries remember theirs.
class Tiles {
 public:
  Tiles() {
    _tile_storeconfig(&before_);
    Config whole;
    whole.palette = 1;
    for (int t = 0; t < 8; t++) whole.rows[t] = 16, whole.line_bytes[t] = 64;
    _tile_loadconfig(&whole);
  }
  ~Tiles() {
    if (before_.palette)
      _tile_loadconfig(&before_);
    else
      _tile_release();
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

 private:
  struct alignas(64) Config {
    uint8_t palette = 0, start_row = 0, reserved[14] = {};
    uint16_t line_bytes[16] = {};
    uint8_t rows[16] = {};
  };
  Config before_;
};

// The sums of 2 x 2 tiles, in tile registers 0 to 3. Nothing else may use these, nor 4 to 7, until they are stored. In
// memory each tile is contiguous, rows of 16 numbers; `down` and `across` are the distances between neighbours.
HDFAST_INLINE void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}
HDFAST_INLINE void load_sums(const float* sums, int64_t down, int64_t across) {
  _tile_loadd(0, sums, 64);
  _tile_loadd(1, sums + across, 64);
  _tile_loadd(2, sums + down, 64);
  _tile_loadd(3, sums + down + across, 64);
}
HDFAST_INLINE void store_sums(float* sums, int64_t down, int64_t across) {
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + across, 64);
  _tile_stored(2, sums + down, 64);
  _tile_stored(3, sums + down + across, 64);
}

// Adds the products of two left tiles, `down` bytes apart, with two right ones, `across` bytes apart; `left_line` and
// `right_line` are the bytes from one line to the next.
HDFAST_INLINE void add_products(const void* left, int64_t down, int64_t left_line, const void* right, int64_t across,
                                int64_t right_line) {
  _tile_loadd(4, left, left_line);
  _tile_loadd(6, right, right_line);
  _tile_dpbf16ps(0, 4, 6);
  _tile_loadd(7, static_cast<const char*>(right) + across, right_line);
  _tile_dpbf16ps(1, 4, 7);
  _tile_loadd(5, static_cast<const char*>(left) + down, left_line);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

// Rounds the 32 numbers of row m of sums that were stored with `down` of two tiles and `across` of one.
template <bool far>
HDFAST_INLINE void round_sums(const float* sums, int64_t m, bf16* out) {
  const float* const row = sums + m / tile * 2 * tile * tile + m % tile * tile;
  const __m512i line = bit_cast<__m512i>(_mm512_cvtne2ps_pbh(_mm512_load_ps(row + tile * tile), _mm512_load_ps(row)));
  if constexpr (far)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(out), line);
  else
    _mm512_storeu_si512(out, line);
}

// Operands of a sum over many rows, such as a weight gradient, where the factors are columns of the two matrices.

// A left tile: a line for each of the 16 columns from c on, with its numbers from 32 rows; a null row is all zeros.
HDFAST_INLINE void lay_left(const bf16* const (&rows)[depth], int64_t c, uint32_t* out) {
  const auto numbers = [&](const bf16* row) {
    return row ? _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + c)))
               : _mm512_setzero_si512();
  };
  __m512i columns[tile];
  for (int k = 0; k < tile; k++)
    columns[k] = _mm512_or_si512(numbers(rows[2 * k]), _mm512_slli_epi32(numbers(rows[2 * k + 1]), 16));
  transpose(columns);
  for (int k = 0; k < tile; k++) _mm512_store_si512(out + k * tile, columns[k]);
}

// A line of right tiles from two rows; a null row is all zeros. The columns, a multiple of 32, are permuted.
HDFAST_INLINE void lay_right(const bf16* a, const bf16* b, uint32_t* out, int64_t columns) {
  for (int64_t c = 0; c < columns; c += wide) {
    const __m512i above = a ? _mm512_loadu_si512(a + c) : _mm512_setzero_si512();
    const __m512i below = b ? _mm512_loadu_si512(b + c) : _mm512_setzero_si512();
    _mm512_store_si512(out + c, _mm512_unpacklo_epi16(above, below));
    _mm512_store_si512(out + c + tile, _mm512_unpackhi_epi16(above, below));
  }
}
// Where that puts column c of 32.
constexpr int64_t column_at(int64_t c) { return c / 8 * 4 + c % 4 + c / 4 % 2 * tile; }

}  // namespace
}  // namespace HDFAST_ISA
#endif
