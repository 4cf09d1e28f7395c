"""What `MemoryConfig()` holds: free of each defect of the published memory, and the policies' choices."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from memory_driver import DIM, MemoryDriver, prompt_of

from memflow.memory import MemoryConfig
from memflow.memory.policies import POLICIES

CONFIGS = {
    "default": MemoryConfig(),
    "fifo": MemoryConfig(policy="fifo"),
    "recorded every third chunk": MemoryConfig(record_interval=3),
    "no sink": MemoryConfig(sink_frames=0),
    "window of the chunk alone": MemoryConfig(window_frames=3),
    "window no multiple of a chunk": MemoryConfig(window_frames=7, sink_frames=1, bank_frames=2),
    "chunks of one frame": MemoryConfig(frames_per_chunk=1, window_frames=4, sink_frames=2),
}


def random_keys(frame: int) -> torch.Tensor:
    return torch.randn(DIM, generator=torch.Generator().manual_seed(frame))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_attention_sees_sink_bank_and_window_each_frame_once(config):
    driver = MemoryDriver(config, frame_keys=random_keys)
    for chunk in range(30):
        seen = driver.chunk(prompt_of(random_keys(1000 + chunk)) if chunk % 7 == 5 else None)
        stop = (chunk + 1) * config.frames_per_chunk
        bank = [frame for frame in driver.bank() if frame >= 0]
        sink = list(range(min(stop, config.sink_frames)))
        window = list(range(max(config.sink_frames, stop - config.window_frames), stop))
        assert sorted(seen) == sorted(bank + sink + window)
        for attended in driver.seen:  # the pass that re-encodes the window too
            assert len(set(attended)) == len(attended), "a frame is counted twice in one softmax"


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "none"])
def test_copies_never_fill_the_bank(policy):
    """Published defect 1: a pending frame that scores well is inserted again and again."""
    favourite = 27
    keys = lambda frame: torch.full((DIM,), 5.0 if frame == favourite else -1.0)  # noqa: E731
    config = MemoryConfig(policy=policy, record_interval=3)
    driver = MemoryDriver(config, frame_keys=keys)
    for _ in range(40):
        driver.chunk()
        held = [frame for frame in driver.bank() if frame >= 0]
        assert len(set(held)) == len(held)
    published = MemoryDriver(MemoryConfig.published(), frame_keys=keys)
    copies = 0
    for _ in range(16):
        published.chunk()
        copies = max(copies, published.bank().count(favourite))
    assert copies > 1, "the published memory shows the defect that this test is about"


def test_new_prompt_retrieves_in_its_first_chunk():
    """Published defect 3: after a switch the choice is made with zeros, the new prompt counts one chunk late."""
    directions = torch.eye(DIM)
    liked = {9: 0, 12: 1, 15: 2}  # frame -> direction of its keys
    keys = lambda frame: directions[liked[frame]] if frame in liked else -torch.ones(DIM)  # noqa: E731
    first, second = directions[0] + directions[1], directions[1] + directions[2]

    def bank_after_switch(config):
        driver = MemoryDriver(config, frame_keys=keys)
        driver.prompt = prompt_of(first)
        while sorted(driver.bank()) != [9, 12, 15]:
            driver.chunk()
        driver.chunk(prompt_of(second))
        return set(driver.bank())

    assert bank_after_switch(MemoryConfig()) >= {12, 15}
    assert 9 not in bank_after_switch(MemoryConfig()), "9 is what the new prompt does not call for"


@pytest.mark.parametrize("switch_at", range(1, 8))
def test_switch_never_rewrites_or_empties_the_sink(switch_at):
    """Published defects 4 and 5: an early switch overwrites the sink; without global_sink zeros stay in it."""
    config = MemoryConfig()
    driver = MemoryDriver(config)
    for _ in range(switch_at):
        driver.chunk()
    sink = slice(config.bank_frames * 2, (config.bank_frames + config.sink_frames) * 2)
    before = driver.memory.pool.key[:, :, sink].clone()
    driver.model.frame_keys = lambda frame: torch.full((DIM,), -1.0)
    driver.chunk(prompt_of(torch.ones(DIM)))
    assert torch.equal(driver.memory.pool.key[:, :, sink], before)


def test_switch_reencodes_the_window_and_the_prototype_that_leaves_keeps_its_own_prompt():
    config = MemoryConfig()
    driver = MemoryDriver(config)
    for _ in range(6):
        driver.chunk()
    driver.model.frame_keys = lambda frame: torch.full((DIM,), 100.0 + frame)
    driver.chunk(prompt_of(torch.ones(DIM)))
    keys = driver.memory.pool.key[0, 0, ::2, 0, 0]
    window, bank = keys[config.bank_frames + config.sink_frames :], keys[: config.bank_frames]
    assert (window >= 100).all()
    assert sorted(bank.tolist()) == sorted(driver.bank()) and 9 in driver.bank()


def test_two_streams_share_nothing():
    """Published defect 8: clearing a cache leaves counters and the pending frame behind."""
    fresh = MemoryDriver(MemoryConfig())
    expected = [fresh.chunk() for _ in range(8)]
    first = MemoryDriver(MemoryConfig())
    for _ in range(12):
        first.chunk()
    second = MemoryDriver(MemoryConfig())
    for chunk in expected:
        assert second.chunk() == chunk
        first.chunk(prompt_of(random_keys(1)))


def test_without_a_bank():
    """Published defect 7: there the bank must exist even where it is not used."""
    for config in (MemoryConfig(bank_frames=0), MemoryConfig(policy="none")):
        driver = MemoryDriver(config)
        for _ in range(10):
            seen = driver.chunk()
        assert sorted(seen) == [0, 1, 2, *range(21, 30)]


def test_fifo_keeps_the_newest_that_left_the_window():
    driver = MemoryDriver(MemoryConfig(policy="fifo"))
    for _ in range(12):
        driver.chunk()
    # The last chunk holds frames 33 to 35, the window 27 to 35; the prototypes before it are 24, 21, 18, ...
    assert sorted(driver.bank()) == [18, 21, 24]


def test_prompt_keeps_what_it_calls_for_per_row_and_layer():
    """Each batch row and layer keeps its own frames."""
    layers, batch = 2, 3
    directions = torch.eye(DIM)
    driver = MemoryDriver(
        MemoryConfig(bank_frames=2), batch, layers, frame_keys=lambda frame: directions[(frame // 3) % DIM]
    )
    wanted = torch.tensor([[0, 1, 2], [3, 0, 1]])
    keys = directions[wanted][:, :, None, None].expand(layers, batch, 1, 2, DIM)
    driver.prompt = driver.prompt._replace(key=keys, value=keys)
    for _ in range(20):
        driver.chunk()
    for layer in range(layers):
        for row in range(batch):
            best = [frame for frame in driver.bank(layer, row) if (frame // 3) % DIM == wanted[layer, row]]
            assert best, f"layer {layer}, row {row} dropped the frame its prompt calls for: {driver.bank(layer, row)}"


@pytest.mark.parametrize("aggregate", ["mean", "softmax"])
def test_padding_does_not_count(aggregate):
    driver = MemoryDriver(MemoryConfig(aggregate=aggregate), frame_keys=random_keys)
    for _ in range(8):
        driver.chunk()
    key = random_keys(77).expand(1, 1, 1, 2, DIM)
    padded = torch.cat([key, 50 * torch.ones(1, 1, 3, 2, DIM)], dim=2)
    mask = torch.tensor([[True, False, False, False]])
    plain = driver.memory.relevance(prompt_of(random_keys(77)))
    torch.testing.assert_close(driver.memory.relevance(driver.prompt._replace(key=padded, mask=mask)), plain)


def test_the_update_is_made_once_per_chunk():
    driver = MemoryDriver(MemoryConfig())
    for _ in range(9):
        driver.chunk()
    driver.memory.update(27, driver.prompt)
    before = driver.bank()
    driver.memory.update(27, driver.prompt)
    assert driver.bank() == before


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"top_k": 0}, "top_k must be a whole number of at least 1, got 0"),
        ({"top_k": 2.5}, "top_k"),
        ({"bank_frames": -1}, "bank_frames"),
        ({"window_frames": 2}, "window_frames must be a whole number of at least 3"),
        ({"frames_per_chunk": 0}, "frames_per_chunk"),
        ({"record_interval": 0}, "record_interval"),
        ({"policy": "best"}, "policy must be one of prompt, .*, none, got 'best'"),
        ({"aggregate": "max"}, "aggregate must be one of mean, softmax"),
        ({"published_mode": "web"}, "published_mode"),
        ({"sink_frames": True}, "sink_frames"),
        ({"recache": "no"}, "recache must be True or False, got 'no'"),
    ],
)
def test_config_refuses(fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        MemoryConfig(**fields)


def test_whole_numbers_of_numpy_can_be_saved():
    config = MemoryConfig(window_frames=np.int64(6), top_k=np.int32(2), held_frames=np.int64(9))
    assert MemoryConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"mode": "web"}, "mode must be one of interactive, single"),
        ({"local_frames": 6, "sink_frames": 6}, "local_frames .* at least 9"),
        ({"policy": "fifo"}, "policy must be one of prompt"),
        ({"aggregate": "softmax"}, "aggregate must be one of mean"),
        ({"bank_frames": 0}, "bank_frames must be a whole number of at least 1"),
    ],
)
def test_published_refuses(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        MemoryConfig.published(**arguments)


@pytest.mark.parametrize("aggregate", ["mean", "softmax"])
def test_snapshot_scores_what_is_held(aggregate):
    driver = MemoryDriver(MemoryConfig(aggregate=aggregate), frame_keys=random_keys)
    for _ in range(5):  # one frame has entered the bank
        driver.chunk()
    snapshot = driver.memory.snapshot(15, driver.prompt)
    assert (snapshot.held[0, 0] >= 0).tolist() == [False, False, True]
    assert torch.isfinite(torch.from_numpy(snapshot.relevance[0, 0])).tolist() == [False, False, True]
    if aggregate == "softmax":
        assert snapshot.relevance[0, 0, 2] == pytest.approx(1), "the only frame has all the attention"


@pytest.mark.parametrize("name", ["frames_per_chunk", "sink_frames", "window_frames", "bank_frames", "held_frames"])
def test_counts_that_no_tensor_has(name):
    with pytest.raises(ValueError, match=f"{name} must be at most"):
        MemoryConfig(**{name: 10**20} | ({"window_frames": 10**20} if name == "frames_per_chunk" else {}))
