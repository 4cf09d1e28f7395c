// The wrappers of csrc/ptx.h on a CPU. Addresses in shared memory are offsets from its start.
// Fragment layouts: PTX ISA, "Matrix fragments for mma.m16n8k16" and "ldmatrix".
#pragma once

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"

namespace cuda_host {
uint32_t shared_offset(const void* address);
// The 16 bytes of a row of an 8x8 matrix at a shared offset; checked for alignment and bounds.
const unsigned char* matrix_row(uint32_t offset);
void copy_async(uint32_t target, const void* source, uint32_t bytes);  // 16 bytes; those from `bytes` on become 0
void commit_copies();
void wait_copies(int groups_left);
}  // namespace cuda_host

inline uint32_t shared_address(const void* address) { return cuda_host::shared_offset(address); }
inline void cp_async_16(uint32_t target, const void* source, uint32_t bytes) {
  cuda_host::copy_async(target, source, bytes);
}
inline void cp_async_commit() { cuda_host::commit_copies(); }
template <int GROUPS>
void cp_async_wait() { cuda_host::wait_copies(GROUPS); }

// Lane 8j + i names row i of matrix j; register j of lane 4g + t holds elements 2t, 2t + 1 of row g of matrix j.
inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t row) {
  auto* slots = cuda_host::exchange(cuda_host::LDMATRIX, 0xffffffffu, &row, sizeof(row));
  int lane = cuda_host::lane();
  for (int j = 0; j < 4; ++j) {
    auto* bytes = cuda_host::matrix_row(cuda_host::from_lane<uint32_t>(slots, 8 * j + lane / 4));
    std::memcpy(&r[j], bytes + 4 * (lane % 4), 4);
  }
}
// Transposed: register j of lane 4g + t holds column g of rows 2t, 2t + 1.
inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row) {
  auto* slots = cuda_host::exchange(cuda_host::LDMATRIX, 0xffffffffu, &row, sizeof(row));
  int lane = cuda_host::lane();
  for (int j = 0; j < 4; ++j) {
    uint16_t pair[2];
    for (int i = 0; i < 2; ++i) {
      auto* bytes = cuda_host::matrix_row(cuda_host::from_lane<uint32_t>(slots, 8 * j + 2 * (lane % 4) + i));
      std::memcpy(&pair[i], bytes + 2 * (lane / 4), 2);
    }
    std::memcpy(&r[j], pair, 4);
  }
}

namespace cuda_host {
struct MmaOperands { uint32_t a[4], b[2]; float c[4]; };
inline void mma(Collective kind, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  MmaOperands operands = {{a[0], a[1], a[2], a[3]}, {b0, b1}, {c[0], c[1], c[2], c[3]}};
  auto* slots = exchange(kind, 0xffffffffu, &operands, sizeof(operands));
  std::memcpy(c, from_lane<MmaOperands>(slots, lane()).c, sizeof(c));
}
}  // namespace cuda_host

inline void mma_16816(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __nv_bfloat16) {
  cuda_host::mma(cuda_host::MMA_BFLOAT16, c, a, b0, b1);
}
inline void mma_16816(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __half) {
  cuda_host::mma(cuda_host::MMA_FLOAT16, c, a, b0, b1);
}
inline uint32_t pack2(float low, float high, __nv_bfloat16) {
  return uint32_t(__float2bfloat16_rn(low).bits) | uint32_t(__float2bfloat16_rn(high).bits) << 16;
}
inline uint32_t pack2(float low, float high, __half) {
  return uint32_t(__float2half_rn(low).bits) | uint32_t(__float2half_rn(high).bits) << 16;
}
inline float exp2_approx(float x) { return std::exp2(x); }
