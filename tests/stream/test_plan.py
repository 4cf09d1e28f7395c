"""Which prompt rules which chunk."""

import pytest

from memflow import MemFlowError
from memflow.stream.plan import Plan, check_text, prompt_texts


def told(plan: Plan) -> list[tuple[str, bool]]:
    chunks = []
    while (entry := plan.next()) is not None:
        chunks.append((entry[0][0], entry[1]))
    return chunks


def test_prompts_follow_each_other():
    plan = Plan([("a",), ("b",)], 2)
    assert len(plan) == 4
    assert told(plan) == [("a", True), ("a", False), ("b", True), ("b", False)]
    assert len(plan) == 0


def test_a_sent_prompt_starts_with_the_next_chunk_and_the_planned_ones_follow():
    plan = Plan([("a",), ("b",)], 3)
    plan.next()
    plan.send(("x",))
    assert len(plan) == 6
    assert [text for text, _ in told(plan)] == ["x", "x", "x", "b", "b", "b"]


def test_the_last_of_several_sent_prompts_counts():
    plan = Plan([("a",)], 2)
    plan.send(("x",))
    plan.send(("y",))
    assert len(plan) == 4
    assert [text for text, _ in told(plan)] == ["y", "y", "a", "a"]


def test_a_prompt_sent_after_the_end_goes_on():
    plan = Plan([("a",)], 1)
    assert told(plan) == [("a", True)]
    plan.send(("x",))
    assert told(plan) == [("x", True)]


def test_round_trip():
    plan = Plan([("a",), ("b",)], 2)
    plan.next()
    plan.send(("x",))
    again = Plan.from_dict(plan.to_dict())
    for both in (plan, again):  # saving has decided nothing: a later prompt still takes the place of the first
        both.send(("y",))
    assert told(again) == told(plan) == [("y", True), ("y", False), ("b", True), ("b", False)]


def test_a_chunk_that_was_not_begun_is_made_still():
    plan = Plan([("a",), ("b",)], 2)
    for _ in range(2):
        plan.give_back(plan.next()[1])
    assert len(plan) == 4
    first = plan.next()
    plan.give_back(plan.next()[1])
    assert first == (("a",), True)
    assert told(plan) == [("a", False), ("b", True), ("b", False)]


def test_one_text_or_one_per_story():
    assert prompt_texts("a", 2) == ("a", "a")
    assert prompt_texts(["a", "b"], 2) == prompt_texts(("a", "b"), 2) == ("a", "b")
    for texts, batch in ((["a"], 2), ([], 0), ("a", 0)):
        with pytest.raises(MemFlowError, match=rf"one text per story \({batch}\), got {len(texts) if batch else 0}"):
            prompt_texts(texts, batch)


def test_how_long_a_prompt_may_be():
    check_text("a" * 20_000)
    with pytest.raises(MemFlowError, match="at most 20,000 characters, got 20,001"):
        check_text("a" * 20_001)


@pytest.mark.parametrize(
    "change",
    [{"chunks_each": 0}, {"chunks_each": 2.0}, {"chunks_each": True}, {"remaining": -1}, {"remaining": 2**48},
     {"queue": [[["a"], 0]]}, {"queue": [[[], 1]]}, {"current": "a"}, {"sent": [[1]]}],
    ids=str,
)  # fmt: skip
def test_a_plan_that_none_could_be(change):
    saved = Plan([("a",), ("b",)], 2).to_dict()
    assert len(Plan.from_dict(saved)) == 4
    with pytest.raises(ValueError, match="plan"):
        Plan.from_dict(saved | change)
