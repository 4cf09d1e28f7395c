// select_frames: the candidate frames that each head attends to.
#include "sums.h"

namespace memflow {
namespace {

constexpr int64_t MOST_FRAMES = 12288;  // their scores fit into the shared memory that every chip gives without asking
constexpr int MOST_CHANNELS = 256;

// What a frame's place in shared memory holds: 0 for a frame that may not be chosen, TAKEN for one that has been, else
// its score as `sortable` maps it.
constexpr uint32_t NOT_FREE = 0, TAKEN = 1;

// One warp makes the choice of one head for one block of queries. Sums of queries serve as well as means: the order of
// the scores is the same.
// queries [B, blocks, parts, H, D]: parts to be added up; table [B, H, blocks, places].
__global__ void __launch_bounds__(WARP)
select_kernel(const float* queries, int parts, const float* frame_mean, int64_t mean_batch, int64_t mean_frame,
              int64_t mean_head, const uint8_t* valid, int32_t* table, int64_t heads, int64_t blocks, int frames,
              int head_dim, int places) {
  constexpr int PER_LANE = MOST_CHANNELS / WARP;
  uint32_t* keys = reinterpret_cast<uint32_t*>(memflow_shared);  // [frames]; a lane touches lane, lane + 32, ... only
  int lane = threadIdx.x;
  int64_t row = blockIdx.x;
  int64_t block = row % blocks, head = row / blocks % heads, batch = row / blocks / heads;

  float query[PER_LANE];
#pragma unroll
  for (int i = 0; i < PER_LANE; ++i) query[i] = 0;
  for (int part = 0; part < parts; ++part) {
    const float* source = queries + (((batch * blocks + block) * parts + part) * heads + head) * head_dim;
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i)
      if (lane + i * WARP < head_dim) query[i] += source[lane + i * WARP];
  }
#pragma unroll 4
  for (int frame = 0; frame < frames; ++frame) {
    const float* mean = frame_mean + batch * mean_batch + frame * mean_frame + head * mean_head;
    float score = 0;
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i)
      if (lane + i * WARP < head_dim) score += query[i] * mean[lane + i * WARP];
    score = warp_sum(score);
    bool free = !valid || valid[batch * frames + frame];
    if (lane == frame % WARP) keys[frame] = free ? sortable(score) : NOT_FREE;
  }

  for (int place = 0; place < places; ++place) {
    uint32_t best = 0, winner = 0xffffffffu;
    for (int frame = lane; frame < frames; frame += WARP) {
      if (keys[frame] > best) {
        best = keys[frame];
        winner = frame;
      }
    }
    uint32_t largest = __reduce_max_sync(ALL_LANES, best);
    if (largest <= TAKEN) break;
    winner = __reduce_min_sync(ALL_LANES, best == largest ? winner : 0xffffffffu);  // of equal scores the lower index
    if (winner % WARP == static_cast<uint32_t>(lane)) keys[winner] = TAKEN;
  }

  int32_t* out = table + row * places;
  int chosen = 0;
  for (int start = 0; start < frames; start += WARP) {
    bool taken = start + lane < frames && keys[start + lane] == TAKEN;
    uint32_t lanes = __ballot_sync(ALL_LANES, taken);
    if (taken) out[chosen + __popc(lanes & ((1u << lane) - 1))] = start + lane;
    chosen += __popc(lanes);
  }
  for (int place = chosen + lane; place < places; place += WARP) out[place] = -1;
}

}  // namespace
}  // namespace memflow

extern "C" int64_t memflow_select_frames_workspace(int64_t batch, int64_t queries, int64_t heads, int64_t head_dim,
                                                   int64_t query_block) {
  if (queries < 1) return 0;
  int64_t size = query_block ? min(query_block, queries) : queries;
  return batch * memflow::cdiv(queries, size) * memflow::splits_of(size) * heads * head_dim *
         static_cast<int64_t>(sizeof(float));
}

extern "C" int memflow_select_frames(MemflowStates query, int dtype, const float* query_mean, MemflowStates frame_mean,
                                     const uint8_t* valid, int64_t batch, int64_t queries, int64_t frames,
                                     int64_t heads, int64_t head_dim, int64_t top_k, int64_t query_block,
                                     int32_t* table, void* workspace, void* stream) {
  using namespace memflow;
  if (batch < 1 || queries < 1 || frames < 0 || heads < 1 || head_dim < 1 || top_k < 1 || query_block < 0)
    return MEMFLOW_INVALID;
  if (head_dim > MOST_CHANNELS || frames > MOST_FRAMES) return MEMFLOW_UNSUPPORTED;
  int64_t places = min(top_k, frames);
  if (places == 0) return cudaSuccess;
  int64_t size = query_block ? min(query_block, queries) : queries;
  int64_t blocks = cdiv(queries, size), parts = 1;
  if (batch * heads * blocks > INT32_MAX) return MEMFLOW_UNSUPPORTED;
  const float* sums = query_mean;
  if (!sums) {
    parts = splits_of(size);
    float* target = static_cast<float*>(workspace);
    int error =
        segment_sums(query, dtype, nullptr, target, batch, queries, size, parts, heads, head_dim, false, stream);
    if (error) return error;
    sums = target;
  }
  return launch(select_kernel, dim3(static_cast<unsigned>(batch * heads * blocks)), WARP, frames * sizeof(uint32_t),
                stream, sums, parts, static_cast<const float*>(frame_mean.data), frame_mean.batch, frame_mean.token,
                frame_mean.head, valid, table, heads, blocks, frames, head_dim, places);
}
