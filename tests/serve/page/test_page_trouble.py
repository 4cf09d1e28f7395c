"""The page when things go wrong: a server that dies, a network that fails, more written than a scene takes."""

import shutil
import time

import browser
import pytest
from browser import BEACH, FOREST, start, tell


def test_a_server_that_died_goes_on_from_an_older_state(open_page, served):
    """Its last state is older than what the viewer has seen; and a scene that was written meanwhile is told."""
    page = open_page()
    routed, away = [], []

    def route(socket):
        if away:
            socket.close()
            return
        routed.append((socket, socket.connect_to_server()))

    page.route_web_socket("**/v1/realtime/video", route)
    start(page)
    page.click("#save")
    page.wait_for_selector("#kept:has-text('Kept until')")
    id = page.url.partition("#story=")[2]
    state, kept = served.folder / f"{id}.safetensors", served.folder / "kept"
    shutil.copy(state, kept)
    saved = page.evaluate("document.getElementById('video').buffered.end(0)")
    browser.until(page, f"document.getElementById('video').currentTime > {saved + 2}", 30)  # more than is made ahead
    away.append(True)
    for end in reversed(routed[0]):
        end.close()
    page.wait_for_selector("#status[data-state=lost]")
    tell(page, FOREST)
    page.wait_for_selector("#scenes .coming")
    while id in served.tellings:
        time.sleep(0.02)
    shutil.move(kept, state)
    away.clear()
    page.wait_for_selector("#status[data-state=telling]", timeout=30_000)
    before = page.evaluate("document.getElementById('video').buffered.end(0)")
    browser.until(page, f"document.getElementById('video').currentTime > {before + 0.5}", 30)
    page.wait_for_selector("#scenes .coming", state="detached")
    assert page.locator("#scenes .told").all_inner_texts() == [BEACH, FOREST]


def test_a_kept_story_that_cannot_be_fetched(open_page):
    page = open_page()
    start(page)
    page.click("#save")
    page.wait_for_selector("#kept:has-text('Kept until')")
    address = page.url[page.url.index("#") :]
    other = open_page(expected="ERR_FAILED")
    other.route("**/v1/stories/*/chunks", lambda route: route.abort())
    other.evaluate(f"location.hash = '{address}'")
    other.reload()
    other.wait_for_selector("#error:visible")
    assert other.inner_text("#error") == "The server cannot be reached. Reload the page in a moment."


@pytest.mark.filterwarnings("ignore:the prompt has")
def test_a_long_scene_is_refused_whole_and_a_caption_stays_short(open_page):
    page = open_page(width=320, height=640)
    page.fill("#prompt", (BEACH + " ") * 60)
    page.press("#prompt", "Control+Enter")
    page.wait_for_selector("#error:visible")
    assert page.inner_text("#error") == "A scene has at most 2000 letters, this one has 2159."
    page.fill("#prompt", (BEACH + " ") * 50)
    page.wait_for_selector("#unknown:has-text('cut off')")
    page.press("#prompt", "Control+Enter")
    page.wait_for_selector("#caption:visible")
    assert len(page.inner_text("#caption")) == 120 and page.inner_text("#caption").endswith("…")
    assert page.evaluate("document.documentElement.scrollWidth") == 320
