"""python -m benchmarks: what `memflow-bench` does, without installing."""

from memflow_bench.__main__ import run

raise SystemExit(run())
