"""States on disk: a damaged one is refused in one sentence, whatever is damaged; a whole one resumes bit by bit."""

from __future__ import annotations

import json
import os
import random
import struct
import threading

import pytest
import torch

from memflow import MemFlowError
from memflow.memory import MemoryConfig
from memflow.models.wan.adapter import WanModel
from memflow.stream import saved

CHUNK_SECONDS = 0.75
SMALL = {"seconds_per_prompt": 3 * CHUNK_SECONDS, "height": 32, "width": 32}
STORY = ["a red boat", "an owl"]
CONFIGS = {
    "plain": MemoryConfig(),
    "published": MemoryConfig.published(),
    "held": MemoryConfig(
        policy="original", held_frames=5, positions="relative", recall="coverage", scene_frame="first"
    ),
    "archive": MemoryConfig(policy="archive"),
}


@pytest.fixture(scope="module", params=CONFIGS)
def state(request, toy, tmp_path_factory):
    """A state in the middle of a story, and the latents that follow."""
    stream = toy.stream(STORY * 3, memory=CONFIGS[request.param], **SMALL)
    for _ in range(8):
        next(stream)
    path = tmp_path_factory.mktemp(request.param) / "state"
    stream.save(path)
    return path.read_bytes(), next(stream).latents


def outcome(toy, path, expected) -> str:
    """ "same" or the sentence of the refusal."""
    try:
        stream = toy.resume(path)
    except MemFlowError as error:
        assert "\n" not in str(error) and str(path) in str(error)
        return str(error)
    assert torch.equal(next(stream).latents, expected)
    return "same"


def test_a_whole_state_resumes(toy, state, tmp_path):
    data, expected = state
    assert struct.unpack("<Q", data[:8])[0] % 8 == 0  # numbers at even addresses, for whoever maps the file
    (tmp_path / "state").write_bytes(data)
    assert outcome(toy, tmp_path / "state", expected) == "same"


@pytest.mark.parametrize("count", [30, pytest.param(300, marks=pytest.mark.slow)])
def test_no_damage_is_believed(toy, state, tmp_path, count):
    """Bits, cuts and additions anywhere: what is accepted must be what was saved."""
    data, expected = state
    dice, path = random.Random(count), tmp_path / "state"
    header = 8 + struct.unpack("<Q", data[:8])[0]
    for number in range(count):
        damaged = bytearray(data)
        kind = number % 5
        if kind == 0:
            damaged[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        elif kind == 1:
            damaged[dice.randrange(header)] ^= 1 << dice.randrange(8)
        elif kind == 2:
            del damaged[dice.randrange(len(data)) :]
        elif kind == 3:
            start = dice.randrange(len(data))
            damaged[start : start + 64] = bytes(64)
        else:
            damaged += dice.randbytes(dice.randrange(1, 100))
        path.write_bytes(damaged)
        found = outcome(toy, path, expected)
        assert found != "same" or bytes(damaged) == data or kind == 1, f"damage {number}"


def rewritten(data: bytes, change, *, signed: bool = True) -> bytes:
    """The state with `change(header, tensors)` applied, and its digest made right again."""
    size = struct.unpack("<Q", data[:8])[0]
    table = json.loads(data[8 : 8 + size])
    metadata = table.pop("__metadata__")
    types = {name: dtype for dtype, name in saved._DTYPES.items()}
    tensors = {}
    for name, entry in table.items():
        begin, end = (8 + size + offset for offset in entry["data_offsets"])
        flat = torch.frombuffer(bytearray(data[begin:end]), dtype=torch.uint8) if end > begin else torch.empty(0).byte()
        tensors[name] = flat.view(types[entry["dtype"]]).view(entry["shape"])
    header = json.loads(metadata["stream"])
    change(header, tensors)
    tensors = dict(sorted(tensors.items()))
    metadata["stream"] = json.dumps(header)
    if signed:
        metadata["digest"] = saved._digest(metadata["stream"], tensors)

    class File(list):
        write = list.append

    saved._write(file := File(), metadata, tensors)
    return b"".join(bytes(part) for part in file)


def test_every_field_of_a_made_up_state_is_checked(toy, state, tmp_path):
    """Somebody who knows the format and signs what they made: still one sentence, no traceback, no wrong film."""
    data, expected = state
    path, fields = tmp_path / "state", []
    rewritten(data, lambda header, tensors: fields.extend([*(("h", n) for n in header), *(("t", n) for n in tensors)]))
    values = [None, -1, 2**70, "x", [], {}, [[]], 1.5, True]
    for place, name in fields:
        for value in values if place == "h" else ("gone", "shape", "dtype"):

            def change(header, tensors, place=place, name=name, value=value):
                if place == "h":
                    header[name] = value
                elif value == "gone":
                    del tensors[name]
                elif value == "shape":
                    tensors[name] = tensors[name][..., None].contiguous()
                else:
                    other = torch.float16 if tensors[name].dtype != torch.float16 else torch.float32
                    tensors[name] = tensors[name].to(other)

            path.write_bytes(rewritten(data, change))
            found = outcome(toy, path, expected)
            harmless = value == {} and name in ("extra", "config")  # no extra texts; a config of defaults alone
            # States from before there were scenes have none, nor need they any.
            harmless |= value == "gone" and name == "memory.scene_starts" and rb"scene_frame\": \"first" not in data
            assert found != "same" or harmless, f"{name} = {value!r} was believed"


def test_what_a_state_says_of_its_model_is_not_repeated(toy, state, tmp_path):
    path = tmp_path / "state"
    path.write_bytes(rewritten(state[0], lambda header, _: header["model"].update({"\x1b[2J\n": 1})))
    with pytest.raises(MemFlowError, match=r"it differs in: parts that this one has not$"):
        toy.resume(path)
    path.write_bytes(rewritten(state[0], lambda header, _: header["model"].update({"transformer": "another"})))
    with pytest.raises(MemFlowError, match=r"it differs in: transformer$"):
        toy.resume(path)


def test_an_edit_without_the_digest_is_damage(toy, state, tmp_path):
    data, expected = state
    path = tmp_path / "state"

    def later(header, tensors):
        header["counters"]["position"] += 1

    def reshaped(header, tensors):  # the same bytes
        tensors["noise"] = tensors["noise"].view(-1, 2)

    def renamed(header, tensors):
        tensors["noisy"] = tensors.pop("noise")

    for change in (later, reshaped, renamed):
        path.write_bytes(rewritten(data, change, signed=False))
        assert outcome(toy, path, expected).endswith("is damaged: its contents are not those that were saved")


@pytest.mark.parametrize(
    ("form", "sentence"),
    [
        ("memflow-stream-1", "was saved by MemFlow 0.1, whose states cannot be resumed"),
        ("memflow-stream-9", "a newer version of this package may read it"),
        ("pt", "is not the state of a stream: its format is 'pt'"),
    ],
)
def test_other_versions_are_named(toy, state, tmp_path, form, sentence):
    data, expected = state
    path = tmp_path / "state"
    size = struct.unpack("<Q", data[:8])[0]
    table = json.loads(data[8 : 8 + size])
    table["__metadata__"]["format"] = form
    text = json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
    assert sentence in outcome(toy, path, expected)


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_a_state_is_not_blamed_for_want_of_memory(toy, state, tmp_path, error):
    """Whoever resumes it would throw it away, and tell the story anew."""
    (tmp_path / "state").write_bytes(state[0])

    def make(*_, **__):
        raise error("81 GiB")

    with pytest.raises(error, match="81 GiB"):
        saved.load_stream(toy, tmp_path / "state", make, WanModel)


def test_a_pipe_is_no_state(toy, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(MemFlowError, match="it is not a regular file"):
        toy.resume(tmp_path / "pipe")


def test_save_from_another_thread_waits_for_the_chunk(toy, tmp_path):
    stream, whole = (toy.stream(STORY * 2, **SMALL) for _ in range(2))
    expected, made, errors = [chunk.latents for chunk in whole], [], []

    def save():
        try:
            for number in range(6):
                stream.save(tmp_path / f"{number}")
        except Exception as error:
            errors.append(error)

    made.append(next(stream).latents)
    thread = threading.Thread(target=save)
    thread.start()
    made += [chunk.latents for chunk in stream]
    thread.join()
    assert not errors
    assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))
    for number in range(6):
        again = toy.resume(tmp_path / f"{number}")
        rest = expected[again.position :]
        assert all(torch.equal(chunk.latents, b) for chunk, b in zip(again, rest, strict=True))
