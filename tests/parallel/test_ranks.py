"""What several processes exchange, and what they refuse."""

from __future__ import annotations

import pytest
import together
import torch

from memflow.cli import main
from memflow.errors import MemFlowError
from memflow.memory import MemoryConfig
from memflow.parallel.ranks import Ranks, numbers_that_do, require_division

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def exchanged() -> None:
    ranks, n = Ranks(), 3
    for dtype in DTYPES:
        whole = torch.randn(2, 2, 4 * n, 2 * n, 5, generator=torch.Generator().manual_seed(1)).to(dtype)
        tokens, heads = whole[:, :, 4 * ranks.rank :][:, :, :4], whole[..., 2 * ranks.rank :, :][..., :2, :]
        for mine, expected in zip(ranks.to_heads(*tokens), heads, strict=True):
            assert torch.equal(mine, expected)
        for x, expected in zip(heads, tokens, strict=True):
            assert torch.equal(ranks.to_tokens(x), expected)
        assert torch.equal(ranks.all_heads(heads), whole) and torch.equal(ranks.mine(whole), heads)
        collected = ranks.collect(heads)
        assert torch.equal(collected, whole) if ranks.first else collected.numel() == 0
        assert ranks.all_heads(heads[:, :, :0]).shape == whole[:, :, :0].shape
    assert torch.equal(ranks.mean(torch.tensor([float(ranks.rank), 4.0])), torch.tensor([1.0, 4.0]))
    assert ranks.any(ranks.rank == 2) and not ranks.any(False)
    assert ranks.from_first(lambda: ranks.rank) == 0
    with pytest.raises(MemFlowError, match="as 0 says"):
        ranks.from_first(lambda: (_ for _ in ()).throw(MemFlowError(f"as {ranks.rank} says")))


def test_exchanges():
    together.run(3, exchanged)


def steered(folder: str) -> list[str]:
    """The prompts of a story that the first process changes while it runs; what others are refused."""
    pipe = together.pipeline()
    pipe.enable_parallelism()
    pipe.enable_parallelism()  # once more changes nothing
    # 9 tokens in a frame: a chunk of 4 frames can be divided by two, what a switch encodes again, 3 frames, cannot.
    odd = MemoryConfig(frames_per_chunk=4, sink_frames=1, window_frames=8)
    with pytest.raises(MemFlowError, match="2 processes cannot share a model of 4 heads and calls of 27, 36 tokens"):
        pipe.stream(["a"], height=24, width=24, memory=odd)
    with pytest.raises(MemFlowError, match="compile: not with enable_parallelism"):
        pipe.compile()
    stream, said = pipe.stream(["a red boat"], seconds_per_prompt=2.25, height=32, width=32), []
    for chunk in stream:
        said += chunk.prompts
        if chunk.index == 1 and pipe.ranks.first:
            stream.send("an owl")
        elif chunk.index == 1:
            with pytest.raises(MemFlowError, match="taken by the first process, not by number 1"):
                stream.send("a fox")
        assert len(stream) == stream.ranks.from_first(lambda: len(stream)) or chunk.index == 1
    with pytest.raises(MemFlowError, match=r"the state cannot be written"):  # in both, though one writes
        stream.save(f"{folder}/nowhere/state")
    return said


def test_a_story_is_steered_by_the_first(tmp_path):
    for said in together.run(2, steered, str(tmp_path)):
        assert said == ["a red boat"] * 2 + ["an owl"] * 3


def test_numbers():
    assert numbers_that_do(12, [4680, 9360]) == [1, 2, 3, 4, 6, 12]
    assert numbers_that_do(40, [4680]) == [1, 2, 4, 5, 8, 10, 20, 40]
    assert numbers_that_do(12, [27]) == [1, 3]
    with pytest.raises(
        MemFlowError, match=r"8 processes cannot share a model of 12 heads: .*; 1, 2, 3, 4, 6, 12 would do"
    ):
        require_division(8, 12)


@pytest.mark.parametrize(
    ("size", "missing"), [("2", "environment variable RANK expected"), ("many", "environment variable RANK expected")]
)
def test_a_world_size_without_the_rest(tmp_path, monkeypatch, capsys, size, missing):
    """As a cluster may set it for all its jobs."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", size)
    assert main(["generate", "-p", "a fox", "-o", str(tmp_path / "fox.mp4"), "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"memflow: WORLD_SIZE={size} says that a launcher started this process with others")
    assert missing in said and said.count("\n") == 1 and not list(tmp_path.iterdir())


def test_without_a_group():
    with pytest.raises(MemFlowError, match="init_process_group comes first"):
        together.pipeline().enable_parallelism()
