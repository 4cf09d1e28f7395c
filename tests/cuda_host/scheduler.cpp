// Runs a grid on one CPU thread: block after block, every thread of a block a fiber that gives way at barriers and warp
// collectives. Compiled without sanitizers, for speed; what the kernels touch is checked here by hand.
//
// The order is unkind on purpose. A warp runs ahead as far as the next block barrier lets it while the others have not
// moved, first or last warp first in turn, so that a missing barrier shows. Shared memory is NaN before every block.
#include "fiber.h"

#include <sanitizer/asan_interface.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <vector>

#include "cuda_runtime.h"
#include "ptx_host.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

constexpr size_t SHARED_LIMIT = 99 * 1024;  // of a block on compute capability 8.6 and 8.9, after opting in
constexpr size_t SHARED_DEFAULT = 48 * 1024;
alignas(1024) uint4 memflow_shared[SHARED_LIMIT / 16 + 64];

namespace cuda_host {
namespace {

struct Copy {
  uint32_t target;
  const void* source;
  uint32_t bytes;
};

struct Thread {
  Fiber fiber;
  uint3 index;
  uint32_t turn = 0;  // collectives met so far
  std::vector<std::vector<Copy>> groups;  // committed, oldest first
  std::vector<Copy> open;
};

struct Warp {
  uint32_t ready, arrived, live;  // lanes that may run, that wait at the collective, that have not returned
  Collective kind;
  Slot slots[2][32];
};

std::vector<Thread*> threads;
std::vector<Warp> warps;
Fiber host;
const std::function<void()>* body;
int now = -1;  // the running thread
uint32_t count, at_barrier, finished, phase;
size_t shared_bytes;
std::map<const void*, int> allowed;
int multiprocessors = 3;
bool last_block_first = false;

[[noreturn]] void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::fprintf(stderr, "CUDA host build: block (%u, %u, %u), thread %d: ", blockIdx.x, blockIdx.y, blockIdx.z, now);
  std::vfprintf(stderr, format, arguments);
  std::fprintf(stderr, "\n");
  std::fflush(stderr);
  std::abort();
}

int first_of(uint32_t lanes) { return phase & 1 ? 31 - __builtin_clz(lanes) : __builtin_ctz(lanes); }

void resume(int thread) {
  Fiber& from = now < 0 ? host : threads[now]->fiber;
  now = thread;
  if (thread >= 0) threadIdx = threads[thread]->index;
  switch_fiber(from, thread < 0 ? host : threads[thread]->fiber);
}

// Gives way to a lane of the same warp, else of the first warp with one that may run.
void give_way() {
  int own = now / 32, all = int(warps.size());
  if (warps[own].ready) return resume(32 * own + first_of(warps[own].ready));
  for (int i = 0; i < all; ++i) {
    int warp = phase & 1 ? all - 1 - i : i;
    if (warps[warp].ready) return resume(32 * warp + first_of(warps[warp].ready));
  }
  if (finished == count) return resume(-1);
  fail("deadlock: %u of %u threads wait at __syncthreads, %u have returned, the others wait for lanes of their warp",
       at_barrier, count, finished);
}

void release_barrier() {
  at_barrier = 0;
  ++phase;
  for (Warp& warp : warps) warp.ready = warp.live;
}

void fiber_main() {
  for (;;) {
    (*body)();
    Thread& thread = *threads[now];
    thread.groups.clear();
    thread.open.clear();
    Warp& warp = warps[now / 32];
    warp.live &= ~(1u << now % 32);
    warp.ready &= warp.live;
    ++finished;
    if (at_barrier && at_barrier + finished == count) release_barrier();
    give_way();
  }
}

void run_block() {
  std::memset(memflow_shared, 0xff, shared_bytes);
  for (uint32_t i = 0; i < count; ++i) {
    threads[i]->index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
    threads[i]->turn = 0;
  }
  warps.assign((count + 31) / 32, Warp{});
  for (size_t i = 0; i < warps.size(); ++i) {
    uint32_t lanes = std::min<uint32_t>(32, count - 32 * i);
    warps[i].ready = warps[i].live = lanes == 32 ? ~0u : (1u << lanes) - 1;
  }
  at_barrier = finished = 0;
  phase = blockIdx.x + blockIdx.y + blockIdx.z;
  resume(phase & 1 ? int(count) - 1 : 0);
}

void check_shared(uint32_t offset, const char* what) {
  if (offset % 16) fail("%s at shared offset %u, which is not a multiple of 16", what, offset);
  if (offset + 16 > shared_bytes) fail("%s at shared offset %u of %zu bytes", what, offset, shared_bytes);
}

float half_to_float(uint16_t bits, Collective kind) {
  return kind == MMA_BFLOAT16 ? __bfloat162float({bits}) : __half2float({bits});
}

// C [16, 8] += A [16, 16] B [16, 8] from the fragments of 32 lanes; lane = 4g + t.
void multiply(Slot* slots, Collective kind) {
  float a[16][16], b[8][16];
  MmaOperands* lanes[32];
  for (int lane = 0; lane < 32; ++lane) {
    int g = lane / 4, t = lane % 4;
    lanes[lane] = reinterpret_cast<MmaOperands*>(slots[lane].bytes);
    for (int i = 0; i < 8; ++i) {
      uint16_t bits = uint16_t(lanes[lane]->a[i / 2] >> 16 * (i % 2));
      a[g + 8 * (i / 2 % 2)][2 * t + i % 2 + 8 * (i / 4)] = half_to_float(bits, kind);
    }
    for (int i = 0; i < 4; ++i) {
      uint16_t bits = uint16_t(lanes[lane]->b[i / 2] >> 16 * (i % 2));
      b[g][2 * t + i % 2 + 8 * (i / 2)] = half_to_float(bits, kind);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const float *row = a[lane / 4 + 8 * (i / 2)], *column = b[2 * (lane % 4) + i % 2];
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += row[k] * column[k];
      lanes[lane]->c[i] += sum;
    }
  }
}

}  // namespace

int lane() { return now % 32; }

Slot* exchange(Collective kind, uint32_t mask, const void* operand, size_t bytes) {
  if (mask != 0xffffffffu) fail("a warp collective with mask %#x; only whole warps are served", mask);
  Warp& warp = warps[now / 32];
  Slot* slots = warp.slots[threads[now]->turn++ & 1];
  if (warp.arrived && warp.kind != kind) fail("lanes of one warp meet at different collectives (%d, %d)", warp.kind, kind);
  warp.kind = kind;
  if (bytes) std::memcpy(slots[now % 32].bytes, operand, bytes);
  warp.arrived |= 1u << now % 32;
  if (warp.arrived == 0xffffffffu) {
    if (kind == MMA_BFLOAT16 || kind == MMA_FLOAT16) multiply(slots, kind);
    warp.ready = warp.arrived;
    warp.arrived = 0;
  } else {
    warp.ready &= ~(1u << now % 32);
    give_way();
  }
  return slots;
}

void block_barrier() {
  warps[now / 32].ready &= ~(1u << now % 32);
  if (++at_barrier + finished == count) {
    release_barrier();
  } else {
    give_way();
  }
}

uint32_t shared_offset(const void* address) {
  ptrdiff_t offset = static_cast<const char*>(address) - reinterpret_cast<const char*>(memflow_shared);
  if (offset < 0 || size_t(offset) > shared_bytes) fail("an address outside of shared memory");
  return uint32_t(offset);
}

const unsigned char* matrix_row(uint32_t offset) {
  check_shared(offset, "ldmatrix");
  return reinterpret_cast<const unsigned char*>(memflow_shared) + offset;
}

void copy_async(uint32_t target, const void* source, uint32_t bytes) {
  check_shared(target, "cp.async");
  if (reinterpret_cast<uintptr_t>(source) % 16) fail("cp.async from an address that is not a multiple of 16");
  if (bytes > 16) fail("cp.async of %u bytes", bytes);
  if (void* bad = bytes ? __asan_region_is_poisoned(const_cast<void*>(source), bytes) : nullptr)
    fail("cp.async reads out of bounds, at %p", bad);
  std::memset(reinterpret_cast<char*>(memflow_shared) + target, 0xff, 16);
  threads[now]->open.push_back({target, source, bytes});
}

void commit_copies() {
  threads[now]->groups.push_back(std::move(threads[now]->open));
  threads[now]->open.clear();
}

void wait_copies(int groups_left) {
  auto& groups = threads[now]->groups;
  while (groups.size() > size_t(groups_left)) {
    for (const Copy& copy : groups.front()) {
      char* target = reinterpret_cast<char*>(memflow_shared) + copy.target;
      std::memcpy(target, copy.source, copy.bytes);
      std::memset(target + copy.bytes, 0, 16 - copy.bytes);
    }
    groups.erase(groups.begin());
  }
}

cudaError_t allow_shared_memory(const void* kernel, int bytes) {
  if (bytes < 0 || size_t(bytes) > SHARED_LIMIT) return cudaErrorInvalidValue;
  allowed[kernel] = bytes;
  return cudaSuccess;
}

int64_t launched = 0;  // threads of all grids since the last question

cudaError_t run_grid(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& thread) {
  auto found = allowed.find(kernel);
  size_t limit = found == allowed.end() ? SHARED_DEFAULT : std::max<size_t>(SHARED_DEFAULT, found->second);
  uint64_t size = uint64_t(config.blockDim.x) * config.blockDim.y * config.blockDim.z;
  const dim3& grid = config.gridDim;
  if (size < 1 || size > 1024 || config.dynamicSmemBytes > limit) return cudaErrorInvalidValue;
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535)
    return cudaErrorInvalidValue;
  body = &thread;
  blockDim = config.blockDim;
  gridDim = grid;
  count = uint32_t(size);
  shared_bytes = config.dynamicSmemBytes;
  while (threads.size() < count) {
    threads.push_back(new Thread);
    make_fiber(threads.back()->fiber, fiber_main);
  }
  __asan_unpoison_memory_region(memflow_shared, shared_bytes);
  __asan_poison_memory_region(reinterpret_cast<char*>(memflow_shared) + shared_bytes, sizeof(memflow_shared) - shared_bytes);
  uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  launched += int64_t(blocks * size);
  for (uint64_t i = 0; i < blocks; ++i) {
    uint64_t block = last_block_first ? blocks - 1 - i : i;
    blockIdx = {uint32_t(block % grid.x), uint32_t(block / grid.x % grid.y), uint32_t(block / grid.x / grid.y)};
    run_block();
  }
  return cudaSuccess;
}

}  // namespace cuda_host

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? cuda_host::multiprocessors : 8;
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* target, int value, size_t bytes, cudaStream_t) {
  if (__asan_region_is_poisoned(target, bytes)) cuda_host::fail("cudaMemsetAsync writes out of bounds");
  std::memset(target, value, bytes);
  return cudaSuccess;
}

// Number of multiprocessors that kernels see, and the order in which the blocks of a grid run.
extern "C" int cuda_host_set(int multiprocessors, int last_block_first) {
  cuda_host::multiprocessors = multiprocessors;
  cuda_host::last_block_first = last_block_first != 0;
  return 0;
}

// Threads launched since the last question.
extern "C" int64_t cuda_host_launched() {
  int64_t launched = cuda_host::launched;
  cuda_host::launched = 0;
  return launched;
}
