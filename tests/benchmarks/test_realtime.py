"""Loop and decoder timed together, at sizes that take no time."""

from dataclasses import replace

import torch

from memflow_bench.cases import case
from memflow_bench.experiments import PLAIN, RealtimeExperiment, Way
from memflow_bench.realtime import run_realtime
from memflow_bench.table import group_table

SMALL = {
    "vae": {"base_dim": 8, "z_dim": 16, "num_res_blocks": 1},
    "tiny": {"channels": (8, 4, 4, 4)},
}


def test_rows_of_loop_and_decoders():
    small = replace(case("toy"), heads=2, head_dim=16, grid=(2, 2), layers=2, text_tokens=7)
    ways = (PLAIN, Way("float8", 0.3, float8=True), Way("graphs", 0.0, compiled=True, graphs=True))
    rows = run_realtime(RealtimeExperiment(small, "float32", ways, budget=0.0, least=2, **SMALL), torch.device("cpu"))
    assert [(row.provider, row.status, len(row.seconds)) for row in rows] == [
        ("loop, eager", "ok", 2),
        ("end to end, eager, VAE", "ok", 2),
        ("end to end, eager, tiny decoder", "ok", 2),
        ("loop, float8", "missing", 0),
        ("loop, graphs", "missing", 0),
    ]
    assert "the weights must be bfloat16" in rows[3].reason
    assert "need a model on a GPU" in rows[4].reason
    assert rows[1].frames == 12
    table = group_table(rows, {})
    assert "| end to end, eager, tiny decoder |" in table
    assert "frames/s" in table
