"""The journal of a story, after a crash or by another hand: what is whole of it counts, and the rest harms nobody."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from memflow.serve.film import memory_of, read_journal

ABOUT = {"fps": 8, "width": 64, "height": 48, "frames_per_chunk": 3, "model": "noise"}
CHUNKS = [
    {"chunk": n, "start_frame": 12 * n, "frames": 12, "prompt": "bo", "switched": not n, "encode_ms": 1.5}
    for n in range(3)
]
LINES = [json.dumps(line).encode() + b"\n" for line in (ABOUT, *CHUNKS)]


def test_a_whole_journal(tmp_path):
    (tmp_path / "j").write_bytes(b"".join(LINES))
    assert read_journal(tmp_path / "j") == (ABOUT, CHUNKS)


DAMAGES = {
    "cut": LINES[3][:-3],
    "zeros": bytes(300) + b"\n",
    "a number": b"7\n",
    "a list": b"[]\n",
    "of something else": b"{}\n",
    "deep": b"[" * 100_000 + b"\n",
    "no text": b"\xff\xfe\n",
    "without its frames": LINES[3].replace(b"frames", b"framez"),
    "with frames that are none": json.dumps(CHUNKS[2] | {"frames": "twelve"}).encode() + b"\n",
    "with a text that is none": json.dumps(CHUNKS[2] | {"prompt": 7}).encode() + b"\n",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_line_ends_it(tmp_path, damage):
    (tmp_path / "j").write_bytes(b"".join([*LINES[:3], damage, *LINES[3:]]))
    about, chunks = read_journal(tmp_path / "j")
    assert about == ABOUT and chunks == CHUNKS[:2]


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_without_its_first_line_there_is_no_story(tmp_path, damage):
    (tmp_path / "j").write_bytes(damage + b"".join(LINES[1:]))
    with pytest.raises(FileNotFoundError):
        read_journal(tmp_path / "j")


@pytest.mark.parametrize("relevance", [np.nan, np.inf, -np.inf])
def test_a_relevance_that_is_no_number_is_none(relevance):
    """JSON has neither: a page could not read the message."""
    held = np.array([[[3, 5]]])
    snapshot = SimpleNamespace(
        held=held, recalled=held, relevance=np.array([[[0.5, relevance]]]), sink=[0, 1, 2], window=[6, 7, 8]
    )
    frames = json.loads(json.dumps(memory_of(snapshot, 3), allow_nan=False))["held"]
    assert [frame["relevance"] for frame in frames] == [0.5, None]
