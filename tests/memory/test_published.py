"""`MemoryConfig.published()` against a second, independent telling of the published rules: lists instead of slots."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_driver import DIM, MemoryDriver, prompt_of

from memflow.memory import MemoryConfig

ZERO = 0.0  # what an emptied slot holds; frames are numbered from 1 here


def keys(frame: float) -> torch.Tensor:
    return torch.randn(DIM, generator=torch.Generator().manual_seed(int(frame)))


class FrameLists:
    """Sink, local queue and bank as lists of labels: 1 + frame + 1000 * version of the pass that wrote it."""

    def __init__(self, config: MemoryConfig):
        self.config = config
        self.sink, self.local, self.bank = [], [], []
        self.pending, self.slots, self.text_known = None, 0, False

    def maintain(self, text: torch.Tensor) -> None:
        places = self.config.bank_frames
        if self.slots == 0:
            return
        if self.slots <= places:
            self.bank[self.slots - 1 :] = [self.pending]
            return
        scores = [float(keys(label) @ text) if self.text_known else 0.0 for label in self.bank]
        best = sorted(range(places), key=lambda place: -scores[place])[: places - 1]
        self.bank = [self.bank[place] for place in best] + [self.pending]

    def call(self, start: int, frames: int, version: int, store: bool) -> list[float]:
        own = [1 + frame + 1000 * version for frame in range(start, start + frames)]
        queue = self.config.window_frames
        sink, local = self.sink, (self.local + own)[-queue:]
        if start == 0:
            sink, local = own[: self.config.sink_frames], own[self.config.sink_frames :][-queue:]
        if store:
            self.sink, self.local = sink, local
        return [*sink, *(self.bank[: self.slots] if self.config.sink_frames else []), *local]

    def switch(self, start: int, text: torch.Tensor, version: int) -> None:
        self.text_known = False
        if not self.config.global_sink:
            self.sink, self.local = [ZERO] * len(self.sink), [ZERO] * len(self.local)
        frames = min(self.config.sink_frames + self.config.window_frames, start)
        if frames:
            self.maintain(text)
            self.call(start - frames, frames, version, store=True)

    def record(self, start: int, version: int) -> None:
        chunk = start // self.config.frames_per_chunk
        if self.config.published_mode == "single" or chunk % self.config.record_interval == 0:
            self.pending, self.slots = 1 + start + 1000 * version, chunk // self.config.record_interval + 1
        self.text_known = True


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    mode=st.sampled_from(["interactive", "single"]),
    sink=st.sampled_from([0, 0, 3, 3, 3]),
    window=st.sampled_from([3, 6, 9]),
    bank=st.integers(1, 4),
    interval=st.integers(1, 4),
    global_sink=st.booleans(),
    switches=st.sets(st.integers(0, 17), max_size=4),
)
def test_published_memory_is_the_frame_lists(mode, sink, window, bank, interval, global_sink, switches):
    config = MemoryConfig.published(
        mode,
        local_frames=sink + window,
        sink_frames=sink,
        bank_frames=bank,
        record_interval=interval,
        global_sink=global_sink,
    )
    driver, lists, text = MemoryDriver(config, frame_keys=keys), FrameLists(config), keys(999_999)
    version = 0
    driver.model.number = lambda frame: 1 + frame + 1000 * version  # labels like those of `FrameLists`
    driver.prompt = prompt_of(text)
    for chunk in range(18):
        start, prompt = 3 * chunk, None
        if chunk in switches:
            text = keys(999_999 - chunk)
            prompt = prompt_of(text)
            version = 2 * chunk
            lists.switch(start, text, version)
        lists.maintain(text)
        # One version for all writes of a chunk: the driver writes window and chunk in one go.
        expected = lists.call(start, 3, version, store=True)
        assert sorted(driver.chunk(prompt)) == sorted(expected), f"chunk {chunk}"
        lists.record(start, version)


@pytest.mark.parametrize("mode", ["interactive", "single"])
def test_bank_and_sink_compete(mode):
    """With its sparse part on, the published memory chooses among the sink's frames as well."""
    config = MemoryConfig.published(mode, local_frames=12, sink_frames=3, bank_frames=3, top_k=4)
    driver = MemoryDriver(config)
    found = []
    for chunk in range(8):
        driver.chunk()
        step = driver.memory.pass_over(3 * chunk + 3, 3, driver.prompt)
        found.append((step.candidates, step.top_k))
    bank = [step - 3 for step, _ in found]
    assert bank[-1] == 3 and bank == sorted(bank) and bank[0] >= 0
    assert found[-1] == (6, 4)
    assert MemoryDriver(config).memory.pass_over(0, 3, driver.prompt).candidates == 3
