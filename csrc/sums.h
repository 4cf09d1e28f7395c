// Sums over segments of tokens: frame means, mean queries, mean text keys. Defined in means.cu.
#pragma once

#include "device.h"

namespace memflow {

// sums [B, segments, splits, H, D] float32: x [B, L, H, D] summed over segments of `size` tokens (the last may be
// shorter), each in `splits` equal parts; divided by `size` where `divide`. mask [B, L]: the tokens that count, or null.
int segment_sums(const MemflowStates& x, int dtype, const uint8_t* mask, float* sums, int64_t batch, int64_t tokens,
                 int64_t size, int64_t splits, int64_t heads, int64_t head_dim, bool divide, void* stream);

// Parts in which a segment of `size` tokens is summed, so that one long segment fills the chip.
inline int64_t splits_of(int64_t size) {
  constexpr int64_t TOKENS_PER_PART = 256;
  return cdiv(size, TOKENS_PER_PART);
}

}  // namespace memflow
