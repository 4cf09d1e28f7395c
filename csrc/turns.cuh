// Norm, weight and rotation of a vector of channels; turns of the 3-axis rotary embedding at any position.
#pragma once

#include "device.h"

namespace memflow {

// floor(pairs/3) channel pairs turn with the row, as many with the column, and the rest, which come first, with the
// frame. The position along the axis of a pair:
__device__ __forceinline__ int64_t position_of(int pair, int pairs, int64_t frame, int row, int col) {
  int third = pairs / 3, along_frame = pairs - 2 * third;
  return pair < along_frame ? frame : pair < along_frame + third ? row : col;
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

// cos and sin of position * speed: the quadrant is the top two bits, the rest at most an eighth of a circle.
__device__ __forceinline__ float2 circle_turn(int64_t position, uint64_t speed) {
  constexpr float RADIAN_PER_UNIT = 3.6572952e-10f;  // 2 pi / 2^34: of the upper bits, 2^30 units each
  uint64_t phase = static_cast<uint64_t>(position) * speed;
  uint32_t quadrant = static_cast<uint32_t>((phase + (uint64_t(1) << 61)) >> 62);
  int64_t rest = static_cast<int64_t>(phase - (static_cast<uint64_t>(quadrant) << 62));
  float angle = static_cast<float>(static_cast<int32_t>(rest >> 30)) * RADIAN_PER_UNIT;  // [-pi/4, pi/4]
  float square = angle * angle;
  // Taylor series: the first term left out is below 3e-9
  float sin = angle + angle * square * (-1.0f / 6 + square * (1.0f / 120 + square * (-1.0f / 5040 + square / 362880)));
  float cos = 1 + square * (-0.5f + square * (1.0f / 24 + square * (-1.0f / 720 +
                                                                     square * (1.0f / 40320 - square / 3628800))));
  float turned_cos = quadrant & 1 ? sin : cos, turned_sin = quadrant & 1 ? cos : sin;
  return make_float2((quadrant + 1) & 2 ? -turned_cos : turned_cos, quadrant & 2 ? -turned_sin : turned_sin);
}

// x, normed, weighted and turned in pairs (2i, 2i + 1); each step rounds to the format of x. Adds the result to `sum`.
template <class T, int VEC>
__device__ __forceinline__ void norm_rotate(Vector<T, VEC>& x, const float (&weight)[VEC], float inverse_rms,
                                            const float2* turns, float (&sum)[VEC]) {
#pragma unroll
  for (int i = 0; i < VEC; i += 2) {
    float even = to_float(from_float<T>(to_float(from_float<T>(to_float(x.x[i]) * inverse_rms)) * weight[i]));
    float odd = to_float(from_float<T>(to_float(from_float<T>(to_float(x.x[i + 1]) * inverse_rms)) * weight[i + 1]));
    float2 turn = turns[i / 2];
    x.x[i] = from_float<T>(even * turn.x - odd * turn.y);
    x.x[i + 1] = from_float<T>(even * turn.y + odd * turn.x);
    sum[i] += to_float(x.x[i]);
    sum[i + 1] += to_float(x.x[i + 1]);
  }
}

}  // namespace memflow
