"""Bounds of what a memory can be told, and how much it takes; each test says what would pass without."""

from __future__ import annotations

import pytest
import torch
from memory_driver import DIM, HEADS, TOKENS, MemoryDriver

from memflow import MemFlowError
from memflow.memory import MemoryConfig
from memflow.memory.slots import FramePool, copy_exactly
from memflow.parallel import Alone

HELD = {"held_frames": 12}


@pytest.mark.parametrize("name", ["bank_frames", "held_frames", "window_frames", "sink_frames", "frames_per_chunk"])
def test_counts_end_where_kernels_cannot_count_on(name):
    with pytest.raises(ValueError, match=name):
        MemoryConfig(**{name: 2**31})


def test_the_largest_count_is_taken():
    assert MemoryConfig(top_k=2**31 - 1).top_k == 2**31 - 1


@pytest.mark.parametrize("share", [0.0, -0.25, 1.0001, float("nan")])
def test_a_share_of_nothing_or_of_more_than_all(share):
    with pytest.raises(ValueError, match="activated must be above 0 and at most 1"):
        MemoryConfig(activated=share)


def test_a_share_of_all():
    assert MemoryConfig(activated=1.0).activated == 1.0


@pytest.mark.parametrize("block", ["activation_block", "query_block"])
def test_blocks_need_to_know_how_much_is_attended_to(block):
    with pytest.raises(ValueError, match=f"{block}=4 needs top_k or activated"):
        MemoryConfig(**{block: 4})
    assert getattr(MemoryConfig(**{block: 4}, top_k=2), block) == 4


@pytest.mark.parametrize("name", ["scene_frame", "recall"])
def test_names_of_rules(name):
    with pytest.raises(ValueError, match=f"{name} must be"):
        MemoryConfig(**HELD, **{name: "newest"})


def test_rules_of_what_is_shown_are_for_policies_that_ask_the_prompt():
    with pytest.raises(ValueError, match="this policy shows what it says"):
        MemoryConfig(policy="random", **HELD, recall="coverage")


def test_another_policy_leaves_the_rules_that_it_has_no_use_for():
    """And one that has a use for them keeps them."""
    own = MemoryConfig(policy="prompt", **HELD, recall="coverage", scene_frame="first")
    assert own.changed(policy="random").recall == MemoryConfig().recall
    kept = own.changed(held_frames=9)
    assert (kept.recall, kept.scene_frame) == ("coverage", "first")
    assert own.changed(policy="archive", held_frames=None).recall == "coverage"


@pytest.mark.parametrize("value", [2**62, -2, 1.0, None, "3"])
def test_counters_that_no_state_has(value):
    driver = MemoryDriver(MemoryConfig())
    driver.chunk()
    tensors, counters = driver.memory.state_dict()
    with pytest.raises(ValueError, match="updated_for must be a whole number"):
        driver.memory.load_state_dict(tensors, counters | {"updated_for": value})


@pytest.mark.parametrize("bank_used", [-1, 4])
def test_a_bank_is_used_from_nothing_to_all(bank_used):
    driver = MemoryDriver(MemoryConfig())
    tensors, counters = driver.memory.state_dict()
    with pytest.raises(ValueError, match="bank_used must be 0 to 3"):
        driver.memory.load_state_dict(tensors, counters | {"bank_used": bank_used})


@pytest.mark.parametrize("fields", [HELD, {"policy": "archive"}])
def test_a_state_without_one_of_its_parts_is_no_state(fields):
    driver = MemoryDriver(MemoryConfig(**fields))
    for _ in range(6):
        driver.chunk()
    tensors, counters = driver.memory.state_dict()
    for name in tensors.keys() - {"scene_starts"}:  # which states of before do not have
        lacking = {other: tensor.clone() for other, tensor in tensors.items() if other != name}
        with pytest.raises(ValueError, match=f"{name} must be .* got nothing"):
            driver.memory.load_state_dict(lacking, counters)
    for name in counters:
        lacking = {other: tensor.clone() for other, tensor in tensors.items()}
        with pytest.raises(ValueError, match=f"{name} must be .* got None"):
            driver.memory.load_state_dict(lacking, {other: n for other, n in counters.items() if other != name})


@pytest.mark.parametrize("window, sink", [(9, 3), (6, 0), (12, 6), (3, 3), (7, 2)])
def test_every_kind_of_call_is_known_before_it_comes(window, sink):
    """Graphs and processes are prepared for these sizes alone; one that is forgotten fails in the middle of a film."""
    config = MemoryConfig(window_frames=window, sink_frames=sink, recache=True)
    driver = MemoryDriver(config)
    known = driver.memory.call_tokens()
    met = {config.frames_per_chunk * TOKENS}
    for start in range(0, 400, config.frames_per_chunk):
        met |= {driver.memory.recache_span(start)[1] * TOKENS} - {0}
    assert known == met


@pytest.mark.parametrize("bad", [torch.zeros(1, 1, 3, 1, TOKENS, dtype=torch.int64), [[0.0]], None])
def test_what_is_kept_is_latents(bad):
    driver = MemoryDriver(MemoryConfig())
    driver.driver.prompt(torch.ones(1, 1, 1))
    with pytest.raises(MemFlowError, match="latents must be"):
        driver.driver.keep(bad)


def test_the_published_memory_has_one_slot_more():
    config = MemoryConfig.published()
    places = config.bank_frames + config.sink_frames + config.window_frames
    assert MemoryDriver(config).memory.pool.frame_mean.shape[2] == places + 1


def test_without_seeds_all_rows_have_the_first():
    """A film that is told again without a seed is the same film."""
    assert MemoryDriver(MemoryConfig(policy="random", **HELD), batch=2).memory.seeds.tolist() == [0, 0]


def test_a_pool_too_large_says_how_large():
    """Keys and values both count."""
    tokens = 2**30
    shape = {"layers": 8, "batch": 1, "heads": HEADS, "head_dim": DIM, "tokens_per_frame": tokens}
    slots = {"bank": 2, "sink": 0, "window": 1, "extra": 1}
    size = 2 * 8 * HEADS * DIM * tokens * 4 * 4 / 2**30
    with pytest.raises(MemoryError, match=f"take {size:,.1f} GiB"):
        FramePool(**shape, **slots, dtype=torch.float32, device="cpu")


class Half(Alone):
    """The second of two processes, which has the second half of the heads."""

    rank, size = 1, 2

    def mine(self, states):
        return states[..., states.shape[-2] // 2 :, :]


def test_a_process_takes_its_heads_of_a_state():
    whole, buffer = torch.arange(24.0).view(3, 2, 4), torch.full((3, 1, 4), torch.nan)
    copy_exactly(buffer, {"pool.key": whole}, "pool.key", Half())
    assert torch.equal(buffer, whole[:, 1:])
    with pytest.raises(ValueError, match=r"pool.key must be torch.float32 \[3, 2, 4\], got torch.float32 \[3, 1, 4\]"):
        copy_exactly(buffer, {"pool.key": whole[:, 1:]}, "pool.key", Half())
