#include <omp.h>

#include "../ops.h"
#include "../simd.h"

namespace HDFAST_ISA {
namespace {

constexpr int64_t tile = 8 * W;       // columns whose sums stay in registers
constexpr int64_t block_rows = 2048;  // rows of the gradient whose tile stays in the L2 cache

// Sums of `tile` columns in registers, possibly permuted.
template <class T>
struct Sums {
  Vf v[8] = {};

  HDFAST_INLINE void add(const T* row) {
    for (int i = 0; i < 8; i++) v[i] += load(row + i * W, Whole{});
  }
  HDFAST_INLINE void put(T* out) const {
    for (int i = 0; i < 8; i++) store(out + i * W, v[i], Whole{});
  }
};

#if defined(__AVX512BF16__)
// Even columns in one vector, odd ones in the next: pairs of neighbours times (1, 0) and (0, 1). This takes a third of
// the instructions of widening them and gives the same sums, except NaN next to an infinite weight. Processors with AMX
// are slow at these products, so there a pair is split instead.
template <>
struct Sums<bf16> {
  Vf v[8] = {};

  HDFAST_INLINE void add(const bf16* row) {
#if defined(__AMX_BF16__)
    for (int i = 0; i < 8; i += 2) {
      const Vu pairs = bit_cast<Vu>(_mm512_loadu_si512(row + i * W));
      v[i] += bit_cast<Vf>(pairs << 16), v[i + 1] += bit_cast<Vf>(pairs & 0xffff0000u);
    }
#else
    const auto pair = [](int32_t ones) { return bit_cast<__m512bh>(_mm512_set1_epi32(ones)); };
    const __m512bh even = pair(0x3f80), odd = pair(0x3f800000);
    for (int i = 0; i < 8; i += 2) {
      const __m512bh pairs = bit_cast<__m512bh>(_mm512_loadu_si512(row + i * W));
      v[i] = _mm512_dpbf16_ps(v[i], pairs, even), v[i + 1] = _mm512_dpbf16_ps(v[i + 1], pairs, odd);
    }
#endif
  }
  HDFAST_INLINE void put(bf16* out) const {
    for (int i = 0; i < 8; i += 2) {
      const auto wide = [](Vf sums) { return _mm512_cvtepu16_epi32(bit_cast<__m256i>(narrow(sums, bf16{}))); };
      _mm512_storeu_si512(out + i * W, _mm512_or_si512(wide(v[i]), _mm512_slli_epi32(wide(v[i + 1]), 16)));
    }
  }
};
#endif

// Goes tile by tile, so that a tile's part of the weight stays in the cache while all rows pass. `onto` may be null.
template <class T>
void forward(const int64_t* index, const T* weight, const T* onto, T* out, int64_t rows, int64_t groups,
             int64_t classes, int64_t units, int threads) {
#pragma omp parallel num_threads(threads)
  for (int64_t column = 0; column < units; column += tile) {
    const int64_t width = units - column < tile ? units - column : tile;
#pragma omp for schedule(static) nowait
    for (int64_t r = 0; r < rows; r++) {
      const int64_t *drawn = index + r * groups, at = r * units + column;
      const auto row = [&](int64_t s) { return weight + (s * classes + drawn[s]) * units + column; };
      if (width == tile) {
        Sums<T> sums;
        if (onto) sums.add(onto + at);
        for (int64_t s = 0; s < groups; s++) sums.add(row(s));
        sums.put(out + at);
      } else {
        for_lanes(width, [&](int64_t c, auto lanes) {
          Vf sum = onto ? load(onto + at + c, lanes) : Vf{};
          for (int64_t s = 0; s < groups; s++) sum += load(row(s) + c, lanes);
          store(out + at + c, sum, lanes);
        });
      }
    }
  }
}

// Sorts `rows` rows by their class in one group, found in `index` at steps of `stride`: `order` receives the row
// numbers, `ends` (classes,) the position in `order` at which each class ends.
void sort_by_class(const int64_t* index, int64_t stride, int64_t rows, int64_t classes, int32_t* order, int32_t* ends) {
  std::memset(ends, 0, classes * sizeof(int32_t));
  for (int64_t r = 0; r < rows; r++) ends[index[r * stride]]++;
  for (int64_t k = 0, begin = 0; k < classes; k++) {
    const int32_t count = ends[k];
    ends[k] = begin;
    begin += count;
  }
  for (int64_t r = 0; r < rows; r++) order[ends[index[r * stride]]++] = r;  // begins become ends
}

// A row of the weight's gradient is the sum of those rows of the gradient that have its class. Each thread takes some
// of the groups; for each tile of columns it goes through the rows block by block, and sums in float.
template <class T>
void backward(const T* grad, const int64_t* index, T* grad_weight, int64_t rows, int64_t groups, int64_t classes,
              int64_t units, int threads) {
#pragma omp parallel num_threads(threads)
  {
    const int64_t first = groups * omp_get_thread_num() / omp_get_num_threads();
    const int64_t mine = groups * (omp_get_thread_num() + 1) / omp_get_num_threads() - first;
    Scratch<int32_t> orders(mine * rows), all_ends(mine * classes * (rows / block_rows + 1));
    Scratch<float> sums(mine * classes * tile);
    // Positions in `orders` of (group, block), and in `all_ends`.
    const auto order_of = [&](int64_t s, int64_t start) { return orders + s * rows + start; };
    const auto ends_of = [&](int64_t s, int64_t start) { return all_ends + (start / block_rows * mine + s) * classes; };
    for (int64_t start = 0; start < rows; start += block_rows) {
      const int64_t count = rows - start < block_rows ? rows - start : block_rows;
      for (int64_t s = 0; s < mine; s++)
        sort_by_class(index + start * groups + first + s, groups, count, classes, order_of(s, start),
                      ends_of(s, start));
    }
    for (int64_t column = 0; column < units; column += tile) {
      const int64_t width = units - column < tile ? units - column : tile;
      std::memset(sums, 0, mine * classes * tile * sizeof(float));
      for (int64_t start = 0; start < rows; start += block_rows) {
        for (int64_t s = 0; s < mine; s++) {
          const int32_t *order = order_of(s, start), *ends = ends_of(s, start);
          for (int64_t k = 0; k < classes; k++) {
            const int32_t begin = k ? ends[k - 1] : 0;
            float* const total = sums + (s * classes + k) * tile;
            const auto row = [&](int64_t i) { return grad + (start + order[i]) * units + column; };
            if (width == tile) {
              Sums<T> some;
              std::memcpy(some.v, total, sizeof(some.v));
              for (int32_t i = begin; i < ends[k]; i++) some.add(row(i));
              std::memcpy(total, some.v, sizeof(some.v));
            } else {
              for_lanes(width, [&](int64_t c, auto lanes) {
                Vf sum = load(total + c, lanes);
                for (int32_t i = begin; i < ends[k]; i++) sum += load(row(i) + c, lanes);
                store(total + c, sum, lanes);
              });
            }
          }
        }
      }
      for (int64_t k = 0; k < mine * classes; k++) {
        T* const out = grad_weight + (first * classes + k) * units + column;
        if (width == tile) {
          Sums<T> all;
          std::memcpy(all.v, sums + k * tile, sizeof(all.v));
          all.put(out);
        } else {
          for_lanes(width, [&](int64_t c, auto lanes) { store(out + c, load(sums + k * tile + c, lanes), lanes); });
        }
      }
    }
  }
}

}  // namespace

int64_t onehot_linear_forward(const int64_t* index, const void* weight, const void* onto, void* out, int64_t rows,
                              int64_t groups, int64_t classes, int64_t units, bool is_bf16, int threads) {
  for (int64_t i = 0; i < rows * groups; i++)
    if (index[i] < 0 || index[i] >= classes) return i;
  threads = threads_for(rows * groups * units, threads);
  with_dtype(is_bf16, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    forward(index, static_cast<const T*>(weight), static_cast<const T*>(onto), static_cast<T*>(out), rows, groups,
            classes, units, threads);
  });
  return -1;
}

void onehot_linear_backward(const void* grad, const int64_t* index, void* grad_weight, int64_t rows, int64_t groups,
                            int64_t classes, int64_t units, bool is_bf16, int threads) {
  threads = threads_for(rows * groups * units, threads);
  with_dtype(is_bf16, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    backward(static_cast<const T*>(grad), index, static_cast<T*>(grad_weight), rows, groups, classes, units, threads);
  });
}

}  // namespace HDFAST_ISA
