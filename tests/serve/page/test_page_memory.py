"""What the page shows of the memory is what the stream's own snapshot says for the picture on the screen."""

import browser
import numpy as np
import pytest
from browser import BEACH, FOREST, start, tell

ROWS = """
() => [...document.querySelectorAll("#rows tr")].map(
  (row) => [Number(row.dataset.frame), ...[...row.cells].map((cell) => cell.textContent)]
)
"""


def stand_still(page, seconds):
    """Pause after so many seconds of the film; the number of the frame that stays on the screen."""
    browser.until(page, f"document.getElementById('video').currentTime > {seconds}", 30)
    browser.until(page, "parseFloat(document.getElementById('ahead').textContent.slice(3)) > 1", 30)
    page.click("#pause")
    page.wait_for_timeout(300)
    return browser.frame_on_screen(page)


def test_memory_is_that_of_the_picture_on_the_screen(open_page, served):
    page = open_page()
    page.click("#settings summary")
    page.fill("#held_frames", "5")
    page.fill("#bank_frames", "3")
    start(page)
    page.wait_for_timeout(2000)
    tell(page, FOREST)
    page.wait_for_selector(f"#caption:text-is('{FOREST}')")
    page.click("#table summary")
    chunk = stand_still(page, 4.5) // 3
    assert max(served.snapshots) > chunk + 1  # what is made is ahead of what is shown
    snapshot = served.snapshots[chunk]
    held = {int(f): float(r) for f, r in zip(snapshot.held[0, 0], snapshot.relevance[0, 0], strict=True) if f >= 0}
    recalled = sorted({int(frame) for frame in snapshot.recalled[:, 0].flat if frame >= 0})
    assert len(held) == 5 and len(recalled) == 3
    rows = page.evaluate(ROWS)
    assert [row[0] for row in rows] == sorted(held)
    assert [row[0] for row in rows if row[3] == "yes"] == recalled
    assert [float(row[4]) for row in rows] == pytest.approx([held[row[0]] for row in rows], abs=6e-4)
    assert page.locator("#scenes .told").all_inner_texts() == [BEACH, FOREST]
    assert {row[2] for row in rows} <= {BEACH, FOREST} and rows[0][2] == BEACH
    pictures = page.locator("#recalled li")
    assert [int(item.get_attribute("data-frame")) for item in pictures.all()] == recalled
    assert page.inner_text("#memory-when") == f"at 0:0{chunk * 3 // 8}: 3 recalled of 5 kept"
    for item, frame in zip(pictures.all(), recalled, strict=True):
        assert item.locator("img").evaluate("(image) => image.complete && image.naturalWidth") > 0
        assert item.locator(".facts b").inner_text() == f"0:0{frame // 8}"
        assert item.locator(".facts span").inner_text() == f"{held[frame]:.3f}"
    assert f"{chunk + 1} chunks in 2 scenes" in page.get_attribute("#strip", "aria-label")
    words = getattr(snapshot, "words", None)
    if words:
        assert [row[5] for row in rows] == [", ".join(words[0].get(row[0], ())) for row in rows]


def test_strip_is_drawn_where_the_frames_are(open_page, served):
    page = open_page()
    start(page)
    chunk = stand_still(page, 3.5) // 3
    recalled = {int(frame) // 3 for frame in served.snapshots[chunk].recalled[:, 0].flat if frame >= 0}
    assert recalled
    marks = page.evaluate(
        """() => {
          const canvas = document.getElementById("strip"), scale = canvas.width / canvas.clientWidth;
          const step = canvas.clientWidth / 24, g = canvas.getContext("2d");
          const at = (x, y) => [...g.getImageData(Math.round(x * scale), Math.round(y * scale), 1, 1).data];
          return Array.from({ length: 24 }, (_, i) => at((i + 0.5) * step, 70));
        }"""
    )
    heated = {i for i, (red, _, blue, alpha) in enumerate(marks) if alpha and red > blue + 60}
    assert heated == recalled
    assert all(alpha == 0 for *_, alpha in marks[chunk + 1 :])  # nothing of what is made and not yet shown


def test_settings_reach_the_story(open_page, served):
    page = open_page()
    page.click("#settings summary")
    page.select_option("#policy", "none")
    assert page.is_disabled("#bank_frames") and page.is_disabled("#held_frames")
    start(page)
    page.wait_for_timeout(2500)
    assert not page.is_visible("#recalled li") and page.is_visible("#no-memory")
    assert np.all(served.snapshots[max(served.snapshots)].held < 0)
    assert page.evaluate("document.getElementById('settings').inert")
