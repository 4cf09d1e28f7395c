// memory_attention: chosen frames are read where they lie, through the frame table; then the tokens always attended to.
#include "attention.h"
#include "tiles.cuh"

namespace memflow {
namespace {

// One key tile of a tile of queries.
struct KeyTile {
  int64_t token;
  int count;  // keys; more than BN: a full tile
};

__device__ __forceinline__ KeyTile key_tile(const Attention& a, const int32_t* table_row, int unit) {
  int table_units = a.schedule.table_units;
  if (unit >= table_units) {
    int64_t token = int64_t(a.candidate_frames) * a.tokens_per_frame + int64_t(unit - table_units) * BN;
    return {token, static_cast<int>(min(a.tokens - token, int64_t(BN)))};
  }
  int tiles_per_frame = (a.tokens_per_frame + BN - 1) / BN;
  int start = unit % tiles_per_frame * BN;
  return {int64_t(table_row[unit / tiles_per_frame]) * a.tokens_per_frame + start, a.tokens_per_frame - start};
}

// The first unit from `unit` on that is not that of an empty place.
__device__ __forceinline__ int next_unit(const Attention& a, const int32_t* table_row, int unit) {
  int tiles_per_frame = (a.tokens_per_frame + BN - 1) / BN;
  while (unit < a.schedule.table_units) {
    int place = unit / tiles_per_frame, frame = table_row[place];
    if (frame >= 0 && frame < a.candidate_frames) break;
    unit = (place + 1) * tiles_per_frame;
  }
  return unit;
}

// Writes this warp's 16 rows of a whole tile: through its own rows of the query tile, so that rows leave in one piece.
template <class T, int D>
__device__ __forceinline__ void store_rows(const Attention& a, const QueryTile& tile, float (&out)[D / 8][4],
                                           uint32_t query_tile) {
  constexpr int PIECES = D / 8;
  int lane = threadIdx.x % WARP, first = threadIdx.x / WARP * 16;
  char* shared = reinterpret_cast<char*>(memflow_shared) + query_tile - shared_address(memflow_shared);
#pragma unroll
  for (int n = 0; n < D / 8; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t place = tile_offset<D>(first + lane / 4 + 8 * half, n) + lane % 4 * 4;
      *reinterpret_cast<uint32_t*>(shared + place) = pack2(out[n][2 * half], out[n][2 * half + 1], T());
    }
  }
  __syncwarp();
  T* target = static_cast<T*>(a.out) + (tile.batch * a.queries * a.heads + tile.head) * D;
#pragma unroll
  for (int i = lane; i < 16 * PIECES; i += WARP) {
    int row = first + i / PIECES, piece = i % PIECES;
    if (row < tile.count) {
      const uint4 numbers = *reinterpret_cast<const uint4*>(shared + tile_offset<D>(row, piece));
      *reinterpret_cast<uint4*>(target + int64_t(tile.first + row) * a.heads * D + piece * 8) = numbers;
    }
  }
}

template <class T, int D, bool ASYNC>
__global__ void __launch_bounds__(ATTENTION_THREADS, 1)
attention_kernel(const __grid_constant__ Attention a) {
  constexpr uint32_t QUERY_BYTES = BM * D * 2, KEY_BYTES = BN * D * 2;
  const uint32_t queries = shared_address(memflow_shared), stages = queries + QUERY_BYTES;  // [2, key and value]
  const int lane = threadIdx.x % WARP, warp_row = threadIdx.x / WARP * 16;
  const Schedule& schedule = a.schedule;
  int64_t position = 0, end = 0;
  if (static_cast<int>(blockIdx.x) < schedule.sharers) {
    position = schedule.share(blockIdx.x);
    end = schedule.share(blockIdx.x + 1);
  }
  int whole = blockIdx.x, piece = -1;
  while (whole < schedule.whole || position < end) {
    int index = whole, first = 0, last = schedule.units;
    if (whole < schedule.whole) {
      whole += schedule.blocks;
    } else {
      index = schedule.whole + static_cast<int>(position / schedule.units);
      first = static_cast<int>(position % schedule.units);
      last = static_cast<int>(min(int64_t(last), first + end - position));
      position += last - first;
      ++piece;  // of a share, only the first tile and the last are not whole
    }
    const QueryTile tile = query_tile(a, index);
    const int32_t* table_row = a.frame_table + tile.row * a.places;
    const T* query = static_cast<const T*>(a.query.data) + tile.batch * a.query.batch + tile.head * a.query.head;
    const T* keys = static_cast<const T*>(a.key.data) + tile.batch * a.key.batch + tile.head * a.key.head;
    const T* values = static_cast<const T*>(a.value.data) + tile.batch * a.value.batch + tile.head * a.value.head;
    auto load_unit = [&](int unit, uint32_t stage) {
      const KeyTile k = key_tile(a, table_row, unit);
      load_tile<T, D, BN, ATTENTION_THREADS, ASYNC>(stage, keys + k.token * a.key.token, a.key.token, k.count);
      load_tile<T, D, BN, ATTENTION_THREADS, ASYNC>(stage + KEY_BYTES, values + k.token * a.value.token, a.value.token,
                                                    k.count);
      cp_async_commit();
      return k.count;
    };

    float out[D / 8][4] = {}, top[2] = {LOWEST, LOWEST}, mass[2] = {};
    int unit = next_unit(a, table_row, first);
    if (unit < last) {
      load_tile<T, D, BM, ATTENTION_THREADS, ASYNC>(queries, query + tile.first * a.query.token, a.query.token,
                                                    tile.count);
      int count = load_unit(unit, stages);
      cp_async_wait<0>();
      __syncthreads();  // the first tiles are there
      uint32_t fragment[D / 16][4];
      load_query<D>(fragment, queries, warp_row, a.signs);
      for (uint32_t stage = stages, other = stages + 2 * KEY_BYTES;;) {
        unit = next_unit(a, table_row, unit + 1);
        int next_count = 0;
        if (unit < last) next_count = load_unit(unit, other);
        float logits[BN / 8][4], shrink[2];
        multiply_keys<T, D, BN>(logits, fragment, stage);
        if (count < BN) mask_keys<BN>(logits, count);  // a branch: most tiles are full
        online_softmax<BN>(logits, a.scale, top, mass, shrink);
        add_values<T, D, BN>(out, shrink, logits, stage + KEY_BYTES);
        if (unit >= last) break;
        cp_async_wait<0>();
        __syncthreads();  // the next tiles are there, and nobody reads these any more
        count = next_count;
        uint32_t swapped = stage;
        stage = other;
        other = swapped;
      }
    }

    float log_mass[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      mass[half] = row_sum(mass[half]);
      log_mass[half] = mass[half] == 0 ? -INFINITY : top[half] + log2f(mass[half]);
      float inverse = mass[half] == 0 ? 0.0f : 1.0f / mass[half];
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        out[n][2 * half] *= inverse;
        out[n][2 * half + 1] *= inverse;
      }
    }
    bool complete = last - first == schedule.units;
    if (complete) store_rows<T, D>(a, tile, out, queries);
    int64_t slot = int64_t(blockIdx.x) * 2 + min(piece, 1);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int row = warp_row + lane / 4 + 8 * half;
      if (row >= tile.count) continue;
      if (complete) {
        if (a.lse && lane % 4 == 0)
          a.lse[(tile.batch * a.heads + tile.head) * a.queries + tile.first + row] = log_mass[half] / LOG2_E;
        continue;
      }
      float* target = a.partial_out + (slot * BM + row) * D + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < D / 8; ++n)
        *reinterpret_cast<float2*>(target + n * 8) = make_float2(out[n][2 * half], out[n][2 * half + 1]);
      if (lane % 4 == 0) a.partial_lse[slot * BM + row] = log_mass[half];
    }
    __syncthreads();  // nobody reads this tile any more
  }
}

template <class T, int D, bool ASYNC>
struct Kernel {
  static constexpr int SHARED_BYTES = BM * D * 2 + 4 * BN * D * 2;

  static constexpr auto FUNCTION = attention_kernel<T, D, ASYNC>;

  static int blocks_side_by_side(int* blocks) {
    int device, multiprocessors, each;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess)
      error = cudaFuncSetAttribute(FUNCTION, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED_BYTES);
    if (error == cudaSuccess)
      error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, FUNCTION, ATTENTION_THREADS, SHARED_BYTES);
    if (error == cudaSuccess) *blocks = multiprocessors * max(each, 1);
    return error;
  }
};

// Calls use(Kernel<...>()) for the kernel that serves this dtype, head size and alignment.
template <class Use>
int with_kernel(int dtype, int64_t head_dim, bool async, Use use) {
  auto of_format = [&](auto format) -> int {
    using T = decltype(format);
    if (head_dim == 64) return async ? use(Kernel<T, 64, true>()) : use(Kernel<T, 64, false>());
    if (head_dim == 128) return async ? use(Kernel<T, 128, true>()) : use(Kernel<T, 128, false>());
    return MEMFLOW_UNSUPPORTED;
  };
  if (dtype == MEMFLOW_BFLOAT16) return of_format(__nv_bfloat16());
  if (dtype == MEMFLOW_FLOAT16) return of_format(__half());
  return MEMFLOW_UNSUPPORTED;
}

Schedule make_schedule(int64_t tiles, int64_t units, int64_t table_units, int64_t side_by_side) {
  constexpr int64_t LEAST_UNITS = 4;  // of a share; what it costs to add up partial results is of this order
  int64_t whole = tiles / side_by_side * side_by_side, left = tiles - whole;
  int64_t sharers = min(side_by_side, max(left, left * units / LEAST_UNITS));
  if (left && cdiv(left * units, sharers) + LEAST_UNITS >= units) sharers = left;
  if (left == 0) sharers = 0;
  return {int(tiles), int(units), int(table_units), int(whole ? side_by_side : max(sharers, int64_t(1))), int(whole),
          int(sharers)};
}

// Fills in all that follows from the sizes. Returns an error code.
int describe(Attention& a, int dtype, int64_t batch, int64_t queries, int64_t frames, int64_t tokens_per_frame,
             int64_t heads, int64_t head_dim, int64_t places, int64_t candidate_frames, int64_t query_block,
             bool async) {
  if (batch < 1 || queries < 1 || frames < 1 || tokens_per_frame < 1 || heads < 1 || places < 0 ||
      candidate_frames < 0 || candidate_frames > frames || query_block < 0)
    return MEMFLOW_INVALID;
  int64_t size = query_block ? min(query_block, queries) : queries, blocks = cdiv(queries, size);
  int64_t tiles = batch * heads * blocks * cdiv(size, BM);
  int64_t table_units = candidate_frames ? places * cdiv(tokens_per_frame, BN) : 0;
  int64_t units = table_units + cdiv((frames - candidate_frames) * tokens_per_frame, BN);
  if (tiles > INT32_MAX || units > INT32_MAX || queries > INT32_MAX || frames > INT32_MAX ||
      tokens_per_frame > INT32_MAX)
    return MEMFLOW_UNSUPPORTED;
  int side_by_side = 0;
  int error = with_kernel(dtype, head_dim, async,
                          [&](auto kernel) { return decltype(kernel)::blocks_side_by_side(&side_by_side); });
  if (error) return error;
  a.batch = int(batch);
  a.queries = int(queries);
  a.heads = int(heads);
  a.query_block = int(size);
  a.query_blocks = int(blocks);
  a.places = int(places);
  a.tokens_per_frame = int(tokens_per_frame);
  a.candidate_frames = int(candidate_frames);
  a.tokens = frames * tokens_per_frame;
  a.schedule = make_schedule(tiles, max(units, int64_t(1)), table_units, side_by_side);
  return cudaSuccess;
}

bool split(const Schedule& schedule) { return schedule.sharers > schedule.tiles - schedule.whole; }

}  // namespace
}  // namespace memflow

extern "C" int memflow_memory_attention_supported(int dtype, int64_t head_dim) {
  return (dtype == MEMFLOW_BFLOAT16 || dtype == MEMFLOW_FLOAT16) && (head_dim == 64 || head_dim == 128);
}

extern "C" int64_t memflow_memory_attention_workspace(int dtype, int64_t batch, int64_t queries, int64_t frames,
                                                      int64_t tokens_per_frame, int64_t heads, int64_t head_dim,
                                                      int64_t places, int64_t candidate_frames, int64_t query_block) {
  using namespace memflow;
  int64_t most = 0;
  for (bool async : {true, false}) {  // which one runs depends on the addresses
    Attention a{};
    if (describe(a, dtype, batch, queries, frames, tokens_per_frame, heads, head_dim, places, candidate_frames,
                 query_block, async))
      return 0;
    if (split(a.schedule)) most = max(most, int64_t(a.schedule.sharers) * 2 * BM * (head_dim + 1) * 4);
  }
  return most;
}

extern "C" int memflow_memory_attention(MemflowStates query, MemflowStates key, MemflowStates value, int dtype,
                                        const int32_t* frame_table, int64_t batch, int64_t queries, int64_t frames,
                                        int64_t tokens_per_frame, int64_t heads, int64_t head_dim, int64_t places,
                                        int64_t candidate_frames, int64_t query_block, double scale, void* out,
                                        float* lse, void* workspace, void* stream) {
  using namespace memflow;
  // torch gives an empty table no address; it is not read then
  if ((!frame_table && candidate_frames && places) || reinterpret_cast<uintptr_t>(out) % 16) return MEMFLOW_INVALID;
  bool async = aligned(query, dtype, head_dim) && aligned(key, dtype, head_dim) && aligned(value, dtype, head_dim);
  Attention a{};
  int error = describe(a, dtype, batch, queries, frames, tokens_per_frame, heads, head_dim, places, candidate_frames,
                       query_block, async);
  if (error) return error;
  a.query = query;
  a.key = key;
  a.value = value;
  a.frame_table = frame_table;
  a.out = out;
  a.lse = lse;
  a.partial_out = static_cast<float*>(workspace);
  a.partial_lse = a.partial_out + int64_t(a.schedule.sharers) * 2 * BM * head_dim;
  a.scale = static_cast<float>(max(scale < 0 ? -scale : scale, 1e-30)) * LOG2_E;
  a.signs = scale < 0 ? 0x80008000u : 0u;
  error = with_kernel(dtype, head_dim, async, [&](auto kernel) {
    return launch(decltype(kernel)::FUNCTION, dim3(a.schedule.blocks), ATTENTION_THREADS,
                  decltype(kernel)::SHARED_BYTES, stream, a);
  });
  if (error || !split(a.schedule)) return error;
  return launch_combine(a, dtype, static_cast<int>(head_dim), stream);
}
