"""One colour per provider, the same in every plot; parts of a time have colours that no provider has."""

from __future__ import annotations

from collections.abc import Iterable
from zlib import crc32

KNOWN = {
    "ours (triton)": "#1f5fae",
    "ours (cuda)": "#0b2f66",
    "ours (torch)": "#6aa5e8",
    "published path": "#d1495b",
    "SDPA flash": "#2a9d5c",
    "SDPA cudnn": "#0f6b3a",
    "SDPA efficient": "#7fcf9b",
    "SDPA math": "#b4b42e",
    "FlexAttention": "#e08e2b",
    "FlexAttention FLASH": "#a65f0f",
    "flash-attn 2": "#9c6ad1",
    "flash-attn 3": "#7440ad",
    "flash-attn 4": "#4c2080",
    "FlashInfer": "#8a8a8a",
}
OWN = ("#111111", "#12b5b0", "#7a4b2a", "#c9a100", "#5a6b7a")  # of providers that users bring
PARTS = {"linear": "#d9d9d9", "attention": "#8fb3a7", "memory": "#f2c14e", "rest": "#f4f1ea"}


def colours_of(providers: Iterable[str]) -> dict[str, str]:
    """By name. A user's provider has its colour by its name, the next free one where two would share it."""
    found: dict[str, str] = {}
    for name in sorted(set(providers)):
        base = name.split(", no bank")[0]
        if base in KNOWN:
            found[name] = KNOWN[base]
            continue
        first = crc32(name.encode()) % len(OWN)
        order = OWN[first:] + OWN[:first]
        found[name] = next((colour for colour in order if colour not in found.values()), order[0])
    return found
