// prompt_relevance "softmax": the log-sum-exp of every text token's logits over the keys of every frame.
#pragma once

#include "device.h"

namespace memflow {


struct FrameLse {
  MemflowStates text, key;
  float* lse;  // [B, H, T, F], to the base 2
  int tokens, frames, tokens_per_frame, heads, head_dim;
  float scale;  // times log2(e)
};

// By tensor cores for 16-bit numbers with D = 64 or 128 and rows aligned to 16 bytes, else in float32.
int launch_frame_lse(const FrameLse& task, int dtype, int64_t batch, void* stream);

}  // namespace memflow
