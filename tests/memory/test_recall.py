"""Policies and stores: what is held, what of it is shown, and that the slots contain what the numbers say."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from memory_driver import DIM, TOKENS, MemoryDriver, prompt_of
from slow_memory import turned

from memflow.memory import MemoryConfig
from memflow.memory.policies import POLICIES, DiversePolicy, Held, OriginalPolicy

CHUNK_SECONDS = 0.75
STORES = {
    "archive": MemoryConfig(policy="archive"),
    "archive, one place": MemoryConfig(policy="archive", bank_frames=1),
    "12 held": MemoryConfig(policy="fifo", held_frames=12),
    "as many held as shown": MemoryConfig(policy="fifo", held_frames=3),
}


def random_keys(frame: int) -> torch.Tensor:
    return torch.randn(DIM, generator=torch.Generator().manual_seed(frame))


def prompts(layers: int, batch: int, seed: int):
    """One of its own for every layer and row."""
    key = torch.randn(layers, batch, 1, 1, DIM, generator=torch.Generator().manual_seed(seed)).expand(-1, -1, 1, 2, -1)
    return prompt_of(torch.ones(DIM), layers, batch)._replace(key=key, value=key)


def past(config: MemoryConfig, chunks: int) -> list[int]:
    """Prototypes that have left the window before chunk `chunks - 1` is made."""
    return list(range(config.sink_frames, config.frames_per_chunk * (chunks - 1) - config.window_frames + 3, 3))


@pytest.mark.parametrize("config", STORES.values(), ids=STORES)
def test_the_bank_shows_the_most_relevant_of_all_that_is_held(config):
    layers, batch = 2, 3
    driver = MemoryDriver(config, batch, layers, frame_keys=random_keys)
    for chunk in range(1, 26):
        driver.chunk(prompts(layers, batch, 1000 + chunk) if chunk % 4 == 1 else None)
        held = past(config, chunk)[-(config.held_frames or 999) :]
        for layer, row in itertools.product(range(layers), range(batch)):
            text = driver.prompt.key[layer, row, 0, 0]
            best = sorted(held, key=lambda frame: -float(random_keys(frame) @ text))[: config.bank_frames]
            shown = [frame for frame in driver.memory.shown[layer, row].tolist() if frame >= 0]
            assert sorted(shown) == sorted(best)
            kept = [frame for frame in driver.memory.held[layer, row].tolist() if frame >= 0]
            assert sorted(kept) == held


@pytest.mark.parametrize("config", STORES.values(), ids=STORES)
def test_slots_contain_what_the_numbers_say(config):
    layers, batch = 2, 2
    driver = MemoryDriver(config, batch, layers, frame_keys=random_keys)
    before = driver.memory.shown.clone()
    for chunk in range(24):
        driver.chunk(prompts(layers, batch, chunk) if chunk % 3 == 1 else None)
        shown, pool = driver.memory.shown, driver.memory.pool
        for layer, row, slot in itertools.product(range(layers), range(batch), range(config.bank_frames)):
            frame = int(shown[layer, row, slot])
            if frame < 0:
                continue
            tokens = slice(slot * TOKENS, (slot + 1) * TOKENS)
            assert (pool.value[layer, row, tokens] == frame).all()
            assert torch.equal(pool.key[layer, row, tokens], random_keys(frame).expand(TOKENS, 2, DIM))
            assert torch.equal(pool.frame_mean[layer, row, slot], random_keys(frame).expand(2, DIM))
        was, now = (set(x[0, 0].tolist()) - {-1} for x in (before, shown))
        for frame in was & now:
            assert before[0, 0].tolist().index(frame) == shown[0, 0].tolist().index(frame), "a copy that was not needed"
        before = shown.clone()


@pytest.mark.parametrize("positions", ["absolute", "relative"])
def test_while_all_is_shown_every_store_tells_the_same_story(toy, positions):
    """Four prototypes in four places."""
    settings = {"seconds_per_prompt": 8 * CHUNK_SECONDS, "height": 32, "width": 32}
    plain = MemoryConfig(bank_frames=4, positions=positions)
    expected = torch.cat([chunk.latents for chunk in toy.stream(["a fox"], memory=plain, **settings)], 2)
    for policy in ("archive", "diverse", "original"):
        other = replace(plain, policy=policy, held_frames=None if policy == "archive" else 7)
        stream = toy.stream(["a fox"], memory=other, **settings)
        latents = torch.cat([chunk.latents for chunk in stream], 2)
        torch.testing.assert_close(latents, expected, rtol=0, atol=1e-4)
        assert set(stream.memory.shown.flatten().tolist()) == {3, 6, 9, 12}


def test_what_the_prompt_forgets_the_others_keep():
    """A visitor, in one chunk only, and then a long stay elsewhere; at the end the prompt asks for the visitor."""
    visitor, home = torch.eye(DIM)[0], torch.eye(DIM)[1]
    keys = lambda frame: 3 * visitor if 12 <= frame < 15 else home + 0.1 * random_keys(frame)  # noqa: E731

    def found(**fields):
        driver = MemoryDriver(MemoryConfig(**fields), frame_keys=keys)
        driver.prompt = prompt_of(home)
        for _ in range(20):
            driver.chunk()
        return 12 in driver.chunk(prompt_of(visitor))

    assert not found(policy="prompt") and not found(policy="fifo", held_frames=6)
    assert found(policy="diverse") and found(policy="diverse", held_frames=6) and found(policy="archive")
    assert found(policy="original") and found(policy="original", held_frames=6)


def nearest_two(means: torch.Tensor) -> tuple[int, int]:
    """Indices of the two nearest of means [n, H, D]."""
    pairs = itertools.combinations(range(len(means)), 2)
    return min(pairs, key=lambda pair: float((means[pair[0]] - means[pair[1]]).double().square().sum()))


@pytest.mark.parametrize(("policy", "leaving"), [(DiversePolicy, min), (OriginalPolicy, max)])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_of_the_nearest_pair_one_is_given_up(policy, leaving, count):
    """The older one, or the newer one; the newcomer is not taken where it is that."""
    torch.manual_seed(count)
    refused = 0
    for _ in range(20):
        means = torch.randn(2, 3, count + 1, 2, DIM) + 5  # what all have in common does not matter
        frames = torch.stack([torch.randperm(count) for _ in range(6)]).view(2, 3, count)
        new = torch.full((2, 3, 1), 100)
        views = [
            Held(f, lambda m=m: m, None, lambda scores: scores, None)
            for f, m in ((frames, means[:, :, :-1]), (new, means[:, :, -1:]))
        ]
        victim = policy().victim(*views)
        for layer, row in itertools.product(range(2), range(3)):
            numbers = [*frames[layer, row].tolist(), 100]
            expected = leaving(nearest_two(means[layer, row]), key=lambda index: numbers[index])
            assert int(victim[layer, row]) == (-1 if expected == count else expected)
            refused += expected == count
    assert (refused > 0) == (policy is OriginalPolicy)


def test_what_looks_the_same_is_held_as_it_looked_at_first():
    """The same scene twenty times, a little different each time, and one visitor: the first of each stays."""
    visitor, home = torch.eye(DIM)[0], torch.eye(DIM)[1]
    keys = lambda frame: 3 * visitor if 12 <= frame < 15 else home + 0.01 * frame * torch.eye(DIM)[2]  # noqa: E731

    def held(policy):
        driver = MemoryDriver(MemoryConfig(policy=policy, bank_frames=2), frame_keys=keys)
        driver.prompt = prompt_of(home)
        for _ in range(20):
            driver.chunk()
        return sorted(driver.memory.held[0, 0].tolist())

    first = held("original")
    assert first == [3, 12]
    latest = held("diverse")
    assert latest[0] == 12 and latest[1] > 30


def test_policies_see_means_at_place_zero_with_absolute_positions_too(toy):
    memory = MemoryConfig(policy="diverse", bank_frames=2)
    stream = toy.stream(["a fox"], seconds_per_prompt=7 * CHUNK_SECONDS, height=32, width=32, memory=memory)
    for _ in stream:
        pass
    memory, tokens = stream.memory, stream.memory.pool.tokens_per_frame
    means = memory._held(stream.driver.in_force.prompt).frame_mean()
    for slot, frame in enumerate(memory.held[1, 0].tolist()):
        key = memory.pool.key[1, :, slot * tokens : (slot + 1) * tokens]
        flat = turned(key.double(), -frame, memory.grid, rows_and_columns=False).mean(1)
        torch.testing.assert_close(means[1, :, slot].double(), flat, rtol=0, atol=1e-5)
        assert (means[1, :, slot] - key.mean(1)).abs().max() > 0.01


def shown_at_random(seeds: list[int], chunks: int, **fields) -> list[set[int]]:
    config = MemoryConfig(policy="random", **fields)
    driver = MemoryDriver(config, len(seeds), layers=2, frame_keys=random_keys)
    driver.memory.seeds = torch.tensor(seeds)
    for _ in range(chunks):
        driver.chunk()
    shown = getattr(driver.memory, "shown", driver.memory.held)
    assert torch.equal(shown[0].sort().values, shown[1].sort().values), "layers must agree"
    return [set(row) for row in shown[0].tolist()]


@pytest.mark.parametrize("held", [None, 6])
def test_random_shows_every_past_frame_equally_often(held):
    stories, chunks = 900, 14
    shown = shown_at_random(list(range(stories)), chunks, held_frames=held)
    frames = past(MemoryConfig(), chunks)
    expected = stories * 3 / len(frames)
    for frame in frames:
        often = sum(frame in row for row in shown)
        assert abs(often - expected) < 5 * expected**0.5, f"frame {frame}: {often} times, {expected} expected"
    assert shown_at_random([17], chunks, held_frames=held)[0] == shown[17], "a story alone is the story in a batch"


def test_oracle_shows_what_is_wanted():
    driver = MemoryDriver(MemoryConfig(policy="oracle"), batch=2, layers=2, frame_keys=random_keys)
    for _ in range(12):
        driver.chunk()
    assert driver.memory.shown[1, 0].sort().values.tolist() == [18, 21, 24], "nothing wanted: the newest"
    driver.memory.policy.wanted = [[3, 9], [12]]
    assert {3, 9, 27} <= set(driver.chunk())
    assert [sorted(row) for row in driver.memory.shown[1].tolist()] == [[3, 9, 27], [12, 24, 27]]
    driver.memory.policy.wanted = [[3]]
    with pytest.raises(ValueError, match="wanted must have one list of frames per batch row \\(2\\)"):
        driver.chunk()


@pytest.mark.parametrize("policy", [name for name in POLICIES if name not in ("none", "oracle")])
@pytest.mark.parametrize("held", [None, 5])
def test_layers_vote_without_the_first(policy, held):
    if policy == "archive":
        held = None
    layers, config = 3, MemoryConfig(policy=policy, layers="mean", held_frames=held)
    directions = torch.randn(layers, DIM, generator=torch.Generator().manual_seed(0))
    drivers = [MemoryDriver(config, layers=layers, frame_keys=random_keys) for _ in range(2)]
    for changed, driver in enumerate(drivers):
        key = directions.clone()
        if changed:
            key[0] = -100 * key[0]  # the first layer has no say
        key = key[:, None, None, None].expand(-1, 1, 1, 2, -1)
        driver.prompt = driver.prompt._replace(key=key, value=key)
        for _ in range(20):
            driver.chunk()
    first, second = (driver.memory.snapshot(60, driver.prompt) for driver in drivers)
    assert (first.held == first.held[:1]).all() and (first.recalled == first.recalled[:1]).all()
    assert (first.recalled == second.recalled).all()
    held = first.held[0, 0][first.held[0, 0] >= 0]
    mean = torch.stack([random_keys(int(frame)) for frame in held]) @ directions[1:].mean(0) / DIM**0.5
    known = torch.from_numpy(first.relevance[0, 0])
    torch.testing.assert_close(known[torch.from_numpy(first.held[0, 0] >= 0)], mean)


def test_snapshot_tells_held_from_recalled():
    driver = MemoryDriver(MemoryConfig(policy="archive"), frame_keys=random_keys)
    driver.chunk()
    empty = driver.memory.snapshot(3, driver.prompt)
    assert empty.held.shape == empty.relevance.shape == (1, 1, 0)
    assert empty.recalled.tolist() == [[[-1, -1, -1]]]
    for _ in range(11):
        driver.chunk()
    snapshot = driver.memory.snapshot(36, driver.prompt)
    assert snapshot.held[0, 0].tolist() == [3, 6, 9, 12, 15, 18, 21, 24]
    best = snapshot.held[0, 0][snapshot.relevance[0, 0].argsort()[-3:]]
    assert sorted(best) == sorted(snapshot.recalled[0, 0])


@pytest.mark.parametrize(
    "config",
    [
        MemoryConfig(policy="archive", positions="relative", layers="mean"),
        MemoryConfig(policy="diverse", positions="relative", held_frames=4, bank_frames=2, top_k=2),
        MemoryConfig(policy="random", held_frames=4, bank_frames=2),
    ],
    ids=lambda config: f"{config.policy}, {config.positions}, {config.held_frames} held",
)
def test_resume_is_bit_identical_with_any_store(toy, config, tmp_path):
    settings = {"seconds_per_prompt": 5 * CHUNK_SECONDS, "height": 32, "width": 32, "memory": config, "seed": 4}
    stream = toy.stream(["a fox in the snow", "an owl"], **settings)
    for _ in range(8):
        next(stream)
    stream.save(tmp_path / "state.safetensors")
    resumed = toy.resume(tmp_path / "state.safetensors")
    for there, here in zip(resumed, stream, strict=True):
        assert torch.equal(there.latents, here.latents)
    assert torch.equal(resumed.memory.held, stream.memory.held)
    assert torch.equal(resumed.memory.shown, stream.memory.shown)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"held_frames": 2}, "held_frames must be a whole number of at least 3, got 2"),
        ({"held_frames": 3.5}, "held_frames must be a whole number"),
        ({"policy": "archive", "held_frames": 12}, "held_frames must be None with policy='archive'"),
        ({"policy": "archive", "held_frames": 2}, "held_frames must be None with policy='archive'"),
        ({"policy": "none", "held_frames": 9}, "held_frames must be None with policy='none', which holds nothing"),
        ({"bank_frames": 0, "held_frames": 9}, "held_frames must be None with bank_frames=0, which shows nothing"),
        (
            {"bank_frames": 0, "policy": "archive"},
            "bank_frames must be a whole number of at least 1, got 0: policy='ar",
        ),
        ({"global_sink": False}, "global_sink must be True without published"),
        ({"policy": "archive", "aggregate": "softmax"}, "aggregate must be 'mean' with policy='archive'"),
        ({"layers": "all"}, "layers must be one of each, mean, got 'all'"),
        ({"positions": "rope"}, "positions must be one of absolute, relative, got 'rope'"),
        ({"published_mode": "single", "positions": "relative"}, "positions must be one of absolute"),
        ({"published_mode": "single", "layers": "mean"}, "layers must be one of each"),
        (
            {"published_mode": "single", "held_frames": 9},
            "None with published_mode='single', got 9",
        ),
    ],
)
def test_config_refuses_what_has_no_meaning(fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        MemoryConfig(**fields)
