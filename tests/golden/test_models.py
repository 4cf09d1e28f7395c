"""Whole-model runs of the manifest, to the final latents: checkpoint, pipeline and stream as a user runs them."""

from __future__ import annotations

import golden
import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel

from memflow.convert import Conversion, convert
from memflow.memory import MemoryConfig
from memflow.models.wan.checkpoints import load_transformer
from memflow.stream.pipeline import MemFlowPipeline
from memflow.stream.plan import Plan
from memflow.stream.stream import Stream

SECTION = golden.manifest().get("model_stream", {})
CASES = SECTION.get("cases", {})
SMA_TOP_K = 3  # fixed in the published code
LATENT_TOLERANCE = 1e-4  # diffusers keeps the time embedding in float32


@pytest.fixture(scope="module", params=["original file", "converted folder"])
def pipeline(request, tmp_path_factory):
    config = SECTION["config"]
    weights = golden.directory() / next(name for name in SECTION["files"] if "weights" in name)
    if request.param == "original file":
        transformer = load_transformer(weights, num_attention_heads=config["heads"])
    else:
        folder = tmp_path_factory.mktemp("converted") / "model"
        convert(Conversion([weights], folder, heads=config["heads"], partial=True, shard_bytes=10**6))
        transformer = WanTransformer3DModel.from_pretrained(folder / "transformer").eval()
    with torch.random.fork_rng():
        vae = AutoencoderKLWan(base_dim=8, z_dim=config["in_channels"], num_res_blocks=1)
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=config["timestep_shift"])
    return MemFlowPipeline(
        tokenizer=None,
        text_encoder=None,
        transformer=transformer,
        vae=vae,
        scheduler=scheduler,
        denoising_steps=config["denoising_steps"],
    )


@pytest.mark.skipif(not SECTION, reason="this golden directory has no whole-model runs")
def test_schedule(pipeline):
    recorded = tensors()
    two_float32_steps = 2.4e-7  # at 1
    torch.testing.assert_close(pipeline.scheduler.sigmas[:1000], recorded["sigmas"], rtol=0, atol=two_float32_steps)
    steps = torch.tensor(pipeline.schedule.timesteps)
    torch.testing.assert_close(steps, recorded["denoising_step_list"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_model(pipeline, name):
    case, recorded = CASES[name], tensors()
    expected = recorded[f"{name}.latents"]
    stream = recorded_stream(pipeline, {**SECTION["config"], **case["spec"]}, recorded, batch=expected.shape[0])
    chunks = list(stream)
    stream.driver.settle()
    latents = torch.cat([chunk.latents for chunk in chunks], dim=2).transpose(1, 2)
    assert latents.shape == expected.shape
    assert (latents - expected).abs().max() <= LATENT_TOLERANCE
    ends = [call["bank_end"] for call in case["calls"] if call["update_cache"] and not call["is_recache"]]
    assert stream.memory.recorded == ends[-1]
    memory, tokens = stream.memory, SECTION["config"]["tokens_per_frame"]
    for layer in range(SECTION["config"]["layers"]):
        for part, buffer in (("k", memory.pool.key), ("v", memory.pool.value)):
            bank = recorded.get(f"{name}.final_bank.{layer}.{part}")
            if bank is not None:
                rows = torch.arange(buffer.shape[1])[:, None]
                held = buffer[layer].unflatten(1, (-1, tokens))[rows, memory.order[layer]]
                assert (held.flatten(1, 2) - bank).abs().max() <= LATENT_TOLERANCE


def recorded_stream(pipeline, spec, recorded, batch: int) -> Stream:
    """The stream of one case: its memory, its switches, its prompts and its noise."""
    config = MemoryConfig.published(
        spec["mode"],
        local_frames=spec.get("local", spec["local_attn_size"]),
        sink_frames=spec.get("sink", spec["sink_size"]),
        bank_frames=spec.get("bank", spec["bank_size"]),
        record_interval=spec["ri"],
        top_k=SMA_TOP_K if spec["SMA"] else None,
        global_sink=spec.get("global_sink", True),
        frames_per_chunk=spec["frames_per_chunk"],
    )
    height, width = (side * pipeline.spatial_factor for side in spec["latent_hw"])
    plan = plan_of(spec["chunks"], spec["switch"], spec["frames_per_chunk"])
    stream = RecordedStream(pipeline, plan=plan, config=config, seeds=range(batch), height=height, width=width)
    stream.noise = RecordedNoise(recorded, batch, spec["frames_per_chunk"])
    stream.text = recorded["text"][:, :batch]
    return stream


def plan_of(chunks: int, switches: list[int], frames_per_chunk: int) -> Plan:
    """A switch takes effect at the first chunk that starts at or after its frame; one switch a chunk at the most."""
    prompt_of, waiting, prompt = [], sorted(switches), 0
    for chunk in range(chunks):
        if waiting and chunk * frames_per_chunk >= waiting[0]:
            waiting.pop(0)
            prompt += 1
        prompt_of.append(prompt)
    plan = Plan([], 1)
    plan.queue = [((str(p),), prompt_of.count(p)) for p in sorted(set(prompt_of))]
    return plan


class RecordedStream(Stream):
    """Takes text embeddings from the recording and leaves the latents undecoded."""

    def _encode(self, texts):
        embeds = self.text[int(texts[0])]
        self.decoder.decode = lambda latents: torch.empty(0)
        return embeds, torch.ones(embeds.shape[:2], dtype=torch.bool)


class RecordedNoise:
    """The recorded noise in the order in which a stream asks for it: of a chunk, then of each of its later steps."""

    def __init__(self, recorded, batch, frames_per_chunk):
        suffixes = ["", "_batch1"][:batch]
        initial = torch.cat([recorded[f"noise{s}"][:, : recorded[f"noise{suffixes[-1]}"].shape[1]] for s in suffixes])
        chunks = initial.shape[1] // frames_per_chunk
        steps = torch.cat([recorded[f"step_noise{s}"][:chunks] for s in suffixes], dim=2)
        self.queue = []
        for chunk, first in enumerate(initial.split(frames_per_chunk, dim=1)):
            self.queue += [first, *steps[chunk]]

    def __call__(self, shape):
        return self.queue.pop(0).transpose(1, 2)


def tensors():
    return {k: v for name in SECTION.get("files", []) for k, v in golden.tensors(name).items()}
