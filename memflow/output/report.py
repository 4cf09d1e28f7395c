"""A record of what a stream remembered and its picture: which frames it held when, and how relevant they were."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from memflow.errors import MemFlowError, MemFlowWarning
from memflow.files import write_whole
from memflow.output import jpeg

try:
    from matplotlib import style

    from memflow.output.texts import missing
    from memflow.output.timeline import Entry, Held, Timeline
except (ValueError, OSError) as error:  # MPLBACKEND names no backend, or there is no folder for matplotlib's cache
    raise MemFlowError(f"matplotlib, which draws the report, does not start: {error}") from None

_THUMBNAIL = (192, 108)  # pixels at most
_MARK = {"Software": "memflow"}  # in the picture's file


def is_ours(path: str | Path) -> bool:
    """Whether a file is the picture of a MemoryReport."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its size: nothing is decoded
        try:
            with Image.open(path, formats=["PNG"]) as picture:
                return picture.info.items() >= _MARK.items()
        except (OSError, ValueError, Image.DecompressionBombError):
            return False


class MemoryReport:
    """Records a stream, batch row 0, and draws it. Keeps a few kilobytes per chunk.

        report = MemoryReport("The keeper's cat", fps=pipe.fps)
        for chunk in stream:
            report.add(chunk, stream.snapshot())
        report.save("story.png")

    Args:
        title: the headline.
        fps: frames per second of the video.
        subtitle: a line below the title, e.g. the settings.
    """

    def __init__(self, title: str, fps: float, subtitle: str = ""):
        self.title, self.fps, self.subtitle = title, fps, subtitle
        self._entries: list[Entry] = []
        self._seconds_per_chunk = 0.0

    @classmethod
    def of(cls, stream, name: str) -> MemoryReport:
        """A report for a stream (a `memflow.stream.stream.Stream`), with its settings below the name of the story."""
        config = stream.config
        held = "" if config.held_frames is None else f", {config.held_frames} held"
        recall = "" if config.recall == "relevance" else f", shown by {config.recall}"
        recall += "" if config.scene_frame == "any" else f", {config.scene_frame} of a scene"
        facts = [f"resumed: from chunk {stream.position + 1} on"] if stream.position else []
        facts += [
            f"memory: {'published' if config.published_mode else config.policy}{held}{recall}",
            f"sink {config.sink_frames}, window {config.window_frames}, bank {config.bank_frames} latent frames",
            f"every head attends to {_attended(config)} of sink and bank",
            f"seed {stream.seeds[0]}",
        ]
        title = name.replace("-", " ").replace("_", " ")
        return cls(title, fps=stream.pipeline.fps, subtitle="   ·   ".join(facts))

    def add(self, chunk, snapshot) -> None:
        """Record `chunk` (a `memflow.stream.stream.Chunk`) and what the memory held for it (a `MemorySnapshot`)."""
        frames_per_chunk = chunk.latents.shape[2]
        self._seconds_per_chunk = chunk.frames.shape[1] / self.fps
        self._entries.append(
            Entry(
                index=chunk.index,
                prompt=chunk.prompts[0],
                thumbnail=jpeg(np.asarray(chunk.frames[0, 0]), 85, _THUMBNAIL),
                bank=_bank(snapshot, frames_per_chunk),
                sink=_span(snapshot.sink, frames_per_chunk),
                window=_span(snapshot.window, frames_per_chunk),
                called=_called(snapshot, frames_per_chunk),
            )
        )

    def __len__(self) -> int:
        """Chunks recorded."""
        return len(self._entries)

    def save(self, path: str | Path) -> None:
        """Write the picture as a PNG, whole or not at all; MemFlowError if `path` cannot be written."""
        if not self._entries:
            raise ValueError("nothing was recorded: call add() for at least one chunk")
        lost = "".join(sorted(missing([self.title, *(entry.prompt for entry in self._entries)])))
        if lost:
            letters = " ".join(lost[:12]) + (" …" if len(lost) > 12 else "")
            advice = "install one that has them (for Chinese, Japanese and Korean Noto Sans CJK)"
            said = f"no font here has the letters {letters} of the report, which are boxes in it: {advice}"
            warnings.warn(said, MemFlowWarning, stacklevel=2)
        picture = io.BytesIO()
        with warnings.catch_warnings(), style.context("default"):  # not the caller's settings of plots
            warnings.filterwarnings("ignore", "Glyph .* missing")  # said above
            figure = Timeline(self._entries, self.title, self.subtitle, self._seconds_per_chunk).draw()
            figure.savefig(picture, format="png", dpi=130, metadata=_MARK)
        try:
            write_whole(path, lambda file: file.write(picture.getvalue()))
        except OSError as error:
            raise MemFlowError(f"{path}: cannot be written: {error.strerror}") from None


def _bank(snapshot, frames_per_chunk: int) -> list[Held]:
    """What batch row 0 holds, over all layers; every layer's relevance is stretched to 0 to 1."""
    held, relevance, recalled = (np.asarray(x)[:, 0] for x in (snapshot.held, snapshot.relevance, snapshot.recalled))
    if not (held >= 0).any():
        return []
    known = {"where": (held >= 0) & np.isfinite(relevance), "axis": 1, "keepdims": True}
    low = np.min(relevance, initial=np.inf, **known)
    spread = np.max(relevance, initial=-np.inf, **known) - low
    # Frames of equal relevance, a single one too, and those without one are neither the least nor the most relevant.
    ranked = known["where"] & (spread > 0)
    part, low, spread = (np.where(ranked, x, other) for x, other in ((relevance, 0), (low, 0), (spread, 1)))
    relevance = np.where(ranked, (part - low) / spread, 0.5)
    found = []
    for chunk in np.unique(held[held >= 0] // frames_per_chunk):
        here = held // frames_per_chunk == chunk
        shown = recalled // frames_per_chunk == chunk
        shares = here.any(axis=1).mean(), shown.any(axis=1).mean(), relevance[here].mean(), shown.mean()
        found.append(Held(int(chunk), *map(float, shares)))
    return found


def _called(snapshot, frames_per_chunk: int) -> list[tuple[int, str]]:
    """Chunks that the bank of batch row 0 shows and the words that called for them, those without any last, oldest
    first."""
    words = getattr(snapshot, "words", None) or [{}]
    frames = sorted(words[0].items(), key=lambda entry: (not entry[1], entry[0]))
    return [(frame // frames_per_chunk, ", ".join(said)) for frame, said in frames]


def _span(frames: list[int], frames_per_chunk: int) -> tuple[int, int]:
    return (min(frames) // frames_per_chunk, max(frames) // frames_per_chunk + 1) if frames else (0, 0)


def _attended(config) -> str:
    blocks = "" if config.activation_block is None else f" in blocks of {config.activation_block} tokens"
    if config.activated is None:
        return "all" if config.top_k is None else f"{config.top_k}{blocks and ' frames'}{blocks}"
    amount = f"{config.activated:.0%}" if isinstance(config.activated, float) else f"{config.activated} tokens"
    return amount + blocks
