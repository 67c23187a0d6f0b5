#include <omp.h>

#include "../ops.h"
#include "../simd.h"

namespace HDFAST_ISA {
namespace {

constexpr int64_t tile = 8 * W;       // columns whose sums stay in registers
constexpr int64_t block_rows = 2048;  // rows of the gradient whose tile stays in the second cache

// The sum of rows of `source`, `width` columns from `column` on, over the row numbers row(i) for i below count; added to
// what `out` has where `onto` says so.
template <bool onto, class T, class Out, class Row>
HDFAST_INLINE void sum_rows(const T* source, int64_t stride, int64_t count, Row row, int64_t column, int64_t width,
                            Out* out) {
  if (width == tile) {
    Vf sums[8] = {};
    if (onto)
      for (int v = 0; v < 8; v++) sums[v] = load(out + v * W, Whole{});
    for (int64_t i = 0; i < count; i++) {
      const T* from = source + row(i) * stride + column;
      for (int v = 0; v < 8; v++) sums[v] += load(from + v * W, Whole{});
    }
    for (int v = 0; v < 8; v++) store(out + v * W, sums[v], Whole{});
  } else {
    for_lanes(width, [&](int64_t c, auto lanes) {
      Vf total = onto ? load(out + c, lanes) : Vf{};
      for (int64_t i = 0; i < count; i++) total += load(source + row(i) * stride + column + c, lanes);
      store(out + c, total, lanes);
    });
  }
}

// Tile by tile, so that a tile's part of the weight stays in the cache while all rows pass.
template <class T>
void forward(const int64_t* index, const T* weight, T* out, int64_t rows, int64_t groups, int64_t classes,
             int64_t units, int threads) {
#pragma omp parallel num_threads(threads)
  for (int64_t column = 0; column < units; column += tile) {
    const int64_t width = units - column < tile ? units - column : tile;
#pragma omp for schedule(static) nowait
    for (int64_t r = 0; r < rows; r++) {
      const int64_t* drawn = index + r * groups;
      const auto row = [&](int64_t s) __attribute__((always_inline)) { return s * classes + drawn[s]; };
      sum_rows<false>(weight, units, groups, row, column, width, out + r * units + column);
    }
  }
}

// Sorts `rows` rows by the class of one group, given each row's index `stride` apart: `order` gets their numbers, `ends`
// (classes,) where in it each class ends.
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

// A row of the weight's gradient is the sum of the rows of the gradient whose class it belongs to. Each thread has some
// of the groups; for a tile of columns it goes through the rows block by block, and sums in float.
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
        sort_by_class(index + start * groups + first + s, groups, count, classes, order_of(s, start), ends_of(s, start));
    }
    for (int64_t column = 0; column < units; column += tile) {
      const int64_t width = units - column < tile ? units - column : tile;
      std::memset(sums, 0, mine * classes * tile * sizeof(float));
      for (int64_t start = 0; start < rows; start += block_rows) {
        for (int64_t s = 0; s < mine; s++) {
          const int32_t *order = order_of(s, start), *ends = ends_of(s, start);
          for (int64_t k = 0; k < classes; k++) {
            const int32_t begin = k ? ends[k - 1] : 0;
            const auto row = [&](int64_t i) __attribute__((always_inline)) { return start + order[begin + i]; };
            sum_rows<true>(grad, units, ends[k] - begin, row, column, width, sums + (s * classes + k) * tile);
          }
        }
      }
      for (int64_t k = 0; k < mine * classes; k++) {
        T* out = grad_weight + (first * classes + k) * units + column;
        for_lanes(width, [&](int64_t c, auto lanes) { store(out + c, load(sums + k * tile + c, lanes), lanes); });
      }
    }
  }
}

}  // namespace

int64_t onehot_linear_forward(const int64_t* index, const void* weight, void* out, int64_t rows, int64_t groups,
                              int64_t classes, int64_t units, bool is_bf16, int threads) {
  for (int64_t i = 0; i < rows * groups; i++)
    if (index[i] < 0 || index[i] >= classes) return i;
  threads = threads_for(rows * groups * units, threads);
  with_dtype(is_bf16, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    forward(index, static_cast<const T*>(weight), static_cast<T*>(out), rows, groups, classes, units, threads);
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
