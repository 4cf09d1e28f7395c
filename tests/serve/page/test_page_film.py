"""The film on the page, in a real browser: every frame is proven by the number stamped into it."""

import browser
import pytest
from browser import BEACH, FOREST, in_order, start, tell, whole

NO_MEDIA_SOURCE = "delete window.MediaSource; delete window.ManagedMediaSource; crypto.randomUUID = undefined;"
FULL = """
const append = SourceBuffer.prototype.appendBuffer;
let calls = 0;
window.refused = 0;
SourceBuffer.prototype.appendBuffer = function (data) {
  if (++calls % 3 === 0) { window.refused++; throw new DOMException("full", "QuotaExceededError"); }
  append.call(this, data);
};
"""


SOCKET = """
const Real = WebSocket;
WebSocket = class extends Real { constructor(...given) { super(...given); window.socket = this; } };
"""


def goes_on(page, frame):
    """The film comes to this frame, and has all of those before it."""
    browser.until(page, f"document.getElementById('video').currentTime > {frame / 8}", 30)
    assert page.inner_text("#status") == "Telling" and not page.is_visible("#error")
    numbers = whole(page)
    assert numbers == list(range(0, 2 * len(numbers), 2)) and numbers[-1] > frame - 3


@pytest.mark.parametrize("how", ["m4s", "jpeg", "no media source", "full buffer"])
def test_story_starts_and_shows_every_frame(open_page, how):
    page = open_page(
        "?format=jpeg" if how == "jpeg" else "",
        script={"no media source": NO_MEDIA_SOURCE, "full buffer": FULL}.get(how),
    )
    tries = [start(page)]
    while min(tries) >= 2 and len(tries) < 4:  # the machine is busy with other things
        page.click("#new")
        tries.append(start(page))
    assert min(tries) < 2
    assert page.is_visible("#canvas") == (how in ("jpeg", "no media source"))
    in_order(browser.watch(page, 2))
    if how == "full buffer":
        assert page.evaluate("window.refused") > 1
    tell(page, FOREST)
    page.wait_for_selector(f"#scenes li >> text={FOREST}")
    if how in ("m4s", "full buffer"):
        assert len(whole(page)) > 8


def test_next_scene_is_seen_when_it_is_said(open_page):
    page = open_page()
    start(page)
    page.wait_for_timeout(1500)
    beach = browser.colour(page)
    assert page.inner_text("#caption") == BEACH
    tell(page, FOREST)
    page.wait_for_selector("#scenes li.coming")
    page.wait_for_selector(f"#caption:text-is('{FOREST}')")
    page.wait_for_timeout(250)
    forest = browser.colour(page)
    assert sum(beach) - sum(forest) > 200  # night
    scenes = page.locator("#scenes li")
    assert scenes.count() == 2
    assert scenes.nth(1).get_attribute("aria-current") == "true" and scenes.nth(0).get_attribute("aria-current") is None
    assert page.input_value("#prompt") == "" and page.evaluate("document.activeElement.id") == "prompt"


def test_pause_stops_the_making(open_page, served):
    page = open_page()
    start(page)
    page.wait_for_timeout(800)
    page.locator("#prompt").blur()
    page.keyboard.press("k")
    assert page.inner_text("#status") == "Paused"
    page.wait_for_timeout(500)  # the chunk in hand
    shown, newest = browser.frame_on_screen(page), max(served.snapshots)
    served.snapshots.clear()
    page.wait_for_timeout(2500)  # longer than what is made ahead
    assert not served.snapshots
    assert browser.frame_on_screen(page) == shown
    page.keyboard.press("k")
    page.wait_for_timeout(1500)
    assert served.snapshots and min(served.snapshots) == newest + 1


def test_reload_goes_on(open_page):
    page = open_page()
    start(page)
    page.wait_for_timeout(1500)
    before, address = browser.frame_on_screen(page), page.url
    page.reload()
    showing = "!video.seeking && video.readyState >= 2 && video.currentTime > 0"
    browser.until(page, f"(() => {{ const video = document.getElementById('video'); return {showing}; }})()")
    page.wait_for_timeout(100)
    assert page.url == address and "#story=" in address
    assert before <= browser.frame_on_screen(page) <= before + 12
    goes_on(page, before + 20)  # over what was made before, and on
    assert page.locator("#scenes li").count() == 1


def test_lost_connection_goes_on(open_page):
    page = open_page(script=SOCKET)
    start(page)
    page.wait_for_timeout(800)
    page.evaluate("window.socket.close()")
    goes_on(page, browser.frame_on_screen(page) + 20)


def test_ended_story_is_a_film_and_goes_on(open_page):
    page = open_page()
    start(page)
    page.wait_for_timeout(1500)
    page.click("#end")
    browser.until(page, "document.getElementById('video').controls")
    assert page.inner_text("#status") == "Ended" and page.is_disabled("#pause")
    assert "Kept until" in page.inner_text("#kept")
    page.evaluate("document.getElementById('video').currentTime = 0.3")
    page.wait_for_timeout(300)
    assert browser.frame_on_screen(page) == 2
    with page.expect_download() as download:
        page.click("#download")
    frames = page.evaluate("document.getElementById('video').duration") * 8
    import av

    with av.open(str(download.value.path())) as film:
        assert sum(1 for _ in film.decode(video=0)) == round(frames)
    tell(page, FOREST)
    page.wait_for_selector("#status[data-state=telling]")
    page.wait_for_selector(f"#caption:text-is('{FOREST}')")
    goes_on(page, round(frames) + 4)
