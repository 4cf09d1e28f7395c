"""The recorded streams once more, through `memflow.integrations.patch`: outputs, cache contents and indices.

The caller is played by the recording: it says which of the recorded prototypes lie in the bank, and in which order.
"""

from __future__ import annotations

import golden
import pytest
import torch
from torch import nn

from memflow.integrations import contents, patch
from memflow.memory import MemoryConfig
from memflow_kernels.reference.rotary import rotation_table

CASES = golden.manifest().get("selfattn_stream", {}).get("cases", {})


class Layer(nn.Module):
    """The module that a generator has; its own arithmetic is never run here."""

    def __init__(self, config, weights):
        super().__init__()
        self.num_heads = config["heads"]
        for name in "qkvo":
            setattr(self, name, nn.Linear(config["dim"], config["dim"]))
        for name in ("norm_q", "norm_k"):
            setattr(self, name, nn.RMSNorm(config["dim"], eps=config["eps"]))
        self.load_state_dict(weights)

    def forward(
        self, x, seq_lens, grid_sizes, freqs, block_mask, kv_cache, current_start, cache_start,
        kv_bank, update_bank, is_recache, update_cache,
    ):  # fmt: skip
        raise NotImplementedError


@pytest.mark.parametrize("activated", [False, True], ids=["dense", "activated"])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_patched_stream(name, activated):
    case = CASES[name]
    config, tolerance = case["config"], {k: 10 * v for k, v in case["f32_run_max_abs_diff_vs_f64_run"].items()}
    tensors = golden.tensors(case["file"])
    layer = Layer(config, {k.removeprefix("weight."): v for k, v in tensors.items() if k.startswith("weight.")})
    sizes = {"local_frames": config["local"], "sink_frames": config["sink"], "bank_frames": config["bank"]}
    top_k = 3 if activated else None
    memory = MemoryConfig.published(config["mode"], record_interval=config["ri"], top_k=top_k, **sizes)
    # The recording is what its own code gives.
    patch(layer, memory=memory, returns=lambda call: call.output, check=False)
    tokens, batch = config["tokens_per_frame"], config["batch"]
    cache, bank = (
        {k: torch.zeros(batch, frames * tokens, config["heads"], config["head_dim"]) for k in "kv"}
        | {f"{end}_end_index": torch.tensor([0]) for end in ("global", "local")}
        for frames in (config["local"], config["bank"])
    )
    bank |= {f"{k}_new": torch.zeros(batch, tokens, config["heads"], config["head_dim"]) for k in "kv"}
    side = 64
    freqs = rotation_table(config["head_dim"], side, (side, side), 0, torch.device("cpu"))[:: side**2 + side + 1, 0]
    prototypes, checked = {}, 0
    for event in case["events"]:
        recorded = {k[4:]: v for k, v in tensors.items() if k.startswith(f"{event['i']:03d}.")}
        if event["type"] == "zero_cache":
            cache["k"].zero_(), cache["v"].zero_()
        elif event["type"] == "retrieve":
            rows = event["bank_after"]
            for row, labels in enumerate(rows if isinstance(rows[0], list) else [rows] * batch):
                for place, label in enumerate(labels):
                    for k in "kv":
                        if label != "zero":
                            bank[k][row, place * tokens : (place + 1) * tokens] = prototypes[label][k][row]
        else:
            start, frames = event["start"], event["frames"]
            grid_sizes = torch.tensor([[frames, *config["grid_hw"]]] * batch)
            flags = event["update_bank"], event["is_recache"], event["update_cache"]
            lengths = torch.full((batch,), frames * tokens)
            out = layer(
                recorded["x"], lengths, grid_sizes, freqs, None, cache, start * tokens, None, bank, *flags
            )  # fmt: skip
            assert_close(out, recorded["out_sma" if activated else "out_dense"], tolerance["out"])
            for kept, which in ((cache, "cache"), (bank, "bank")):
                for end in ("global", "local"):
                    if f"{which}_{end}_end_frames" in event:
                        assert int(kept[f"{end}_end_index"]) == event[f"{which}_{end}_end_frames"] * tokens
                        checked += 1
            if "k_new_after" in event:
                prototypes[event["k_new_after"]] = {k: bank[f"{k}_new"].clone() for k in "kv"}
            if "cache_k" in recorded:
                for held, k in zip(contents(cache), "kv", strict=True):
                    assert_close(held, recorded[f"cache_{k}"], tolerance["cache"])
            for k in "kv":
                if f"bank_{k}_new" in recorded:
                    assert_close(bank[f"{k}_new"], recorded[f"bank_{k}_new"], tolerance["cache"])
    assert checked > 20


def assert_close(actual, expected, tolerance):
    error = (actual - expected).abs().max().item()
    assert actual.shape == expected.shape and error <= tolerance, f"differs by {error:.3g}, tolerance {tolerance:.3g}"
