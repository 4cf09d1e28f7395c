"""A model that changes under a live stream: what was computed of its old weights is made anew, or a refusal by name."""

from __future__ import annotations

import time
import warnings

import pytest
import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from memflow import MemFlowError
from memflow.models.digests import weights_digest
from memflow.models.wan import graphs
from memflow.models.wan.adapter import WanModel
from memflow.models.wan.changes import refuse_hooks, text_version
from memflow.stream.saved import identity_of
from memflow_bench.untrained import noise_pipeline

STORY, SMALL = ["a red boat", "an owl"], {"height": 32, "width": 32, "seconds_per_prompt": 3 * 0.75}
TEXT_LAYERS = ["to_k", "to_v"]


@pytest.fixture
def pipe():
    return noise_pipeline()


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """A folder with adapters of all attention layers."""
    folder, pipeline = tmp_path_factory.mktemp("lora"), noise_pipeline()
    pipeline.transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", *TEXT_LAYERS]))
    for name, weight in pipeline.transformer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05, generator=torch.Generator().manual_seed(0))
    pipeline.save_lora_weights(folder, transformer_lora_layers=get_peft_model_state_dict(pipeline.transformer))
    return folder


def current_prompt(driver):
    """Keys and values of the prompt in force as the model's weights have them now."""
    return driver.model.encode_prompt(*driver.in_force[:2])


def fuse_and_forget(pipe, lora):
    """Leaves no adapter, no counted write and the same parameters: only the numbers say it."""
    pipe.load_lora_weights(lora)
    pipe.fuse_lora()
    pipe.unload_lora_weights()


def write_in_place(pipe, lora):
    with torch.no_grad():
        pipe.transformer.blocks[2].attn2.to_k.weight[3].zero_()


def new_weight(pipe, lora):
    linear = pipe.transformer.blocks[1].attn2.to_v
    linear.weight = torch.nn.Parameter(linear.weight.detach() * 1.5)


def new_layer(pipe, lora):
    attn = pipe.transformer.blocks[1].attn2
    attn.to_k = torch.nn.Sequential(attn.to_k, torch.nn.Tanh())


def load_and_scale(pipe, lora):
    pipe.load_lora_weights(lora, adapter_name="a")
    pipe.set_adapters(["a"], [0.5])


CHANGES = {
    "adapter loaded": lambda pipe, lora: pipe.load_lora_weights(lora),
    "adapter loaded and scaled": load_and_scale,
    "adapter fused and forgotten": fuse_and_forget,
    "written in place": write_in_place,
    "weight replaced": new_weight,
    "layer replaced": new_layer,
    "state dict loaded": lambda pipe, lora: pipe.transformer.load_state_dict(
        {name: weight * 0.9 for name, weight in pipe.transformer.state_dict().items()}
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_prompt_is_that_of_the_weights_in_force(pipe, lora, change):
    stream = pipe.stream(STORY[:1], **SMALL)
    next(stream)
    old = stream.driver.in_force.prompt
    change(pipe, lora)
    latents = next(stream).latents
    new = stream.driver.in_force.prompt
    assert not torch.equal(torch.cat([new.key, new.value]), torch.cat([old.key, old.value]))
    for made, expected in zip(new, current_prompt(stream.driver), strict=True):
        assert torch.equal(made, expected)
    assert latents.isfinite().all()


def test_adapters_that_come_and_go(pipe, lora):
    """Loaded, weighted, switched off, on, taken away: every time the prompt follows; at the end it is as at first."""
    driver = pipe.stream(STORY[:1], **SMALL).driver
    driver.prompt(*pipe.encode(STORY[:1]))
    steps = [
        lambda: pipe.load_lora_weights(lora, adapter_name="a"),
        lambda: pipe.set_adapters(["a"], [0.25]),
        lambda: pipe.disable_lora(),
        lambda: pipe.enable_lora(),
        lambda: pipe.unload_lora_weights(),
    ]
    keys = [driver.coming.prompt.key]
    for step in steps:
        step()
        driver.follow_model()
        keys.append(driver.coming.prompt.key)
        assert torch.equal(keys[-1], driver.model.encode_prompt(*driver.coming[:2]).key)
    same = [(a, b) for a in range(6) for b in range(a) if torch.equal(keys[a], keys[b])]
    assert same == [(3, 0), (4, 2), (5, 0), (5, 3)]


def test_a_stream_ends_as_one_that_was_resumed_after_the_change(pipe, lora, tmp_path):
    """The clean pass that is due, and what comes after it, under the new weights."""
    stream = pipe.stream(STORY, **SMALL)
    next(stream), stream.driver.settle()
    pipe.load_lora_weights(lora)
    stream.save(tmp_path / "state")
    resumed = pipe.resume(tmp_path / "state")
    for _ in range(3):
        assert torch.equal(next(stream).latents, next(resumed).latents)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_state_is_not_resumed_with_other_weights(pipe, lora, change, tmp_path):
    stream = pipe.stream(STORY, **SMALL)
    next(stream)
    stream.save(tmp_path / "state")
    identity_of(pipe, WanModel(pipe.transformer))
    change(pipe, lora)
    with pytest.raises(MemFlowError, match="saved with another model, it differs in: transformer"):
        pipe.resume(tmp_path / "state")


def test_a_state_is_not_resumed_with_adapters_otherwise_in_force(pipe, lora, tmp_path):
    pipe.load_lora_weights(lora, adapter_name="a")
    stream = pipe.stream(STORY, **SMALL)
    next(stream)
    stream.save(tmp_path / "state")
    for change in (lambda: pipe.set_adapters(["a"], [0.25]), pipe.disable_lora):
        change()
        with pytest.raises(MemFlowError, match="saved with another model, it differs in: transformer"):
            pipe.resume(tmp_path / "state")
        pipe.enable_lora(), pipe.set_adapters(["a"], [1.0])
    assert torch.equal(next(pipe.resume(tmp_path / "state")).latents, next(stream).latents)


def test_layers_whose_weights_are_no_tensors_cannot_be_told_apart(pipe, tmp_path):
    """torch.ao's quantised layers: a state that nobody could check is not written, and the stream goes on."""
    stream = pipe.stream(STORY, **SMALL)
    next(stream)
    linear = torch.nn.Sequential(pipe.transformer.proj_out)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.ao.quantization.quantize_dynamic(linear, {torch.nn.Linear})
    pipe.transformer.proj_out = quantised[0]
    with pytest.raises(MemFlowError, match=r"proj_out.* is a .*: a state can tell plain tensors apart only"):
        stream.save(tmp_path / "state")
    assert not list(tmp_path.iterdir())
    assert next(stream).latents.isfinite().all()


def test_the_digest_takes_any_buffer():
    module = torch.nn.Linear(3, 2)
    module.register_buffer("expanded", torch.ones(1).expand(4, 5))
    module.register_buffer("number", torch.tensor(3))
    module.register_buffer("empty", torch.empty(0))
    first = weights_digest(module)
    module.weight.data += 1
    assert weights_digest(module) != first


def test_nothing_is_made_anew_where_nothing_changed(pipe):
    stream = pipe.stream(STORY[:1], **SMALL)
    next(stream)
    prompt = stream.driver.in_force.prompt
    pipe.transformer.eval().requires_grad_(False)
    next(stream)
    assert stream.driver.in_force.prompt is prompt


def test_fused_projections_between_chunks(pipe, toy):
    plain = [chunk.latents for chunk in toy.stream(STORY[:1], **SMALL)]
    stream = pipe.stream(STORY[:1], **SMALL)
    torch.testing.assert_close(next(stream).latents, plain[0])
    pipe.transformer.fuse_qkv_projections()
    torch.testing.assert_close(next(stream).latents, plain[1], rtol=0, atol=1e-5)
    assert all(map(torch.equal, stream.driver.in_force.prompt, current_prompt(stream.driver)))


def test_compiled_after_the_start(pipe, toy):
    plain = [chunk.latents for chunk in toy.stream(STORY[:1], **SMALL)]
    stream = pipe.stream(STORY[:1], **SMALL)
    next(stream)
    pipe.compile(backend="eager")
    torch.testing.assert_close(next(stream).latents, plain[1], rtol=0, atol=1e-5)


def test_captured_passes_are_those_of_the_layers_in_force(pipe, monkeypatch):
    """Without a GPU: what stands for a captured graph goes with any change of the layers, and with none else."""
    monkeypatch.setattr(graphs, "require_gpu", lambda transformer: None)
    monkeypatch.setattr(graphs, "Recorder", lambda device: None)
    model = WanModel(pipe.transformer, cuda_graphs=True)
    version = model.text_version()
    model._graphs.captured["size"] = "graph"
    assert model.text_version() == version and model._graphs.captured
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))  # nothing of the prompt's keys
    assert model.text_version() == version and not model._graphs.captured


def test_layerwise_casting_between_chunks(pipe):
    """Weights are kept in another dtype than that which computes: the same dtype of keys, so the stream goes on."""
    stream = pipe.stream(STORY[:1], **SMALL)
    next(stream)
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert next(stream).latents.isfinite().all()
    prompt = stream.driver.in_force.prompt
    assert all(map(torch.equal, prompt, current_prompt(stream.driver)))
    next(stream)
    assert stream.driver.in_force.prompt is prompt, "casting to and fro is no change"


def test_looking_costs_less_than_a_millisecond():
    """At the 825 parameters of the smallest published model; the minimum, on a machine that may be busy."""
    sizes = {"num_attention_heads": 2, "attention_head_dim": 24, "ffn_dim": 96, "num_layers": 30, "text_dim": 32}
    transformer, seconds = WanTransformer3DModel(**sizes), []
    assert len(list(transformer.parameters())) == 825
    for _ in range(100):
        begin = time.perf_counter()
        refuse_hooks(transformer)
        text_version(transformer)
        seconds.append(time.perf_counter() - begin)
    assert min(seconds) < 1e-3
