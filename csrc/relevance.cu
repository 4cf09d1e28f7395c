// prompt_relevance: how much the prompt calls for each remembered frame, from means or from attention shares.
#include "frame_lse.h"
#include "sums.h"

namespace memflow {
namespace {

constexpr int SCORE_THREADS = 256;

// The sum over the block, in thread 0; the same order every time.
__device__ __forceinline__ float block_sum(float x) {
  float* partial = reinterpret_cast<float*>(memflow_shared);  // [SCORE_THREADS / WARP]
  x = warp_sum(x);
  __syncthreads();
  if (threadIdx.x % WARP == 0) partial[threadIdx.x / WARP] = x;
  __syncthreads();
  float sum = 0;
  for (int i = 0; i < SCORE_THREADS / WARP; ++i) sum += partial[i];
  return sum;
}

// Number of text tokens that count, at least 1: what is summed over them is divided by it.
__device__ __forceinline__ float counted_tokens(const uint8_t* mask, int64_t batch, int tokens) {
  if (!mask) return static_cast<float>(tokens);
  float count = 0;
  for (int token = threadIdx.x; token < tokens; token += SCORE_THREADS) count += mask[batch * tokens + token] != 0;
  return fmaxf(block_sum(count), 1.0f);
}

// score [B, F] of one frame: sums [B, parts, H, D] of the text keys times frame_mean [B, F, H, D].
__global__ void __launch_bounds__(SCORE_THREADS)
mean_score_kernel(const float* sums, int parts, const uint8_t* mask, MemflowStates frame_mean, float* score, int tokens,
                  int frames, int heads, int head_dim, float scale) {
  int64_t frame = blockIdx.x, batch = blockIdx.y;
  int channels = heads * head_dim;
  const float* means =
      static_cast<const float*>(frame_mean.data) + batch * frame_mean.batch + frame * frame_mean.token;
  float total = 0;
  for (int channel = threadIdx.x; channel < channels; channel += SCORE_THREADS) {
    float text = 0;
    for (int part = 0; part < parts; ++part) text += sums[(batch * parts + part) * channels + channel];
    total += text * means[channel / head_dim * frame_mean.head + channel % head_dim];
  }
  total = block_sum(total);
  float count = counted_tokens(mask, batch, tokens);
  if (threadIdx.x == 0) score[batch * frames + frame] = total / count * (scale / static_cast<float>(heads));
}

// score [B, F] of one frame from lse [B, H, T, F], to the base 2: its mean share over heads and the tokens that count.
__global__ void __launch_bounds__(SCORE_THREADS)
share_kernel(const float* lse, const uint8_t* mask, float* score, int heads, int tokens, int frames) {
  int64_t frame = blockIdx.x, batch = blockIdx.y;
  float total = 0;
  for (int row = threadIdx.x; row < heads * tokens; row += SCORE_THREADS) {
    if (mask && !mask[batch * tokens + row % tokens]) continue;
    const float* own = lse + (batch * heads * tokens + row) * frames;
    float top = own[0], sum = 0;
    for (int i = 1; i < frames; ++i) top = fmaxf(top, own[i]);
    for (int i = 0; i < frames; ++i) sum += exp2f(own[i] - top);
    total += exp2f(own[frame] - top) / sum;
  }
  total = block_sum(total);
  float count = counted_tokens(mask, batch, tokens);
  if (threadIdx.x == 0) score[batch * frames + frame] = total / (count * static_cast<float>(heads));
}

// score [B, T, F]: one tile of TILE tokens x TILE frames per block, four numbers per thread, each added up in the order of
// the channels. Token and frame of a thread's numbers are TILE / 2 apart.
template <class T>
__global__ void __launch_bounds__(SCORE_THREADS)
token_score_kernel(MemflowStates text_key, const uint8_t* mask, MemflowStates frame_mean, float* score, int tokens,
                   int frames, int heads, int head_dim, float scale) {
  constexpr int TILE = 2 * 16, STEP = 32;
  float(*text)[STEP + 1] = reinterpret_cast<float(*)[STEP + 1]>(memflow_shared);  // [TILE][STEP + 1], no bank twice
  float(*means)[STEP + 1] = text + TILE;
  int64_t batch = blockIdx.z, first_token = int64_t(blockIdx.x) * TILE, first_frame = int64_t(blockIdx.y) * TILE;
  const T* texts = static_cast<const T*>(text_key.data) + batch * text_key.batch;
  const float* all_means = static_cast<const float*>(frame_mean.data) + batch * frame_mean.batch;
  int own_token = threadIdx.x / 16, own_frame = threadIdx.x % 16;
  float sum[2][2] = {};
  for (int head = 0; head < heads; ++head) {
    for (int start = 0; start < head_dim; start += STEP) {
      __syncthreads();
      for (int i = threadIdx.x; i < TILE * STEP; i += SCORE_THREADS) {
        int64_t token = first_token + i / STEP, frame = first_frame + i / STEP;
        int channel = start + i % STEP;
        bool counts = token < tokens && channel < head_dim && (!mask || mask[batch * tokens + token]);
        text[i / STEP][i % STEP] = counts ? to_float(texts[token * text_key.token + head * text_key.head + channel]) : 0;
        bool inside = frame < frames && channel < head_dim;
        means[i / STEP][i % STEP] =
            inside ? all_means[frame * frame_mean.token + head * frame_mean.head + channel] : 0;
      }
      __syncthreads();
#pragma unroll 8
      for (int channel = 0; channel < STEP; ++channel)
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int j = 0; j < 2; ++j)
            sum[i][j] += text[own_token + 16 * i][channel] * means[own_frame + 16 * j][channel];
    }
  }
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 2; ++j) {
      int64_t token = first_token + own_token + 16 * i, frame = first_frame + own_frame + 16 * j;
      if (token >= tokens || frame >= frames) continue;
      bool counts = !mask || mask[batch * tokens + token];  // 0 times a mean that is NaN would be NaN
      score[(batch * tokens + token) * frames + frame] = counts ? sum[i][j] * (scale / static_cast<float>(heads)) : 0;
    }
  }
}

constexpr int64_t SCORE_SHARED = SCORE_THREADS / WARP * sizeof(float);

}  // namespace
}  // namespace memflow

extern "C" int64_t memflow_prompt_relevance_mean_workspace(int64_t batch, int64_t tokens, int64_t heads,
                                                           int64_t head_dim) {
  return batch * memflow::splits_of(tokens) * heads * head_dim * static_cast<int64_t>(sizeof(float));
}

extern "C" int memflow_prompt_relevance_mean(MemflowStates text_key, int dtype, const uint8_t* text_mask,
                                             MemflowStates frame_mean, int64_t batch, int64_t tokens, int64_t frames,
                                             int64_t heads, int64_t head_dim, double scale, float* score,
                                             void* workspace, void* stream) {
  using namespace memflow;
  if (batch < 1 || tokens < 1 || frames < 0 || heads < 1 || head_dim < 1) return MEMFLOW_INVALID;
  if (batch > 65535 || frames > INT32_MAX || tokens > INT32_MAX) return MEMFLOW_UNSUPPORTED;
  if (frames == 0) return cudaSuccess;
  float* sums = static_cast<float*>(workspace);
  int64_t parts = splits_of(tokens);
  int error =
      segment_sums(text_key, dtype, text_mask, sums, batch, tokens, tokens, parts, heads, head_dim, false, stream);
  if (error) return error;
  dim3 grid(static_cast<unsigned>(frames), static_cast<unsigned>(batch));
  return launch(mean_score_kernel, grid, SCORE_THREADS, SCORE_SHARED, stream, sums, parts, text_mask, frame_mean, score,
                tokens, frames, heads, head_dim, scale);
}

extern "C" int memflow_prompt_relevance_token(MemflowStates text_key, int dtype, const uint8_t* text_mask,
                                              MemflowStates frame_mean, int64_t batch, int64_t tokens, int64_t frames,
                                              int64_t heads, int64_t head_dim, double scale, float* score,
                                              void* stream) {
  using namespace memflow;
  if (batch < 1 || tokens < 1 || frames < 0 || heads < 1 || head_dim < 1) return MEMFLOW_INVALID;
  if (batch > 65535 || frames > 32 * 65535 || tokens > INT32_MAX) return MEMFLOW_UNSUPPORTED;
  if (frames == 0) return cudaSuccess;
  dim3 grid(static_cast<unsigned>(cdiv(tokens, 32)), static_cast<unsigned>(cdiv(frames, 32)),
            static_cast<unsigned>(batch));
  return with_format(dtype, [&](auto format) {
    return launch(token_score_kernel<decltype(format)>, grid, SCORE_THREADS, 2 * 32 * 33 * sizeof(float), stream,
                  text_key, text_mask, frame_mean, score, int(tokens), int(frames), int(heads), int(head_dim),
                  static_cast<float>(scale));
  });
}

extern "C" int64_t memflow_prompt_relevance_softmax_workspace(int64_t batch, int64_t tokens, int64_t heads,
                                                              int64_t frames) {
  return batch * heads * tokens * frames * static_cast<int64_t>(sizeof(float));
}

extern "C" int memflow_prompt_relevance_softmax(MemflowStates text_key, MemflowStates key, int dtype,
                                                const uint8_t* text_mask, int64_t batch, int64_t tokens, int64_t frames,
                                                int64_t tokens_per_frame, int64_t heads, int64_t head_dim, double scale,
                                                float* score, void* workspace, void* stream) {
  using namespace memflow;
  if (batch < 1 || tokens < 1 || frames < 0 || tokens_per_frame < 1 || heads < 1 || head_dim < 1)
    return MEMFLOW_INVALID;
  if (batch > 65535 || heads > 65535 || tokens_per_frame > INT32_MAX / 2 || tokens * heads > INT32_MAX ||
      frames * cdiv(tokens, 64) > INT32_MAX)
    return MEMFLOW_UNSUPPORTED;
  if (frames == 0) return cudaSuccess;
  FrameLse task{text_key,     key,          static_cast<float*>(workspace), int(tokens), int(frames), int(tokens_per_frame),
                int(heads),   int(head_dim), static_cast<float>(scale) * LOG2_E};
  int error = launch_frame_lse(task, dtype, batch, stream);
  if (error) return error;
  dim3 grid(static_cast<unsigned>(frames), static_cast<unsigned>(batch));
  return launch(share_kernel, grid, SCORE_THREADS, SCORE_SHARED, stream, task.lse, text_mask, score, heads, tokens,
                frames);
}
