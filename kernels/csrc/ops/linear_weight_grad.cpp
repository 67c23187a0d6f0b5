#include <omp.h>

#include <algorithm>

#include "../gemm_tile.h"
#include "../ops.h"
#include "../simd.h"

// The gradient of a linear layer's weight in float, out (M, N) = grad (K, M)^T x (K, N), over K rows of activations.
// Libraries first transpose one of the two. Here both already have the layout that the tiles of gemm_tile.h need.
//
// K is divided among groups of threads if it is long, and a group's threads take rectangles of `out`. With several
// groups, their sums are added up at the end.
//
// Axes: m, n of `out`, k rows; t tiles of m, p panels of n.

namespace HDFAST_ISA {
namespace {

constexpr int64_t deep = 128;              // rows of a block: a tile and a panel of that depth fit in the L1 cache
constexpr int64_t broad = 16 * tile_rows;  // m of a block, which fits in the L2 cache
constexpr int64_t deep_of_thread = 1024;   // least rows for which separate sums pay off
constexpr int64_t tile_size = tile_rows * panel;
constexpr int64_t slot = (tile_rows + W - 1) / W * W;  // a tile's m, rounded up to whole vectors

struct Span {
  int64_t first, last;

  // Part i of n.
  static Span part(int64_t all, int64_t i, int64_t n) { return {all * i / n, all * (i + 1) / n}; }
};

struct Layout {
  int64_t K, M, N, tiles, panels;
  int64_t along, across, down;  // how many parts K, the panels and the tiles are divided into

  Layout(int64_t K, int64_t M, int64_t N, int64_t team)
      : K(K), M(M), N(N), tiles((M + tile_rows - 1) / tile_rows), panels((N + panel - 1) / panel), along(team),
        across(1) {
    while (along > 1 && (team % along || K < along * deep_of_thread)) along--;
    down = team / along;
    // The threads of a row or column of rectangles all lay out the same operand, so operands are kept small.
    while (down % 2 == 0 && down / 2 * N > across * M && panels >= 2 * across) down /= 2, across *= 2;
  }

  int64_t sums_at(int64_t part, int64_t t, int64_t p) const { return ((part * tiles + t) * panels + p) * tile_size; }
};

// Copies rows k as (piece, row, wide): piece i is the `wide` columns from i * step on. Zeros beyond the matrix.
template <int64_t step, int64_t wide>
void lay(const float* matrix, int64_t columns, Span k, Span pieces, float* out) {
  for (int64_t i = pieces.first; i < pieces.last; i++)
    for (int64_t row = k.first; row < k.first + deep; row++)
      for (int64_t v = 0; v < wide; v += W, out += W) {
        const int64_t column = i * step + v, left = row < k.last ? columns - column : 0;
        const float* const from = matrix + row * columns + column;
        store(out, left >= W ? load(from, Whole{}) : left > 0 ? load(from, Part{int(left)}) : Vf{}, Whole{});
      }
}

void put_tile(const Layout& at, const float* sums, int64_t t, int64_t p, float* out) {
  const int64_t width = std::min(panel, at.N - p * panel);
  for (int64_t i = 0; i < tile_rows && t * tile_rows + i < at.M; i++)
    for_lanes(width, [&](int64_t n, auto lanes) {
      store(out + (t * tile_rows + i) * at.N + p * panel + n, load(sums + i * panel + n, Whole{}), lanes);
    });
}

// The sums over rows k for a rectangle: to `out`, or only to `sums` if `out` is null as other threads add to it too.
void rectangle(const Layout& at, const float* grad, const float* x, Span k, Span t, Span p, float* sums, float* out) {
  if (t.first == t.last || p.first == p.last) return;  // more threads than work
  const int64_t tiles_of_block = broad / tile_rows;
  Scratch<float> left(tiles_of_block * deep * slot), right((p.last - p.first) * deep * panel);
  for (int64_t first = k.first; first < k.last; first += deep) {
    const Span block = {first, std::min(first + deep, k.last)};
    const Span next = {block.last, std::min(block.last + deep, k.last)};
    const int64_t groups = (block.last - first + group<float> - 1) / group<float>;
    lay<panel, panel>(x, at.N, block, p, right);
    const int64_t calls = (t.last - t.first) * (p.last - p.first);
    Prefetcher<float> of_grad(grad + next.first * at.M,
                              grad + (t.last - t.first == at.tiles ? next.last : next.first) * at.M, calls);
    Prefetcher<float> of_x(x + next.first * at.N,
                           x + (p.last - p.first == at.panels ? next.last : next.first) * at.N, calls);
    for (Span some = {t.first, 0}; some.first < t.last; some.first = some.last) {
      some.last = std::min(some.first + tiles_of_block, t.last);
      lay<tile_rows, slot>(grad, at.M, block, some, left);
      for (int64_t j = p.first; j < p.last; j++)
        for (int64_t i = some.first; i < some.last; i++) {
          of_grad.advance(), of_x.advance();
          const float* const a = left + (i - some.first) * deep * slot;
          const float* const b = right + (j - p.first) * deep * panel;
          float* const sum = sums + at.sums_at(0, i, j);
          if (at.N - j * panel > W)
            multiply_tile<2, 1, slot>(a, group<float> * slot, b, groups, sum, first == k.first);
          else
            multiply_tile<1, 1, slot>(a, group<float> * slot, b, groups, sum, first == k.first);
          if (out && block.last == k.last) put_tile(at, sum, i, j, out);
        }
    }
  }
}

}  // namespace

void linear_weight_grad(const float* grad, const float* x, float* out, int64_t K, int64_t M, int64_t N, int threads) {
  const int64_t most_parts = std::clamp<int64_t>(K / deep_of_thread, 1, threads);
  Scratch<float> sums(Layout(K, M, N, threads).sums_at(most_parts, 0, 0));
#pragma omp parallel num_threads(threads)
  {
    const int64_t mine = omp_get_thread_num();
    const Layout at(K, M, N, omp_get_num_threads());
    const int64_t part = mine / (at.across * at.down), of_out = mine % (at.across * at.down);
    rectangle(at, grad, x, Span::part(K, part, at.along), Span::part(at.tiles, of_out / at.across, at.down),
              Span::part(at.panels, of_out % at.across, at.across), sums + at.sums_at(part, 0, 0),
              at.along == 1 ? out : nullptr);
    if (at.along > 1) {
#pragma omp barrier
#pragma omp for schedule(static)
      for (int64_t tile = 0; tile < at.tiles * at.panels; tile++) {
        float* const first = sums + tile * tile_size;
        for (int64_t other = 1; other < at.along; other++)
          for (int64_t i = 0; i < tile_size; i += W)
            store(first + i, load(first + i, Whole{}) + load(first + at.sums_at(other, 0, 0) + i, Whole{}), Whole{});
        put_tile(at, first, tile / at.panels, tile % at.panels, out);
      }
    }
  }
}

}  // namespace HDFAST_ISA
