"""replace_frame: one remembered frame gives its slot to another, per batch row."""

import torch
from torch import Tensor


def _check_slots(name: str, slots: list[int], available: int) -> None:
    if any(not -1 <= slot < available for slot in slots):
        raise ValueError(f"{name} is {slots}: each must be -1 (row left as it is) or a slot, 0 to {available - 1}")


def _frames(pool_key: Tensor, pool_value: Tensor, pool_frame_mean: Tensor) -> list[Tensor]:
    """The parts of the pool as [B, S, ...] views, one place per slot."""
    slots = pool_frame_mean.shape[1]
    return [pool_key.unflatten(1, (slots, -1)), pool_value.unflatten(1, (slots, -1)), pool_frame_mean]


def replace_by_index(
    pool_key: Tensor, pool_value: Tensor, pool_frame_mean: Tensor, slot: Tensor, source_slot: Tensor
) -> None:
    """replace_frame by index operations, which do not read the slots on the host."""
    rows = torch.arange(slot.shape[0], device=slot.device)
    still = (slot < 0) | (source_slot < 0)
    source = source_slot.clamp(min=0).long()
    target = torch.where(still, source, slot.long())  # a row that stays copies a frame onto itself
    for frames in _frames(pool_key, pool_value, pool_frame_mean):
        frames[rows, target] = frames[rows, source]


def replace_frame(
    pool_key: Tensor, pool_value: Tensor, pool_frame_mean: Tensor, slot: Tensor, source_slot: Tensor
) -> None:
    """Per row b, copy the frame in source_slot[b] over the one in slot[b]; nothing where either is -1."""
    if pool_key.device.type != "cpu":
        replace_by_index(pool_key, pool_value, pool_frame_mean, slot, source_slot)
        return
    targets, sources = slot.tolist(), source_slot.tolist()
    _check_slots("slot", targets, pool_frame_mean.shape[1])
    _check_slots("source_slot", sources, pool_frame_mean.shape[1])
    for row, (target, source) in enumerate(zip(targets, sources, strict=True)):
        if target >= 0 and source >= 0 and target != source:
            for frames in _frames(pool_key, pool_value, pool_frame_mean):
                frames[row, target].copy_(frames[row, source])
