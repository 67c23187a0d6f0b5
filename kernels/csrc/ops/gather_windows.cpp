#include "../ops.h"

#include <cstring>

namespace HDFAST_ISA {

int64_t gather_windows(const uint8_t* storage, int64_t row_bytes, int64_t rows, const int64_t* starts, int64_t batch,
                       int64_t length, int64_t ring, uint8_t* out, int threads) {
  for (int64_t b = 0; b < batch; b++)
    if (starts[b] < 0 || starts[b] >= rows) return b;
  const int64_t copies = length * batch;
  if (copies * row_bytes < 1 << 16) threads = 1;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < copies; i++) {
    const int64_t t = i / batch, start = starts[i % batch];
    const int64_t ring_start = start / ring * ring;
    const int64_t row = ring_start + (start - ring_start + t) % ring;
    std::memcpy(out + i * row_bytes, storage + row * row_bytes, row_bytes);
  }
  return -1;
}

}  // namespace HDFAST_ISA
