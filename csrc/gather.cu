// gather_frames: keys and values of the frames that each head chose, copied next to those that are always attended to.
#include "device.h"

namespace memflow {
namespace {

constexpr int GATHER_THREADS = 256, COPIES = 4;

__host__ __device__ inline int tiles_of(int64_t tokens, int vectors) {
  return static_cast<int>((tokens * vectors + GATHER_THREADS * COPIES - 1) / (GATHER_THREADS * COPIES));
}

struct Gathered {
  const void *key, *value;
  int64_t key_batch, key_token, key_head;
  int64_t value_batch, value_token, value_head;
  void *packed_key, *packed_value;
};

// One block: GATHER_THREADS * COPIES vectors of one frame (or of all frames behind the candidates) of one head.
// blockIdx: x tile, those of the chosen frames first, place by place; y batch row and head.
template <class E, int VEC>
__global__ void __launch_bounds__(GATHER_THREADS)
gather_kernel(Gathered g, const int32_t* frame_table, int heads, int places, int64_t tokens_per_frame,
              int64_t candidate_frames, int64_t tokens, int head_dim) {
  int64_t batch = blockIdx.y / heads, head = blockIdx.y % heads;
  int vectors = head_dim / VEC, per_place = tiles_of(tokens_per_frame, vectors);
  int place = min(static_cast<int>(blockIdx.x) / per_place, places), tile = blockIdx.x - place * per_place;
  int64_t rest = tokens - candidate_frames * tokens_per_frame;
  int64_t packed_tokens = places * tokens_per_frame + rest;
  int64_t count = place < places ? tokens_per_frame : rest;
  int64_t frame = place < places ? frame_table[(batch * heads + head) * places + place] : candidate_frames;
  bool exists = place == places || (frame >= 0 && frame < candidate_frames);
  int64_t target = ((batch * heads + head) * packed_tokens + place * tokens_per_frame) * head_dim;
  const E* keys = static_cast<const E*>(g.key) + batch * g.key_batch + head * g.key_head;
  const E* values = static_cast<const E*>(g.value) + batch * g.value_batch + head * g.value_head;
  int64_t first = tile * int64_t(GATHER_THREADS * COPIES) + threadIdx.x;
  Vector<E, VEC> key[COPIES] = {}, value[COPIES] = {};
#pragma unroll
  for (int i = 0; i < COPIES; ++i) {
    int64_t index = first + i * GATHER_THREADS;
    if (exists && index < count * vectors) {
      int64_t token = frame * tokens_per_frame + index / vectors, channel = index % vectors * VEC;
      key[i] = load<E, VEC>(keys + token * g.key_token + channel);
      value[i] = load<E, VEC>(values + token * g.value_token + channel);
    }
  }
#pragma unroll
  for (int i = 0; i < COPIES; ++i) {
    int64_t index = first + i * GATHER_THREADS;
    if (index < count * vectors) {
      store<E, VEC>(static_cast<E*>(g.packed_key) + target + index * VEC, key[i]);
      store<E, VEC>(static_cast<E*>(g.packed_value) + target + index * VEC, value[i]);
    }
  }
}

template <class E, int VEC>
int launch_gather(const Gathered& g, const int32_t* frame_table, int64_t batch, int64_t heads, int64_t places,
                  int64_t tokens_per_frame, int64_t candidate_frames, int64_t tokens, int64_t head_dim, void* stream) {
  if (head_dim > INT32_MAX) return MEMFLOW_UNSUPPORTED;
  int64_t rest = tokens - candidate_frames * tokens_per_frame;
  int vectors = static_cast<int>(head_dim / VEC);
  int64_t blocks = places * int64_t(tiles_of(tokens_per_frame, vectors)) + tiles_of(rest, vectors);
  if (blocks == 0) return cudaSuccess;
  if (max(tokens_per_frame, rest) * vectors > INT32_MAX || blocks > INT32_MAX || batch * heads > 65535)
    return MEMFLOW_UNSUPPORTED;
  dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(batch * heads));
  return launch(gather_kernel<E, VEC>, grid, GATHER_THREADS, 0, stream, g, frame_table, heads, places, tokens_per_frame,
                candidate_frames, tokens, head_dim);
}

}  // namespace
}  // namespace memflow

extern "C" int memflow_gather_frames(MemflowStates key, MemflowStates value, int dtype, const int32_t* frame_table,
                                     int64_t batch, int64_t frames, int64_t tokens_per_frame, int64_t heads,
                                     int64_t head_dim, int64_t places, int64_t candidate_frames, void* packed_key,
                                     void* packed_value, void* stream) {
  using namespace memflow;
  if (batch < 1 || frames < 1 || tokens_per_frame < 1 || heads < 1 || head_dim < 1 || places < 0 ||
      candidate_frames < 0 || candidate_frames > frames)
    return MEMFLOW_INVALID;
  if (!known(dtype)) return MEMFLOW_UNSUPPORTED;
  Gathered g{key.data,    value.data,  key.batch,  key.token,    key.head,
             value.batch, value.token, value.head, packed_key, packed_value};
  auto run = [&](auto element, auto vector) {
    using E = decltype(element);
    return launch_gather<E, decltype(vector)::value>(g, frame_table, batch, heads, places, tokens_per_frame,
                                                     candidate_frames, frames * tokens_per_frame, head_dim, stream);
  };
  MemflowStates packed[2] = {{packed_key, 0, 0, 0}, {packed_value, 0, 0, 0}};
  bool wide = aligned(key, dtype, head_dim) && aligned(value, dtype, head_dim) && aligned(packed[0], dtype, head_dim) &&
              aligned(packed[1], dtype, head_dim);
  if (dtype == MEMFLOW_FLOAT32)
    return wide ? run(uint32_t(), Number<4>()) : run(uint32_t(), Number<1>());
  return wide ? run(uint16_t(), Number<8>()) : run(uint16_t(), Number<1>());
}
