"""Stories, states, checkpoints and adapters that nobody would write. See fuzzing.py."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from fuzzing import JSON, damaged, edited, fuzz
from hypothesis import strategies as st
from safetensors.torch import save
from written import lora, text_encoder, transformer

from memflow.cli.story import read_stories
from memflow.convert.lora import check_fits
from memflow.convert.sources import find_sources
from memflow.memory import MemoryConfig
from memflow.models.wan.checkpoints import layout_of
from memflow.stream import saved

STORIES = {
    ".txt": ["A fox.\nA hare.\n", "# no\n\n  A fox.\r\n"],
    ".json": ['["A fox.", "A hare."]', '{"name": "fox", "prompts": ["A fox."]}', '[{"name": "a", "prompts": ["b"]}]'],
    ".jsonl": ['{"name": "fox", "prompts": ["A fox."]}\n{"prompts": ["A hare."]}\n'],
    ".yaml": ["- A fox.\n- A hare.\n", "name: fox\nprompts:\n  - 'A fox: red'\n", "- &a {prompts: [x]}\n- *a\n"],
}


@pytest.mark.parametrize("suffix", STORIES)
def test_stories(tmp_path, suffix):
    path = tmp_path / f"story{suffix}"
    seeds = [text.encode() for text in STORIES[suffix]]
    made_up = JSON.map(lambda value: json.dumps(value).encode())
    lines = st.lists(made_up, max_size=3).map(b"\n".join)

    def use(data: bytes) -> None:
        path.write_bytes(data)
        for story in read_stories(path):
            assert story.name and "/" not in story.name and all(prompt.strip() for prompt in story.prompts)

    fuzz(st.one_of(damaged(seeds), made_up, lines, st.binary(max_size=40)), use)


@pytest.fixture(scope="module")
def state(toy, tmp_path_factory) -> bytes:
    stream = toy.stream(["a red boat"], memory=MemoryConfig(policy="original", held_frames=4, bank_frames=2),
                        seconds_per_prompt=3.75, height=32, width=32)  # fmt: skip
    for _ in range(4):
        next(stream)
    path = tmp_path_factory.mktemp("fuzz") / "state"
    stream.save(path, {"note": "text"})
    return path.read_bytes()


def parts(data: bytes) -> tuple[dict, bytes]:
    """Header and body of a safetensors file."""
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def whole(header: dict, body: bytes) -> bytes:
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + body


def test_states(toy, state, tmp_path):
    """Damaged ones, and ones of which a part was changed and the digest made right again."""
    path, (table, body) = tmp_path / "state", parts(state)
    types = {name: dtype for dtype, name in saved._DTYPES.items()}
    tensors = {}
    for name in sorted(name for name in table if name != "__metadata__"):
        begin, end = table[name]["data_offsets"]
        flat = torch.tensor(list(body[begin:end]), dtype=torch.uint8)
        tensors[name] = flat.view(types[table[name]["dtype"]]).view(table[name]["shape"])

    @st.composite
    def signed(draw):
        header = edited(json.loads(table["__metadata__"]["stream"]), draw)
        text = json.dumps(header)
        metadata = {"format": saved.FORMAT, "stream": text, "digest": saved._digest(text, tensors)}
        return whole(table | {"__metadata__": metadata}, body)

    @st.composite
    def other_table(draw):
        return whole(draw(st.just(edited(table, draw)).filter(lambda value: isinstance(value, dict))), body)

    def use(data: bytes) -> None:
        path.write_bytes(data)
        stream = toy.resume(path)
        next(stream, None)

    fuzz(st.one_of(signed(), signed(), damaged([state]), other_table()), use)


def convertible(paths: list[Path]) -> None:
    """What `memflow convert` does with files before it writes."""
    sources = find_sources(paths)
    for kind, tensors in sources.models.items():
        layout_of(kind, tensors, source=sources.titles[kind], partial=True)
    for adapter in sources.loras:
        check_fits(adapter, transformer())


def test_checkpoints(tmp_path):
    path = tmp_path / "model.safetensors"
    seeds = [save(transformer(dtype=torch.bfloat16)), save(text_encoder())]
    names = st.one_of(
        st.sampled_from(sorted(transformer()) + sorted(text_encoder())),
        st.builds("blocks.{}.{}".format, st.integers(-1, 10**12), st.sampled_from(["self_attn.q.weight", "x", ""])),
        st.text(max_size=30),
    )
    shapes = st.lists(st.sampled_from([0, 1, 2, 3, 48]), max_size=6).map(tuple)
    made = st.builds(
        torch.zeros, shapes, dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int8, torch.bool])
    )

    @st.composite
    def other_header(draw):
        header, body = parts(draw(st.sampled_from(seeds)))
        changed = edited(header, draw)
        return whole(changed if isinstance(changed, dict) else {"x": changed}, body)

    @st.composite
    def other_tensors(draw):
        tensors = dict(draw(st.sampled_from([transformer(), text_encoder()])))
        for name in draw(st.lists(st.sampled_from(sorted(tensors)), max_size=3)):
            tensors.pop(name, None)
        tensors |= draw(st.dictionaries(names, made, max_size=3))
        return save({name.encode("utf-8", "replace").decode(): tensor for name, tensor in tensors.items()})

    def use(data: bytes) -> None:
        path.write_bytes(data)
        convertible([path])

    fuzz(st.one_of(other_header(), other_tensors(), damaged([seed[: len(seed) // 8] for seed in seeds])), use)


def test_adapters(tmp_path):
    path, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    seed, names = lora(3), sorted(transformer())
    factors = st.sampled_from(["lora_A", "lora_B", "lora_down", "lora_up", "lora_C", "alpha"])
    keys = st.builds("{}.{}.weight".format, st.sampled_from([n.removesuffix(".weight") for n in names]), factors)
    keys |= keys.map(lambda key: key.removesuffix(".weight")) | st.text(max_size=20)
    shapes = st.lists(st.sampled_from([0, 1, 3, 48]), max_size=3).map(tuple)
    made = st.builds(torch.full, shapes, st.sampled_from([0.0, 1.0, float("nan"), float("inf")]))
    options = {"r": 3, "lora_alpha": 6, "alpha_pattern": {}, "use_rslora": False, "rank_pattern": {}}

    @st.composite
    def adapter(draw):
        tensors = dict(seed) | draw(st.dictionaries(keys, made, max_size=3))
        for name in draw(st.lists(st.sampled_from(sorted(seed)), max_size=2)):
            tensors.pop(name, None)
        tensors = {name.encode("utf-8", "replace").decode(): tensor for name, tensor in tensors.items()}
        text = draw(st.one_of(st.none(), st.just(options), st.just(edited(options, draw))))
        return save(tensors), None if text is None else json.dumps(text).encode("utf-8", "replace")

    def use(data) -> None:
        path.write_bytes(data[0])
        config.unlink(missing_ok=True)
        if data[1] is not None:
            config.write_bytes(data[1])
        convertible([path])

    fuzz(adapter(), use)
