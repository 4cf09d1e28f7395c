"""Named sizes: those of cases.json, and a user's own."""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

FILE = Path(__file__).with_name("cases.json")


@dataclass(frozen=True)
class Case:
    """Sizes of one self-attention layer with memory, in latent frames, tokens and channels.

    grid: token rows and columns of a frame. chunk: frames denoised together. sink, bank, window: frames attended to,
    the chunk part of the window. top_k: candidates (bank + sink) that each head attends to. layers, ffn: of the whole
    model. sweep: what grows along the cases that share it, and otherwise is like its base. activation_block: tokens of
    the blocks that heads choose, of which top_k counts then; 0: whole frames. A case with one is for the workload
    "layer" and our providers.
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
    activation_block: int = 0
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

    @property
    def block(self) -> int:
        """Tokens that a head chooses together."""
        return self.activation_block or self.tokens

    def attended_keys(self, activated: bool) -> int:
        """Keys that each head sees."""
        if not activated:
            return self.frames * self.tokens
        return self.window * self.tokens + min(self.top_k * self.block, self.candidates * self.tokens)


SWEEPS = {
    "memory": "bank",
    "window": "window",
    "top_k": "top_k",
    "resolution": "grid",
    "streams": "batch",
}  # what grows
TEXTS = ("name", "about", "sweep", "like")
OPTIONAL = ("activation_block",)
SIZES = tuple(field.name for field in fields(Case) if field.name not in (*TEXTS, *OPTIONAL))


@functools.cache
def load_cases() -> dict[str, Case]:
    """Every case of the package by name."""
    return read_cases(FILE, {})


def read_cases(file: Path, known: dict[str, Case]) -> dict[str, Case]:
    """The cases of a JSON file by name. A case has all sizes, or names the one that it is like, in the file or of
    `known`, and what differs.

    Raises:
        ValueError: With the file, the case and the field.
    """
    try:
        entries = json.loads(file.read_text(), object_pairs_hook=_each_once)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read as cases: {error}") from error
    if not isinstance(entries, dict) or not entries or not all(isinstance(entry, dict) for entry in entries.values()):
        raise ValueError(f'{file} needs the form {{"name of a case": {{"like": "quarter", "bank": 6}}, ...}}')

    def full(name: str, asking: tuple[str, ...] = ()) -> dict:
        if name in asking:
            raise ValueError(f"{file}: {' is like '.join((*asking, name))}, without an end")
        if not isinstance(name, str) or name not in entries:
            if isinstance(name, str) and name in known:
                return asdict(known[name])
            there = ", ".join((*entries, *known))
            raise ValueError(f"{file}: {asking[-1]} is like {name!r}, which is no case; cases: {there}")
        entry = entries[name]
        base = full(entry["like"], (*asking, name)) if "like" in entry else {}
        inherited = {key: value for key, value in base.items() if key not in TEXTS}
        return {**inherited, **entry}

    return {name: _checked(file, name, full(name)) for name in entries}


def is_line(value: object) -> bool:
    """Whether this is text that stands in one cell of a table."""
    return isinstance(value, str) and value.isprintable() and "|" not in value


def _each_once(pairs: list[tuple[str, object]]) -> dict:
    names = [name for name, _ in pairs]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"{', '.join(sorted(twice))} stands there twice")
    return dict(pairs)


def _checked(file: Path, name: str, entry: dict) -> Case:
    where = f"{file}, case {name!r}"
    unknown = sorted(set(entry) - set(SIZES) - set(OPTIONAL) - set(TEXTS[1:]))
    missing = [size for size in SIZES if size not in entry]
    if unknown or missing:
        wrong = f"no field {', '.join(unknown)}" if unknown else f'needs {", ".join(missing)}, or "like": another case'
        raise ValueError(f"{where}: {wrong}; fields: {', '.join((*SIZES, *OPTIONAL, *TEXTS[1:]))}")
    for text in ("name", *TEXTS[1:]):
        value = name if text == "name" else entry.get(text, "")
        if not is_line(value) or (text == "name" and not value.strip()):
            raise ValueError(f"{where}: {text} is {value!r}; needed: text without a line break or |, for tables")
    for size in SIZES:
        value = list(entry[size]) if isinstance(entry[size], tuple) else entry[size]
        numbers = value if size == "grid" else [value]
        least = 0 if size in ("sink", "bank") else 1
        shaped = isinstance(numbers, list) and len(numbers) == (2 if size == "grid" else 1)
        if not shaped or not all(type(number) is int and number >= least for number in numbers):
            needed = "[rows, columns], whole numbers" if size == "grid" else "a whole number"
            raise ValueError(f"{where}: {size} is {value!r}; needed: {needed} from {least} on")
    if entry["head_dim"] % 2:
        raise ValueError(f"{where}: head_dim is {entry['head_dim']}; needed: an even number, as channels turn in pairs")
    if entry.get("sweep") and (entry["sweep"] not in SWEEPS or "like" not in entry):
        raise ValueError(
            f"{where}: sweep is {entry['sweep']!r}; needed: one of {', '.join(SWEEPS)}, and what it is like"
        )
    block = entry.get("activation_block", 0)
    tokens = entry["grid"][0] * entry["grid"][1]
    if type(block) is not int or block < 0 or (block and tokens % block):
        raise ValueError(f"{where}: activation_block is {block!r}; needed: a divisor of the {tokens} tokens of a frame")
    if entry["window"] < entry["chunk"]:
        raise ValueError(f"{where}: window is {entry['window']}; needed: at least the chunk, {entry['chunk']}")
    return Case(name=name, **{**entry, "grid": tuple(entry["grid"])})


def case(name: str) -> Case:
    """Raises ValueError, with the names that there are."""
    cases = load_cases()
    if name not in cases:
        raise ValueError(f"there is no case {name!r}; cases: {', '.join(cases)}")
    return cases[name]
