"""Threads that stay where they are. Imports nothing: an OpenMP runtime reads its settings when it is loaded."""

import os


def pin_threads() -> None:
    """Keep every OpenMP thread on a core of its own; OMP_* settings stay as given.

    Call it before anything that loads an OpenMP runtime, torch first of all. A second runtime that came later with
    these settings would pin the main thread alone, and torch's threads, which inherit its core, to that one core.
    """
    os.environ.setdefault("OMP_PROC_BIND", "close")
    os.environ.setdefault("OMP_PLACES", "cores")
