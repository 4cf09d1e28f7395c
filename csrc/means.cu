// frame_means, and the sums over segments of tokens that other ops need: of queries and of text keys.
#include "sums.h"

namespace memflow {
namespace {

constexpr int SUM_THREADS = 256;

// sums [B, segments, splits, H, D]: x [B, L, H, D] summed over segments of `size` tokens (the last may be shorter), each
// in `splits` parts of part_size tokens; divided by `size` where `divide`. mask [B, L]: the tokens that count, or null.
//
// One block sums LANES vectors of VEC channels of one head over one part. LANES neighbouring threads read a row of 64
// (or 128) bytes, whole bursts of DRAM; the other threads take other tokens.
template <class T, int VEC, int LANES>
__global__ void __launch_bounds__(SUM_THREADS)
sums_kernel(const T* x, int64_t x_batch, int64_t x_token, int64_t x_head, const uint8_t* mask, float* sums,
            int64_t tokens, int64_t size, int64_t splits, int64_t part_size, int64_t segments, int heads, int head_dim,
            bool divide) {
  constexpr int ROWS = SUM_THREADS / LANES, CHANNELS = LANES * VEC, WARPS = SUM_THREADS / WARP;
  float* partial = reinterpret_cast<float*>(memflow_shared);  // [WARPS, CHANNELS]
  int chunks = (head_dim + CHANNELS - 1) / CHANNELS;
  int64_t block = blockIdx.x;
  int chunk = static_cast<int>(block % chunks);
  block /= chunks;
  int64_t head = block % heads;
  block /= heads;
  int64_t part = block % splits, segment = block / splits % segments, batch = block / splits / segments;

  int64_t first = segment * size + part * part_size;
  int64_t last = min(min(first + part_size, segment * size + size), tokens);
  int lane = threadIdx.x % LANES, channel = chunk * CHANNELS + lane * VEC;
  const T* rows = x + batch * x_batch + head * x_head + channel;
  const uint8_t* counts = mask ? mask + batch * tokens : nullptr;
  float total[VEC] = {};
  if (channel < head_dim) {
#pragma unroll 8
    for (int64_t token = first + threadIdx.x / LANES; token < last; token += ROWS) {
      if (counts && !counts[token]) continue;
      Vector<T, VEC> row = load<T, VEC>(rows + token * x_token);
#pragma unroll
      for (int i = 0; i < VEC; ++i) total[i] += to_float(row.x[i]);
    }
  }
  int warp = threadIdx.x / WARP;
#pragma unroll
  for (int i = 0; i < VEC; ++i) {
    total[i] = warp_sum(total[i], LANES);  // over the tokens of a warp
    if (threadIdx.x % WARP < LANES) partial[warp * CHANNELS + lane * VEC + i] = total[i];
  }
  __syncthreads();
  int own = threadIdx.x;
  if (own < CHANNELS && chunk * CHANNELS + own < head_dim) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < WARPS; ++i) sum += partial[i * CHANNELS + own];
    int64_t row = ((batch * segments + segment) * splits + part) * heads + head;
    sums[row * head_dim + chunk * CHANNELS + own] = divide ? sum / static_cast<float>(size) : sum;
  }
}

template <class T, int VEC, int LANES>
int launch_sums(const MemflowStates& x, const uint8_t* mask, float* sums, int64_t batch, int64_t tokens, int64_t size,
                int64_t splits, int64_t heads, int64_t head_dim, bool divide, void* stream) {
  int64_t segments = cdiv(tokens, size), chunks = cdiv(head_dim, LANES * VEC);
  int64_t blocks = batch * segments * splits * heads * chunks;
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return MEMFLOW_UNSUPPORTED;
  int64_t shared_bytes = SUM_THREADS / WARP * LANES * VEC * sizeof(float);
  return launch(sums_kernel<T, VEC, LANES>, dim3(static_cast<unsigned>(blocks)), SUM_THREADS, shared_bytes, stream,
                static_cast<const T*>(x.data), x.batch, x.token, x.head, mask, sums, tokens, size, splits,
                cdiv(size, splits), segments, heads, head_dim, divide);
}

}  // namespace

int segment_sums(const MemflowStates& x, int dtype, const uint8_t* mask, float* sums, int64_t batch,
                 int64_t tokens, int64_t size, int64_t splits, int64_t heads, int64_t head_dim, bool divide,
                 void* stream) {
  return with_format(dtype, [&](auto format) -> int {
    using T = decltype(format);
    if (aligned(x, dtype, head_dim))
      return launch_sums<T, 16 / sizeof(T), 4>(x, mask, sums, batch, tokens, size, splits, heads, head_dim, divide,
                                               stream);
    return launch_sums<T, 1, WARP>(x, mask, sums, batch, tokens, size, splits, heads, head_dim, divide, stream);
  });
}

}  // namespace memflow

extern "C" int memflow_frame_means(MemflowStates key, int dtype, int64_t batch, int64_t frames,
                                   int64_t tokens_per_frame, int64_t heads, int64_t head_dim, float* mean,
                                   void* stream) {
  if (batch < 1 || frames < 0 || tokens_per_frame < 1 || heads < 1 || head_dim < 1) return MEMFLOW_INVALID;
  return memflow::segment_sums(key, dtype, nullptr, mean, batch, frames * tokens_per_frame, tokens_per_frame, 1, heads,
                               head_dim, true, stream);
}

extern "C" const char* memflow_error_string(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
