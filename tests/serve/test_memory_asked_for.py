"""What a viewer asks of the memory, on top of what the model was trained with."""

from __future__ import annotations

import pytest

from memflow.errors import MemFlowError
from memflow.memory.config import MemoryConfig
from memflow.memory.policies import OFFERED
from memflow.serve.stories import memory_asked_for


@pytest.mark.parametrize("mode", ["interactive", "single"])
@pytest.mark.parametrize("policy", OFFERED)
def test_every_policy_of_a_server_with_a_published_model(policy, mode):
    published = MemoryConfig.published(mode, top_k=3, global_sink=False)
    asked = {"policy": policy, "held_frames": None, "top_k": 2}
    if policy != "none":
        asked["bank_frames"] = 3
    memory = memory_asked_for(published, asked)
    assert (memory.policy, memory.top_k) == (policy, 2)
    assert (memory.published_mode, memory.global_sink) == ((mode, False) if policy == "prompt" else (None, True))
    with pytest.raises(MemFlowError, match="memory: held_frames must be None with published_mode"):
        memory_asked_for(published, {"policy": "prompt", "held_frames": 9})
