"""memory_attention through a Gluon kernel: on the CPU its launch is the real one and its kernel the stand-in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from gluon_standin import StandIn
from torch import Tensor

from memflow_kernels import reference
from memflow_kernels.backends import implementation
from memflow_kernels.testing import AttentionCase, assert_close, attention_inputs, draw, poisoned_memory
from memflow_kernels.triton import configs
from memflow_kernels.triton.attention import planned
from memflow_kernels.triton.gluon import attention_sm90, attention_sm100

KERNELS = {"sm90": attention_sm90, "sm100": attention_sm100}


@contextmanager
def anew() -> Iterator[None]:
    """Launches inside the block are planned inside it, and nobody else takes its plans."""
    planned.cache_clear()
    try:
        yield
    finally:
        planned.cache_clear()


class Counted:
    """A kernel on its GPU, and how many programs of it were launched."""

    def __init__(self, kernel):
        self.kernel, self.programs = kernel, 0
        self.__name__, self.arg_names = kernel.__name__, kernel.arg_names

    def run(self, *arguments, grid, **options):
        self.programs += grid[0]
        return self.kernel.run(*arguments, grid=grid, **options)


@contextmanager
def on_gpu(chip: str) -> Iterator[Counted]:
    """Inside the block the launches of the kernel are counted; skips where this is another chip."""
    family = chip.replace("sm", "sm_")
    if configs.family(torch.device("cuda")) != family:
        pytest.skip(f"this GPU is not {family}")
    with pytest.MonkeyPatch.context() as patch:
        counted = Counted(getattr(KERNELS[chip], f"forward_{chip}_kernel"))
        patch.setattr(KERNELS[chip], f"forward_{chip}_kernel", counted)
        patch.setattr(configs, "SPECIALISED", configs.SPECIALISED | configs.SPECIALISED_UNTIMED)
        with anew():
            yield counted


@contextmanager
def small_tiles(
    chip: str = "sm90", keys: int = 16, stages: int = 2, seed: int = 0, faults: tuple = ()
) -> Iterator[StandIn | Counted]:
    """Inside the block calls that the kernel serves are run by the stand-in, with tiles of so many keys.

    On a GPU they are run by the kernel itself, with its own tiles.
    """
    if torch.cuda.is_available():
        with on_gpu(chip) as counted:
            yield counted
        return
    stand_in = StandIn(f"attention_{chip}", f"forward_{chip}_kernel", seed, faults)
    config = configs.Config({"BN": keys}, stages=stages)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KERNELS[chip], f"forward_{chip}_kernel", stand_in)
        patch.setattr(configs, "family", lambda device: chip.replace("sm", "sm_"))
        patch.setattr(configs, "SPECIALISED", {"any": {64: config, 128: config}})
        with anew():
            yield stand_in


@dataclass
class Call:
    """Arguments of one call."""

    case: AttentionCase
    dtype: torch.dtype = torch.bfloat16
    layout: str = "dense"
    frame_table: Tensor | None = None
    scale: float = 0.125
    query_block: int | None = None
    seed: int = 0

    def check(self) -> None:
        """The result is that of the specification in float64; nothing is left unwritten."""
        query, key, value = attention_inputs(self.case, dtype=self.dtype, layout=self.layout, seed=self.seed)
        sizes = (self.frame_table, self.case.tokens_per_frame, self.case.candidate_frames, self.scale, self.query_block)
        wide = reference.memory_attention(query.double(), key.double(), value.double(), *sizes)
        with poisoned_memory():
            out, lse = implementation("memory_attention", "triton")(query, key, value, *sizes)
        assert_close(out, wide[0], roundings=2)
        assert_close(lse, wide[1])


def table(case: AttentionCase, places: int, blocks: int | None = None, seed: int = 0) -> Tensor:
    """Random: with empty places, and with frames named twice."""
    shape = (case.batch, case.heads, *([] if blocks is None else [blocks]), places)
    return draw(torch.randint, -1, case.candidate_frames, shape, seed=seed, dtype=torch.int32)
