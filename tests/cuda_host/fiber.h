// A stack of its own for every CUDA thread, and the switch between two of them; AddressSanitizer is told of each.
#pragma once

#include <cstddef>

struct Fiber {
  void* stack_pointer = nullptr;  // of a fiber that does not run
  const void* bottom = nullptr;
  size_t size = 0;
  void* context = nullptr;  // where there is no switch in assembly: its ucontext_t
};

// `entry` never returns. A fiber lives as long as the process.
void make_fiber(Fiber& fiber, void (*entry)());
void switch_fiber(Fiber& from, Fiber& to);
