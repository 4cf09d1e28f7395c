"""The cases, and their export."""

import json
from dataclasses import asdict

import pytest
import torch

from memflow_bench.cases import case, load_cases
from memflow_bench.command import main
from memflow_bench.definitions import definition
from memflow_bench.states import attention_state
from memflow_kernels import memory_attention
from memflow_kernels.testing import assert_close

SWEPT = {"memory": "bank", "window": "window", "top_k": "top_k", "resolution": "grid", "streams": "batch"}


def test_the_base_case_is_the_published_one():
    base = case("wan-1.3b-480p")
    assert (base.queries, base.heads, base.head_dim, base.tokens) == (4680, 12, 128, 1560)
    assert (base.sink, base.bank, base.window, base.top_k, base.candidates) == (3, 3, 9, 3, 6)
    assert (base.attended_keys(False), base.attended_keys(True)) == (15 * 1560, 12 * 1560)
    rows = case("wan-1.3b-480p-rows")  # 1/9 of six frames, by rows
    assert (rows.block, rows.attended_keys(False), rows.attended_keys(True)) == (52, 15 * 1560, 9 * 1560 + 1040)


@pytest.mark.parametrize("name", [name for name, entry in load_cases().items() if entry.sweep])
def test_along_a_sweep_one_thing_changes(name):
    entry = asdict(case(name))
    base = asdict(case(entry["like"]))
    changed = {field for field in entry if entry[field] != base[field]} - {"name", "about", "sweep", "like"}
    assert changed == {SWEPT[entry["sweep"]]}


def test_an_unknown_case_is_named():
    with pytest.raises(ValueError, match=r"no case 'wan'.*wan-1\.3b-480p"):
        case("wan")


def test_definitions_are_runnable(tmp_path, tiny):
    assert main(["cases", "--export-definitions", str(tmp_path)]) == 0
    names = {json.loads(path.read_text())["name"] for path in tmp_path.glob("*.json")}
    assert "memory_attention_wan_1_3b_480p" in names
    state = attention_state(tiny, True, torch.float64, torch.device("cpu"))
    module: dict = {}
    exec(definition(tiny)["reference"], module)
    inputs = [x.float() for x in (state.query, state.key, state.value, state.frame_mean)]
    ours = memory_attention(
        *inputs[:3], tokens_per_frame=tiny.tokens, candidate_frames=tiny.candidates, top_k=tiny.top_k
    )
    assert_close(module["run"](*inputs), ours)
