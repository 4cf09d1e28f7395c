// replace_frame: one remembered frame gives its slot to another, per batch row.
#include "device.h"

namespace memflow {
namespace {

constexpr int COPY_THREADS = 256, COPIES = 4;  // loads of a thread that are on their way together

// A part of the pool seen as frames of `rows` rows of `columns` runs of `width` elements.
struct Frames {
  void* data;
  int64_t batch, frame, row, column;
};

// Copies from run to run, COPY_THREADS * COPIES vectors of a row's runs per block; the first block also moves the mean.
// E: an unsigned integer as wide as a number.
template <class E, int VEC>
__global__ void __launch_bounds__(COPY_THREADS)
replace_kernel(Frames key, Frames value, Frames mean, const int32_t* slot, const int32_t* source_slot, int64_t slots,
               int64_t columns, int64_t width, int heads, int head_dim) {
  int64_t batch = blockIdx.z, row = blockIdx.y, to = slot[batch], from = source_slot[batch];
  if (to < 0 || to >= slots || from < 0 || from >= slots || to == from) return;
  E* parts[2] = {static_cast<E*>(key.data) + batch * key.batch + row * key.row,
                 static_cast<E*>(value.data) + batch * value.batch + row * value.row};
  int64_t frame[2] = {key.frame, value.frame}, column[2] = {key.column, value.column};
  int64_t vectors = width / VEC, first = blockIdx.x * int64_t(COPY_THREADS * COPIES) + threadIdx.x;
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    Vector<E, VEC> moved[COPIES];
    int64_t offset[COPIES];
#pragma unroll
    for (int i = 0; i < COPIES; ++i) {
      int64_t index = first + i * COPY_THREADS;
      offset[i] = index < columns * vectors ? index / vectors * column[part] + index % vectors * VEC : -1;
      if (offset[i] >= 0) moved[i] = load<E, VEC>(parts[part] + from * frame[part] + offset[i]);
    }
#pragma unroll
    for (int i = 0; i < COPIES; ++i)
      if (offset[i] >= 0) store<E, VEC>(parts[part] + to * frame[part] + offset[i], moved[i]);
  }
  if (blockIdx.x == 0 && row == 0) {
    float* means = static_cast<float*>(mean.data) + batch * mean.batch;
    for (int i = threadIdx.x; i < heads * head_dim; i += COPY_THREADS) {
      int64_t offset = i / head_dim * mean.column + i % head_dim;
      means[to * mean.frame + offset] = means[from * mean.frame + offset];
    }
  }
}

template <class E, int VEC>
int launch_replace(const Frames& key, const Frames& value, const Frames& mean, const int32_t* slot,
                   const int32_t* source_slot, int64_t batch, int64_t slots, int64_t rows, int64_t columns,
                   int64_t width, int64_t heads, int64_t head_dim, void* stream) {
  int64_t blocks = cdiv(columns * (width / VEC), COPY_THREADS * COPIES);
  if (batch > 65535 || rows > 65535 || blocks > INT32_MAX) return MEMFLOW_UNSUPPORTED;
  dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(rows), static_cast<unsigned>(batch));
  return launch(replace_kernel<E, VEC>, grid, COPY_THREADS, 0, stream, key, value, mean, slot, source_slot, slots,
                columns, width, heads, head_dim);
}

bool in_one_piece(const MemflowStates& part, int64_t heads, int64_t head_dim) {
  return part.head == head_dim && part.token == heads * head_dim;
}

bool one_piece_per_head(const MemflowStates& part, int64_t head_dim) { return part.token == head_dim; }

}  // namespace
}  // namespace memflow

extern "C" int memflow_replace_frame(MemflowStates pool_key, MemflowStates pool_value, MemflowStates pool_frame_mean,
                                     int dtype, int64_t batch, int64_t slots, int64_t tokens_per_frame, int64_t heads,
                                     int64_t head_dim, const int32_t* slot, const int32_t* source_slot, void* stream) {
  using namespace memflow;
  if (batch < 1 || slots < 1 || tokens_per_frame < 1 || heads < 1 || head_dim < 1) return MEMFLOW_INVALID;
  if (!known(dtype)) return MEMFLOW_UNSUPPORTED;
  int64_t rows = tokens_per_frame, columns = heads, width = head_dim;
  bool per_head = false;
  if (in_one_piece(pool_key, heads, head_dim) && in_one_piece(pool_value, heads, head_dim)) {
    width *= rows * columns;
    rows = columns = 1;
  } else if (one_piece_per_head(pool_key, head_dim) && one_piece_per_head(pool_value, head_dim)) {
    per_head = true;
    width *= rows;
    rows = heads;
    columns = 1;
  }
  auto frames = [&](const MemflowStates& part) {
    return Frames{part.data, part.batch, part.token * tokens_per_frame, per_head ? part.head : part.token, part.head};
  };
  Frames mean{pool_frame_mean.data, pool_frame_mean.batch, pool_frame_mean.token, 0, pool_frame_mean.head};
  Frames key = frames(pool_key), value = frames(pool_value);
  auto run = [&](auto element, auto vector) {
    using E = decltype(element);
    return launch_replace<E, decltype(vector)::value>(key, value, mean, slot, source_slot, batch, slots, rows, columns,
                                                      width, heads, head_dim, stream);
  };
  bool wide = aligned(pool_key, dtype, head_dim) && aligned(pool_value, dtype, head_dim);
  if (dtype == MEMFLOW_FLOAT32)
    return wide ? run(uint32_t(), Number<4>()) : run(uint32_t(), Number<1>());
  return wide ? run(uint16_t(), Number<8>()) : run(uint16_t(), Number<1>());
}
