// What a .cu file of csrc/ needs of the CUDA runtime, on a CPU: qualifiers, launches, barriers, warp collectives.
// Every thread of a block is a fiber; see scheduler.cpp. Shared memory is dynamic only (`extern __shared__`).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct uint2 { uint32_t x, y; };
struct uint3 { uint32_t x, y, z; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct dim3 {
  uint32_t x, y, z;
  dim3(uint32_t x = 1, uint32_t y = 1, uint32_t z = 1) : x(x), y(y), z(z) {}
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

using std::max;
using std::min;

// ---- host side

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorNotSupported = 801 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrComputeCapabilityMajor = 75 };
typedef struct cuda_host_stream* cudaStream_t;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  void* attrs = nullptr;
  unsigned numAttrs = 0;
};

namespace cuda_host {
cudaError_t run_grid(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& thread);
cudaError_t allow_shared_memory(const void* kernel, int bytes);
}  // namespace cuda_host

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... given) {
  return cuda_host::run_grid(*config, reinterpret_cast<const void*>(kernel), [&] { kernel(Parameters(given)...); });
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  return cuda_host::allow_shared_memory(reinterpret_cast<const void*>(kernel), bytes);
}
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaMemsetAsync(void* target, int value, size_t bytes, cudaStream_t stream);
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "an error of the host build"; }
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}

// ---- device side

namespace cuda_host {
enum Collective { SYNC_WARP = 1, SHUFFLE, BALLOT, REDUCE, LDMATRIX, MMA_BFLOAT16, MMA_FLOAT16 };
struct Slot { alignas(16) unsigned char bytes[48]; };
// Every lane of the warp leaves `bytes` of its operand and waits for the others; returns what the 32 lanes left.
Slot* exchange(Collective kind, uint32_t mask, const void* operand, size_t bytes);
int lane();
void block_barrier();

template <class T>
T from_lane(Slot* slots, int lane) {
  T value;
  std::memcpy(&value, slots[lane].bytes, sizeof(T));
  return value;
}
}  // namespace cuda_host

inline void __syncthreads() { cuda_host::block_barrier(); }
inline void __syncwarp(uint32_t mask = 0xffffffffu) { cuda_host::exchange(cuda_host::SYNC_WARP, mask, nullptr, 0); }
inline void __threadfence() {}

template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int lanes) {
  return cuda_host::from_lane<T>(cuda_host::exchange(cuda_host::SHUFFLE, mask, &value, sizeof(T)),
                                 cuda_host::lane() ^ lanes);
}
template <class T>
T __shfl_sync(uint32_t mask, T value, int source) {
  return cuda_host::from_lane<T>(cuda_host::exchange(cuda_host::SHUFFLE, mask, &value, sizeof(T)), source & 31);
}
inline uint32_t __ballot_sync(uint32_t mask, int predicate) {
  auto* slots = cuda_host::exchange(cuda_host::BALLOT, mask, &predicate, sizeof(int));
  uint32_t result = 0;
  for (int i = 0; i < 32; ++i) result |= uint32_t(cuda_host::from_lane<int>(slots, i) != 0) << i;
  return result;
}
inline uint32_t __reduce_max_sync(uint32_t mask, uint32_t value) {
  auto* slots = cuda_host::exchange(cuda_host::REDUCE, mask, &value, sizeof(value));
  for (int i = 0; i < 32; ++i) value = std::max(value, cuda_host::from_lane<uint32_t>(slots, i));
  return value;
}
inline uint32_t __reduce_min_sync(uint32_t mask, uint32_t value) {
  auto* slots = cuda_host::exchange(cuda_host::REDUCE, mask, &value, sizeof(value));
  for (int i = 0; i < 32; ++i) value = std::min(value, cuda_host::from_lane<uint32_t>(slots, i));
  return value;
}
inline uint32_t atomicAdd(uint32_t* address, uint32_t value) {
  uint32_t before = *address;
  *address += value;
  return before;
}
template <class T>
T __ldcg(const T* address) { return *address; }
inline int __popc(uint32_t value) { return __builtin_popcount(value); }
inline uint32_t __float_as_uint(float value) { uint32_t bits; std::memcpy(&bits, &value, 4); return bits; }
inline float __uint_as_float(uint32_t bits) { float value; std::memcpy(&value, &bits, 4); return value; }
