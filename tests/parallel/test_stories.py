"""A story that several processes make together is that of one process."""

from __future__ import annotations

import pytest
import together
import torch

from memflow.memory import MemoryConfig
from memflow.memory.policies import POLICIES

MEMORIES = {
    **{name: {"policy": name, "held_frames": 5} for name in ("prompt", "fifo", "diverse", "original", "random")},
    "archive": {"policy": "archive"},
    "oracle": {"policy": "oracle"},
    "none": {"policy": "none"},
}
ACTIVATED = {"dense": {}, "top-2": {"top_k": 2}, "blocks": {"activation_block": 4, "activated": 0.4, "query_block": 8}}
WAYS = {
    f"{positions}-{name}": {"positions": positions, **activated}
    for positions in ("absolute", "relative")
    for name, activated in ACTIVATED.items()
}
ALL = {f"{policy}-{way}": memory | WAYS[way] for policy, memory in MEMORIES.items() for way in WAYS}
ALL |= {
    "softmax": {"aggregate": "softmax", "held_frames": 5, "top_k": 2},
    "bank-alone": {"policy": "diverse"},
    "two-stories": {"policy": "archive", "positions": "relative", "top_k": 2},
    "one-vote": {"layers": "mean", "held_frames": 5},
    "published": {"published_mode": "interactive", "record_interval": 3, "top_k": 3},
}
ALL |= {f"coverage-{way}": {"recall": "coverage", "policy": "archive"} | WAYS[way] for way in WAYS}
# Each policy in one way, and each way at least once.
SOME = [f"{policy}-{list(WAYS)[number % len(WAYS)]}" for number, policy in enumerate(MEMORIES)]
SOME += ["softmax", "two-stories", "published", "coverage-relative-blocks"]


def told(memories: dict[str, dict], shared: bool) -> dict:
    """Of each memory: latents of 30 chunks under five prompts, what was held, and the numbers in the pool."""
    pipe, found = together.pipeline(), {}
    if shared:
        pipe.enable_parallelism()
    for name, memory in memories.items():
        story = [(text, f"{text} at night") for text in together.STORY] if name == "two-stories" else together.STORY
        stream = pipe.stream(story, **together.SMALL, memory=MemoryConfig(**memory), seed=3)
        chunks = list(stream)
        pool = stream.memory.pool
        found[name] = {
            "latents": torch.cat([chunk.latents for chunk in chunks], 2),
            "frames": [chunk.frames.shape[1] for chunk in chunks],
            "held": stream.memory.held.clone(),
            "shown": stream.memory.shown.clone(),
            "relevance": torch.from_numpy(stream.snapshot().relevance),
            "pool": {part: buffer.numel() for part, buffer in pool.buffers().items()},
        }
    return found


def check(size: int, memories: dict[str, dict]) -> None:
    alone, shared = told(memories, False), together.run(size, told, memories, True)
    for name, expected in alone.items():
        assert expected["latents"].shape[2] == 90 and expected["latents"].isfinite().all()
        for rank, found in enumerate(results[name] for results in shared):
            error = (found["latents"] - expected["latents"]).norm() / expected["latents"].norm()
            assert error < 1e-6, (name, rank, error)
            for part in ("held", "shown"):
                assert torch.equal(found[part], expected[part]), (name, rank, part)
            torch.testing.assert_close(found["relevance"], expected["relevance"], equal_nan=True, rtol=1e-4, atol=1e-5)
            assert found["pool"] == {part: count // size for part, count in expected["pool"].items()}
            assert found["frames"] == (expected["frames"] if rank == 0 else [0] * 30)


def test_every_policy_is_here():
    assert set(MEMORIES) == set(POLICIES)


def test_two_processes():
    check(2, {name: ALL[name] for name in SOME})


def test_four_processes():
    check(4, {name: ALL[name] for name in ("prompt-relative-blocks", "archive-absolute-top-2")})


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_everything(size):
    check(size, ALL)
