"""memory_attention by warps with roles of their own: which calls that serves, and the plan of its launch."""

from __future__ import annotations

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .. import configs
from ..attention_plan import Call, Plan, in_order, plan
from ..attention_schedule import schedule
from ..descriptors import Form
from ..integers import cdiv, next_power_of_2
from ..layouts import Layout, Sizes, by_frame, by_token, describable
from . import attention_sm90, attention_sm100


def _kernel(device: torch.device) -> tuple[object, int]:
    """The kernel of the chip, and how many queries each of its two groups of warps has."""
    if configs.family(device) == "sm_100":
        return attention_sm100.forward_sm100_kernel, attention_sm100.ROWS.value
    return attention_sm90.forward_sm90_kernel, attention_sm90.ROWS.value


def serves(call: Call) -> bool:
    """Whether a call, of a head size with a configuration, is served; others go to the kernel of triton/attention.py.

    Those are float32, tensors that no descriptor describes, and so few queries (of one block) that the second group of
    warps would have none.
    """
    return (
        call.query.dtype in (torch.bfloat16, torch.float16)
        and call.block_sizes[0] > _kernel(call.device)[1]
        and all(describable(x) for x in (call.query, call.key, call.value))
    )


def _form(x: Layout, view: tuple[Sizes, Sizes], rows: int) -> Form:
    """Of tiles of `rows` tokens, laid out as the tensor cores read them."""
    rank = len(view[0])
    tile = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=rank)
    return Form.made(TensorDescriptor, x.dtype, view, (*[1] * (rank - 2), rows, x.shape[-1]), tile)


def planned(call: Call) -> Plan:
    """The plan of a call that is served."""
    batch, queries, heads, head_dim = call.query.shape
    query_block, blocks = call.block_sizes
    places, candidate_frames = call.chosen
    tokens, tokens_per_frame = call.key.shape[1], call.tokens_per_frame
    config = configs.of_family(configs.SPECIALISED, call.device)[head_dim]
    kernel, group_rows = _kernel(call.device)
    keys, rows = config.blocks["BN"], 2 * group_rows
    units = places * cdiv(tokens_per_frame, keys) + cdiv(tokens - candidate_frames * tokens_per_frame, keys)
    tiles = batch * heads * blocks * cdiv(query_block, rows)
    whole, pieces = schedule(tiles, max(units, 1), config.resident * configs.multiprocessors(call.device))
    numbers = (queries, heads, query_block, blocks, places, tokens_per_frame, candidate_frames, tokens, whole, pieces)
    states = ((1, call.key), (2, call.value))
    operands = (
        (0, _form(call.query, by_token(call.query), group_rows)),
        *((n, _form(x, by_frame(x, tokens_per_frame), keys)) for n, x in states),
        *((n, _form(x, by_token(x), keys)) for n, x in states),
    )
    constants = {
        "D": head_dim, "STAGES": config.stages, "PLACES_PAD": max(8, next_power_of_2(max(places, 1))), **config.blocks,
    }  # fmt: skip
    numbers = (*numbers, *in_order(kernel, constants))
    return plan(call, kernel, operands, numbers, {"num_warps": config.warps}, rows, tiles, whole, pieces)
