#include "../ops.h"
#include "../row_sums.h"

namespace HDFAST_ISA {
namespace {

// pred - image / 255, with 1/255 in two parts: more accurate than a division, and much cheaper.
template <class T, class Lanes>
HDFAST_INLINE Vf difference(const T* pred, const uint8_t* image, Lanes lanes) {
  const Vf pixel = load(image, lanes);
  const float high = 1 / 255.f, low = float(1 / 255. - high);
  return (load(pred, lanes) - pixel * high) - pixel * low;
}

template <class T>
void forward(const T* pred, const uint8_t* image, float* loss, int64_t rows, int64_t width, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    loss[r] = sum_blocks(width, [&](int64_t i, auto lanes) {
      const Vf d = difference(pred + r * width + i, image + r * width + i, lanes);
      return d * d;
    });
  }
}

template <bool far, class T>
void backward(const float* grad, const T* pred, const uint8_t* image, T* grad_pred, int64_t rows, int64_t width,
              int threads) {
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
      const float twice = 2.f * grad[r];
      for_lanes(width, [&](int64_t i, auto lanes) {
        const int64_t at = r * width + i;
        put<far>(grad_pred + at, twice * difference(pred + at, image + at, lanes), lanes);
      });
    }
    if (far) fence();
  }
}

}  // namespace

void image_loss_forward(const void* pred, const uint8_t* image, float* loss, int64_t rows, int64_t width, bool is_bf16,
                        int threads) {
  threads = threads_for(rows * width, threads);
  with_dtype(is_bf16, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    forward(static_cast<const T*>(pred), image, loss, rows, width, threads);
  });
}

void image_loss_backward(const float* grad, const void* pred, const uint8_t* image, void* grad_pred, int64_t rows,
                         int64_t width, bool is_bf16, int threads) {
  threads = threads_for(rows * width, threads);
  with_dtype(is_bf16, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    T* out = static_cast<T*>(grad_pred);
    with_bool(is_far(out, rows, width), [&](auto far) {
      backward<far>(grad, static_cast<const T*>(pred), image, out, rows, width, threads);
    });
  });
}

}  // namespace HDFAST_ISA
