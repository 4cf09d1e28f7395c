"""A server of live stories. `memflow.serve:app` is the app of `memflow serve` for any ASGI host (docs/serving.md)."""

from importlib import import_module


def __getattr__(name: str):
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module("memflow.serve.command").app_of_environment()
