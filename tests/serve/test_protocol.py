"""Every field of the messages: what is taken, what is refused and with which code; nothing else is a crash."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memflow.serve import protocol
from memflow.serve.protocol import Refused
from memflow.serve.settings import Settings

SETTINGS = Settings(folder=Path("."), model="noise")
GOOD = {"type": "session.start", "prompt": "bo"}
WORDS = {"event": {"prompt": "bo"}}


def start(**fields):
    return protocol.start(GOOD | fields, SETTINGS)


def interaction(**fields):
    return protocol.interaction({"interaction": WORDS | fields}, SETTINGS)


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("type", "session.stop"),
        ("type", None),
        ("prompt", None),
        ("prompt", ""),
        ("prompt", " \n"),
        ("prompt", 3),
        ("prompt", "x" * 2001),
        ("prompt", "\ud800"),
        ("format", "mp4"),
        ("format", []),
        ("model", "other"),
        ("model", 5),
        *((name, bad) for name in ("width", "height", "num_frames") for bad in (0, -1, 1.5, "8", True, 10**400)),
        *(("size", bad) for bad in ("8", "8x", "x8", "8X8", " 8x8", "8x8 ", "-8x8", 8, "8x8x8", "٣x٣٣٣٣٣٣٣٣٣٣")),
        *(("size", bad) for bad in ("0x8", "8x0", "08x8")),
        *(("fps", bad) for bad in (0, 0.5, float("nan"), float("inf"), "16", True)),
        *(("seconds", bad) for bad in (8, "0", "08", "1.5", "-1", "8 ", "", "9" * 30)),
        *(("seed", bad) for bad in (-1, 2**63, 1.0, "0")),
        ("video_params", []),
        ("video_params", {"width": 0}),
        ("sampling_params", "x"),
        ("sampling_params", {"seed": -1}),
        ("extra_params", 1),
        ("extra_params", {"preencode_mp4": True}),
        *(("num_inference_steps", bad) for bad in (0, 201, 1.5)),
        *((name, bad) for name in ("guidance_scale", "guidance_scale_2", "true_cfg_scale") for bad in (-1, 21, "1")),
        *(("boundary_ratio", bad) for bad in (-0.1, 1.1)),
        *(("flow_shift", bad) for bad in ("1", float("nan"), float("inf"))),
        *(("num_outputs_per_prompt", bad) for bad in (0, 11)),
        *((name, {"image_url": "data:"}) for name in ("image_reference", "video_reference", "audio_reference", "lora")),
        *(("streaming_buffer_seconds", bad) for bad in (-1, float("nan"), "1", 10**9)),
        ("memflow", []),
        *(("memflow", {"memory": bad}) for bad in ([], {"policy": "oracle"}, {"policy": 3}, {"bank_frames": 17})),
        *(("memflow", {"memory": bad}) for bad in ({"held_frames": 0}, {"held_frames": 1025}, {"top_k": 0})),
        ("memflow", {"memory": {"window_frames": 10**9}}),
        ("memflow", {"mamory": {}}),
        *(("memflow", {"report": bad}) for bad in ("yes", 1, [])),
        *(("seconds", bad) for bad in ("1\u0661", "0")),
        ("size", "\u0661\u0662\u0668x128"),
        *(("memflow", {"resume": bad}) for bad in (3, "", "../x", "a/b", "x" * 81, "a\0")),
    ],
)
def test_a_start_that_cannot_be_followed(field, bad):
    with pytest.raises(Refused) as refused:
        start(**{field: bad})
    assert refused.value.code == "bad_message" and 10 < len(refused.value.message) < 300
    json.dumps(refused.value.message).encode()


def test_what_a_start_may_say():
    found = start(size="64x32", width=8, height=8, seconds="7", streaming_buffer_seconds=1, quality="high", extra=None)
    assert (found.width, found.height, found.seconds, found.frames, found.buffer) == (64, 32, 7, None, 1)
    assert (
        found.ignored == ["height", "quality", "width"] and "extra" not in found.config and "type" not in found.config
    )
    found = start(
        video_params={"width": 16, "num_frames": 9}, width=8, sampling_params={"seed": 4, "odd": 1, "fps": None}
    )
    assert (found.width, found.frames, found.seed, found.fps) == (8, 9, 4, None)
    assert found.config["extra_params"] == {"odd": 1} and found.config["num_outputs_per_prompt"] == 1
    assert start(num_frames=9, seconds="7").ignored == ["seconds"]
    assert protocol.start({"type": "session.start", "memflow": {"resume": "a"}}, SETTINGS).prompt is None
    kept = start(memflow={"resume": "a", "memory": {"bank_frames": 2}}, seed=3, fps=8, streaming_buffer_seconds=1)
    assert kept.ignored == ["fps", "memflow.memory", "seed"]  # of the story that goes on
    memory = {"policy": "fifo", "top_k": None, "held_frames": None}  # None: as `MemoryConfig` has it
    assert start(memflow={"memory": memory | {"bank_frames": None}}).memory == memory
    named = {"recall": "coverage", "scene_frame": "first", "activated": 0.5, "activation_block": 4, "query_block": None}
    assert start(memflow={"memory": named}).memory == named


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ({}, "bad_message"),
        ({"interaction": []}, "bad_message"),
        ({"interaction": {}}, "bad_message"),
        *(({"interaction": WORDS | {"event_id": bad}}, "bad_message") for bad in ("", " ", 3, [], "x" * 201)),
        ({"interaction": {"event": "bo"}}, "bad_message"),
        ({"interaction": {"event": {}}}, "bad_message"),
        *(({"interaction": {"event": {"prompt": bad}}}, "bad_message") for bad in (None, "", " ", 3, "x" * 2001)),
        *(({"interaction": {"event": {"multi_modal_data": bad}}}, "bad_message") for bad in ({}, [], {"image": 3})),
        ({"interaction": {"event": {"multi_modal_data": {"image": {}}}}}, "interaction_failed"),
        ({"interaction": {"event": {"prompt": "bo", "negative_prompt": ""}}}, "bad_message"),
        *(({"interaction": WORDS | {"transition_chunks": bad}}, "bad_message") for bad in (-1, 1.5, True, "1", [])),
        ({"interaction": WORDS | {"transition_chunks": float("nan")}}, "bad_message"),
        ({"interaction": WORDS | {"transition_chunks": float("inf")}}, "bad_message"),
    ],
)
def test_an_interaction_that_cannot_be_followed(message, code):
    with pytest.raises(Refused) as refused:
        protocol.interaction(message, SETTINGS)
    assert refused.value.code == code


def test_what_an_interaction_may_say():
    assert interaction(event_id="a", transition_chunks=2.0) == ("a", "bo")
    first, second = interaction(), interaction(event_id=None, transition_chunks=0)
    assert len(first[0]) == 32 and first[0] != second[0]


@pytest.mark.parametrize("bad", [None, "1", -1, float("nan"), float("inf"), 10**400, True])
def test_a_playhead_that_is_none(bad):
    with pytest.raises(Refused):
        protocol.position({"position_seconds": bad})


def test_what_is_no_message():
    for text in (None, "", "{", "[1]", "3", "[" * 100_000, '{"a":' * 100_000, "x" * 200_000, "1" * 5000, "NaN"):
        with pytest.raises(Refused) as refused:
            protocol.read(text, SETTINGS)
        assert len(refused.value.message) < 200
    with pytest.raises(Refused):
        protocol.paused({"paused": 1})
    assert protocol.paused({}) is True and protocol.position({"position_seconds": 0}) == 0.0


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(["prompt", *protocol._USED, *protocol._FIELDS, "extra_params", "lora", "interaction", "event"])


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.dictionaries(NAMES, JSON), st.dictionaries(st.sampled_from(["event", "event_id", "transition_chunks"]), JSON))
def test_whatever_comes_is_taken_or_refused(fields, body):
    for check in (
        lambda: protocol.start(GOOD | fields, SETTINGS),
        lambda: protocol.interaction({"interaction": body}, SETTINGS),
        lambda: protocol.position({"position_seconds": fields.get("fps")}),
    ):
        try:
            check()
        except Refused as refused:
            json.dumps([refused.message, refused.event_id]).encode()


def test_a_name_that_stands_twice():
    with pytest.raises(Refused, match="a name stands twice"):
        protocol.read('{"type": "session.start", "memflow": {"report": true, "report": false}}', SETTINGS)


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_constants_that_no_json_has(constant):
    with pytest.raises(Refused, match="not JSON"):
        protocol.read(f'{{"type": "session.start", "foo": [{constant}]}}', SETTINGS)
