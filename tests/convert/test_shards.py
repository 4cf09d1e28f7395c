"""Weight files are written piece by piece: whole or not there, continued when interrupted, never all in memory."""

import errno
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_convert import convert
from written import HEADS, lora, transformer

from memflow.convert import shards
from memflow.convert.lora import Update
from memflow.convert.shards import Weight, plan_shards, write_shards

ODD = {"a": [7], "b": [3, 5], "scalar": [], "empty": [0, 4], "conv": [4, 3, 1, 2, 2], "big": [1560, 24]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [64, 2**25])
def test_files_are_what_safetensors_reads(tmp_path, dtype, block, monkeypatch):
    monkeypatch.setattr(shards, "_BLOCK", block)
    tensors = {name: torch.randn(shape).to(torch.float32) for name, shape in ODD.items()}
    tensors["turned"] = torch.randn(6, 4).T
    weights = [Weight(name, tensor, dtype) for name, tensor in tensors.items()]
    for limit in (1, 1000, 10**9):
        folder = tmp_path / str(limit)
        folder.mkdir()
        plan, done = plan_shards(weights, "model", limit), []
        write_shards(plan, folder, "model", done.append)
        assert sum(done) == sum(weight.nbytes for weight in weights)
        for shard in plan:  # where the numbers begin: readers map them in place
            assert int.from_bytes((folder / shard.file).read_bytes()[:8], "little") % 8 == 0
        found = {name: t for shard in plan for name, t in load_file(folder / shard.file).items()}
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensor.to(dtype)) for name, tensor in tensors.items())
        if len(plan) > 1:
            index = json.loads((folder / "model.safetensors.index.json").read_text())
            assert index["weight_map"] == {w.name: shard.file for shard in plan for w in shard.weights}


@pytest.mark.parametrize("rows", [1, 3, 7])
def test_every_block_of_a_weight_gets_its_own_rows_of_an_update(rows, tmp_path, monkeypatch):
    """Weights of the published models have several blocks of 32 MB; here a block has a few rows."""
    monkeypatch.setattr(shards, "_BLOCK", 4 * 24 * rows)
    generator = torch.Generator().manual_seed(0)
    weight, a, b = (torch.randn(shape, generator=generator) for shape in ([20, 24], [3, 24], [20, 3]))
    plan = plan_shards([Weight("w", weight, torch.float32, (Update(a, b, 0.5), Update(a, -b, 2.0)))], "model", 10**9)
    write_shards(plan, tmp_path, "model", lambda _: None)
    expected = weight.double() - 1.5 * b.double() @ a.double()
    torch.testing.assert_close(load_file(tmp_path / "model.safetensors")["w"].double(), expected, atol=1e-5, rtol=1e-5)


def test_a_file_of_another_size_is_written_again(tmp_path):
    """Something cut it short after it had its name: a copy that broke off, a full disk."""
    plan = plan_shards([Weight("w", torch.arange(60.0), torch.float32)], "model", 10**9)
    write_shards(plan, tmp_path, "model", lambda _: None)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    for spoiled in (whole[:-4], whole + b"more", b""):
        path.write_bytes(spoiled)
        write_shards(plan, tmp_path, "model", lambda _: None)
        assert path.read_bytes() == whole


def test_an_interrupted_conversion_continues(wan, tmp_path, capsys, monkeypatch):
    save_file(lora(3), tmp_path / "lora.safetensors")
    arguments = [wan, tmp_path / "lora.safetensors", "--heads", HEADS, "--shard-gigabytes", "0.0001"]
    assert convert(capsys, *arguments, "-o", tmp_path / "whole")[0] == 0
    blocks, cut = Weight.blocks, []

    def stopping(weight):
        cut.append(weight.name)
        if len(cut) == 100:  # in the middle of a file of the text encoder or the VAE
            raise KeyboardInterrupt
        yield from blocks(weight)

    monkeypatch.setattr(Weight, "blocks", stopping)
    out = tmp_path / "out"
    assert convert(capsys, *arguments, "-o", out)[0] == 130
    assert not (out / "model_index.json").exists() and not list(out.rglob("*.partial"))
    done = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert len(done) > 2
    first = cut[:99]
    cut.clear()
    cut.extend([""] * 200)
    assert convert(capsys, *arguments, "-o", out)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in done} == done, "a finished file was written again"
    index = {}
    for file in out.rglob("*.index.json"):
        index |= json.loads(file.read_text())["weight_map"]
    begun_again = {index[name] for name in set(cut[200:]) & set(first)}
    assert len(begun_again) == 1, "only the file in hand is begun again"
    whole = {path.relative_to(tmp_path / "whole"): path.read_bytes() for path in (tmp_path / "whole").rglob("*.*")}
    assert {path.relative_to(out): path.read_bytes() for path in out.rglob("*.*")} == whole
    written = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert convert(capsys, *arguments, "-o", out)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in written} == written


def test_a_file_of_the_users_own_is_not_ours_to_write_over(tmp_path):
    """Beside the weights, under any name that a file in the making could have had."""
    plan = plan_shards([Weight("w", torch.arange(60.0), torch.float32)], "model", 10**9)
    for name in ("model.safetensors.partial", "model.partial"):
        (tmp_path / name).write_text("mine")
    write_shards(plan, tmp_path, "model", lambda _: None)
    assert {path.read_text() for path in tmp_path.glob("*.partial")} == {"mine"}


def test_a_full_disk_is_a_sentence(wan, tmp_path, capsys, monkeypatch):
    """At each file in turn: the record, weights, the index, configurations."""
    save_file(lora(3), tmp_path / "lora.safetensors")
    arguments = [wan, tmp_path / "lora.safetensors", "--heads", HEADS, "--keep-lora", "-o", tmp_path / "out"]
    fsync, left = os.fsync, 0

    def full(descriptor):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    for room in range(8):
        left, before = room, set(tmp_path.rglob("*.safetensors"))
        code, _, error = convert(capsys, *arguments)
        if code == 0:
            break
        assert code == 2 and "cannot be written: No space left on device; what is finished stays" in error
        assert before <= set(tmp_path.rglob("*.safetensors")) and "Traceback" not in error
    assert room >= 4, "each of record, transformer, text encoder, VAE and LoRA has been refused once"


def test_other_files_or_options_do_not_continue_it(wan, tmp_path, capsys):
    torch.save(transformer(), tmp_path / "a.pt")
    out = ["-o", tmp_path / "out", "--heads", HEADS]
    assert convert(capsys, wan, tmp_path / "a.pt", *out)[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*")}
    torch.save(transformer(seed=1), tmp_path / "a.pt")
    for arguments in ([wan, tmp_path / "a.pt"], [wan], [wan, tmp_path / "a.pt", "--dtype", "float16"]):
        code, _, error = convert(capsys, *arguments, *out)
        assert code == 2 and "out: holds another conversion (files or options differ); choose a new folder" in error
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*")} == before


MEASURE = """
import sys
from memflow.cli import main
code = main(["convert", *sys.argv[1:]])
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(code, int(peak) * 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_memory_stays_within_the_largest_tensor_and_a_gigabyte(tmp_path, suffix):
    """350 MB of weights, a LoRA on the widest; VmHWM, the peak, counts the mapped pages of the source too."""
    grown = {48: 1024, 40: 40960, 6 * 48: 6 * 1024}
    tensors = {
        name: torch.zeros([grown.get(size, size) for size in tensor.shape])
        for name, tensor in transformer().items()
        if not name.startswith("blocks.1.")
    }
    size = sum(tensor.nbytes for tensor in tensors.values())
    largest = max(tensor.nbytes for tensor in tensors.values())
    assert size > 350e6 > 170e6 > largest
    source = tmp_path / f"wide.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(tensors, source)
    adapter = {
        "blocks.0.ffn.0.lora_A.weight": torch.randn(16, 1024),
        "blocks.0.ffn.0.lora_B.weight": torch.randn(40960, 16),
    }
    save_file(adapter, tmp_path / "lora.safetensors")
    del tensors
    command = [str(source), str(tmp_path / "lora.safetensors"), "-o", str(tmp_path / "out"), "--partial"]
    result = subprocess.run([sys.executable, "-c", MEASURE, *command], capture_output=True, text=True, check=True)
    code, peak = map(int, result.stdout.splitlines()[-1].split())
    assert code == 0
    assert peak < largest + 2**30
    assert (tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors").stat().st_size > size
