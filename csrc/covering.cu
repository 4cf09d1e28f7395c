// cover_frames: the frames that together score high for every token.
#include "device.h"

namespace memflow {
namespace {

constexpr int COVER_THREADS = 256, COVER_WARPS = COVER_THREADS / WARP;
constexpr int64_t MOST_FLOATS = 12288;  // of shared memory, which every chip gives without asking
constexpr float LARGEST = 3.402823466e38f;

int64_t floats_needed(int64_t tokens, int64_t frames) { return 2 * tokens + (COVER_WARPS + 1) * frames + 1; }

// A score without NaN, which does as little for a token as -inf, and without +inf.
template <class T>
__device__ __forceinline__ float known(T score) {
  float x = to_float(score);
  return x != x ? -INFINITY : fminf(x, LARGEST);
}

// All choices of one row, by one block. Token t belongs to warp t % COVER_WARPS until a frame is chosen.
// scores [R, T, F], weights [R, T], prior [R, F], table [R, places].
template <class T>
__global__ void __launch_bounds__(COVER_THREADS)
cover_kernel(const T* scores, const float* weights, const float* prior, int32_t* table, int tokens, int frames,
             int places) {
  float* reached = reinterpret_cast<float*>(memflow_shared);  // [T]
  float* weight = reached + tokens;                           // [T], 0 for a token that does not count
  float* bonus = weight + tokens;                             // [F], -inf for a frame that may not be chosen (any more)
  float* gain = bonus + frames;                               // [COVER_WARPS, F]
  int* winner_of_all = reinterpret_cast<int*>(gain + COVER_WARPS * frames);
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  int64_t row = blockIdx.x;
  scores += row * tokens * frames;
  table += row * places;

  for (int frame = threadIdx.x; frame < frames; frame += COVER_THREADS) {
    float x = prior[row * frames + frame];
    bonus[frame] = x > -INFINITY ? x : -INFINITY;  // NaN is not
  }
  for (int token = threadIdx.x; token < tokens; token += COVER_THREADS) {
    float x = weights[row * tokens + token];
    weight[token] = x > 0 ? fminf(x, LARGEST) : 0.0f;
  }
  __syncthreads();
  for (int token = warp; token < tokens; token += COVER_WARPS) {
    float lowest = LARGEST;
    for (int frame = lane; frame < frames; frame += WARP) {
      if (bonus[frame] == -INFINITY) continue;
      float score = known(scores[static_cast<int64_t>(token) * frames + frame]);
      if (score > -INFINITY) lowest = fminf(lowest, score);
    }
    for (int lanes = WARP / 2; lanes > 0; lanes /= 2) lowest = fminf(lowest, __shfl_xor_sync(ALL_LANES, lowest, lanes));
    if (lane == 0) reached[token] = lowest;
  }
  __syncthreads();

  for (int place = 0; place < places; ++place) {
    for (int frame = lane; frame < frames; frame += WARP) {
      if (bonus[frame] == -INFINITY) continue;
      float sum = 0;
#pragma unroll 4
      for (int token = warp; token < tokens; token += COVER_WARPS)
        if (weight[token] > 0) {
          float score = known(scores[static_cast<int64_t>(token) * frames + frame]);
          sum += weight[token] * fmaxf(score - reached[token], 0.0f);
        }
      gain[warp * frames + frame] = sum;
    }
    __syncthreads();
    if (warp == 0) {
      uint32_t best = 0, winner = 0xffffffffu;
      for (int frame = lane; frame < frames; frame += WARP) {
        if (bonus[frame] == -INFINITY) continue;
        float sum = 0;
        for (int i = 0; i < COVER_WARPS; ++i) sum += gain[i * frames + frame];
        uint32_t key = sortable(sum + bonus[frame]);
        if (key > best) {
          best = key;
          winner = frame;
        }
      }
      uint32_t largest = __reduce_max_sync(ALL_LANES, best);
      winner = __reduce_min_sync(ALL_LANES, best == largest ? winner : 0xffffffffu);  // of equal frames the lower index
      if (lane == 0) {
        table[place] = *winner_of_all = static_cast<int>(winner);  // -1 where none is left
        if (largest > 0) bonus[winner] = -INFINITY;
      }
    }
    __syncthreads();
    int winner = *winner_of_all;
    if (winner >= 0)
      for (int token = threadIdx.x; token < tokens; token += COVER_THREADS)
        reached[token] = fmaxf(reached[token], known(scores[static_cast<int64_t>(token) * frames + winner]));
    __syncthreads();
  }
}

}  // namespace
}  // namespace memflow

extern "C" int memflow_cover_frames(const void* scores, int dtype, const float* weights, const float* prior,
                                    int64_t rows, int64_t tokens, int64_t frames, int64_t k, int32_t* table,
                                    void* stream) {
  using namespace memflow;
  if (rows < 0 || tokens < 0 || frames < 0 || k < 0) return MEMFLOW_INVALID;
  int64_t places = min(k, frames), floats = floats_needed(tokens, frames);
  if (rows > INT32_MAX || floats > MOST_FLOATS || !known(dtype)) return MEMFLOW_UNSUPPORTED;
  if (rows == 0 || places == 0) return cudaSuccess;
  return with_format(dtype, [&](auto format) {
    using T = decltype(format);
    return launch(cover_kernel<T>, dim3(static_cast<unsigned>(rows)), COVER_THREADS, floats * sizeof(float), stream,
                  static_cast<const T*>(scores), weights, prior, table, int(tokens), int(frames), int(places));
  });
}
