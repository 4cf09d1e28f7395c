// Norm, weight and rotation of a vector of channels; turns of the 3-axis rotary embedding at any position.
#pragma once

#include "device.h"

namespace memflow {

// floor(pairs/3) channel pairs turn with the row, as many with the column, and the rest, which come first, with the
// frame. The axis of a pair: 0 frame, 1 row, 2 column.
__device__ __forceinline__ int axis_of(int pair, int pairs) {
  int third = pairs / 3, along_frame = pairs - 2 * third;
  return pair < along_frame ? 0 : pair < along_frame + third ? 1 : 2;
}

// Pair i of an axis with m pairs turns by 10000^(-i/m) per position: here in units of 2^-64 of a full circle. The product
// with a position wraps around at 2^64, where the circle does, and so is right at every position; in float32, an angle
// would be off by 0.004 at frame 100,000.
__device__ __forceinline__ uint64_t circle_speed(int pair, int pairs) {
  constexpr double LOG2_BASE = 13.287712379549449;                    // of 10000
  constexpr double CIRCLE_PER_RADIAN = 2935890503282001226.8;         // 2^64 / 2 pi
  int third = pairs / 3, along_frame = pairs - 2 * third;
  int index = pair < along_frame ? pair : (pair - along_frame) % third;
  int count = pair < along_frame ? along_frame : third;
  return static_cast<uint64_t>(exp2(-LOG2_BASE * index / count) * CIRCLE_PER_RADIAN);
}

// cos and sin of an angle in units of 2^-64 of a circle: the quadrant is the top two bits of the angle plus an eighth of a
// circle, the bits below them the rest, between minus and plus an eighth.
__device__ __forceinline__ float2 circle_turn(uint64_t phase) {
  constexpr float RADIAN_PER_UNIT = 3.6572952e-10f;  // 2 pi / 2^34: of the upper bits, 2^30 units each
  uint32_t quadrant = static_cast<uint32_t>((phase + (uint64_t(1) << 61)) >> 32);
  float angle = static_cast<float>(static_cast<int32_t>(phase >> 30)) * RADIAN_PER_UNIT;  // [-pi/4, pi/4]
  float square = angle * angle;
  // Taylor series: the first term left out is below 3e-9
  float sin = angle + angle * square * (-1.0f / 6 + square * (1.0f / 120 + square * (-1.0f / 5040 + square * (1.0f / 362880))));
  float cos = 1 + square * (-0.5f + square * (1.0f / 24 + square * (-1.0f / 720 +
                                                                     square * (1.0f / 40320 - square * (1.0f / 3628800)))));
  bool swapped = quadrant & (1u << 30);
  float turned_cos = swapped ? sin : cos, turned_sin = swapped ? cos : sin;
  return make_float2((quadrant + (1u << 30)) >> 31 ? -turned_cos : turned_cos, quadrant >> 31 ? -turned_sin : turned_sin);
}

// x, normed, weighted and turned in pairs (2i, 2i + 1); each step rounds to the format of x. Adds the result to `sum`.
template <class T, class W, int VEC>
__device__ __forceinline__ void norm_rotate(Vector<T, VEC>& x, const Vector<W, VEC>& weight, float inverse_rms,
                                            const float2* turns, float (&sum)[VEC]) {
#pragma unroll
  for (int i = 0; i < VEC; i += 2) {
    T* pair = x.x + i;
    round_two(pair, to_float(pair[0]) * inverse_rms, to_float(pair[1]) * inverse_rms);
    round_two(pair, to_float(pair[0]) * to_float(weight.x[i]), to_float(pair[1]) * to_float(weight.x[i + 1]));
    float even = to_float(pair[0]), odd = to_float(pair[1]);
    float2 turn = turns[i / 2];
    round_two(pair, even * turn.x - odd * turn.y, even * turn.y + odd * turn.x);
    sum[i] += to_float(pair[0]);
    sum[i + 1] += to_float(pair[1]);
  }
}

}  // namespace memflow
