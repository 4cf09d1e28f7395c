"""The messages of `WS /v1/realtime/video`: read, checked, and refused in plain words. Nothing here waits or computes.

Fields and order are those of vLLM-Omni's endpoint of this name; what is ours is added under "memflow".
"""

from __future__ import annotations

import json
import math
import re
import sys
import uuid
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from memflow.errors import MemFlowError
from memflow.memory.policies import OFFERED
from memflow.serve.settings import Settings
from memflow.stream.plan import check_text
from memflow.tellers.teller import check_id

FORMATS = ("m4s", "jpeg")
_EVENT_ID = 200  # characters
_REFUSED = ("image_reference", "video_reference", "audio_reference", "lora")  # would change what is told
_WHOLE, _NUMBER, _TEXT = "a whole number", "a number", "a text"
_FIELDS: dict[str, tuple[str, float, float]] = {
    "width": (_WHOLE, 1, 2**31),
    "height": (_WHOLE, 1, 2**31),
    "fps": (_NUMBER, 1, 240),
    "num_frames": (_WHOLE, 1, 2**31),
    "seed": (_WHOLE, 0, 2**63 - 1),
    "streaming_buffer_seconds": (_NUMBER, 0, 3600),
    "num_inference_steps": (_WHOLE, 1, 200),
    "guidance_scale": (_NUMBER, 0, 20),
    "guidance_scale_2": (_NUMBER, 0, 20),
    "true_cfg_scale": (_NUMBER, 0, 20),
    "boundary_ratio": (_NUMBER, 0, 1),
    "flow_shift": (_NUMBER, -math.inf, math.inf),
    "num_outputs_per_prompt": (_WHOLE, 1, 10),
}
# Of a memory; null: not that, whatever the model has.
_OPTIONAL = ("held_frames", "top_k", "activated", "activation_block", "query_block")
_MEMORY = ("policy", "bank_frames", "recall", "scene_frame", *_OPTIONAL)
_USED = {"type", "prompt", "format", "model", "width", "height", "size", "fps", "num_frames", "seconds", "seed"}
_USED |= {"video_params", "sampling_params", "streaming_buffer_seconds", "memflow"}
_BEGINNING = {"width", "height", "size", "fps", "num_frames", "seconds", "seed"}  # what a story keeps when it goes on
_SIZE = re.compile(r"([1-9][0-9]{0,8})x([1-9][0-9]{0,8})")


class Refused(Exception):
    """A message that cannot be followed.

    Attributes:
        message: why, a sentence.
        code: for programs.
        event_id: of the interaction.
    """

    def __init__(self, message: str, code: str = "bad_message", event_id: str | None = None):
        super().__init__(message)
        self.message, self.code, self.event_id = message, code, event_id


@dataclass
class Start:
    """A session.start that can be followed.

    Attributes:
        prompt: of the first scene; None: only with `resume`.
        format: "m4s" or "jpeg".
        height, width: of the video in pixels; None: the model's.
        fps: frames per second of the video; None: the model's.
        frames: of the whole video; None: `seconds`.
        seconds: of the whole video; None: as long as the server allows.
        seed: of the noise.
        buffer: seconds that may be made ahead of the playhead; None: any.
        memory: settings of the memory, by name.
        report: whether chunks tell what the memory held.
        resume: id of the story that goes on.
        ignored: fields without effect here.
        config: the request as it is echoed.
    """

    prompt: str | None
    format: str
    height: int | None = None
    width: int | None = None
    fps: float | None = None
    frames: int | None = None
    seconds: int | None = None
    seed: int = 0
    buffer: float | None = None
    memory: dict[str, Any] = field(default_factory=dict)
    report: bool = False
    resume: str | None = None
    ignored: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)


def read(text: str | None, settings: Settings, what: str = "message") -> dict[str, Any]:
    """The text of a frame (None: it was binary) as an object; Refused where it is too long, no JSON, or no object."""
    if text is None:
        raise Refused(f"{what}: a text frame is needed, a binary one came")
    if len(text) > settings.message_characters:
        raise Refused(f"{what}: at most {settings.message_characters:,} characters, {len(text):,} came")
    try:
        found = json.loads(text, parse_constant=_no_number, object_pairs_hook=_no_twins)
    except (ValueError, RecursionError):
        raise Refused(f"{what}: this is not JSON that can be read, or a name stands twice in one object") from None
    if not isinstance(found, dict):
        raise Refused(f"{what}: a JSON object is needed, {type(found).__name__} came")
    return found


def start(message: dict[str, Any], settings: Settings) -> Start:
    """What the first message asks for; Refused where it cannot be followed."""
    if message.get("type") != "session.start":
        raise Refused(f"the first message must be session.start, {_short(message.get('type'))} came")
    given = {name: value for name, value in message.items() if value is not None}
    if given.get("format", "m4s") not in FORMATS:
        raise Refused(f"format must be one of {', '.join(FORMATS)}, {_short(given['format'])} came")
    _spread(given)
    ours = _object(given, "memflow")
    if unknown := sorted(set(ours) - {"memory", "report", "resume"}):
        raise Refused(f"memflow: {_short(unknown[0])} is unknown; there are memory, report, resume")
    if not isinstance(ours.get("report"), bool | None):
        raise Refused(f"memflow: report must be true or false, {_short(ours['report'])} came")
    for name in _REFUSED:
        if name in given:
            raise Refused(f"{name}: this server tells stories from text alone")
    if "preencode_mp4" in _object(given, "extra_params"):
        raise Refused("extra_params: preencode_mp4 cannot be had")
    if given.get("model", settings.model) != settings.model:
        raise Refused(f"model: {_short(given['model'])} is asked for, {settings.model!r} is here")
    for name, (kind, least, most) in _FIELDS.items():
        if name in given:
            _number(name, given[name], kind, least, most)
    resume = ours.get("resume")
    if resume is not None:
        _said(check_id, resume)
    prompt = given.get("prompt")
    if not (resume and prompt in (None, "")):
        check_prompt(prompt, settings)
    height, width = given.get("height"), given.get("width")
    if "size" in given:
        size = isinstance(given["size"], str) and _SIZE.fullmatch(given["size"])
        if not size:
            raise Refused(f"size must be WIDTHxHEIGHT, {_short(given['size'])} came")
        width, height = map(int, size.groups())
    seconds = given.get("seconds")
    if seconds is not None and not (isinstance(seconds, str) and re.fullmatch(r"[1-9][0-9]{0,8}", seconds)):
        raise Refused(f'seconds must be a whole number as a text, "8" for example, {_short(seconds)} came')
    found = Start(prompt or None, given.get("format", "m4s"), height, width, given.get("fps"), given.get("num_frames"))
    found.seconds = None if seconds is None else int(seconds)
    found.seed, found.buffer = given.get("seed", 0), given.get("streaming_buffer_seconds")
    found.memory, found.report, found.resume = _memory(ours, settings), ours.get("report") is True, resume
    unused = set(given) - _USED
    if resume is not None:
        unused |= set(given) & _BEGINNING | ({"memflow.memory"} if found.memory else set())
    else:
        unused |= set(given) & ({"width", "height"} if "size" in given else set())
        unused |= set(given) & ({"seconds"} if "num_frames" in given else set())
    found.ignored = sorted(unused)
    found.config = {"num_outputs_per_prompt": 1} | {name: value for name, value in given.items() if name != "type"}
    return found


def interaction(message: dict[str, Any], settings: Settings) -> tuple[str, str]:
    """The next scene of a session.interaction: its id, which comes back with the chunk that it begins with, and its
    prompt; Refused where it cannot be followed."""
    body = message.get("interaction")
    if not isinstance(body, dict):
        raise Refused("session.interaction: an object `interaction` is needed")
    event_id = body.get("event_id")
    if event_id is None:
        event_id = uuid.uuid4().hex
    elif not isinstance(event_id, str) or not event_id.strip() or len(event_id) > _EVENT_ID:
        raise Refused(f"event_id must be a text of 1 to {_EVENT_ID} characters")
    event = body.get("event")
    if not isinstance(event, dict):
        raise Refused("session.interaction: an object `event` is needed")
    media = event.get("multi_modal_data")
    if media is not None:
        if not isinstance(media, dict) or not media:
            raise Refused("multi_modal_data must be an object that is not empty")
        for name, value in media.items():
            if not isinstance(value, dict):
                raise Refused(f"multi_modal_data: {_short(name)} must be an object")
        raise Refused("multi_modal_data: this server tells stories from text alone", "interaction_failed", event_id)
    if "prompt" not in event:
        raise Refused("session.interaction: event.prompt is needed")
    if not isinstance(event["prompt"], str) or not event["prompt"].strip():
        raise Refused("event.prompt must be a text that is not blank")
    if event.get("negative_prompt") is not None:
        raise Refused("negative_prompt cannot be had")
    chunks = body.get("transition_chunks")
    if chunks is not None:
        if isinstance(chunks, bool) or not isinstance(chunks, (int, float)) or chunks != chunks // 1:
            raise Refused("transition_chunks must be a whole number")
        if chunks < 0:
            raise Refused("transition_chunks must be at least 0")
    check_prompt(event["prompt"], settings)
    return event_id, event["prompt"]


def position(message: dict[str, Any]) -> float:
    """The playhead of a session.playback, in seconds; Refused if there is none."""
    seconds = message.get("position_seconds")
    _number("position_seconds", seconds, _NUMBER, 0, sys.float_info.max)
    return float(seconds)


def paused(message: dict[str, Any]) -> bool:
    """What a session.pause asks for."""
    if not isinstance(message.get("paused", True), bool):
        raise Refused("paused must be true or false")
    return message.get("paused", True)


def check_prompt(prompt: Any, settings: Settings) -> None:
    """Raise Refused unless `prompt` can be a scene."""
    if isinstance(prompt, str) and len(prompt) > settings.prompt_characters:
        raise Refused(f"prompt: at most {settings.prompt_characters:,} characters, {len(prompt):,} came")
    _said(check_text, prompt)


def _spread(given: dict[str, Any]) -> None:
    """Bring what the nested forms hold to the top, where that is free."""
    for name, value in _object(given, "sampling_params").items():
        if value is not None and (name in _USED or name in _FIELDS):
            given.setdefault(name, value)
        elif value is not None:
            given.setdefault("extra_params", {})
            _object(given, "extra_params").setdefault(name, value)
    for name, value in _object(given, "video_params").items():
        if name in ("width", "height", "fps", "num_frames") and value is not None:
            given.setdefault(name, value)


def _memory(ours: dict[str, Any], settings: Settings) -> dict[str, Any]:
    given = _object(ours, "memory").items()
    memory = {name: value for name, value in given if value is not None or name in _OPTIONAL}
    if unknown := sorted(set(memory) - {*_MEMORY}):
        raise Refused(f"memory: {_short(unknown[0])} is no setting; there are {', '.join(_MEMORY)}")
    if "policy" in memory and memory["policy"] not in tuple(OFFERED):  # JSON has what no dict looks up
        raise Refused(f"memory: policy must be one of {', '.join(OFFERED)}, {_short(memory['policy'])} came")
    for name, kind, least, most in (
        ("bank_frames", _WHOLE, 0, settings.bank_frames),
        ("held_frames", _WHOLE, 1, settings.held_frames),
        ("top_k", _WHOLE, 1, 2**31),
        ("activated", _NUMBER, 0, 2**31),
        ("activation_block", _WHOLE, 1, 2**31),
        ("query_block", _WHOLE, 1, 2**31),
    ):
        if memory.get(name) is not None:
            _number(f"memory: {name}", memory[name], kind, least, most)
    return memory


def _object(given: dict[str, Any], name: str) -> dict[str, Any]:
    value = given.get(name, {})
    if not isinstance(value, dict):
        raise Refused(f"{name} must be an object, {_short(value)} came")
    return value


def _number(name: str, value: Any, kind: str, least: float, most: float) -> None:
    right = isinstance(value, int if kind is _WHOLE else Real) and not isinstance(value, bool)
    if not right or value in (math.inf, -math.inf) or not least <= value <= most:
        bounds = f" of at least {least:g}" + (f" and at most {most:g}" if most < 2**31 else "")
        raise Refused(f"{name} must be {kind}{bounds if least > -math.inf else ''}, {_short(value)} came")


def _said(check, value: Any) -> None:
    try:
        check(value)
    except MemFlowError as error:
        raise Refused(str(error)) from None


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice in one object")  # one of the two would be dropped
    return found


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON")  # though Python reads it, and would echo it to clients that do not


def _short(value: Any) -> str:
    text = repr(value) if isinstance(value, (str, int, float, bool)) else type(value).__name__
    return text if len(text) <= 60 else f"{text[:57]}..."
