"""The command memflow-bench."""

from .pinning import pin_threads


def run() -> int:
    """The threads are pinned before torch, which comes before anything else that brings an OpenMP runtime."""
    pin_threads()
    import torch  # noqa: F401

    from .command import main

    return main()


if __name__ == "__main__":
    raise SystemExit(run())
