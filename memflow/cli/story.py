"""Stories: lists of prompts, read from a JSONL file or from plain text."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from memflow.errors import MemFlowError


class Story(NamedTuple):
    """One story. `name` is safe as a file name and differs from the other names of its file."""

    name: str
    prompts: list[str]


def read_stories(path: str | Path) -> list[Story]:
    """Read the stories of a file, at least one.

    A `.jsonl` file has one story per line, `{"prompts": ["...", ...]}`, with an optional `"name"`; other keys are
    left alone. Any other file is plain text with one prompt per line and makes one story. Blank lines do not count.

    Raises:
        MemFlowError: the file cannot be read or holds no story, or a line is broken (the message names file and line).
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except IsADirectoryError:
        raise MemFlowError(f"{path}: is a folder, a story file is needed") from None
    except OSError as error:
        raise MemFlowError(f"{path}: cannot read the story: {error.strerror}") from None
    except UnicodeDecodeError:
        raise MemFlowError(f"{path}: not a text file in UTF-8") from None
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise MemFlowError(f"{path}: the file is empty, at least one prompt is needed")
    if path.suffix.lower() != ".jsonl":
        return [Story(_file_name(path.stem), [line.strip() for _, line in lines])]
    stories: dict[str, Story] = {}
    for count, (number, line) in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        record = _record(line, where)
        default = path.stem if len(lines) == 1 else f"{path.stem}-{count:0{len(str(len(lines)))}d}"
        story = Story(_file_name(_name(record, where) or default), check_prompts(record["prompts"], where))
        if story.name in stories:
            raise MemFlowError(f"{where}: a second story with the name {story.name!r}")
        stories[story.name] = story
    return list(stories.values())


def check_prompts(prompts: Any, where: str) -> list[str]:
    """The prompts without surrounding white space; MemFlowError, beginning with `where`, if they make no story."""
    if not isinstance(prompts, list):
        raise MemFlowError(f'{where}: "prompts" must be a list of strings, not {type(prompts).__name__}')
    if not prompts:
        raise MemFlowError(f"{where}: the story has no prompts, at least one is needed")
    for number, prompt in enumerate(prompts, start=1):
        if not isinstance(prompt, str):
            raise MemFlowError(f"{where}: prompt {number} must be a string, not {type(prompt).__name__}")
        if not prompt.strip():
            raise MemFlowError(f"{where}: prompt {number} is blank")
    return [prompt.strip() for prompt in prompts]


def _record(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise MemFlowError(f"{where}: broken JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise MemFlowError(f"{where}: broken JSON: nested too deeply") from None
    if not isinstance(record, dict) or "prompts" not in record:
        raise MemFlowError(f'{where}: an object with a list of "prompts" is needed')
    return record


def _name(record: dict[str, Any], where: str) -> str | None:
    name = record.get("name")
    if name is not None and not isinstance(name, str):
        raise MemFlowError(f'{where}: "name" must be a string, not {type(name).__name__}')
    return name


def _file_name(name: str) -> str:
    """`name` with all that could leave the output folder, hide the file or upset a shell replaced by a hyphen."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "story"
