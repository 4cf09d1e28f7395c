"""What a server allows, and for how long: every limit stands here once, with its default."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """Of one server.

    Attributes:
        folder: where films and states are kept.
        model: name that clients may ask for.
        token: what a client must show; None: nothing.
        origins: other pages that may use the server, "https://example.org" for example.
        hosts: names that it may be called by, besides localhost and any IP address.
        sessions: stories told at the same time.
        prompt_characters: of a prompt.
        message_characters: of a message.
        start_seconds: until session.start has to be there.
        send_seconds: that one send may take.
        stall_seconds: without a message and without a chunk until a connection ends.
        messages_per_second: read from one connection; it waits for the rest.
        scenes_per_second: prompts of one connection; further ones are refused.
        scenes: prompts of one connection in all.
        story_seconds: of video in a story.
        bank_frames: that a story may ask for.
        held_frames: that a story may ask for.
        disk_bytes: of all films and states together.
        keep_seconds: that a story can be resumed for after its last change.
        save_every: chunks after which the state is written too, for a process that is killed; 0: never.
    """

    folder: Path
    model: str = "storybook"
    token: str | None = None
    origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    sessions: int = 8
    prompt_characters: int = 2000
    message_characters: int = 128 * 1024
    start_seconds: float = 10.0
    send_seconds: float = 8.0
    stall_seconds: float = 60.0
    messages_per_second: float = 50.0
    scenes_per_second: float = 2.0
    scenes: int = 4096
    story_seconds: float = 3600.0
    bank_frames: int = 16
    held_frames: int = 1024
    disk_bytes: int = 20 * 10**9
    keep_seconds: float = 86400.0
    save_every: int = 50

    def public(self) -> dict:
        """The limits that a client may know."""
        hidden = ("folder", "model", "token", "origins", "hosts")
        return {name: value for name, value in vars(self).items() if name not in hidden}
