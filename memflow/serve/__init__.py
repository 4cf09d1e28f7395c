"""A server of live stories. `memflow.serve:app` is the app of `memflow serve` for any ASGI host (docs/serving.md)."""


def __getattr__(name: str):
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from memflow.serve.command import app_of_environment

    return app_of_environment()
