// memory_attention: what its kernels are told, and how the work is divided among their blocks.
#pragma once

#include "device.h"

namespace memflow {

constexpr int BM = 128, BN = 64;  // queries and keys of a tile
constexpr int ATTENTION_THREADS = BM / 16 * WARP;

// A tile of queries has a row of key tiles ("units"): those of the frames in its table row, then those of the tokens
// behind the candidates. `blocks` thread blocks work on `whole` tiles of queries one after the other, the same number
// each; what is left over, fewer tiles than blocks, is cut into `sharers` equal shares of units, which leave partial
// results where they are not a whole tile.
struct Schedule {
  int tiles, units, table_units, blocks, whole, sharers;

  // First unit of a share, counted through all tiles that are left over.
  __host__ __device__ int64_t share(int sharer) const {
    return int64_t(tiles - whole) * units * sharer / sharers;
  }
};

struct Attention {
  MemflowStates query, key, value;
  const int32_t* frame_table;  // [B, H, query blocks, places]
  void* out;                   // [B, Lq, H, D]
  float* lse;                  // [B, H, Lq] or null
  float* partial_out;          // [sharers, 2, BM, D], normalised
  float* partial_lse;          // [sharers, 2, BM], to the base 2
  float scale;                 // positive, times log2(e)
  uint32_t signs;              // what turns over the signs of two queries where scale was negative
  int batch, queries, heads, query_block, query_blocks, places, tokens_per_frame, candidate_frames;
  int64_t tokens;
  Schedule schedule;
};

// The queries of a tile; tiles are cut per block of queries.
struct QueryTile {
  int64_t batch, head, row;  // row: of the frame table
  int first, count;
};

__device__ __forceinline__ QueryTile query_tile(const Attention& a, int tile) {
  int tiles_per_block = (a.query_block + BM - 1) / BM;
  int block = tile / tiles_per_block;
  int first = block % a.query_blocks * a.query_block, offset = tile % tiles_per_block * BM;
  int last = min(first + a.query_block, a.queries);
  int64_t row = block / a.query_blocks;
  return {row / a.heads, row % a.heads, block, first + offset, min(last - first - offset, BM)};
}

// Launches the kernel that adds up partial results.
int launch_combine(const Attention& attention, int dtype, int head_dim, void* stream);

}  // namespace memflow
