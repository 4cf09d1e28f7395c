"""What the C functions of csrc/ answer to sizes that make no sense: an error, before anything is read or written."""

import pytest
import torch

from memflow_kernels.testing import states

INVALID, UNSUPPORTED = 1, 801
KIND, ANY = "dtype", None  # a whole number that is no size
TABLE = torch.zeros(1, 2, 1, dtype=torch.int32)
SLOTS = torch.zeros(1, dtype=torch.int32)


def kv(frames=3):
    return states(1, 8 * frames, 2, 64), states(1, 8 * frames, 2, 64, seed=1)


def written(host):
    query, key = kv(1)
    pool = (*kv(2), states(1, 2, 2, 64))
    weight = torch.ones(128)
    return host.qk_norm_rope_write(query, key, key, weight, weight, 1e-6, 2, 4, 0, None, *pool, SLOTS)


# op: (a call, the least that each whole number among its arguments may be)
CALLS = {
    "frame_means": (lambda host: host.frame_means(kv()[0], 8), (KIND, 1, 0, 1, 1, 1)),
    "prompt_relevance_mean": (
        lambda host: host.prompt_relevance_mean(kv()[0], states(1, 3, 2, 64), None, 1.0),
        (KIND, 1, 1, 0, 1, 1),
    ),
    "prompt_relevance_token": (
        lambda host: host.prompt_relevance_token(kv()[0], states(1, 3, 2, 64), None, 1.0),
        (KIND, 1, 1, 0, 1, 1),
    ),
    "prompt_relevance_softmax": (
        lambda host: host.prompt_relevance_softmax(kv(1)[0], kv()[1], None, 8, 1.0),
        (KIND, 1, 1, 0, 1, 1, 1),
    ),
    "select_frames": (
        lambda host: host.select_frames(kv()[0], states(1, 3, 2, 64), 1),
        (KIND, 1, 1, 0, 1, 1, 1, 0),
    ),
    "gather_frames": (lambda host: host.gather_frames(*kv(), TABLE, 8, 2), (KIND, 1, 1, 1, 1, 1, 0, 0)),
    "memory_attention": (
        lambda host: host.memory_attention(kv()[0].half(), *(x.half() for x in kv()), TABLE, 8, 2, 1.0),
        (KIND, 1, 1, 1, 1, 1, ANY, 0, 0, 0),
    ),
    "replace_frame": (
        lambda host: host.replace_frame(*kv(), states(1, 3, 2, 64), SLOTS, SLOTS),
        (KIND, 1, 1, 1, 1, 1),
    ),
    "qk_norm_rope_write": (written, (KIND, ANY, ANY, 1, 1, 1, 1, 1, 2, ANY, ANY, 1)),
}


def arguments(host, op, monkeypatch):
    """Of a call that is served."""
    asked = {}
    run = host.run
    monkeypatch.setattr(host, "run", lambda name, *given: (asked.setdefault(name, given), run(name, *given)))
    CALLS[op][0](host)
    return list(asked[op])


@pytest.mark.parametrize("op", CALLS)
def test_sizes_of_less_than_can_be(host, op, monkeypatch):
    given = arguments(host, op, monkeypatch)
    places = [place for place, value in enumerate(given) if isinstance(value, int)]
    assert len(places) == len(CALLS[op][1])
    for place, least in zip(places, CALLS[op][1], strict=True):
        if least is not ANY:
            wrong, answer = (7, UNSUPPORTED) if least is KIND else (least - 1, INVALID)
            changed = [*given[:place], wrong, *given[place + 1 :]]
            assert host.call(op, *changed) == answer, (place, least)


@pytest.mark.parametrize("op", ["gather_frames", "memory_attention"])
def test_more_candidates_than_frames(host, op, monkeypatch):
    given = arguments(host, op, monkeypatch)
    last = max(place for place, value in enumerate(given) if isinstance(value, int) and value == 2)
    assert host.call(op, *given[:last], 4, *given[last + 1 :]) == INVALID


def test_more_frames_than_a_choice_has_room_for(host, monkeypatch):
    given = arguments(host, "select_frames", monkeypatch)
    frames = [place for place, value in enumerate(given) if isinstance(value, int)][3]
    assert host.select_frames(torch.ones(1, 1, 1, 2), torch.ones(1, 12288, 1, 2), 1).tolist() == [[[0]]]
    assert host.call("select_frames", *given[:frames], 12289, *given[frames + 1 :]) == UNSUPPORTED


@pytest.mark.parametrize(
    ("number", "value"),
    [(1, 32768), (2, 2**40), (3, 2**31), (5, 2**34), (6, 2**31)],
    ids=["batch", "frames", "tokens_per_frame", "head_dim", "places"],
)
def test_more_than_a_grid_or_an_index_holds(host, number, value, monkeypatch):
    given = arguments(host, "gather_frames", monkeypatch)
    place = [place for place, value in enumerate(given) if isinstance(value, int)][number]
    assert host.call("gather_frames", *given[:place], value, *given[place + 1 :]) == UNSUPPORTED


def test_more_text_than_an_index_holds(host, monkeypatch):
    """tokens * heads, of which neither is too many."""
    given = arguments(host, "prompt_relevance_softmax", monkeypatch)
    numbers = [place for place, value in enumerate(given) if isinstance(value, int)]
    given[numbers[2]], given[numbers[5]] = 2**20, 2**12
    assert host.call("prompt_relevance_softmax", *given) == UNSUPPORTED
