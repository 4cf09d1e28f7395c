// bfloat16 on a CPU: its bits, and the conversions that csrc/ uses, rounded to nearest even.
#pragma once

#include "cuda_runtime.h"

struct __nv_bfloat16 { uint16_t bits; };

inline float __bfloat162float(__nv_bfloat16 value) { return __uint_as_float(uint32_t(value.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  uint32_t bits = __float_as_uint(value);
  if (value != value) return {0x7fff};
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
