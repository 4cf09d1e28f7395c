// The C interface of the CUDA kernels: what bindings.cpp and the tests call. Nothing here knows torch.
//
// Every function launches on `stream` of the current device, waits for nothing, allocates nothing and may be captured in
// a CUDA graph. It returns a cudaError_t as int: 0 is success, MEMFLOW_INVALID a size that makes no sense,
// MEMFLOW_UNSUPPORTED a size or dtype that this kernel does not serve (another backend does). Sizes and strides are
// int64, strides in elements. Index tensors are read on the device; an index outside its range is skipped.
// `workspace` is device memory of at least as many bytes as the op's *_workspace function says, aligned to 16 bytes; it
// may be uninitialised, and null where 0 bytes are needed. Results do not depend on what it held. Outputs that are
// called contiguous are aligned to 16 bytes, as every allocation on a GPU is.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { MEMFLOW_FLOAT32 = 0, MEMFLOW_BFLOAT16 = 1, MEMFLOW_FLOAT16 = 2 };  // dtypes
enum { MEMFLOW_INVALID = 1, MEMFLOW_UNSUPPORTED = 801 };  // cudaErrorInvalidValue, cudaErrorNotSupported

// A [B, L, H, D] view with a dense last dimension: the address of its first element and three strides.
// Frame means [B, F, H, D] are float32 and their second stride is that of a frame.
typedef struct MemflowStates {
  void* data;
  int64_t batch, token, head;
} MemflowStates;

// What a return code means, a static string.
const char* memflow_error_string(int code);

// mean [B, F, H, D] float32, contiguous: the mean of every frame of key [B, F*N, H, D].
int memflow_frame_means(MemflowStates key, int dtype, int64_t batch, int64_t frames, int64_t tokens_per_frame,
                        int64_t heads, int64_t head_dim, float* mean, void* stream);

// score [B, F] float32, contiguous: mean over heads of <mean text key, frame mean> * scale.
// text_key [B, T, H, D]; text_mask [B, T] bool, contiguous, or null: every token counts; frame_mean [B, F, H, D].
int64_t memflow_prompt_relevance_mean_workspace(int64_t batch, int64_t tokens, int64_t heads, int64_t head_dim);
int memflow_prompt_relevance_mean(MemflowStates text_key, int dtype, const uint8_t* text_mask, MemflowStates frame_mean,
                                  int64_t batch, int64_t tokens, int64_t frames, int64_t heads, int64_t head_dim,
                                  double scale, float* score, void* workspace, void* stream);

// score [B, F] float32, contiguous: the share of the attention mass of text_key [B, T, H, D] on every frame of
// key [B, F*N, H, D], averaged over heads and the tokens that count. D at most 256.
int64_t memflow_prompt_relevance_softmax_workspace(int64_t batch, int64_t tokens, int64_t heads, int64_t frames);
int memflow_prompt_relevance_softmax(MemflowStates text_key, MemflowStates key, int dtype, const uint8_t* text_mask,
                                     int64_t batch, int64_t tokens, int64_t frames, int64_t tokens_per_frame,
                                     int64_t heads, int64_t head_dim, double scale, float* score, void* workspace,
                                     void* stream);

// score [B, T, F] float32, contiguous: mean over heads of <text key, frame mean> * scale for every text token, 0 for one
// that text_mask leaves out.
int memflow_prompt_relevance_token(MemflowStates text_key, int dtype, const uint8_t* text_mask,
                                   MemflowStates frame_mean, int64_t batch, int64_t tokens, int64_t frames,
                                   int64_t heads, int64_t head_dim, double scale, float* score, void* stream);

// table [R, min(k, F)] int32: k times the frame that adds most, in that order, -1 at the end. scores [R, T, F] of
// `dtype`, weights [R, T] and prior [R, F] float32; all contiguous. 2 T + 9 F at most 12287.
int memflow_cover_frames(const void* scores, int dtype, const float* weights, const float* prior, int64_t rows,
                         int64_t tokens, int64_t frames, int64_t k, int32_t* table, void* stream);

// table [B, H, blocks, k] int32, contiguous, k = min(top_k, F), blocks = ceil(Lq / query_block): the chosen frames of
// every head, ascending, -1 at the end. query [B, Lq, H, D]; query_block 0: one block of all queries.
// query_mean [B, blocks, H, D] float32, contiguous: the means where they are known (query is then not read and no
// workspace needed), or null. valid [B, F] bool, contiguous, or null. F at most 12288.
int64_t memflow_select_frames_workspace(int64_t batch, int64_t queries, int64_t heads, int64_t head_dim,
                                        int64_t query_block);
int memflow_select_frames(MemflowStates query, int dtype, const float* query_mean, MemflowStates frame_mean,
                          const uint8_t* valid, int64_t batch, int64_t queries, int64_t frames, int64_t heads,
                          int64_t head_dim, int64_t top_k, int64_t query_block, int32_t* table, void* workspace,
                          void* stream);

// out [B, Lq, H, D] in the dtype of query and lse [B, H, Lq] float32 (or null), both contiguous: attention of query
// [B, Lq, H, D] over the frames of key, value [B, F*N, H, D] that frame_table names and over the frames from
// candidate_frames on. frame_table [B, H, blocks, places] int32, contiguous, -1 = empty; null: all frames, and
// candidate_frames must be 0. query_block 0: one block of all queries. bfloat16 and float16 with D = 64 or 128, compute
// capability 8.0 and up; memflow_memory_attention_supported tells (1 or 0) for dtype and D. The workspace depends on
// every size: both functions take the same ones, on the same device.
int memflow_memory_attention_supported(int dtype, int64_t head_dim);
int64_t memflow_memory_attention_workspace(int dtype, int64_t batch, int64_t queries, int64_t frames,
                                           int64_t tokens_per_frame, int64_t heads, int64_t head_dim, int64_t places,
                                           int64_t candidate_frames, int64_t query_block);
int memflow_memory_attention(MemflowStates query, MemflowStates key, MemflowStates value, int dtype,
                             const int32_t* frame_table, int64_t batch, int64_t queries, int64_t frames,
                             int64_t tokens_per_frame, int64_t heads, int64_t head_dim, int64_t places,
                             int64_t candidate_frames, int64_t query_block, double scale, void* out, float* lse,
                             void* workspace, void* stream);

// RMS norm over all heads, 3-axis rotation, and the write into the pool. query, key, value [B, L, H, D] with
// L = frames * rows * cols; weight_q, weight_k [H*D], contiguous, of any of the dtypes, or both null: query and key are
// normed already, and eps counts for nothing; new_query [B, L, H, D], contiguous. The first frame has number start_frame + *start; start is null or one integer of start_bytes (4 or 8) on
// the device. slots [frames] int32: where key, value and mean key of every frame go in the pool of pool_slots slots;
// a frame whose slot is outside is not stored. query_mean [B, H, D] float32, contiguous: the mean new query, or null.
// D even; H*D at most 8192.
int64_t memflow_qk_norm_rope_write_workspace(int64_t batch, int64_t frames, int64_t tokens_per_frame, int64_t heads,
                                             int64_t head_dim, int with_query_mean);
int memflow_qk_norm_rope_write(MemflowStates query, MemflowStates key, MemflowStates value, int dtype,
                               const void* weight_q, int weight_q_dtype, const void* weight_k, int weight_k_dtype,
                               int64_t batch, int64_t frames, int64_t rows, int64_t cols, int64_t heads,
                               int64_t head_dim, double eps, int64_t start_frame, const void* start, int start_bytes,
                               MemflowStates pool_key, MemflowStates pool_value, MemflowStates pool_frame_mean,
                               int64_t pool_slots, const int32_t* slots, void* new_query, float* query_mean,
                               void* workspace, void* stream);

// Per batch row, key, value and mean of slot source_slot[b] are copied over those of slot[b]; slot, source_slot [B].
int memflow_replace_frame(MemflowStates pool_key, MemflowStates pool_value, MemflowStates pool_frame_mean, int dtype,
                          int64_t batch, int64_t slots, int64_t tokens_per_frame, int64_t heads, int64_t head_dim,
                          const int32_t* slot, const int32_t* source_slot, void* stream);

// packed_key, packed_value [B, H, places*N + (F - candidate_frames)*N, D], contiguous: the chosen frames of every head
// in front of the frames from candidate_frames on; an empty place is zeros. frame_table [B, H, places] int32.
int memflow_gather_frames(MemflowStates key, MemflowStates value, int dtype, const int32_t* frame_table, int64_t batch,
                          int64_t frames, int64_t tokens_per_frame, int64_t heads, int64_t head_dim, int64_t places,
                          int64_t candidate_frames, void* packed_key, void* packed_value, void* stream);

#ifdef __cplusplus
}
#endif
