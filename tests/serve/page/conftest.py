"""A server in this process, so that what it knows can be compared with what the page shows, and pages of a real browser."""

from __future__ import annotations

import threading
import time
from copy import deepcopy
from types import SimpleNamespace

import browser
import pytest


@pytest.fixture(scope="session")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as running:
        chromium = browser.launch(running)
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    """`url` of a server whose frames are stamped with their numbers, and `snapshots`: what every chunk remembered."""
    import uvicorn

    from memflow import MemFlowPipeline
    from memflow.serve.app import make_app
    from memflow.serve.settings import Settings
    from memflow.stream.stream import Stream

    patch = pytest.MonkeyPatch()
    snapshots, whole = {}, Stream.__next__

    def stamped(stream):
        chunk = whole(stream)
        browser.stamp(chunk.frames[0].numpy(), chunk.index * chunk.frames.shape[1])
        snapshots[chunk.index] = deepcopy(stream.snapshot())
        return chunk

    patch.setattr(Stream, "__next__", stamped)
    settings = Settings(folder=tmp_path_factory.mktemp("stories"))
    app = make_app(lambda: (MemFlowPipeline.from_preset(), {}), settings)
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", ws_per_message_deflate=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield SimpleNamespace(url=f"http://127.0.0.1:{port}/", snapshots=snapshots)
    server.should_exit = True
    thread.join(10)
    patch.undo()


@pytest.fixture
def open_page(chromium, served):
    """Opens the page in a window of its own; what it writes to the console as an error fails the test."""
    contexts, errors, allowed = [], [], []

    def open_page(query="", *, width=1280, height=900, script=None, expected=None, **settings):
        context = chromium.new_context(viewport={"width": width, "height": height}, **settings)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        if expected:
            allowed.append(expected)
        if script:
            page.add_init_script(script)
        page.goto(served.url + query)
        page.wait_for_selector("#go:enabled")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [error for error in errors if not (allowed and any(part in error for part in allowed))] == []
