// What the kernels share: number formats, vectors of 16 bytes, sums over a warp or block, launches.
#pragma once

#include "launch.h"
#include "ptx.h"

extern __shared__ uint4 memflow_shared[];  // all shared memory is dynamic

namespace memflow {

constexpr int WARP = 32;
constexpr uint32_t ALL_LANES = 0xffffffffu;
constexpr float LOG2_E = 1.4426950408889634f;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) { return x; }
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }
template <>
__device__ __forceinline__ __half from_float<__half>(float x) { return __float2half_rn(x); }

// Two numbers rounded to T and written to target[0] and [1]: by one instruction where T has 16 bits.
template <class T>
__device__ __forceinline__ void round_two(T* target, float first, float second) {
  uint32_t pair = pack2(first, second, T());
  memcpy(target, &pair, sizeof(pair));
}
template <>
__device__ __forceinline__ void round_two<float>(float* target, float first, float second) {
  target[0] = first;
  target[1] = second;
}

// N numbers that are loaded and stored together; 16 bytes of them by one instruction.
template <class T, int N>
struct alignas(N * sizeof(T) == 16 ? 16 : alignof(T)) Vector {
  T x[N];
};

template <class T, int N>
__device__ __forceinline__ Vector<T, N> load(const T* address) {
  Vector<T, N> result;
  if constexpr (N * sizeof(T) == 16) {
    *reinterpret_cast<uint4*>(&result) = *reinterpret_cast<const uint4*>(address);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) result.x[i] = address[i];
  }
  return result;
}

template <class T, int N>
__device__ __forceinline__ void store(T* address, const Vector<T, N>& vector) {
  if constexpr (N * sizeof(T) == 16) {
    *reinterpret_cast<uint4*>(address) = *reinterpret_cast<const uint4*>(&vector);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) address[i] = vector.x[i];
  }
}

// Sum over lanes that differ in the bits of `first` to 16.
__device__ __forceinline__ float warp_sum(float x, int first = 1) {
  for (int lanes = 16; lanes >= first; lanes /= 2) x += __shfl_xor_sync(ALL_LANES, x, lanes);
  return x;
}

// A score mapped so that a larger number is a larger score. NaN counts as the largest; no other score is mapped below
// 0x007fffff.
__device__ __forceinline__ uint32_t sortable(float score) {
  if (score != score) return 0xffffffffu;
  uint32_t bits = __float_as_uint(score + 0.0f);  // -0 is 0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// ---- host side

inline int64_t cdiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t dtype_size(int dtype) { return dtype == MEMFLOW_FLOAT32 ? 4 : 2; }

inline bool known(int dtype) { return dtype >= MEMFLOW_FLOAT32 && dtype <= MEMFLOW_FLOAT16; }

// Whether `bytes` at a time can be moved at every row of the view.
inline bool aligned(const MemflowStates& states, int dtype, int64_t head_dim, int64_t bytes = 16) {
  int64_t size = dtype_size(dtype);
  return reinterpret_cast<uintptr_t>(states.data) % bytes == 0 && head_dim * size % bytes == 0 &&
         states.batch * size % bytes == 0 && states.token * size % bytes == 0 && states.head * size % bytes == 0;
}

template <int N>
struct Number {
  static constexpr int value = N;
};

// Calls use(T()) for the number format of `dtype`.
template <class Use>
int with_format(int dtype, Use use) {
  if (dtype == MEMFLOW_FLOAT32) return use(float());
  if (dtype == MEMFLOW_BFLOAT16) return use(__nv_bfloat16());
  if (dtype == MEMFLOW_FLOAT16) return use(__half());
  return MEMFLOW_UNSUPPORTED;
}

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, int threads, int64_t shared_bytes, void* stream,
           Arguments... arguments) {
  constexpr int DEFAULT_SHARED = 48 * 1024;
  if (shared_bytes > DEFAULT_SHARED) {
    cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

}  // namespace memflow
