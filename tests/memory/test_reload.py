"""A driver that has made chunks takes a state as a new one does: nothing of its own is left in it."""

import pytest
import torch
from memory_driver import MemoryDriver

from memflow.memory import MemoryConfig

CONFIGS = {
    "plain": MemoryConfig(),
    "published": MemoryConfig.published(),
    "held": MemoryConfig(held_frames=5),
    "archive": MemoryConfig(policy="archive"),
}


@pytest.mark.parametrize("later", (0, 3, 12))
@pytest.mark.parametrize("saved_at", (0, 3, 9))
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_used_driver_takes_a_state(config, saved_at, later):
    one, other = MemoryDriver(config), MemoryDriver(config)
    for _ in range(saved_at):
        one.chunk()
    tensors, counters = one.driver.state_dict()
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    for _ in range(later):
        other.chunk()
    other.driver.load_state_dict(tensors, counters)
    if saved_at:
        other._first = None  # the state has a prompt in force: another one would begin a scene
    for number in range(9):
        first = one.prompt if number + saved_at == 0 else None
        assert one.chunk(first) == other.chunk(first)
    assert torch.equal(one.memory.held, other.memory.held)
    for name, tensor in one.driver.state_dict()[0].items():
        assert torch.equal(tensor, other.driver.state_dict()[0][name]), name
