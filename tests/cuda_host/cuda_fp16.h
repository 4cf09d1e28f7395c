// float16 on a CPU: the compiler's own half type.
#pragma once

#include "cuda_runtime.h"

struct __half { uint16_t bits; };

inline float __half2float(__half value) { _Float16 half; std::memcpy(&half, &value, 2); return float(half); }
inline __half __float2half_rn(float value) {
  _Float16 half = _Float16(value);
  __half result;
  std::memcpy(&result, &half, 2);
  return result;
}
