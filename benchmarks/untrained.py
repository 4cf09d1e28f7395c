"""Moved to memflow_bench.untrained."""

from memflow_bench.untrained import *  # noqa: F403
