"""`python -m memflow.cli`."""

from memflow.cli import run

run()
