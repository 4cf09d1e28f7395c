"""A real Chromium for the page, and what is read back from the pictures that it shows."""

from __future__ import annotations

import os
import shutil
import time
from functools import cache
from itertools import pairwise

import pytest

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
BEACH, FOREST = "bo, a red ball, jumps on the beach.", "mia, a white star, waits in the forest."
BITS, BLOCK = 16, 16  # the stamp: a frame's number in binary, a square of so many pixels for each digit

# Gives a function that reads the number stamped into what a <video> or <canvas> shows; null: it cannot be read.
_READER = f"""
(() => {{
  const g = new OffscreenCanvas(512, 512).getContext("2d", {{ willReadFrequently: true }});
  return (source) => {{
    g.drawImage(source, 0, 0, 512, 512);
    let number = 0;
    for (let bit = 0; bit < {BITS}; bit++) {{
      const level = g.getImageData(bit * {BLOCK} + 6, 6, 1, 1).data[0];
      if (level > 90 && level < 165) return null;
      if (level > 128) number |= 1 << bit;
    }}
    return number;
  }};
}})()
"""

# The numbers of the frames that are shown, with the time that the player gives them, for some seconds.
_WATCH = f"""
async (seconds) => {{
  const video = document.getElementById("video"), canvas = document.getElementById("canvas"), read = {_READER};
  const seen = [], until = performance.now() + 1000 * seconds;
  const shown = (now, {{ mediaTime }}) => {{
    seen.push([read(video), mediaTime]);
    if (performance.now() < until) video.requestVideoFrameCallback(shown);
  }};
  const look = () => {{
    const number = canvas.width === 512 ? read(canvas) : null;
    if (number !== null && number !== seen.at(-1)?.[0]) seen.push([number, null]);
    if (performance.now() < until) requestAnimationFrame(look);
  }};
  if (canvas.hidden) video.requestVideoFrameCallback(shown);
  else look();
  await new Promise((done) => setTimeout(done, 1000 * seconds + 50));
  return seen;
}}
"""

# Every other frame in the buffer (a chunk, which comes whole, has three), without the last, which the decoder may hold
# back until more comes: the number that each should have, and the one stamped into it.
_SEEK = f"""
async (fps) => {{
  const video = document.getElementById("video"), {{ buffered }} = video, read = {_READER}, seen = [];
  const first = Math.round(buffered.start(0) * fps), end = Math.round(buffered.end(0) * fps) - 1;
  for (let number = first; number < end; number += 2) {{
    video.currentTime = (number + 0.5) / fps;
    const until = performance.now() + 3000; // a busy machine shows late
    while ((video.seeking || read(video) !== number) && performance.now() < until) {{
      await new Promise((done) => setTimeout(done, 5));
    }}
    seen.push([number, read(video)]);
  }}
  return seen;
}}
"""

# Mean colour of the picture on the screen, the stamp left out.
_COLOUR = """
() => {
  const canvas = document.getElementById("canvas"), source = canvas.hidden ? document.getElementById("video") : canvas;
  const copy = new OffscreenCanvas(8, 8), g = copy.getContext("2d");
  g.drawImage(source, 0, 32, 512, 480, 0, 0, 8, 8);
  const { data } = g.getImageData(0, 0, 8, 8), mean = [0, 0, 0];
  for (let i = 0; i < data.length; i++) if (i % 4 < 3) mean[i % 4] += data[i] / 64;
  return mean;
}
"""


@cache
def find_chromium() -> str | None:
    """Path of a Chromium or Chrome; MEMFLOW_CHROMIUM names another."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return os.environ.get("MEMFLOW_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)


def launch(playwright):
    """The browser; the test is skipped, with the reason, where there is none."""
    path = find_chromium()
    if path is None:
        pytest.skip("no Chromium here (apt-get install chromium)")
    return playwright.chromium.launch(executable_path=path, args=FLAGS)


def stamp(frames, first: int) -> None:
    """Write into each of `frames` [T, H, W, 3] its number, counted from `first`."""
    for number, frame in enumerate(frames, start=first):
        for bit in range(BITS):
            frame[:BLOCK, bit * BLOCK : (bit + 1) * BLOCK] = 255 if number >> bit & 1 else 0


def watch(page, seconds: float) -> list[tuple[int | None, float | None]]:
    """Number and time of the frames that the page shows from now on; None: a stamp that cannot be read."""
    return [tuple(entry) for entry in page.evaluate(_WATCH, seconds)]


def frame_on_screen(page) -> int:
    """The number stamped into the picture that stands on the screen."""
    return page.evaluate(f"{_READER}(document.getElementById('video'))")


def colour(page) -> list[float]:
    """Mean red, green and blue of the picture on the screen."""
    return page.evaluate(_COLOUR)


def until(page, expression: str, seconds: float = 10) -> None:
    """Wait until JavaScript is true on the page. Playwright's own way of waiting needs eval, which the page forbids."""
    end = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < end, f"not true within {seconds} s: {expression}"
        page.wait_for_timeout(20)


def tell(page, prompt: str) -> None:
    """Write a scene and send it."""
    page.fill("#prompt", prompt)
    page.press("#prompt", "Control+Enter")


def start(page, prompt: str = BEACH) -> float:
    """Begin a story, and wait for its first picture; the seconds that it took."""
    begin = time.perf_counter()
    tell(page, prompt)
    until(page, "document.getElementById('video').currentTime > 0 || document.getElementById('canvas').width === 512")
    return time.perf_counter() - begin


def in_order(seen, fps: float = 8) -> None:
    """What `watch` saw is the film: on the canvas every picture, one after the other; of a video, of which a busy
    machine presents fewer and tells late, no picture before its time and none again."""
    numbers = [number for number, _ in seen]
    assert len(numbers) >= 5 and None not in numbers, str(numbers)  # two seconds have 16
    if seen[0][1] is None:
        assert all(after - before == 1 for before, after in pairwise(numbers)), str(numbers)
    assert numbers == sorted(numbers)
    assert all(at is None or 0 <= number - round(at * fps) <= 2 for number, at in seen), str(seen)


def whole(page, fps: float = 8) -> list[int]:
    """Pause, and look at every other frame that the browser has: each is the one of its time. Their numbers."""
    if page.get_attribute("#pause", "data-shows") == "pause":
        page.click("#pause")
    until(page, "document.getElementById('video').buffered.length === 1")
    seen = page.evaluate(_SEEK, fps)
    assert all(number == shown for number, shown in seen), str(seen)
    return [number for number, _ in seen]
