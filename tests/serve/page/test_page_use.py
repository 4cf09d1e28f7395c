"""The page for everybody: keyboard, screen reader, both themes, a phone, and what goes wrong said in plain words."""

import json

import browser
import pytest
from browser import BEACH, FOREST, start, tell, whole


def faults(page):
    """What axe-core finds that is serious."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    found = axe.Axe().run(page).response["violations"]
    return [(fault["id"], fault["nodes"][0]["html"]) for fault in found if fault["impact"] in ("serious", "critical")]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_accessible_and_no_wider_than_a_phone(open_page, theme):
    page = open_page(width=390, height=844, color_scheme=theme, device_scale_factor=2)
    assert page.evaluate("document.documentElement.classList.contains('dark')") == (theme == "dark")
    assert faults(page) == []
    start(page)
    page.wait_for_timeout(2000)
    page.click("#table summary")
    page.fill("#prompt", "zoe waits in a very long word: " + "x" * 80)
    page.wait_for_selector("#mirror mark")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.set_viewport_size({"width": 1280, "height": 900})
    page.wait_for_timeout(200)
    assert faults(page) == []
    page.click("#theme")
    assert page.evaluate("document.documentElement.classList.contains('dark')") == (theme == "light")


def test_keyboard_alone(open_page):
    page = open_page()
    order = []
    while "go" not in order and len(order) < 12:
        page.keyboard.press("Tab")
        order.append(
            page.evaluate(
                "document.activeElement.id || document.activeElement.className || document.activeElement.tagName"
            )
        )
    assert [name for name in order if name in ("skip", "theme", "prompt", "go")] == ["skip", "theme", "prompt", "go"]
    page.locator("#theme").focus()
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "prompt" and page.input_value("#prompt") == ""
    page.keyboard.type(BEACH)
    page.keyboard.press("Enter")  # a new line, nothing sent
    assert page.inner_text("#status") == "Ready" and page.input_value("#prompt") == BEACH + "\n"
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#status[data-state=telling]")
    browser.until(page, "document.getElementById('live').textContent === 'The story begins.'")
    page.keyboard.type("k")  # a letter like others while one writes
    assert page.inner_text("#status") == "Telling" and page.input_value("#prompt") == "k"
    page.locator("#end").focus()
    page.keyboard.press("k")
    assert page.inner_text("#status") == "Paused" and page.inner_text("#live") == "Paused."


@pytest.mark.filterwarnings("ignore:the model does not know")
def test_unknown_words_are_marked_before_they_are_sent(open_page):
    page = open_page()
    page.fill("#prompt", "zoe, a red ball, jumps on the Beach.")
    page.press("#prompt", "Control+Enter")  # sooner than they can have been looked up
    page.wait_for_selector("#mirror mark")
    assert page.locator("#mirror mark").all_inner_texts() == ["zoe"]
    assert page.inner_text("#unknown") == "The model does not know: zoe."
    assert page.inner_text("#status") == "Ready" and page.inner_text("#go") == "Send anyway"
    page.fill("#prompt", "bo, a red ball, jumps on the beach.")
    page.wait_for_selector("#mirror mark", state="detached")
    assert page.inner_text("#unknown") == "" and page.inner_text("#go") == "Start"
    page.fill("#prompt", "zoe jumps.")
    page.wait_for_selector("#mirror mark")
    page.press("#prompt", "Control+Enter")  # seen, so it goes
    page.wait_for_selector("#status[data-state=telling]")


def test_nothing_written_is_nothing_sent(open_page):
    page = open_page()
    page.click("#go")
    assert page.inner_text("#error") == "Write what happens in the scene first."
    page.click("#examples button >> nth=1")
    assert page.input_value("#prompt") == FOREST and page.evaluate("document.activeElement.id") == "prompt"


@pytest.mark.parametrize(
    "code, said",
    [
        ("busy", "The server tells as many stories as it can. Try again in a moment."),
        ("out_of_memory", "sentence of the server"),
        ("bad_start", "sentence of the server"),
    ],
)
def test_refusals_in_plain_words(open_page, code, said):
    page = open_page()

    def refuse(socket):
        socket.on_message(
            lambda message: (
                socket.send(json.dumps({"type": "error", "code": code, "message": "sentence of the server"})),
                socket.close(code=1013),
            )
        )

    page.route_web_socket("**/v1/realtime/video", refuse)
    tell(page, BEACH)
    page.wait_for_selector("#error:visible")
    assert page.inner_text("#error") == said
    assert page.inner_text("#status") == "Ready" and page.is_enabled("#go")


def test_story_that_is_gone(open_page, served):
    page = open_page("#story=video_stream-" + 32 * "0", expected="404")
    assert page.inner_text("#error") == "This story is not kept any more. Start a new one."
    assert "#story" not in page.url
    start(page)


def test_story_of_a_link_is_shown_and_goes_on(open_page):
    page = open_page()
    start(page)
    page.wait_for_timeout(1200)
    page.click("#save")
    page.wait_for_selector("#kept:has-text('Kept until')")
    page.click("#end")
    page.wait_for_selector("#status[data-state=ended]")
    address = page.url
    other = open_page(address[address.index("#") :])
    browser.until(other, "document.getElementById('video').duration > 1")
    end = other.evaluate("document.getElementById('video').duration")
    assert other.inner_text("#status") == "Ended" and other.locator("#scenes .told").all_inner_texts() == [BEACH]
    other.click("#go")  # nothing written: the scene goes on
    other.wait_for_selector("#status[data-state=telling]")
    browser.until(other, f"document.getElementById('video').currentTime > {end - 0.2}")  # where the film ended
    told = whole(other)[-1]
    other.keyboard.press("k")
    browser.until(other, f"document.getElementById('video').buffered.end(0) * 8 > {told + 9}")
    other.click("#new")
    assert other.inner_text("#status") == "Ready" and "#story" not in other.url
    assert other.locator("#scenes li").count() == 0 and other.is_visible("#blank")


def test_a_story_is_told_in_one_window(open_page):
    page = open_page()
    start(page)
    other = open_page(page.url[page.url.index("#") :])
    other.wait_for_selector("#status[data-state=ended]")
    other.click("#go")
    page.wait_for_selector("#error:visible")
    assert page.inner_text("#error") == "This story is told in another window now."
    assert page.inner_text("#status") == "Ended"
    other.wait_for_selector("#status[data-state=telling]")
    other.wait_for_timeout(500)  # and it is not taken back
    assert other.inner_text("#status") == "Telling" and not other.is_visible("#error")
