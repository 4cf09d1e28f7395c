"""Which prompt rules which chunk."""

from memflow.stream.plan import Plan


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
