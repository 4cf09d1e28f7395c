"""What is shown as a set: frames that cover the prompt's tokens, and the preferred frame of each scene."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from memory_driver import DIM, HEADS, MemoryDriver, prompt_of

from memflow import MemFlowError
from memflow.memory import MemoryConfig, Prompt, make_memory
from memflow.memory.attention import attend_with_memory
from memflow.memory.policies import PromptPolicy
from memflow.memory.views import passed_over

CHUNK_SECONDS = 0.75
BETTER = {"recall": "coverage", "scene_frame": "first"}


def random_keys(frame: int) -> torch.Tensor:
    return torch.randn(DIM, generator=torch.Generator().manual_seed(frame))


def spoken(layers: int, batch: int, seed: int, tokens: int = 5) -> Prompt:
    """A prompt with tokens of its own in every layer and row; the last ones of a row are padding full of numbers."""
    draw = torch.Generator().manual_seed(seed)
    key = torch.randn(layers, batch, tokens, HEADS, DIM, generator=draw)
    mask = torch.arange(tokens) < torch.randint(2, tokens, (batch, 1), generator=draw)
    return Prompt(key, key, mask)


def covering(scores, prior: list[float], k: int) -> list[int]:
    """Greedily, in plain Python. scores: a list per token, a number per frame."""
    best, chosen = [min(row) for row in scores], []
    for _ in range(k):
        gains = {
            frame: sum(max(0.0, row[frame] - low) for row, low in zip(scores, best, strict=True)) / len(scores) + value
            for frame, value in enumerate(prior)
            if frame not in chosen
        }
        chosen.append(max(gains, key=gains.get))
        best = [max(low, row[chosen[-1]]) for row, low in zip(scores, best, strict=True)]
    return chosen


def first_of(frames: list[int], scene_of, preferred) -> set[int]:
    scenes = {scene_of(frame) for frame in frames}
    return {preferred(frame for frame in frames if scene_of(frame) == scene) for scene in scenes}


@pytest.mark.parametrize("layers_vote", ["each", "mean"])
@pytest.mark.parametrize("scene_frame", ["any", "first", "latest"])
@pytest.mark.parametrize("policy", ["fifo", "archive"])
def test_the_bank_shows_what_plain_greed_would(policy, scene_frame, layers_vote):
    layers, batch = 3, 2
    held = 7 if policy == "fifo" else None
    config = MemoryConfig(
        policy=policy, held_frames=held, recall="coverage", scene_frame=scene_frame, layers=layers_vote
    )
    driver = MemoryDriver(config, batch, layers, frame_keys=random_keys)
    for chunk in range(22):
        driver.chunk(spoken(layers, batch, 100 + chunk) if chunk % 4 == 0 else None)
        for layer, row in itertools.product(range(layers), range(batch)):
            frames = [frame for frame in driver.memory.held[layer, row].tolist() if frame >= 0]
            if not frames:
                continue
            text = driver.prompt.key[:, row, driver.prompt.mask[row]].double()  # [layers, T, H, D]
            keys = torch.stack([random_keys(frame).double() for frame in frames])
            scores = torch.einsum("lthd,fd->ltf", text, keys) / DIM**0.5 / HEADS
            scores = scores[layer] if layers_vote == "each" else scores[1:].mean(0)
            prior = 0.03 * scores.mean(0)
            if scene_frame != "any":
                preferred = first_of(frames, lambda frame: frame // 12, min if scene_frame == "first" else max)
                prior -= 1000 * torch.tensor([frame not in preferred for frame in frames])
            expected = covering(scores.tolist(), prior.tolist(), min(3, len(frames)))
            shown = [frame for frame in driver.memory.shown[layer, row].tolist() if frame >= 0]
            assert sorted(shown) == sorted(frames[index] for index in expected)


def test_one_kind_of_frame_does_not_take_all_places():
    """Ten frames of the place, each a little more relevant than the only one of the visitor."""
    visitor, place = torch.eye(DIM)[0], torch.eye(DIM)[1]
    keys = lambda frame: 3 * visitor if 12 <= frame < 15 else (4 + 0.01 * frame) * place  # noqa: E731
    text = torch.stack([visitor, place])[None, None, :, None].expand(1, 1, 2, HEADS, DIM)
    prompt = Prompt(text, text, torch.ones(1, 2, dtype=torch.bool))

    def found(**fields):
        driver = MemoryDriver(MemoryConfig(policy="archive", **fields), frame_keys=keys)
        driver.prompt = prompt_of(place)
        for _ in range(15):
            driver.chunk()
        driver.chunk(prompt)
        return driver.memory.shown[0, 0].tolist()

    assert 12 not in found() and 12 in found(recall="coverage")
    assert {3, 12} <= set(found(**BETTER)), "the place's first frame, and the visitor, in one scene"


def test_a_prompt_begins_a_scene_and_its_first_frame_is_preferred():
    """Relevance grows with the number of a frame, so that without a preference the latest are shown."""
    keys = lambda frame: (1 + frame) * torch.eye(DIM)[0]  # noqa: E731
    prompt = prompt_of(torch.eye(DIM)[0])

    def shown(scene_frame):
        driver = MemoryDriver(MemoryConfig(policy="archive", scene_frame=scene_frame), frame_keys=keys)
        for chunk in range(15):  # scenes begin at frames 0, 12, 24, 36
            driver.chunk(prompt if chunk % 4 == 0 else None)
        return sorted(driver.memory.shown[0, 0].tolist())

    assert shown("any") == [27, 30, 33]
    assert shown("first") == [3, 12, 24]
    assert shown("latest") == [9, 21, 33]


def test_who_is_preferred_is_counted_in_every_layer_and_row():
    draw = torch.Generator().manual_seed(3)
    for _ in range(20):
        frames = torch.stack([torch.randperm(40, generator=draw)[:9] for _ in range(4)]).view(2, 2, 9)
        for name, preferred in (("first", min), ("latest", max)):
            over = passed_over(frames, frames // 7, name)
            for layer, row in itertools.product(range(2), range(2)):
                held = frames[layer, row].tolist()
                best = first_of(held, lambda frame: frame // 7, preferred)
                assert over[layer, row].tolist() == [frame not in best for frame in held]


def test_a_policy_may_choose_a_set(monkeypatch):
    class Oldest(PromptPolicy):
        def choose(self, held, k):
            return held.frames.topk(k, largest=False).indices

    monkeypatch.setitem(__import__("memflow.memory.policies", fromlist=["POLICIES"]).POLICIES, "oldest", Oldest)
    driver = MemoryDriver(MemoryConfig(policy="oldest", held_frames=9), frame_keys=random_keys)
    for _ in range(10):
        driver.chunk()
    assert sorted(driver.memory.shown[0, 0].tolist()) == [3, 6, 9]
    with pytest.raises(ValueError, match="recall must be 'relevance' with policy='oldest'"):
        MemoryConfig(policy="oldest", held_frames=9, recall="coverage")


def test_a_frame_made_of_nan_is_shown_last_and_breaks_nothing():
    keys = lambda frame: random_keys(frame) * (float("nan") if frame == 6 else 1.0)  # noqa: E731
    driver = MemoryDriver(MemoryConfig(policy="archive", **BETTER), frame_keys=keys)
    for chunk in range(12):
        driver.chunk(spoken(1, 1, chunk))
    assert sorted(driver.memory.held[0, 0].tolist())[1] == 6 and 6 not in driver.memory.shown[0, 0].tolist()


@pytest.mark.parametrize("policy", ["archive", "original"])
def test_resume_is_bit_identical_across_scenes(toy, policy, tmp_path):
    config = MemoryConfig(policy=policy, held_frames=None if policy == "archive" else 6, layers="mean", **BETTER)
    settings = {"seconds_per_prompt": 3 * CHUNK_SECONDS, "height": 32, "width": 32, "memory": config, "seed": 4}
    stream = toy.stream(["a fox in the snow", "an owl", "a fox", "the snow"], **settings)
    for _ in range(8):
        next(stream)
    stream.save(tmp_path / "state")
    resumed = toy.resume(tmp_path / "state")
    assert resumed.memory.scene_starts.tolist() == [0, 9, 18]
    for there, here in zip(resumed, stream, strict=True):
        assert torch.equal(there.latents, here.latents)
    assert torch.equal(resumed.memory.shown, stream.memory.shown)
    assert resumed.memory.scene_starts.tolist() == [0, 9, 18, 27]


@pytest.mark.parametrize("scene_frame", ["any", "first"])
def test_a_state_without_scenes_is_read_where_they_do_not_count(scene_frame):
    """As MemFlow wrote it before there were scenes."""
    config = MemoryConfig(held_frames=5, scene_frame=scene_frame)
    driver = MemoryDriver(config, frame_keys=random_keys)
    for _ in range(9):
        driver.chunk()
    tensors, counters = driver.driver.state_dict()
    tensors = {name: tensor.clone() for name, tensor in tensors.items() if name != "memory.scene_starts"}
    other = MemoryDriver(config, frame_keys=random_keys)
    if scene_frame == "any":
        other.driver.load_state_dict(tensors, counters)
        assert torch.equal(other.memory.shown, driver.memory.shown)
    else:
        with pytest.raises(ValueError, match=r"scene_starts must be torch\.int64 \[scenes\], got nothing"):
            other.driver.load_state_dict(tensors, counters)


def test_a_snapshot_tells_what_each_token_says():
    layers, batch = 2, 2
    driver = MemoryDriver(MemoryConfig(held_frames=6), batch, layers, frame_keys=random_keys)
    for _ in range(7):
        driver.chunk(spoken(layers, batch, 5))
    snapshot = driver.driver.snapshot()
    assert snapshot.token_relevance.shape == (layers, batch, 5, 6) and list(snapshot.words) == []
    for layer, row, token, place in itertools.product(range(layers), range(batch), range(5), range(6)):
        frame, found = int(snapshot.held[layer, row, place]), snapshot.token_relevance[layer, row, token, place]
        text = driver.prompt.key[layer, row, token].mean(0) * driver.prompt.mask[row, token]
        expected = float(text @ random_keys(frame)) / DIM**0.5 if frame >= 0 else float("nan")
        assert found == pytest.approx(expected, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"recall": "best"}, "recall must be one of relevance, coverage, originals, got 'best'"),
        ({"scene_frame": "last"}, "scene_frame must be one of any, first, latest"),
        ({"recall": "coverage"}, "recall must be 'relevance' where held_frames is None, got 'coverage'"),
        ({"scene_frame": "first", "policy": "none"}, "scene_frame must be 'any' where held_frames is None"),
        ({"policy": "random", "held_frames": 9, "scene_frame": "first"}, "scene_frame must be 'any' with policy='rand"),
        ({"policy": "oracle", "recall": "coverage"}, "recall must be 'relevance' with policy='oracle'"),
        ({"held_frames": 9, "recall": "coverage", "aggregate": "softmax"}, "aggregate must be 'mean' with recall="),
        ({"published_mode": "single", "recall": "coverage"}, "recall must be 'relevance' where held_frames is None"),
    ],
)  # fmt: skip
def test_a_recall_without_effect_is_refused(fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        MemoryConfig(**fields)
    with pytest.raises(MemFlowError, match=f"memory settings: {complaint}"):
        MemoryConfig.from_dict(fields)


def test_changed_settings_stay_ones_that_have_an_effect():
    covered = MemoryConfig(policy="original", held_frames=9, **BETTER)
    assert covered.changed(policy="archive", held_frames=None) == replace(covered, policy="archive", held_frames=None)
    for change in ({"held_frames": None}, {"policy": "random"}, {"policy": "none", "held_frames": None}):
        fallen = covered.changed(**change)
        assert (fallen.recall, fallen.scene_frame) == ("relevance", "any")
    with pytest.raises(ValueError, match="recall must be 'relevance' where held_frames is None"):
        covered.changed(held_frames=None, recall="coverage")
    with pytest.raises(ValueError, match="policy must be one of"):
        covered.changed(policy="best")
    shared = covered.changed(activated=0.5)
    assert (
        shared.changed(top_k=2) == covered.changed(top_k=2) and shared.changed(top_k=2).changed(activated=0.5) == shared
    )


def test_the_default_shows_by_relevance_alone():
    assert (MemoryConfig().recall, MemoryConfig().scene_frame) == ("relevance", "any")
    published = MemoryConfig.published()
    assert published == replace(published, recall="relevance", scene_frame="any")


def test_a_memory_in_float64_covers_too():
    config = MemoryConfig(policy="archive", bank_frames=2, **BETTER)
    sizes = {"layers": 2, "batch": 1, "heads": HEADS, "head_dim": DIM, "grid": (2, 3)}
    shown = []
    for dtype in (torch.float32, torch.float64):
        memory = make_memory(config, **sizes, dtype=dtype, device="cpu")
        text = spoken(2, 1, seed=3).key.to(dtype)
        prompt = Prompt(text, text, torch.ones(1, 5, dtype=torch.bool))
        memory.switch_prompt(0, prompt)
        draw = torch.Generator().manual_seed(5)
        for start in range(0, 45, 3):
            memory.update(start, prompt)
            step = memory.pass_over(start, 3, prompt)
            for layer in range(2):
                states = torch.randn(3, 1, 18, HEADS, DIM, generator=draw).to(dtype)
                attend_with_memory(*states, step, layer, rotated=False)
        shown.append(memory.shown.clone())
    assert torch.equal(*shown) and (shown[0] >= 0).all()
