"""`python -m memflow`: the command `memflow`."""

from memflow.cli import run

run()
