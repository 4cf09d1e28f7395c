"""Which prompt rules which chunk: the prompts of a story, and those that are sent while it runs."""

from __future__ import annotations

import reprlib
from collections import deque
from collections.abc import Sequence

from memflow.errors import MemFlowError

_CHARACTERS = 20_000  # of a prompt, at most: what any text encoder takes is a fraction


def check_text(text: object, name: str = "prompt") -> None:
    """Raise MemFlowError, beginning with `name`, unless `text` can be a prompt."""
    if not isinstance(text, str) or not text.strip():
        raise MemFlowError(f"{name} must be a text that is not blank, got {reprlib.repr(text)}")
    if len(text) > _CHARACTERS:
        raise MemFlowError(f"{name} must have at most {_CHARACTERS:,} characters, got {len(text):,}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise MemFlowError(f"{name} must be valid Unicode, got {reprlib.repr(text)}: {error.reason}") from None


def prompt_texts(prompt: str | Sequence[str], batch: int) -> tuple[str, ...]:
    """A prompt as one text for each of `batch` stories."""
    texts = tuple(prompt) if isinstance(prompt, (list, tuple)) else (prompt,) * batch
    if not texts or len(texts) != batch:
        raise MemFlowError(f"prompt must have one text per story ({batch}), got {len(texts)}")
    for text in texts:
        check_text(text)
    return texts


class Plan:
    """Prompts in order, each for a number of chunks. A prompt is a tuple of texts, one per batch row.

    `send` may be called from another thread while the stream runs.
    """

    def __init__(self, prompts: list[tuple[str, ...]], chunks_each: int):
        self.chunks_each = chunks_each
        self.current: tuple[str, ...] | None = None
        self.remaining = 0
        self.queue = [(tuple(texts), chunks_each) for texts in prompts]
        self.inbox: deque[tuple[str, ...]] = deque()

    def send(self, texts: tuple[str, ...]) -> None:
        """Let `texts` rule from the next chunk on, for `chunks_each` chunks; what is still planned comes after it."""
        self.inbox.append(tuple(texts))

    def next(self) -> tuple[tuple[str, ...], bool] | None:
        """(texts of the next chunk, whether they start there), or None when the story is over."""
        self._read_inbox()
        switched = self.remaining == 0
        if switched:
            if not self.queue:
                return None
            self.current, self.remaining = self.queue.pop(0)
        self.remaining -= 1
        return self.current, switched

    def give_back(self, switched: bool) -> None:
        """The chunk of the last `next` was not begun: it is to be made still, and starts its prompt if that one did."""
        self.remaining += 1
        if switched:
            self.queue.insert(0, (self.current, self.remaining))
            self.remaining = 0

    def __len__(self) -> int:
        """Chunks still to be made."""
        sent = len(self.inbox)
        return (
            (0 if sent else self.remaining) + sum(chunks for _, chunks in self.queue) + min(sent, 1) * self.chunks_each
        )

    def _read_inbox(self) -> None:
        latest = None
        while self.inbox:
            latest = self.inbox.popleft()
        if latest is not None:
            self.queue.insert(0, (latest, self.chunks_each))
            self.remaining = 0

    def to_dict(self) -> dict:
        return {
            "chunks_each": self.chunks_each,
            "sent": list(self.inbox),
            "current": self.current,
            "remaining": self.remaining,
            "queue": self.queue,
        }

    @classmethod
    def from_dict(cls, data: dict) -> Plan:
        plan = cls([], _count(data["chunks_each"], 1))
        plan.current = None if data["current"] is None else _texts(data["current"])
        plan.remaining = _count(data["remaining"], 0)
        plan.queue = [(_texts(texts), _count(chunks, 1)) for texts, chunks in data["queue"]]
        plan.inbox.extend(_texts(texts) for texts in data["sent"])
        return plan


def _count(value: object, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**48:
        raise ValueError(f"plan: a number of chunks must be at least {least}, got {value!r}")
    return value


def _texts(value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not value or not all(isinstance(text, str) for text in value):
        raise ValueError(f"plan: a prompt must be a list of texts, got {value!r}")
    return tuple(value)
