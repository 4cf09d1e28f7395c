"""The named workloads of cases.json."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).with_name("cases.json")


@dataclass(frozen=True)
class Case:
    """Sizes of one self-attention layer with memory, in latent frames, tokens and channels.

    grid: token rows and columns of a frame. chunk: frames denoised together. sink, bank, window: frames attended to,
    the chunk part of the window. top_k: candidates (bank + sink) that each head attends to. layers, ffn: of the whole
    model. sweep: what grows along the cases that share it, and otherwise is like its base.
    """

    name: str
    batch: int
    heads: int
    head_dim: int
    grid: tuple[int, int]
    chunk: int
    sink: int
    bank: int
    window: int
    top_k: int
    text_tokens: int
    layers: int
    ffn: int
    about: str = ""
    sweep: str = ""
    like: str = ""

    @property
    def tokens(self) -> int:
        """Tokens of a frame, N."""
        return self.grid[0] * self.grid[1]

    @property
    def queries(self) -> int:
        """Tokens of a chunk, Lq."""
        return self.chunk * self.tokens

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim

    @property
    def candidates(self) -> int:
        return self.bank + self.sink

    @property
    def frames(self) -> int:
        """Frames that dense attention sees."""
        return self.candidates + self.window

    def attended(self, activated: bool) -> int:
        """Frames that each head sees."""
        return self.window + min(self.top_k, self.candidates) if activated else self.frames


@functools.cache
def load_cases(file: Path = FILE) -> dict[str, Case]:
    """Every case by name. A case names the one that it is like and what differs."""
    entries = json.loads(file.read_text())

    def fields(name: str) -> dict:
        entry = dict(entries[name])
        base = fields(entry["like"]) if "like" in entry else {}
        inherited = {key: value for key, value in base.items() if key not in ("about", "sweep", "like")}
        return {**inherited, **entry}

    return {name: Case(name=name, **{**fields(name), "grid": tuple(fields(name)["grid"])}) for name in entries}


def case(name: str) -> Case:
    """Raises ValueError, with the names that there are."""
    cases = load_cases()
    if name not in cases:
        raise ValueError(f"there is no case {name!r}; cases: {', '.join(cases)}")
    return cases[name]
