// memory_attention: partial results of a tile of queries, put together by their mass, always in the same order.
#include "attention.h"
#include "tiles.cuh"

namespace memflow {
namespace {

constexpr int COMBINE_THREADS = 256, ROWS = COMBINE_THREADS / WARP;

// One warp: one query of a tile that is left over; grid (tiles left over, BM / ROWS).
template <class T, int D>
__global__ void __launch_bounds__(COMBINE_THREADS) combine_kernel(const __grid_constant__ Attention a) {
  constexpr int OWN = D / WARP;
  const Schedule& schedule = a.schedule;
  int64_t first = int64_t(blockIdx.x) * schedule.units, last = first + schedule.units;  // in units, through all tiles
  int row = blockIdx.y * ROWS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
  const QueryTile tile = query_tile(a, schedule.whole + blockIdx.x);
  // the sharer that holds unit `first`: rounding can put it one further than this
  int sharer = static_cast<int>(first * schedule.sharers / (int64_t(schedule.tiles - schedule.whole) * schedule.units));
  while (schedule.share(sharer + 1) <= first) ++sharer;
  if (schedule.share(sharer) <= first && schedule.share(sharer + 1) >= last) return;  // one block did the whole tile
  if (row >= tile.count) return;

  float out[OWN] = {}, top = LOWEST, mass = 0;
  for (; sharer < schedule.sharers && schedule.share(sharer) < last; ++sharer) {
    int piece = schedule.share(sharer) / schedule.units == blockIdx.x ? 0 : 1;
    int64_t place = (int64_t(sharer) * 2 + piece) * BM + row;
    float lse = a.partial_lse[place];
    float new_top = fmaxf(top, lse), shrink = exp2f(top - new_top), weight = exp2f(lse - new_top);
#pragma unroll
    for (int i = 0; i < OWN; ++i) out[i] = out[i] * shrink + a.partial_out[place * D + lane + i * WARP] * weight;
    mass = mass * shrink + weight;
    top = new_top;
  }
  T* target = static_cast<T*>(a.out) + ((tile.batch * a.queries + tile.first + row) * a.heads + tile.head) * D;
#pragma unroll
  for (int i = 0; i < OWN; ++i) target[lane + i * WARP] = from_float<T>(mass == 0 ? 0.0f : out[i] / mass);
  if (a.lse && lane == 0)  // without any key log2(0) is -infinity
    a.lse[(tile.batch * a.heads + tile.head) * a.queries + tile.first + row] = (top + log2f(mass)) / LOG2_E;
}

}  // namespace

int launch_combine(const Attention& a, int dtype, int head_dim, void* stream) {
  dim3 grid(a.schedule.tiles - a.schedule.whole, BM / ROWS);
  auto run = [&](auto format) {
    using T = decltype(format);
    return launch(head_dim == 64 ? combine_kernel<T, 64> : combine_kernel<T, 128>, grid, COMBINE_THREADS, 0, stream, a);
  };
  return dtype == MEMFLOW_BFLOAT16 ? run(__nv_bfloat16()) : run(__half());
}

}  // namespace memflow
