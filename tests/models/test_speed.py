"""What makes the real model fast, and that it changes no result: passes that end early, CUDA graphs, float8."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig
from torch.utils.flop_counter import FlopCounterMode

from memflow import MemFlowError, MemoryConfig
from memflow.models.wan import float8, graphs
from memflow.models.wan.float8 import float8_linears, to_float8
from memflow_bench.untrained import noise_pipeline


def on_a_gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")(test))


SMALL = {"height": 32, "width": 32}
STORY = ["a red boat", "an owl"]


def latents_of(pipeline, prompts=STORY, **memory) -> torch.Tensor:
    config = MemoryConfig(top_k=2, **memory)
    stream = pipeline.stream(prompts, seconds_per_prompt=6 * 0.75, memory=config, **SMALL)
    return torch.cat([chunk.latents for chunk in stream], dim=2)


# -- the clean pass ----------------------------------------------------------------------------------------------------


def flops(run) -> int:
    """Of the products that linear layers and convolutions are made of."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@torch.no_grad()
def test_the_clean_pass_leaves_out_what_nobody_reads(toy):
    stream = toy.stream(["a red boat"], **SMALL)
    next(stream)
    latents, step = stream.driver._unwritten
    model, config = stream.driver.model, toy.transformer.config
    whole = flops(lambda: model.denoise(latents, 0.0, step))
    clean = flops(lambda: model.write_clean(latents, step))
    tokens, dim = 3 * 8 * 8 // 4, config.num_attention_heads * config.attention_head_dim
    head = dim * config.out_channels * 4
    rest_of_last_block = 3 * dim * dim + 2 * dim * config.ffn_dim  # attn1.to_out, attn2.to_q, attn2.to_out, ffn
    assert whole - clean == 2 * tokens * (head + rest_of_last_block)


@torch.no_grad()
def test_the_clean_pass_writes_what_a_whole_pass_writes(toy):
    stream = toy.stream(["a red boat"], **SMALL)
    next(stream)
    latents, step = stream.driver._unwritten
    pool, model = stream.memory.pool, stream.driver.model
    model.write_clean(latents, step)
    short = {name: buffer.clone() for name, buffer in pool.state_dict().items()}
    model.denoise(latents, 0.0, step)
    for name, buffer in pool.state_dict().items():
        torch.testing.assert_close(short[name], buffer, rtol=0, atol=1e-6)


def test_prompt_keys_are_computed_once_per_prompt(toy):
    pipeline = noise_pipeline()
    calls = []
    for block in pipeline.transformer.blocks:
        for linear in (block.attn2.to_k, block.attn2.to_v):
            linear.register_forward_hook(lambda *_: calls.append(1))
    latents_of(pipeline)
    assert len(calls) == len(STORY) * 2 * len(pipeline.transformer.blocks)


# -- CUDA graphs -------------------------------------------------------------------------------------------------------


def test_graphs_need_a_gpu(toy):
    with pytest.raises(MemFlowError, match="CUDA graphs need a model on a GPU; this one is on cpu"):
        toy.compile(graphs=True)
    assert not toy.cuda_graphs


@pytest.mark.parametrize("positions", ["absolute", "relative"])
def test_a_captured_pass_takes_everything_that_changes_from_its_inputs(toy, monkeypatch, positions):
    """Played on a CPU: a capture is a function that runs the pass again on the tensors that it was captured with."""
    captures, replays = [], []

    def capture(run):
        result, number = run(), len(captures)
        captures.append("clean" if result is None else "denoise")

        def replay():
            replays.append(captures[number])
            again = run()
            if result is not None:
                result.copy_(again)

        return replay, result

    monkeypatch.setattr(graphs, "Recorder", lambda device: capture)
    monkeypatch.setattr(graphs, "require_gpu", lambda transformer: None)
    expected = latents_of(toy, [*STORY, "a lighthouse"], positions=positions)
    pipeline = noise_pipeline()
    pipeline.cuda_graphs = True
    assert torch.equal(latents_of(pipeline, [*STORY, "a lighthouse"], positions=positions), expected)
    assert sorted(captures) == ["clean", "denoise"], "one size of each, that of a full memory, lasts long enough"
    assert replays.count("clean") > 1
    assert replays.count("denoise") > replays.count("clean")


def test_graphs_of_a_stream_share_their_memory_and_run_on_its_device(monkeypatch):
    """torch.cuda played: what counts is the current device of every call, and what `torch.cuda.graph` is given."""
    current, calls = [torch.device("cuda:0")], []

    @contextmanager
    def on(device):
        current.append(device)
        yield
        current.pop()

    class Graph:
        def replay(self):
            calls.append(("replay", current[-1]))

    @contextmanager
    def recording(graph, pool, stream):
        calls.append(("capture", current[-1], pool, stream))
        yield

    for name, stand_in in {
        "device": on,
        "Stream": lambda: ("stream", current[-1], object()),
        "graph_pool_handle": object,
        "CUDAGraph": Graph,
        "graph": recording,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    second = torch.device("cuda:1")
    record = graphs.Recorder(second)
    for _ in range(2):
        replay, result = record(lambda: "result")
        replay()
        assert result == "result"
    assert calls[0] == calls[2] and calls[1] == calls[3] == ("replay", second)
    assert calls[0][1] == calls[0][3][1] == second


@on_a_gpu
def test_graphs_on_a_gpu(toy):
    pipeline = noise_pipeline().to("cuda")
    expected = latents_of(pipeline)
    pipeline.cuda_graphs = True
    torch.testing.assert_close(latents_of(pipeline), expected, rtol=0, atol=1e-4)


# -- float8 ------------------------------------------------------------------------------------------------------------


def real(**changes) -> WanTransformer3DModel:
    with torch.device("meta"):
        sizes = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 2}
        return WanTransformer3DModel(**sizes | changes)


def test_what_becomes_float8():
    model = real()
    in_a_block = ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_out.0"]
    in_a_block += ["ffn.net.0.proj", "ffn.net.2"]
    assert float8_linears(model) == [f"blocks.{i}.{name}" for i in range(2) for name in in_a_block]
    converted = sum(model.get_submodule(name).weight.numel() for name in float8_linears(model))
    assert converted / sum(p.numel() for p in model.blocks.parameters()) > 0.89
    model.fuse_qkv_projections()
    fused = {name for name in float8_linears(model) if name.startswith("blocks.0.attn")}
    assert fused == {f"blocks.0.attn{x}" for x in ("1.to_qkv", "1.to_out.0", "2.to_q", "2.to_out.0")}
    assert float8_linears(real(ffn_dim=8961)) == [
        f"blocks.{i}.{name}" for i in range(2) for name in in_a_block if "ffn" not in name
    ]


def test_float8_says_why_not(toy, monkeypatch):
    with pytest.raises(MemFlowError, match=r"float8: the weights must be bfloat16, got torch\.float32"):
        toy.use_float8()
    with pytest.raises(MemFlowError, match="float8: the model must be on a GPU, it is on meta"):
        to_float8(real().to(torch.bfloat16))
    with pytest.raises(MemFlowError, match="no linear layer of its blocks whose sizes are multiples of 16"):
        to_float8(real(num_attention_heads=1, attention_head_dim=20, ffn_dim=30))
    with_lora = noise_pipeline().transformer
    with_lora.add_adapter(LoraConfig(r=4, target_modules=["to_q"]))
    with pytest.raises(MemFlowError, match="has LoRA layers; merge them"):
        to_float8(with_lora)
    model = real().to(torch.bfloat16)
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(MemFlowError, match="an A100 has no float8 arithmetic"):
        to_float8(model)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(float8, "find_spec", lambda name: None)
    with pytest.raises(MemFlowError, match=r"torchao is not installed: .* install .*\[float8\]'"):
        to_float8(model)


@on_a_gpu
def test_float8_on_a_gpu(tmp_path):
    pytest.importorskip("torchao", reason="float8 needs torchao: pip install -e '.[float8]'")
    plain, pipeline = (noise_pipeline(dtype=torch.bfloat16).to("cuda") for _ in range(2))
    assert pipeline.use_float8() == float8_linears(plain.transformer)
    expected, made = latents_of(plain), latents_of(pipeline)
    assert not torch.equal(made, expected)
    assert (made - expected).norm() / expected.norm() < 0.2
    stream = pipeline.stream(STORY, **SMALL)
    next(stream)
    stream.save(tmp_path / "state")
    assert torch.equal(next(pipeline.resume(tmp_path / "state")).latents, next(stream).latents)
