"""The attention workloads as FlashInfer-Bench style definitions: axes, inputs, outputs and a reference in torch."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from .cases import Case

REFERENCE = '''import torch


def run(query, key, value, frame_mean):
    """Attention of every head over its top_k of the first candidate_frames frames and over all later frames."""
    B, Lq, H, D = query.shape
    N, C, K = {tokens}, {candidates}, {top_k}
    F = key.shape[1] // N
    score = torch.einsum("bhd,bfhd->bhf", query.float().mean(1), frame_mean.float())
    seen = torch.ones(B, H, F, dtype=torch.bool, device=query.device)
    seen[..., :C] = False
    seen.scatter_(2, score.topk(min(K, C), dim=-1).indices, True)
    logits = torch.einsum("bqhd,bkhd->bhqk", query.float(), key.float()) * D**-0.5
    logits = logits.masked_fill(~seen.repeat_interleave(N, -1)[:, :, None], float("-inf"))
    out = torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), value.float())
    return out.to(query.dtype)
'''


def definition(case: Case) -> dict:
    """One case: the batch may vary, all else is constant."""
    axes = {
        "batch": {"type": "var"},
        "queries": {"type": "const", "value": case.queries},
        "keys": {"type": "const", "value": case.frames * case.tokens},
        "candidates": {"type": "const", "value": case.candidates},
        "heads": {"type": "const", "value": case.heads},
        "head_dim": {"type": "const", "value": case.head_dim},
    }
    states = {"query": "queries", "key": "keys", "value": "keys"}
    inputs = {
        name: {"shape": ["batch", axis, "heads", "head_dim"], "dtype": "bfloat16"} for name, axis in states.items()
    }
    inputs["frame_mean"] = {"shape": ["batch", "candidates", "heads", "head_dim"], "dtype": "float32"}
    reference = REFERENCE.format(tokens=case.tokens, candidates=case.candidates, top_k=case.top_k)
    return {
        "name": f"memory_attention_{case.name.replace('-', '_').replace('.', '_')}",
        "op_type": "memory_attention",
        "description": case.about or f"like {case.like}",
        "axes": axes,
        "inputs": inputs,
        "outputs": {"out": {"shape": ["batch", "queries", "heads", "head_dim"], "dtype": "bfloat16"}},
        "reference": reference,
    }


def export(folder: Path, cases: Iterable[Case]) -> list[Path]:
    """Write one file per case; cases that differ in batch alone share one, those with blocks are of whole layers."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for case in cases:
        if case.sweep == "streams" or case.activation_block:
            continue
        content = definition(case)
        paths.append(folder / f"{content['name']}.json")
        paths[-1].write_text(json.dumps(content, indent=2) + "\n")
    return paths
