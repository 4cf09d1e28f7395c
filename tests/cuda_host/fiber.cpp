#include "fiber.h"

#include <pthread.h>
#include <sanitizer/common_interface_defs.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

namespace {

constexpr size_t STACK = 128 * 1024, GUARD = 64 * 1024;  // a guard of whole pages, whatever their size

void* new_stack() {
  void* memory = mmap(nullptr, STACK + GUARD, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, GUARD, PROT_NONE)) {
    std::perror("CUDA host build: no memory for the stack of a thread");
    std::abort();
  }
  return static_cast<char*>(memory) + GUARD;
}

void (*entry_point)();

void enter() {
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
  entry_point();
}

}  // namespace

#ifdef __x86_64__
// The registers that a call preserves go on the old stack and come from the new one.
extern "C" void cuda_host_switch(void** save, void* stack_pointer);
asm(R"(
.text
.globl cuda_host_switch
.hidden cuda_host_switch
.type cuda_host_switch, @function
cuda_host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_host_switch, .-cuda_host_switch
)");

static void prepare(Fiber& fiber) {
  auto top = reinterpret_cast<uintptr_t*>(reinterpret_cast<uintptr_t>(fiber.bottom) + fiber.size);
  *--top = 0;  // aligns the stack as after a call
  *--top = reinterpret_cast<uintptr_t>(enter);
  for (int i = 0; i < 6; ++i) *--top = 0;
  fiber.stack_pointer = top;
}

static void jump(Fiber& from, Fiber& to) { cuda_host_switch(&from.stack_pointer, to.stack_pointer); }
#else
static void prepare(Fiber& fiber) {
  auto* context = new ucontext_t;
  getcontext(context);
  context->uc_stack.ss_sp = const_cast<void*>(fiber.bottom);
  context->uc_stack.ss_size = fiber.size;
  context->uc_link = nullptr;
  makecontext(context, enter, 0);
  fiber.context = context;
}

static void jump(Fiber& from, Fiber& to) {
  if (!from.context) from.context = new ucontext_t;
  swapcontext(static_cast<ucontext_t*>(from.context), static_cast<ucontext_t*>(to.context));
}
#endif

void make_fiber(Fiber& fiber, void (*entry)()) {
  entry_point = entry;
  fiber.bottom = new_stack();
  fiber.size = STACK;
  prepare(fiber);
}

void switch_fiber(Fiber& from, Fiber& to) {
  if (&from == &to) return;
  if (!from.bottom) {  // the stack of the thread that launches
    pthread_attr_t attributes;
    void* bottom;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &bottom, &from.size);
    pthread_attr_destroy(&attributes);
    from.bottom = bottom;
  }
  void* fake_stack;
  __sanitizer_start_switch_fiber(&fake_stack, to.bottom, to.size);
  jump(from, to);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}
