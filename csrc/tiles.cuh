// Tiles of queries and keys in shared memory for tensor cores: how they are loaded, read as fragments, multiplied.
//
// A row of D numbers of 16 bits lies in D/8 pieces of 16 bytes, piece c of row r at place c ^ (r % 8): the eight rows
// that ldmatrix reads together then lie in different banks.
#pragma once

#include "device.h"

namespace memflow {

constexpr float LOWEST = -3.0e38f;  // below every logit, and finite: no inf - inf where there is no key

template <int D>
__device__ __forceinline__ uint32_t tile_offset(int row, int piece) {
  return static_cast<uint32_t>(row * D * 2 + ((piece ^ (row & 7)) * 16));
}

// Rows 0 to `count` - 1 at `rows`, `stride` numbers apart, to a tile of ROWS rows in shared memory; the others become 0.
// ASYNC: without waiting; needs rows that are aligned to 16 bytes.
template <class T, int D, int ROWS, int THREADS, bool ASYNC>
__device__ __forceinline__ void load_tile(uint32_t tile, const T* rows, int64_t stride, int count) {
  constexpr int PIECES = D / 8, STEP = THREADS / PIECES;
  static_assert(THREADS % PIECES == 0 && ROWS % STEP == 0, "every thread loads as many pieces");
  int piece = threadIdx.x % PIECES, first = threadIdx.x / PIECES;
#pragma unroll
  for (int row = first; row < first + ROWS; row += STEP) {
    bool inside = row < count;
    const T* source = rows + (inside ? row : 0) * stride + piece * 8;
    if constexpr (ASYNC) {
      cp_async_16(tile + tile_offset<D>(row, piece), source, inside ? 16 : 0);
    } else {
      Vector<T, 8> numbers = {};
      if (inside) {
#pragma unroll
        for (int i = 0; i < 8; ++i) numbers.x[i] = source[i];
      }
      auto* target = reinterpret_cast<char*>(memflow_shared) + tile - shared_address(memflow_shared);
      *reinterpret_cast<Vector<T, 8>*>(target + tile_offset<D>(row, piece)) = numbers;
    }
  }
}

// The fragments of this warp's 16 rows, from row `first` on; a negative scale is moved into their signs.
template <int D>
__device__ __forceinline__ void load_query(uint32_t (&fragment)[D / 16][4], uint32_t tile, int first, uint32_t signs) {
  int lane = threadIdx.x % WARP;
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
    ldmatrix_x4(fragment[k], tile + tile_offset<D>(first + lane % 16, 2 * k + lane / 16));
#pragma unroll
    for (int i = 0; i < 4; ++i) fragment[k][i] ^= signs;
  }
}

// logits [16, KEYS] of this warp's queries and a tile of keys; column 8n + 2t + i of row g (+ 8) is logits[n][i (+ 2)].
template <class T, int D, int KEYS>
__device__ __forceinline__ void multiply_keys(float (&logits)[KEYS / 8][4], const uint32_t (&query)[D / 16][4],
                                              uint32_t tile) {
  int lane = threadIdx.x % WARP;
#pragma unroll
  for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) logits[n][i] = 0;
  }
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
#pragma unroll
    for (int n = 0; n < KEYS / 8; n += 2) {
      uint32_t b[4];  // 16 keys x 16 channels
      ldmatrix_x4(b, tile + tile_offset<D>(8 * n + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
      mma_16816(logits[n], query[k], b[0], b[1], T());
      mma_16816(logits[n + 1], query[k], b[2], b[3], T());
    }
  }
}

// Leaves out the columns from `count` on.
template <int KEYS>
__device__ __forceinline__ void mask_keys(float (&logits)[KEYS / 8][4], int count) {
  int column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (8 * n + column + i % 2 >= count) logits[n][i] = -INFINITY;
  }
}

// Over the four lanes that hold one row.
__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 1));
  return fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 2));
}
__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(ALL_LANES, x, 1);
  return x + __shfl_xor_sync(ALL_LANES, x, 2);
}

// One more tile of logits: they become shares 2^(logit * scale - top), whose sum is added to `mass`; top is the largest
// scaled logit so far. What was summed up before counts `shrink` times. Index 0: row g, 1: row g + 8.
template <int KEYS>
__device__ __forceinline__ void online_softmax(float (&logits)[KEYS / 8][4], float scale, float (&top)[2],
                                               float (&mass)[2], float (&shrink)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float largest = logits[0][2 * half];
#pragma unroll
    for (int n = 0; n < KEYS / 8; ++n) largest = fmaxf(largest, fmaxf(logits[n][2 * half], logits[n][2 * half + 1]));
    float new_top = fmaxf(top[half], row_max(largest) * scale);
    shrink[half] = exp2_approx(top[half] - new_top);
    top[half] = new_top;
    float sum = 0;
#pragma unroll
    for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i) {
        logits[n][i] = exp2_approx(logits[n][i] * scale - new_top);
        sum += logits[n][i];
      }
    }
    mass[half] = mass[half] * shrink[half] + sum;  // of this lane's columns
  }
}

// out [16, D] = out * shrink + shares [16, KEYS] values [KEYS, D].
template <class T, int D, int KEYS>
__device__ __forceinline__ void add_values(float (&out)[D / 8][4], const float (&shrink)[2],
                                           const float (&shares)[KEYS / 8][4], uint32_t tile) {
  int lane = threadIdx.x % WARP;
#pragma unroll
  for (int n = 0; n < D / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) out[n][i] *= shrink[i / 2];
  }
#pragma unroll
  for (int k = 0; k < KEYS / 16; ++k) {
    // the layout of a result is that of a factor, two columns of 8 keys side by side
    uint32_t a[4] = {pack2(shares[2 * k][0], shares[2 * k][1], T()), pack2(shares[2 * k][2], shares[2 * k][3], T()),
                     pack2(shares[2 * k + 1][0], shares[2 * k + 1][1], T()),
                     pack2(shares[2 * k + 1][2], shares[2 * k + 1][3], T())};
#pragma unroll
    for (int n = 0; n < D / 8; n += 2) {
      uint32_t b[4];  // 16 keys x 16 channels
      ldmatrix_x4_trans(b, tile + tile_offset<D>(16 * k + lane / 8 % 2 * 8 + lane % 8, n + lane / 16));
      mma_16816(out[n], a, b[0], b[1], T());
      mma_16816(out[n + 1], a, b[2], b[3], T());
    }
  }
}

}  // namespace memflow
