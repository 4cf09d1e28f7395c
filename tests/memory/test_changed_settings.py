"""What the page can ask of the memory is possible for the embedded model."""

import pytest

from memflow.memory.config import MemoryConfig
from memflow.memory.policies import OFFERED

TRAINED = MemoryConfig(bank_frames=6, held_frames=24, policy="original", recall="coverage", scene_frame="first")


@pytest.mark.parametrize("policy", OFFERED)
@pytest.mark.parametrize("held", [None, 24])
@pytest.mark.parametrize("top_k", [None, 2])
def test_every_policy(policy, held, top_k):
    keeps_none = policy in ("archive", "none")  # the page asks for no number of frames then
    asked = {"policy": policy, "held_frames": None if keeps_none else held, "top_k": top_k}
    if policy != "none":
        asked["bank_frames"] = 4
    memory = TRAINED.changed(**asked)
    assert {name: getattr(memory, name) for name in asked} == asked
    by_choice = policy == "archive" or (asked["held_frames"] and policy != "random")
    assert memory.recall == ("coverage" if by_choice else "relevance")


def test_nothing_asked():
    assert TRAINED.changed() == TRAINED


@pytest.mark.parametrize("activated", [{"top_k": 2}, {"activated": 0.25}], ids=str)
def test_how_much_is_activated_stays_where_it_is_not_asked_for(activated):
    memory = TRAINED.changed(**activated)
    again = memory.changed(bank_frames=4)
    assert (again.top_k, again.activated) == (memory.top_k, memory.activated)
    other = memory.changed(**({"activated": 0.5} if memory.top_k else {"top_k": 3}))
    assert (other.top_k is None) != (other.activated is None)
    assert memory.changed(top_k=None, activated=None) == memory.changed(top_k=None).changed(activated=None)


def test_what_does_not_go_together():
    with pytest.raises(ValueError, match="held_frames"):
        TRAINED.changed(policy="none", held_frames=3)
