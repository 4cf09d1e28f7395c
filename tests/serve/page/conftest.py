"""A server in this process, so that what it knows can be compared with what the page shows, and a real browser."""

from __future__ import annotations

import threading
import time
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
    """`url` of a server whose frames are stamped with their numbers; `snapshots`: what was remembered, by chunk;
    `tellings`: the stories that it tells; `folder`: where it keeps them."""
    from memflow import MemFlowPipeline
    from memflow.serve.asgi import make_app
    from memflow.serve.command import listen, server
    from memflow.serve.settings import Settings
    from memflow.stream.stream import Stream

    patch = pytest.MonkeyPatch()
    snapshots, whole = {}, Stream.__next__

    def stamped(stream):
        chunk = whole(stream)
        if stream.pipeline is not pipeline:  # of a test elsewhere, in the same process
            return chunk
        browser.stamp(chunk.frames[0].numpy(), chunk.index * chunk.frames.shape[1])
        snapshots[chunk.index] = stream.snapshot()
        return chunk

    pipeline = MemFlowPipeline.from_preset()
    pipeline.set_progress_bar_config(disable=True)
    patch.setattr(Stream, "__next__", stamped)
    settings = Settings(folder=tmp_path_factory.mktemp("stories"))
    app = make_app(lambda: (pipeline, {}), settings)
    running = server(app, settings)
    with listen("127.0.0.1", 0) as socket:
        thread = threading.Thread(target=running.run, kwargs={"sockets": [socket]}, daemon=True)
        thread.start()
        while not running.started:
            time.sleep(0.02)
        url = f"http://127.0.0.1:{socket.getsockname()[1]}/"
        told = app.state.stories.tellings
        yield SimpleNamespace(url=url, folder=settings.folder, snapshots=snapshots, tellings=told)
        running.should_exit = True
        thread.join(60)
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
    end = time.monotonic() + 20
    while served.tellings:  # the next test is to find nothing that is still told
        assert time.monotonic() < end, "a story is told to nobody"
        time.sleep(0.02)
    served.snapshots.clear()
    assert [error for error in errors if not (allowed and any(part in error for part in allowed))] == []
