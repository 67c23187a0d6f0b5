#include "../image_conv.h"
#include "../ops.h"
#include "../simd.h"

// The convolution of images of few channels, see image_conv.h. In bfloat16 an instruction takes two neighbouring k.

namespace HDFAST_ISA {
namespace {

constexpr int vectors = 2;                    // of the map's channels, in a tile
constexpr int tile_pixels = W == 16 ? 8 : 4;  // of the map

// Lays out weight (S, C, 4, 4) as (i, k, s), or (i, pair of k, s).
template <class Of>
void lay_weight(const Shape& shape, const float* weight, float* out) {
  std::vector<float> turned(shape.S * 4 * shape.depth());
  for (int64_t s = 0; s < shape.S; s++)
    for (int64_t c = 0; c < shape.C; c++)
      for (int64_t place = 0; place < 16; place++)
        turned[(place / 4 * shape.depth() + place % 4 * shape.C + c) * shape.S + s] =
            weight[(s * shape.C + c) * 16 + place];
  for (int64_t k = 0; k < 4 * shape.depth(); k += Of::taken)
    for (int64_t s = 0; s < shape.S; s++)
      out[k / Of::taken * shape.S + s] = Of::pack(turned.data() + k * shape.S + s, shape.S);
}

// P pixels of the map, V vectors of channels of each.
template <class Of, bool far, int P, int V, class T>
HDFAST_INLINE void halve_tile(const Shape& shape, const typename Of::Number* rows, const float* weight, T* map) {
  Vf sums[P][V] = {};
  for (int64_t i = 0; i < 4; i++, rows += shape.row())
    for (int64_t k = 0; k < shape.depth(); k += Of::taken, weight += shape.S) {
      Vf right[V];
      for (int v = 0; v < V; v++) right[v] = load(weight + v * W, Whole{});
#pragma GCC unroll 8
      for (int p = 0; p < P; p++) {
        const Vf left = Of::spread(rows + 2 * p * shape.C + k);
        for (int v = 0; v < V; v++) sums[p][v] = Of::add(sums[p][v], left, right[v]);
      }
    }
  for (int p = 0; p < P; p++)
    for (int v = 0; v < V; v++) put<far>(map + p * shape.S + v * W, sums[p][v], Whole{});
}

template <class Of, bool far, class T>
void halve(const Shape& shape, const Bordered<typename Of::Number>& image, const float* weight, T* map) {
  for (int64_t y = 0; y < shape.height; y++, map += shape.width * shape.S)
    each_vectors<vectors>(shape.S, [&](int64_t s, auto count) {
      constexpr int V = count;
      int64_t x = 0;
      for (; x + tile_pixels <= shape.width; x += tile_pixels)
        halve_tile<Of, far, tile_pixels, V>(shape, image.row(2 * y) + 2 * x * shape.C, weight + s,
                                            map + x * shape.S + s);
      for (; x < shape.width; x++)
        halve_tile<Of, far, 1, V>(shape, image.row(2 * y) + 2 * x * shape.C, weight + s, map + x * shape.S + s);
    });
}

template <class Of, class T>
void halve_all(const Shape& shape, const T* images, const float* weight, T* map, int threads) {
  Scratch<float> laid(shape.S * 4 * shape.depth() / Of::taken);
  lay_weight<Of>(shape, weight, laid);
  with_bool(is_far(map, shape.images * shape.height * shape.width, shape.S), [&](auto far) {
#pragma omp parallel num_threads(threads)
    {
      Bordered<typename Of::Number> image(shape);
#pragma omp for schedule(static)
      for (int64_t n = 0; n < shape.images; n++) {
        image.take(images + n * shape.of_image());
        halve<Of, far>(shape, image, laid, map + n * shape.of_map());
      }
      fence();
    }
  });
}

}  // namespace

void image_conv_forward(const void* images, const float* weight, void* map, int64_t count, int64_t height,
                        int64_t width, int64_t channels, int64_t map_channels, bool is_bf16, int threads) {
  const Shape shape = {count, height, width, channels, map_channels};
  threads = threads_for(count * shape.of_map(), threads);
  if (!is_bf16)
    return halve_all<Singles>(shape, static_cast<const float*>(images), weight, static_cast<float*>(map), threads);
#if defined(__AVX512BF16__)
  if (image_conv_tiles(images, weight, map, count, height, width, channels, map_channels, threads)) return;
  halve_all<Pairs>(shape, static_cast<const bf16*>(images), weight, static_cast<bf16*>(map), threads);
#else
  halve_all<Singles>(shape, static_cast<const bf16*>(images), weight, static_cast<bf16*>(map), threads);
#endif
}

}  // namespace HDFAST_ISA
