"""Studies of this repository, and results. The harness itself is memflow_bench; see docs/benchmarks.md."""
