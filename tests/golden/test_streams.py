"""One self-attention layer driven through recorded streams: every event of every case of the manifest.

The layer is diffusers' WanAttention with MemFlow's processor, its memory `MemoryConfig.published`.
"""

from __future__ import annotations

import golden
import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanAttention

from memflow.memory import MemoryConfig, Prompt, make_memory
from memflow.models.wan.attention import MemorySelfAttention
from memflow_kernels import select_frames

CASES = golden.manifest().get("selfattn_stream", {}).get("cases", {})
SMA_TOP_K = 3  # fixed in the published code


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", CASES)
def test_stream(name, dtype):
    replay = Replay(CASES[name], dtype)
    for event in CASES[name]["events"]:
        replay.handlers[event["type"]](event)


class Replay:
    def __init__(self, case, dtype):
        config = case["config"]
        self.handlers = {"retrieve": self.retrieve, "pass": self.run_pass, "zero_cache": self.zero_cache}
        self.tensors = {k: v.to(dtype) if v.is_floating_point() else v for k, v in golden.tensors(case["file"]).items()}
        self.config = config
        differences = case["f32_run_max_abs_diff_vs_f64_run"]
        exact = dtype == torch.float64
        self.out_tolerance = 1e-6 if exact else 10 * differences["out"]
        self.cache_tolerance = 1e-6 if exact else 10 * differences["cache"]
        self.attn = WanAttention(config["dim"], config["heads"], config["head_dim"], config["eps"]).to(dtype)
        self.attn.load_state_dict(
            {
                diffusers: self.tensors[f"weight.{original}"]
                for diffusers, original in (
                    *((f"to_{x}.{part}", f"{x}.{part}") for x in "qkv" for part in ("weight", "bias")),
                    *((f"to_out.0.{part}", f"o.{part}") for part in ("weight", "bias")),
                    *((f"norm_{x}.weight", f"norm_{x}.weight") for x in "qk"),
                )
            }
        )
        self.layer = MemorySelfAttention(0)
        settings = MemoryConfig.published(
            config["mode"],
            frames_per_chunk=config["frames_per_chunk"],
            local_frames=config["local"],
            sink_frames=config["sink"],
            bank_frames=config["bank"],
            record_interval=config["ri"],
            global_sink=config.get("global_sink", True),
        )
        self.memory = make_memory(
            settings,
            layers=1,
            batch=config["batch"],
            heads=config["heads"],
            head_dim=config["head_dim"],
            grid=config["grid_hw"],
            dtype=dtype,
            device="cpu",
        )

    # -- events --------------------------------------------------------------------------------------------------

    def zero_cache(self, event):
        assert not self.memory.config.global_sink
        self.memory.pool.clear_sink_and_window()

    def retrieve(self, event):
        memory, text = self.memory, event["text"]
        memory.text_known = text != "zero"
        prompt = None
        if memory.text_known:
            key = self.tensors[text][None].expand(-1, self.config["batch"], -1, -1, -1)
            prompt = Prompt(key, key, torch.ones(key.shape[1:3], dtype=torch.bool))
        expected = self.recorded(event, "scores")
        if expected is not None and prompt is not None:
            scores = memory.relevance(prompt)[0].gather(1, memory.order[0])
            assert_close(scores, expected, self.cache_tolerance)
        memory.update(0, prompt)
        order = memory.order[0]
        assert memory.held[0].gather(1, order).tolist() == per_row(event["bank_after"], self.config["batch"])
        for name, buffer in (("bank_k", memory.pool.key), ("bank_v", memory.pool.value)):
            expected = self.recorded(event, name)
            if expected is not None:
                assert_close(self.frames(buffer[0], order), self.by_frame(expected), self.cache_tolerance)

    @torch.no_grad()
    def run_pass(self, event):
        memory, x = self.memory, self.recorded(event, "x")
        step = memory.pass_over(event["start"], event["frames"], None)
        self.check_attended(event, step)
        self.layer.bind(step, clean=False)
        for name, top_k in (("out_sma", SMA_TOP_K), ("out_dense", None)):
            expected = self.recorded(event, name)
            if expected is not None:
                out = self.layer(self.attn, x, rotary_emb=step._replace(top_k=top_k))
                assert_close(out, expected, self.out_tolerance)
        assert self.recorded(event, "out_dense") is not None
        self.check_choice(event, step, self.layer.write(self.attn, x, step)[0])
        if event["kind"] == "clean":
            memory.end_chunk(event["start"])
            assert event["update_bank"] == memory.pending_is_new
        self.check_cache(event)

    # -- what an event leaves behind -------------------------------------------------------------------------------

    def check_attended(self, event, step):
        memory, config = self.memory, self.config
        bank = config["bank"] - step.first_slot
        stop = event["start"] + event["frames"]
        visible = memory.held[0].gather(1, memory.order[0])[:, :bank]
        assert visible.tolist() == per_row(event["attends"]["bank"], config["batch"])
        sink = numbers(event["attends"]["sink"])
        assert sink == list(range(len(sink))) or set(event["attends"]["sink"]) == {"zero"}
        local = numbers(event["attends"]["local"])
        assert local == list(range(stop - len(local), stop))
        assert step.end_slot - step.first_slot == len(sink) + bank + len(local)
        assert step.candidates == len(sink) + bank

    def check_choice(self, event, step, query):
        expected = self.recorded(event, "sma_scores")
        if expected is None or not step.candidates:
            return
        memory = self.memory
        means = step.pools[0].frame_mean[:, step.first_slot : step.first_slot + step.candidates]
        scores = torch.einsum("bhd,bnhd->bhn", query.mean(1).to(means.dtype), means)
        for row in range(self.config["batch"]):
            bank = memory.order[0, row, : self.config["bank"] - step.first_slot] - step.first_slot
            sink = torch.arange(len(bank), step.candidates)
            in_recorded_order = torch.cat([sink, bank])
            # Scores are sums over a head's channels of products of means: an error budget like that of the outputs.
            assert_close(scores[row, :, in_recorded_order], expected[row], 10 * self.out_tolerance)
            chosen = select_frames(query, means, SMA_TOP_K)[row]
            frames = [*memory.held[0, row, step.first_slot :].tolist(), *numbers(event["attends"]["sink"])]
            labels = event["sma_selected_per_head"]
            labels = labels[row] if isinstance(labels[0][0], list) else labels
            for head, expected_labels in enumerate(labels):
                assert sorted(frames[i] for i in chosen[head].tolist()) == sorted(numbers(expected_labels))

    def check_cache(self, event):
        memory, pool = self.memory, self.memory.pool
        for name, buffer in (("cache_k", pool.key), ("cache_v", pool.value)):
            expected = self.recorded(event, name)
            if expected is None:
                continue
            expected = self.by_frame(expected)
            for place, label in enumerate(event["cache_slots_after"]):
                if label != "zero":
                    slot = pool.slot_of(number(label))
                elif place < self.config["sink"]:
                    slot = self.config["bank"] + place
                else:
                    continue
                slots = torch.full((self.config["batch"], 1), slot)
                assert_close(self.frames(buffer[0], slots), expected[:, place : place + 1], self.cache_tolerance)
        for name, buffer in (("bank_k_new", pool.key), ("bank_v_new", pool.value)):
            expected = self.recorded(event, name)
            if expected is not None:
                slots = torch.full((self.config["batch"], 1), memory.pending_slot)
                assert_close(self.frames(buffer[0], slots), self.by_frame(expected), self.cache_tolerance)

    # -- helpers -----------------------------------------------------------------------------------------------------

    def recorded(self, event, name):
        return self.tensors.get(f"{event['i']:03d}.{name}")

    def by_frame(self, x):
        return x.unflatten(1, (-1, self.config["tokens_per_frame"]))

    def frames(self, buffer, slots):
        """[B, n, tokens, H, D]: the frames in `slots` [B, n] of one layer's buffer."""
        return self.by_frame(buffer)[torch.arange(slots.shape[0])[:, None], slots]


def number(label: str) -> int:
    return -1 if label == "zero" else int(label[:-1])


def numbers(labels) -> list[int]:
    return [number(label) for label in labels]


def per_row(labels, batch: int) -> list[list[int]]:
    """Frame numbers per batch row of a list of labels, recorded once for all rows or row by row."""
    rows = labels if labels and isinstance(labels[0], list) else [labels] * batch
    return [numbers(row) for row in rows]


def assert_close(actual, expected, tolerance):
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).abs().max().item()
    assert error <= tolerance, f"differs by {error:.3g}, tolerance {tolerance:.3g}"
