// What bindings.cpp needs of torch: checks of tensors, what a kernel is told about them, and where it is launched.
//
// The stable ABI of libtorch 2.10 alone. Errors become Python's RuntimeError and name the argument, what came and what
// is needed.
#pragma once

#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 10) << 48))

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "launch.h"

namespace memflow {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

template <typename Numbers>
std::string listed(const Numbers& numbers) {
  std::string text = "[";
  for (size_t i = 0; i < numbers.size(); ++i) text += (i ? ", " : "") + std::to_string(numbers[i]);
  return text + "]";
}

inline void check_dtype(const char* name, const Tensor& x, ScalarType needed) {
  if (x.scalar_type() != needed) fail(name, " must be ", toString(needed), ", got ", toString(x.scalar_type()));
}

inline void check_shape(const char* name, const Tensor& x, const Sizes& needed) {
  bool same = static_cast<size_t>(x.dim()) == needed.size();
  for (size_t i = 0; same && i < needed.size(); ++i) same = x.size(i) == needed[i];
  if (!same) fail(name, " must have the shape ", listed(needed), ", got ", listed(x.sizes()));
}

inline int dtype_of(const char* name, const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return MEMFLOW_FLOAT32;
    case ScalarType::BFloat16: return MEMFLOW_BFLOAT16;
    case ScalarType::Half: return MEMFLOW_FLOAT16;
    default: fail(name, " must be float32, bfloat16 or float16, got ", toString(x.scalar_type()));
  }
}

inline int64_t frame_count(const char* name, int64_t tokens, int64_t tokens_per_frame) {
  if (tokens_per_frame < 1) fail("tokens_per_frame must be at least 1, got ", tokens_per_frame);
  if (tokens % tokens_per_frame)
    fail(name, " has ", tokens, " tokens, not a multiple of tokens_per_frame = ", tokens_per_frame);
  return tokens / tokens_per_frame;
}

// The four sizes of states [B, L, H, D].
struct Shape {
  int64_t batch, tokens, heads, head_dim;
  Sizes with(int64_t length) const { return {batch, length, heads, head_dim}; }
};

inline Shape shape_of(const char* name, const Tensor& x) {
  if (x.dim() != 4) fail(name, " must have 4 dimensions, got the shape ", listed(x.sizes()));
  if (x.size(3) > 1 && x.stride(3) != 1) fail(name, " must have a dense last dimension, got stride ", x.stride(3));
  return {x.size(0), x.size(1), x.size(2), x.size(3)};
}

// What a kernel is told about states of this shape and dtype.
inline MemflowStates states(const char* name, const Tensor& x, const Sizes& shape, ScalarType dtype) {
  check_shape(name, x, shape);
  check_dtype(name, x, dtype);
  shape_of(name, x);
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

inline MemflowStates states(const char* name, const Tensor& x, const Shape& shape, ScalarType dtype) {
  return states(name, x, shape.with(shape.tokens), dtype);
}

// An index tensor or a mask, contiguous, so that the kernels need no strides for it.
inline MaybeTensor flat(const char* name, const MaybeTensor& x, const Sizes& shape, ScalarType dtype) {
  if (!x) return x;
  check_shape(name, *x, shape);
  check_dtype(name, *x, dtype);
  return x->is_contiguous() ? *x : torch::stable::contiguous(*x);
}

template <typename T>
const T* pointer(const MaybeTensor& x) {
  return x ? static_cast<const T*>(x->data_ptr()) : nullptr;
}

inline void* current_stream(int32_t device) {
  using Function = AOTITorchError (*)(int32_t, void**);
  // Looked up late: a torch for the CPU has neither the function nor its library.
  static const auto get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  if (get == nullptr) fail("this torch has no CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get(device, &stream));
  return stream;
}

struct Named {
  const char* name;
  MaybeTensor tensor;
};

// Where one op runs: on the device that all its tensors share, in torch's current stream.
class Launch {
 public:
  Launch(const char* op, std::initializer_list<Named> tensors)
      : op_(op), first_(*tensors.begin()->tensor), guard_(device_of(tensors)) {
    stream = current_stream(first_.get_device_index());
  }

  Tensor empty(const Sizes& shape, ScalarType dtype) const { return torch::stable::new_empty(first_, shape, dtype); }

  // Scratch memory; once this is gone, free for what comes later in the stream.
  void* workspace(int64_t bytes) {
    if (bytes < 1) return nullptr;
    workspace_ = empty({bytes}, ScalarType::Byte);
    return workspace_->data_ptr();
  }

  void check(int code) const {
    if (code != 0) fail(op_, ": ", memflow_error_string(code));
  }

  void* stream;

 private:
  static int32_t device_of(std::initializer_list<Named> tensors) {
    const int32_t first = tensors.begin()->tensor->get_device_index();
    for (const auto& [name, x] : tensors) {
      if (x && !x->is_cuda()) fail(name, " must be on a CUDA device");
      if (x && x->get_device_index() != first)
        fail(name, " must be on the device of ", tensors.begin()->name, ", ", first, ", got ", x->get_device_index());
    }
    return first;
  }

  const char* op_;
  Tensor first_;
  torch::stable::accelerator::DeviceGuard guard_;
  MaybeTensor workspace_;
};

}  // namespace memflow
