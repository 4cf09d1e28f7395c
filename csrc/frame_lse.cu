// prompt_relevance "softmax": scores are never stored; a block streams over the keys of one frame and keeps, per text
// token, the largest logit and the sum. Frames are independent that way, which gives work to every multiprocessor.
#include "frame_lse.h"

#include "tiles.cuh"

namespace memflow {
namespace {

constexpr int TEXT = 128, KEYS = 64, LSE_THREADS = TEXT / 16 * WARP;
constexpr int ROWS = 64, CHANNELS = 32, EXACT_THREADS = 256;  // tiles of the kernel without tensor cores

// blockIdx: x tile of TEXT text tokens and frame, y head, z batch row.
template <class T, int D>
__global__ void __launch_bounds__(LSE_THREADS, 2) tensor_lse_kernel(const __grid_constant__ FrameLse a) {
  constexpr uint32_t TEXT_BYTES = TEXT * D * 2, KEY_BYTES = KEYS * D * 2;
  const uint32_t texts = shared_address(memflow_shared), stages = texts + TEXT_BYTES;  // [2]
  int lane = threadIdx.x % WARP, warp_row = threadIdx.x / WARP * 16;
  int64_t head = blockIdx.y, batch = blockIdx.z;
  int frame = blockIdx.x % a.frames, first_text = blockIdx.x / a.frames * TEXT;
  const T* text = static_cast<const T*>(a.text.data) + batch * a.text.batch + head * a.text.head +
                  int64_t(first_text) * a.text.token;
  const T* keys = static_cast<const T*>(a.key.data) + batch * a.key.batch + head * a.key.head +
                  int64_t(frame) * a.tokens_per_frame * a.key.token;
  auto load_keys = [&](int start, uint32_t stage) {
    load_tile<T, D, KEYS, LSE_THREADS, true>(stage, keys + int64_t(start) * a.key.token, a.key.token,
                                             a.tokens_per_frame - start);
    cp_async_commit();
  };
  load_tile<T, D, TEXT, LSE_THREADS, true>(texts, text, a.text.token, a.tokens - first_text);
  load_keys(0, stages);
  uint32_t fragment[D / 16][4];
  float top[2] = {LOWEST, LOWEST}, mass[2] = {}, scale = fmaxf(fabsf(a.scale), 1e-30f);
  for (int start = 0; start < a.tokens_per_frame; start += KEYS) {
    uint32_t stage = stages + start / KEYS % 2 * KEY_BYTES, other = stages + (start / KEYS + 1) % 2 * KEY_BYTES;
    cp_async_wait<0>();
    __syncthreads();  // these tiles are there, and nobody reads the other ones any more
    if (start == 0) load_query<D>(fragment, texts, warp_row, a.scale < 0 ? 0x80008000u : 0u);
    if (start + KEYS < a.tokens_per_frame) load_keys(start + KEYS, other);
    float logits[KEYS / 8][4], shrink[2];
    multiply_keys<T, D, KEYS>(logits, fragment, stage);
    if (a.tokens_per_frame - start < KEYS) mask_keys<KEYS>(logits, a.tokens_per_frame - start);
    online_softmax<KEYS>(logits, scale, top, mass, shrink);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int token = first_text + warp_row + lane / 4 + 8 * half;
    float sum = row_sum(mass[half]);
    if (lane % 4 == 0 && token < a.tokens)
      a.lse[((batch * a.heads + head) * a.tokens + token) * a.frames + frame] = top[half] + log2f(sum);
  }
}

// The same in float32: every thread has 4 text tokens and 4 keys of a tile. Any D, any strides, any format.
template <class T>
__global__ void __launch_bounds__(EXACT_THREADS) exact_lse_kernel(const __grid_constant__ FrameLse a) {
  float* texts = reinterpret_cast<float*>(memflow_shared);  // [CHANNELS, ROWS + 1]
  float* keys = texts + CHANNELS * (ROWS + 1);              // [CHANNELS, ROWS + 1]
  int64_t head = blockIdx.y, batch = blockIdx.z;
  int frame = blockIdx.x % a.frames, first_text = blockIdx.x / a.frames * ROWS;
  int column = threadIdx.x % 16, row = threadIdx.x / 16;  // of 16 x 16 threads; each takes every 16th row and column
  const T* text = static_cast<const T*>(a.text.data) + batch * a.text.batch + head * a.text.head +
                  int64_t(first_text) * a.text.token;
  const T* key = static_cast<const T*>(a.key.data) + batch * a.key.batch + head * a.key.head +
                 int64_t(frame) * a.tokens_per_frame * a.key.token;
  float top[4] = {LOWEST, LOWEST, LOWEST, LOWEST}, mass[4] = {};
  for (int start = 0; start < a.tokens_per_frame; start += ROWS) {
    float logits[4][4] = {};
    for (int channel = 0; channel < a.head_dim; channel += CHANNELS) {
      __syncthreads();  // nobody reads the tiles any more
      for (int i = threadIdx.x; i < ROWS * CHANNELS; i += EXACT_THREADS) {
        int own = i % CHANNELS, line = i / CHANNELS;
        bool inside = channel + own < a.head_dim;
        texts[own * (ROWS + 1) + line] = inside && first_text + line < a.tokens
                                             ? to_float(text[line * a.text.token + channel + own])
                                             : 0.0f;
        keys[own * (ROWS + 1) + line] = inside && start + line < a.tokens_per_frame
                                            ? to_float(key[int64_t(start + line) * a.key.token + channel + own])
                                            : 0.0f;
      }
      __syncthreads();  // the tiles are there
#pragma unroll 8
      for (int own = 0; own < CHANNELS; ++own) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j)
            logits[i][j] += texts[own * (ROWS + 1) + row + 16 * i] * keys[own * (ROWS + 1) + column + 16 * j];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float new_top = top[i];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        logits[i][j] = start + column + 16 * j < a.tokens_per_frame ? logits[i][j] * a.scale : -INFINITY;
        new_top = fmaxf(new_top, logits[i][j]);
      }
      mass[i] *= exp2f(top[i] - new_top);
#pragma unroll
      for (int j = 0; j < 4; ++j) mass[i] += exp2f(logits[i][j] - new_top);
      top[i] = new_top;
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {  // the 16 threads of a row are neighbours in a warp
    for (int lanes = 8; lanes; lanes /= 2) {
      float other_top = __shfl_xor_sync(ALL_LANES, top[i], lanes), other = __shfl_xor_sync(ALL_LANES, mass[i], lanes);
      float new_top = fmaxf(top[i], other_top);
      mass[i] = mass[i] * exp2f(top[i] - new_top) + other * exp2f(other_top - new_top);
      top[i] = new_top;
    }
    int token = first_text + row + 16 * i;
    if (column == 0 && token < a.tokens)
      a.lse[((batch * a.heads + head) * a.tokens + token) * a.frames + frame] = top[i] + log2f(mass[i]);
  }
}

template <class T, int D>
int launch_tensor(const FrameLse& task, dim3 grid, void* stream) {
  grid.x = static_cast<unsigned>(task.frames * cdiv(task.tokens, TEXT));
  return launch(tensor_lse_kernel<T, D>, grid, LSE_THREADS, (TEXT + 2 * KEYS) * D * 2, stream, task);
}

}  // namespace

int launch_frame_lse(const FrameLse& task, int dtype, int64_t batch, void* stream) {
  dim3 grid(1, task.heads, static_cast<unsigned>(batch));
  bool tensor = aligned(task.text, dtype, task.head_dim) && aligned(task.key, dtype, task.head_dim);
  return with_format(dtype, [&](auto format) -> int {
    using T = decltype(format);
    if constexpr (sizeof(T) == 2) {
      if (tensor && task.head_dim == 64) return launch_tensor<T, 64>(task, grid, stream);
      if (tensor && task.head_dim == 128) return launch_tensor<T, 128>(task, grid, stream);
    }
    grid.x = static_cast<unsigned>(task.frames * cdiv(task.tokens, ROWS));
    return launch(exact_lse_kernel<T>, grid, EXACT_THREADS, 2 * CHANNELS * (ROWS + 1) * sizeof(float), stream, task);
  });
}

}  // namespace memflow
