"""Small conditions that a stream depends on for hundreds of frames; each test says what would happen without."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from memory_driver import DIM, HEADS, MemoryDriver, prompt_of

from memflow import MemFlowError
from memflow.memory import MemoryConfig, policies
from memflow.memory.policies import DiversePolicy, Held
from memflow.stream.sampler import DistilledSchedule


def random_keys(frame: int) -> torch.Tensor:
    return torch.randn(DIM, generator=torch.Generator().manual_seed(frame))


@pytest.mark.parametrize("held", [None, 4, 6])
@pytest.mark.parametrize("policy", ["prompt", "random", "diverse", "original"])
def test_a_newcomer_that_is_not_held_overwrites_nothing(policy, held):
    """Without the guard on -1 it would take the slot before the first of the store: the last one of the window."""
    config = MemoryConfig(policy=policy, held_frames=held, bank_frames=3)
    driver = MemoryDriver(config, frame_keys=random_keys)
    for chunk in range(40):
        seen, stop = driver.chunk(), 3 * (chunk + 1)
        shown = [frame for frame in driver.memory.shown[0, 0].tolist() if frame >= 0]
        window = range(max(config.sink_frames, stop - config.window_frames), stop)
        assert sorted(seen) == sorted([*shown, *range(config.sink_frames), *window])
        assert len(set(driver.bank()) - {-1}) == len([frame for frame in driver.bank() if frame >= 0])


MEMORIES = {
    "bank": MemoryConfig(),
    "softmax": MemoryConfig(aggregate="softmax"),
    "held": MemoryConfig(held_frames=5),
    "archive": MemoryConfig(policy="archive"),
}


@pytest.mark.parametrize("config", MEMORIES.values(), ids=MEMORIES)
def test_padding_counts_nowhere_whatever_its_keys(config):
    """Every batch row has a mask of its own, the same in all layers: for what is held and for the newcomer."""
    layers, batch = 3, 2
    driver = MemoryDriver(config, batch, layers, frame_keys=random_keys)
    for _ in range(8):
        driver.chunk()
    draw = torch.Generator().manual_seed(0)
    key = torch.randn(layers, batch, 4, HEADS, DIM, generator=draw)
    mask = torch.tensor([[True, False, False, False], [True, True, True, False]])
    padding = 100 * torch.randn(key.shape, generator=draw)
    clean = prompt_of(torch.ones(DIM), layers, batch)._replace(key=key, value=key, mask=mask)
    messy = clean._replace(key=torch.where(mask[None, :, :, None, None], key, padding))
    memory = driver.memory
    newcomer = lambda prompt: memory._newcomer(21, prompt).relevance()  # noqa: E731
    for scores in (memory.relevance, newcomer):
        assert torch.equal(scores(clean), scores(messy))
        if scores != newcomer or config.aggregate == "mean":  # of a single frame the softmax is 1
            assert not torch.equal(scores(clean), scores(clean._replace(mask=mask.flip(0))))


def test_the_layers_vote_on_how_alike_frames_are():
    """What one layer alone finds most alike is not what all of them but the first do."""
    draw = torch.Generator().manual_seed(3)
    frames = torch.arange(5).expand(4, 1, 5)
    means = torch.randn(4, 1, 6, 2, 3, generator=draw)
    vote = lambda scores: scores[1:].mean(0, keepdim=True).expand_as(scores)  # noqa: E731
    seeds = torch.zeros(1, dtype=torch.int64)
    held = Held(frames, lambda: means[:, :, :5], None, vote, seeds)
    newcomer = Held(torch.full((4, 1, 1), 5), lambda: means[:, :, 5:], None, vote, seeds)

    def pair(layers) -> int:
        """The older of the two frames that are most alike in these layers."""
        distance = {
            (a, b): sum(float((means[layer, 0, a] - means[layer, 0, b]).square().sum()) ** 0.5 for layer in layers)
            for a, b in itertools.combinations(range(6), 2)
        }
        return min(min(distance, key=distance.get))

    alone, together = [pair([layer]) for layer in range(4)], pair([1, 2, 3])
    assert any(frame != together for frame in alone), "the case tells nothing"
    assert DiversePolicy().victim(held, newcomer).flatten().tolist() == [together] * 4


@pytest.mark.parametrize(("interval", "recorded"), [(1, [12, 15, 18]), (2, [6, 12, 18]), (3, [9, 18])])
def test_every_so_many_chunks_a_prototype_is_recorded(interval, recorded):
    driver = MemoryDriver(MemoryConfig(policy="fifo", record_interval=interval))
    for _ in range(10):
        driver.chunk()
    assert sorted(frame for frame in driver.bank() if frame >= 0) == recorded


def test_a_frame_that_is_brought_back_has_all_that_it_had():
    """Relative positions keep keys and mean keys at place 0; the next chunk is placed from these."""
    driver = MemoryDriver(MemoryConfig(policy="archive", positions="relative"), 2, 2, frame_keys=random_keys)
    pool = driver.memory.pool
    for tensor in pool.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(tensor.numel())))
    key, value = (states.clone() for states in pool.frame(5))
    mean = pool.means(5, 1).squeeze(2).clone()
    pool.write(1, key, value, mean)
    pool.write(2, key[1, 0], value[1, 0], mean[1, 0], (1, 0))
    for made, row in ((1, slice(None)), (2, (1, 0))):
        for ours, theirs in zip(pool.frame(made), pool.frame(5), strict=True):
            assert torch.equal(ours[row], theirs[row])
        assert torch.equal(pool.means(made, 1)[row], pool.means(5, 1)[row])
        assert torch.equal(pool.still_mean[:, :, made][row], mean[row])
        assert torch.equal(pool.frame_mean[:, :, made][row], mean[row])
    untouched = pool.still_mean[0, 1, 2]
    assert not torch.equal(untouched, mean[0, 1])


def test_a_sink_that_is_not_full_yet_holds_what_was_made():
    driver = MemoryDriver(MemoryConfig(frames_per_chunk=2, sink_frames=3, window_frames=4))
    for sink, window in (([0, 1], []), ([0, 1, 2], [3]), ([0, 1, 2], [3, 4, 5]), ([0, 1, 2], [4, 5, 6, 7])):
        driver.chunk()
        snapshot = driver.driver.snapshot()
        assert (snapshot.sink, snapshot.window) == (sink, window)


def test_the_sink_competes_from_the_first_chunk_after_it():
    memory = MemoryDriver(MemoryConfig(top_k=1)).memory
    assert [memory.pass_over(start, 3, None).candidates for start in (0, 3, 6)] == [0, 3, 3]
    assert [memory.pass_over(start, 3, None).chooses for start in (0, 3, 6)] == [False, True, True]


@pytest.mark.parametrize(("first", "accepted"), [(1.0, True), (0.999, True), (1.0001, False), (0.9985, False)])
def test_noise_levels_begin_at_one(first, accepted):
    table = torch.linspace(first, 0.001, 1000, dtype=torch.float64)
    scheduler = SimpleNamespace(config=SimpleNamespace(num_train_timesteps=1000), sigmas=table)
    if accepted:
        assert DistilledSchedule(scheduler, (1000, 500)).sigmas[0] == first
        return
    with pytest.raises(MemFlowError, match="from 1 down"):
        DistilledSchedule(scheduler, (1000, 500))


def test_the_random_policy_draws_by_splitmix64():
    """As its authors' C has it, in Python's whole numbers: who names the seed gets the same film for ever."""

    def mixed(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    frames, seeds = torch.tensor([[[0, 7, 2**40], [1, 24, 1560]]]), torch.tensor([0, 2**62 + 3])
    expected = [
        [(mixed((frame + mixed(seed)) % 2**64) >> 11) / 2**53 for frame in row]
        for row, seed in zip(frames[0].tolist(), seeds.tolist(), strict=True)
    ]
    assert policies._draw(frames, seeds)[0].tolist() == expected
