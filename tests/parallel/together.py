"""Processes on this machine that make a story together (gloo), and a small model for them."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel

from memflow import MemFlowPipeline
from memflow_bench.untrained import noise_pipeline

STORY = ("a red boat", "an owl in the fog", "the red boat again", "two foxes", "an owl")
SMALL = {"seconds_per_prompt": 6 * 0.75, "height": 32, "width": 32}
# A process that has imported all of it makes the others, by forking: they start at once.
FACTORY = multiprocessing.get_context("forkserver")
FACTORY.set_forkserver_preload(["memflow_bench.untrained", "memflow.stream.pipeline", "torch.distributed.device_mesh"])


def pipeline(heads: int = 4) -> MemFlowPipeline:
    """The untrained pipeline with a smaller transformer, the same every time."""
    pipe = noise_pipeline()
    pipe.register_to_config(denoising_steps=[1000, 500])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        sizes = {"num_attention_heads": heads, "attention_head_dim": 12, "num_layers": 2, "ffn_dim": 64}
        channels = {name: pipe.transformer.config[name] for name in ("in_channels", "out_channels", "text_dim")}
        pipe.transformer = WanTransformer3DModel(**sizes, **channels).eval()
        for block in pipe.transformer.blocks:  # keys that differ, so that heads choose and prompts call
            for norm in (block.attn1.norm_q, block.attn1.norm_k, block.attn2.norm_q, block.attn2.norm_k):
                torch.nn.init.normal_(norm.weight, 2.0, 0.5)
    return pipe


def run(size: int, work, *arguments) -> list:
    """What `work(*arguments)` returns in each of `size` processes of one group, in their order."""
    with tempfile.TemporaryDirectory() as folder:
        processes = [FACTORY.Process(target=_run, args=(n, size, folder, work, arguments)) for n in range(size)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(240)
        for process in processes:
            if process.is_alive():
                process.kill()
        errors = [path.read_text() for path in sorted(Path(folder).glob("error-*"))]
        assert not errors and all(process.exitcode == 0 for process in processes), "\n".join(errors) or "killed"
        return [torch.load(Path(folder) / f"result-{n}", weights_only=False) for n in range(size)]


def _run(rank: int, size: int, folder: str, work, arguments) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    place = {"init_method": f"file://{folder}/meeting", "rank": rank, "world_size": size}
    try:
        torch.distributed.init_process_group("gloo", **place, timeout=timedelta(seconds=60))
        torch.save(work(*arguments), Path(folder) / f"result-{rank}")
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    except BaseException:
        (Path(folder) / f"error-{rank}").write_text(traceback.format_exc())
        raise
