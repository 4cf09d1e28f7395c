// qk_norm_rope_write: RMS norm over all heads, 3-axis rotation, and the write into the pool, in one launch.
#include <algorithm>
#include <type_traits>

#include "turns.cuh"

namespace memflow {
namespace {

constexpr int RUN = 12;    // tokens of a block
constexpr int GROUP = 12;  // runs whose sums are added up by one block, then groups by another

struct Arguments {
  MemflowStates query, key, value, pool_key, pool_value, pool_frame_mean;
  const void *weight_q, *weight_k, *start;  // weights null: query and key are normed already
  int weight_q_dtype, weight_k_dtype, start_bytes;
  const int32_t* slots;
  void* new_query;
  float* query_mean;  // null: not asked for
  float* sums;        // [B, frames, runs, 2, H*D]: keys, queries; [.., 1, ..] without query_mean
  float* group_sums;  // the same per group
  float* frame_sums;  // [B, frames, H*D]: queries
  uint32_t* counters; // [B, frames, groups], [B, frames], [B]: parts that are done
  float eps;
  int64_t start_frame, pool_slots;
  int frames, rows, cols, heads, head_dim, runs, groups;
};

__device__ __forceinline__ float read_number(const void* address, int dtype, int64_t index) {
  if (dtype == MEMFLOW_FLOAT32) return static_cast<const float*>(address)[index];
  if (dtype == MEMFLOW_BFLOAT16) return to_float(static_cast<const __nv_bfloat16*>(address)[index]);
  return to_float(static_cast<const __half*>(address)[index]);
}

// Counts this block as done; true in the block that is the last of `parts` to come here. What the others wrote before
// is then visible to it.
__device__ __forceinline__ bool last_of(uint32_t* counter, int parts, uint32_t* shared) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *shared = atomicAdd(counter, 1u);
  __syncthreads();
  bool last = *shared == static_cast<uint32_t>(parts - 1);
  if (last) __threadfence();
  return last;
}

// sum[v] = the sum of `parts` rows of `width` numbers, at the channels of this thread, always in the same order.
template <int VEC>
__device__ __forceinline__ Vector<float, VEC> add_rows(const float* rows, int parts, int64_t width, int channel) {
  Vector<float, VEC> sum = {};
#pragma unroll 4
  for (int part = 0; part < parts; ++part) {
#pragma unroll
    for (int i = 0; i < VEC; ++i) sum.x[i] += __ldcg(rows + part * width + channel + i);
  }
  return sum;
}

// The weights of VEC channels: where they are loaded 16 bytes at a time, in the format of the states, to save registers.
template <class T, int VEC>
using Weights = Vector<std::conditional_t<VEC * sizeof(T) == 16, T, float>, VEC>;

template <class T, int VEC>
__device__ __forceinline__ Weights<T, VEC> read_weights(const void* address, int dtype, int channel) {
  if (!address) {  // x * 1 is x, bit by bit
    Weights<T, VEC> ones;
#pragma unroll
    for (int i = 0; i < VEC; i += 2) round_two(ones.x + i, 1.0f, 1.0f);
    return ones;
  }
  if constexpr (VEC * sizeof(T) == 16) {
    return load<T, VEC>(static_cast<const T*>(address) + channel);
  } else {
    Weights<T, VEC> weights;
#pragma unroll
    for (int i = 0; i < VEC; ++i) weights.x[i] = read_number(address, dtype, channel + i);
    return weights;
  }
}

// The angle, in 2^-64 of a circle, of one channel pair of one token of a frame; where a block's threads have their pairs.
struct Angle {
  int axis, row, col;
  uint64_t speed, of_frame;

  __device__ __forceinline__ uint64_t phase() const {
    return axis == 0 ? of_frame : static_cast<uint32_t>(axis == 1 ? row : col) * speed;
  }
  __device__ __forceinline__ void forward(int tokens, int cols) {
    for (col += tokens; col >= cols; col -= cols) ++row;
  }
};

// Sums of KINDS numbers over the lanes of a warp: lane k of every KINDS lanes gets that of x[k].
template <int KINDS>
__device__ __forceinline__ float warp_sums(float (&x)[KINDS], int lane) {
#pragma unroll
  for (int half = KINDS / 2; half > 0; half /= 2) {
#pragma unroll
    for (int i = 0; i < half; ++i) {
      bool upper = lane & half;
      float other = __shfl_xor_sync(ALL_LANES, upper ? x[i] : x[i + half], half);
      x[i] = (upper ? x[i + half] : x[i]) + other;
    }
  }
  for (int lanes = 16; lanes >= KINDS; lanes /= 2) x[0] += __shfl_xor_sync(ALL_LANES, x[0], lanes);
  return x[0];
}

// One block of at most THREADS: a run of tokens of one frame of one batch row, AT_ONCE of them at a time. Every thread
// owns OWN vectors of VEC channels, from thread to thread. Then the sums of the stored keys (and of the new queries) go up
// a tree: the last block of a group of runs adds up the group, the last group of a frame the frame, the last frame the
// batch row. Who is last changes from run to run, what is added in which order does not.
template <class T, int VEC, int OWN, int AT_ONCE, int THREADS>
__global__ void __launch_bounds__(THREADS, THREADS == 192 ? 3 : 1)
norm_rope_write_kernel(const __grid_constant__ Arguments a) {
  constexpr int KINDS = 2 * AT_ONCE, WARPS = THREADS / WARP;  // squares: of query and key of each token
  int run = blockIdx.x, frame = blockIdx.y, pairs = a.head_dim / 2, channels = a.heads * a.head_dim;
  int64_t batch = blockIdx.z;
  int thread = threadIdx.x, threads = blockDim.x, warp = thread / WARP, lane = thread % WARP;
  int tokens = a.rows * a.cols, vectors = channels / VEC;
  // shared memory: two of everything, for one barrier per step
  float* squares = reinterpret_cast<float*>(memflow_shared);                   // [2, WARPS, KINDS]
  float2* turns = reinterpret_cast<float2*>(squares + 2 * WARPS * KINDS);      // [2, AT_ONCE, pairs] cos, sin
  uint32_t* ticket = reinterpret_cast<uint32_t*>(turns + 2 * AT_ONCE * pairs);

  for (int i = thread; i < 2 * WARPS * KINDS; i += threads) squares[i] = 0;  // of warps that are not there
  int64_t first_frame = a.start_frame;
  if (a.start) first_frame += a.start_bytes == 8 ? *static_cast<const int64_t*>(a.start)
                                                 : *static_cast<const int32_t*>(a.start);
  int64_t slot = a.slots[frame];
  bool kept = slot >= 0 && slot < a.pool_slots;

  // a block has at least as many threads as it turns pairs of channels at a time
  int pair = thread % pairs, first = run * RUN + thread / pairs;
  uint64_t speed = circle_speed(pair, pairs);
  Angle angle{axis_of(pair, pairs), first / a.cols, first % a.cols, speed, (first_frame + frame) * speed};
  int head[OWN], dim[OWN];
  bool exists[OWN];
  Weights<T, VEC> weight_q[OWN] = {}, weight_k[OWN] = {};
  float key_sum[OWN][VEC] = {}, query_sum[OWN][VEC] = {};
#pragma unroll
  for (int v = 0; v < OWN; ++v) {
    int channel = (thread + v * threads) * VEC;
    exists[v] = thread + v * threads < vectors;
    head[v] = channel / a.head_dim;
    dim[v] = channel % a.head_dim;
    if (!exists[v]) continue;
    weight_q[v] = read_weights<T, VEC>(a.weight_q, a.weight_q_dtype, channel);
    weight_k[v] = read_weights<T, VEC>(a.weight_k, a.weight_k_dtype, channel);
  }
  // where vector v of token t lies, counted from the run's first token (or its place in the pool)
  int64_t token = int64_t(frame) * tokens + run * RUN, target = slot * tokens + run * RUN;
  auto at = [&](const MemflowStates& x, int64_t number, int v) {
    return static_cast<T*>(x.data) + batch * x.batch + number * x.token + head[v] * x.head + dim[v];
  };
  MemflowStates new_query{a.new_query, int64_t(a.frames) * tokens * channels, channels, a.head_dim};
  __syncthreads();  // squares

  int left = min(RUN, tokens - run * RUN);  // tokens of this block that are still to be done
  for (int step = 0; left > 0; left -= AT_ONCE, step ^= 1) {
    Vector<T, VEC> q[AT_ONCE][OWN] = {}, k[AT_ONCE][OWN] = {}, stored[AT_ONCE][OWN];
#pragma unroll
    for (int t = 0; t < AT_ONCE; ++t) {  // all loads first, so that they wait for memory together
#pragma unroll
      for (int v = 0; v < OWN; ++v) {
        if (!exists[v] || t >= left) continue;
        q[t][v] = load<T, VEC>(at(a.query, token + t, v));
        if (!kept) continue;
        k[t][v] = load<T, VEC>(at(a.key, token + t, v));
        stored[t][v] = load<T, VEC>(at(a.value, token + t, v));
      }
    }
    float2* turn = turns + step * AT_ONCE * pairs;
    if (thread < AT_ONCE * pairs) turn[thread] = circle_turn(angle.phase());
    angle.forward(AT_ONCE, a.cols);
    float square[KINDS] = {};
#pragma unroll
    for (int t = 0; t < AT_ONCE; ++t) {
#pragma unroll
      for (int v = 0; v < OWN; ++v) {
#pragma unroll
        for (int i = 0; i < VEC; ++i) {
          square[2 * t] += to_float(q[t][v].x[i]) * to_float(q[t][v].x[i]);
          square[2 * t + 1] += to_float(k[t][v].x[i]) * to_float(k[t][v].x[i]);
        }
      }
    }
#pragma unroll
    for (int t = 0; t < AT_ONCE; ++t) {
#pragma unroll
      for (int v = 0; v < OWN; ++v)
        if (kept && exists[v] && t < left) store<T, VEC>(at(a.pool_value, target + t, v), stored[t][v]);
    }
    float* of_warps = squares + step * WARPS * KINDS;
    float sum = warp_sums<KINDS>(square, lane);
    if (lane < KINDS) of_warps[warp * KINDS + lane] = sum;
    __syncthreads();
    float total = 0;  // lane k: of kind k % KINDS
#pragma unroll
    for (int i = 0; i < WARPS; ++i) total += of_warps[i * KINDS + lane % KINDS];
    float inverse = a.weight_q ? 1.0f / sqrtf(total / static_cast<float>(channels) + a.eps) : 1.0f;
#pragma unroll
    for (int t = 0; t < AT_ONCE; ++t) {
      float inverse_query = __shfl_sync(ALL_LANES, inverse, 2 * t);
      float inverse_key = __shfl_sync(ALL_LANES, inverse, 2 * t + 1);
#pragma unroll
      for (int v = 0; v < OWN; ++v) {
        if (!exists[v] || t >= left) continue;
        const float2* own_turn = turn + t * pairs + dim[v] / 2;
        norm_rotate(q[t][v], weight_q[v], inverse_query, own_turn, query_sum[v]);
        store<T, VEC>(at(new_query, token + t, v), q[t][v]);
        if (!kept) continue;
        norm_rotate(k[t][v], weight_k[v], inverse_key, own_turn, key_sum[v]);
        store<T, VEC>(at(a.pool_key, target + t, v), k[t][v]);
      }
    }
    token += AT_ONCE;
    target += AT_ONCE;
  }

  if (!kept && !a.query_mean) return;  // the same in all blocks of a frame
  int kinds = a.query_mean ? 2 : 1, group = run / GROUP;
  int64_t place = batch * a.frames + frame, width = int64_t(kinds) * channels;
  float* row = a.sums + (place * a.runs + run) * width;
#pragma unroll
  for (int v = 0; v < OWN; ++v) {
    if (!exists[v]) continue;
    int channel = head[v] * a.head_dim + dim[v];
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
      row[channel + i] = key_sum[v][i];
      if (kinds == 2) row[channels + channel + i] = query_sum[v][i];
    }
  }
  uint32_t *group_counters = a.counters, *frame_counters = group_counters + int64_t(gridDim.z) * a.frames * a.groups;
  uint32_t* row_counters = frame_counters + int64_t(gridDim.z) * a.frames;
  int in_group = min(GROUP, a.runs - group * GROUP);
  if (!last_of(group_counters + place * a.groups + group, in_group, ticket)) return;
  const float* of_runs = a.sums + (place * a.runs + group * GROUP) * width;
  float* of_group = a.group_sums + (place * a.groups + group) * width;
  for (int channel = thread * VEC; channel < width; channel += threads * VEC) {
    Vector<float, VEC> sum = add_rows<VEC>(of_runs, in_group, width, channel);
#pragma unroll
    for (int i = 0; i < VEC; ++i) of_group[channel + i] = sum.x[i];
  }
  if (!last_of(frame_counters + place, a.groups, ticket)) return;
  const float* of_groups = a.group_sums + place * a.groups * width;
  float* mean = static_cast<float*>(a.pool_frame_mean.data) + batch * a.pool_frame_mean.batch +
                slot * a.pool_frame_mean.token;
  for (int channel = thread * VEC; channel < width; channel += threads * VEC) {
    Vector<float, VEC> sum = add_rows<VEC>(of_groups, a.groups, width, channel);
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
      int own = channel + i;
      if (own >= channels) {
        a.frame_sums[place * channels + own - channels] = sum.x[i];
      } else if (kept) {
        mean[own / a.head_dim * a.pool_frame_mean.head + own % a.head_dim] = sum.x[i] / static_cast<float>(tokens);
      }
    }
  }
  if (!a.query_mean || !last_of(row_counters + batch, a.frames, ticket)) return;
  for (int channel = thread * VEC; channel < channels; channel += threads * VEC) {
    Vector<float, VEC> sum = add_rows<VEC>(a.frame_sums + batch * a.frames * channels, a.frames, channels, channel);
#pragma unroll
    for (int i = 0; i < VEC; ++i)
      a.query_mean[batch * channels + channel + i] = sum.x[i] / (static_cast<float>(tokens) * a.frames);
  }
}

template <class T, int VEC, int OWN, int AT_ONCE, int THREADS>
int launch_write(const Arguments& a, int64_t batch, void* stream) {
  int64_t vectors = a.heads * a.head_dim / VEC, pairs = a.head_dim / 2;
  int threads = static_cast<int>(cdiv(std::max(cdiv(vectors, OWN), AT_ONCE * pairs), WARP)) * WARP;
  int64_t shared_bytes = 2 * AT_ONCE * pairs * 8 + THREADS / WARP * 4 * AT_ONCE * 4 + 16;
  dim3 grid(a.runs, a.frames, static_cast<unsigned>(batch));
  return launch(norm_rope_write_kernel<T, VEC, OWN, AT_ONCE, THREADS>, grid, threads, shared_bytes, stream, a);
}

struct Workspace {
  int64_t counters, sums, group_sums, frame_sums;  // numbers of 4 bytes; the counters in whole 16 bytes
  int64_t bytes() const { return 4 * (counters + sums + group_sums + frame_sums); }
};

Workspace workspace_of(int64_t batch, int64_t frames, int64_t tokens_per_frame, int64_t channels, bool query_mean) {
  int64_t runs = cdiv(tokens_per_frame, RUN), groups = cdiv(runs, GROUP), kinds = query_mean ? 2 : 1;
  int64_t counters = cdiv(batch * frames * (groups + 1) + batch, 4) * 4;
  return {counters, batch * frames * runs * kinds * channels, batch * frames * groups * kinds * channels,
          query_mean ? batch * frames * channels : 0};
}

}  // namespace
}  // namespace memflow

extern "C" int64_t memflow_qk_norm_rope_write_workspace(int64_t batch, int64_t frames, int64_t tokens_per_frame,
                                                        int64_t heads, int64_t head_dim, int with_query_mean) {
  return memflow::workspace_of(batch, frames, tokens_per_frame, heads * head_dim, with_query_mean != 0).bytes();
}

extern "C" int memflow_qk_norm_rope_write(MemflowStates query, MemflowStates key, MemflowStates value, int dtype,
                                          const void* weight_q, int weight_q_dtype, const void* weight_k,
                                          int weight_k_dtype, int64_t batch, int64_t frames, int64_t rows, int64_t cols,
                                          int64_t heads, int64_t head_dim, double eps, int64_t start_frame,
                                          const void* start, int start_bytes, MemflowStates pool_key,
                                          MemflowStates pool_value, MemflowStates pool_frame_mean, int64_t pool_slots,
                                          const int32_t* slots, void* new_query, float* query_mean, void* workspace,
                                          void* stream) {
  using namespace memflow;
  int64_t tokens = rows * cols, channels = heads * head_dim;
  if (batch < 1 || frames < 1 || rows < 1 || cols < 1 || heads < 1 || head_dim < 2 || head_dim % 2 || pool_slots < 1 ||
      !(eps >= 0) || !weight_q != !weight_k || (start && start_bytes != 4 && start_bytes != 8))
    return MEMFLOW_INVALID;
  if (!known(dtype) || !known(weight_q_dtype) || !known(weight_k_dtype) || head_dim > 256 || channels > 8192 ||
      tokens > INT32_MAX || frames > 65535 || batch > 65535)
    return MEMFLOW_UNSUPPORTED;
  Workspace sizes = workspace_of(batch, frames, tokens, channels, query_mean != nullptr);
  auto* counters = static_cast<uint32_t*>(workspace);
  float* sums = static_cast<float*>(workspace) + sizes.counters;
  Arguments a{query,    key,      value,        pool_key,       pool_value,     pool_frame_mean,
              weight_q, weight_k, start,        weight_q_dtype, weight_k_dtype, start_bytes,
              slots,    new_query, query_mean,  sums,           sums + sizes.sums, sums + sizes.sums + sizes.group_sums,
              counters, static_cast<float>(eps), start_frame, pool_slots, int(frames), int(rows), int(cols),
              int(heads), int(head_dim), int(cdiv(tokens, RUN)), int(cdiv(cdiv(tokens, RUN), GROUP))};
  cudaError_t error = cudaMemsetAsync(counters, 0, sizes.counters * 4, static_cast<cudaStream_t>(stream));
  if (error != cudaSuccess) return error;
  MemflowStates written{new_query, 0, 0, 0};
  // weights of another format (none have the states' own) go the way of rows that do not begin at multiples of 16 bytes
  bool wide = weight_q_dtype == dtype && weight_k_dtype == dtype &&
              (reinterpret_cast<uintptr_t>(weight_q) | reinterpret_cast<uintptr_t>(weight_k)) % 16 == 0;
  for (const MemflowStates& part : {query, key, value, pool_key, pool_value, written})
    wide = wide && aligned(part, dtype, head_dim);
  return with_format(dtype, [&](auto format) -> int {
    using T = decltype(format);
    constexpr int VEC = 16 / sizeof(T);
    if (wide && channels <= 192 * VEC && head_dim <= 192) return launch_write<T, VEC, 1, 2, 192>(a, batch, stream);
    if (wide && channels <= 2 * 384 * VEC) return launch_write<T, VEC, 2, 1, 384>(a, batch, stream);
    return launch_write<T, 2, 4, 1, 1024>(a, batch, stream);
  });
}
