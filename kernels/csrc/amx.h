// Tiles of the processor: products of 16 rows of 32 bfloat16 numbers with 32 rows of 16, summed in float32.
#pragma once

#if defined(__AMX_BF16__)
#include <immintrin.h>

#include "simd.h"

namespace HDFAST_ISA {
namespace {

constexpr int64_t tile = 16;   // rows and columns of a tile of sums
constexpr int64_t depth = 32;  // numbers that a product sums: a row of the left tile, two rows a line of the right one
constexpr int64_t wide = 2 * tile;

// While it lives, the thread's eight tiles are whole ones. What was configured before is put back, for libraries
// remember what they configured.
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

// The sums of 2 x 2 tiles, in tile registers 0 to 3: nothing else may use them, nor 4 to 7, until they are stored. Each
// tile lies by itself, rows of 16 numbers; `down` and `across` are the distances of neighbours.
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

// Adds the products of two tiles on the left, `down` apart, with two on the right, `across` apart; lines of bytes apart.
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

}  // namespace
}  // namespace HDFAST_ISA
#endif
