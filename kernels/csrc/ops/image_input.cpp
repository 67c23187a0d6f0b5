#include <algorithm>

#include "../ops.h"
#include "../simd.h"

namespace HDFAST_ISA {
namespace {

constexpr int64_t block = 1 << 14;  // pixels that a thread takes at a time; a multiple of all vector lengths

template <bool far, class T>
void forward(const uint8_t* image, T* out, int64_t pixels, int threads) {
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t first = 0; first < pixels; first += block) {
      for_lanes(std::min(block, pixels - first), [&](int64_t i, auto lanes) {
        // Subtracting 127.5 first keeps the difference exact.
        put<far>(out + first + i, (load(image + first + i, lanes) - 127.5f) * (1 / 255.f), lanes);
      });
    }
    if (far) fence();
  }
}

}  // namespace

void image_input_forward(const uint8_t* image, void* out, int64_t pixels, bool is_bf16, int threads) {
  threads = threads_for(pixels, threads);
  with_dtype(is_bf16, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    T* to = static_cast<T*>(out);
    with_bool(is_far(to, 1, pixels / W * W), [&](auto far) { forward<far>(image, to, pixels, threads); });
  });
}

}  // namespace HDFAST_ISA
