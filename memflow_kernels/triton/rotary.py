"""Turns of the 3-axis rotary embedding at any position, and what they do to a tile of heads: used by qk_norm_rope.

A turn's angle is position * 10000^(-i/m). In float32 that product would be off by 0.004 rad at frame 100,000. Here the
angular speed of a channel pair is an integer, in units of 2^-64 of a full circle: the product with the position wraps
around at 2^64 and so is exact modulo full circles at every position. Only the rest, at most an eighth of a circle
after the quadrant is split off, becomes a float32.
"""

import math

import triton
import triton.language as tl

LOG2_BASE = tl.constexpr(math.log2(10000))
CIRCLE_PER_RADIAN = tl.constexpr(2**64 / (2 * math.pi))
RADIAN_PER_UNIT = tl.constexpr(2 * math.pi / 2**34)  # of the upper bits, 2^30 units each


@triton.jit
def axis_speeds(pair, pairs):
    """pair, of `pairs` -> (axis 0 frame, 1 row, 2 column; speed in 2^-64 of a circle per position), both like pair.

    floor(pairs/3) pairs turn with the row, as many with the column, and the rest, which come first, with the frame.
    """
    third = pairs // 3
    along_frame = pairs - 2 * third
    axis = (pair >= along_frame).to(tl.int32) + (pair >= along_frame + third).to(tl.int32)
    index = tl.where(axis == 0, pair, tl.where(axis == 1, pair - along_frame, pair - along_frame - third))
    count = tl.where(axis == 0, along_frame, tl.maximum(third, 1))
    exponent = index.to(tl.float64) / count.to(tl.float64) * LOG2_BASE
    return axis, (tl.exp2(-exponent) * CIRCLE_PER_RADIAN).to(tl.int64)


@triton.jit
def turns_of_phase(phase):
    """cos and sin, float32, of an angle in 2^-64 of a circle (int64)."""
    # the two upper bits of `quadrant`: in which quarter of the circle, counted from -pi/4, the angle lies
    quadrant = ((phase + (1 << 61)) >> 32).to(tl.int32)
    angle = (phase >> 30).to(tl.int32).to(tl.float32) * RADIAN_PER_UNIT  # within that quarter: [-pi/4, pi/4]
    square = angle * angle
    # Taylor series: the first term left out is below 3e-9. tl.fma: one rounding, whatever the compiler may fuse.
    sin = tl.fma(square, 1 / 362880, -1 / 5040)
    sin = tl.fma(square, tl.fma(square, sin, 1 / 120), -1 / 6)
    sin = tl.fma(angle * square, sin, angle)
    cos = tl.fma(square, tl.fma(square, -1 / 3628800, 1 / 40320), -1 / 720)
    cos = tl.fma(square, tl.fma(square, tl.fma(square, cos, 1 / 24), -1 / 2), 1.0)
    swapped = (quadrant & (1 << 30)) != 0
    turned_cos, turned_sin = tl.where(swapped, sin, cos), tl.where(swapped, cos, sin)
    return flipped(turned_cos, quadrant + (1 << 30)), flipped(turned_sin, quadrant)


@triton.jit
def flipped(x, sign):
    """-x where `sign` (int32) is negative."""
    return (x.to(tl.int32, bitcast=True) ^ ((sign >> 31) << 31)).to(tl.float32, bitcast=True)


@triton.jit
def rotate(x, cos, sin):
    """x [BLOCK_TOKENS, BLOCK_HEADS, BLOCK_DIM] float32: channel pairs (2i, 2i+1) turned by cos and sin."""
    even, odd = tl.split(x.reshape(x.shape[0], x.shape[1], x.shape[2] // 2, 2))
    turned = tl.join(tl.fma(even, cos, -(odd * sin)), tl.fma(even, sin, odd * cos))
    return turned.reshape(x.shape)
