"""Stories: lists of prompts, read from files and checked; and the videos that a request makes of them."""

from __future__ import annotations

import json
import math
import re
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from memflow.cli.checks import check_files, check_settings
from memflow.cli.options import Request
from memflow.errors import MemFlowError, MemFlowWarning
from memflow.output import check_regular

_FILE, _LINE = 4 * 2**20, 2**20  # bytes of a story file and of a line in it
_TEXT, _LINES, _JSON, _YAML = (".txt", ".text", ""), (".jsonl", ".ndjson"), (".json",), (".yaml", ".yml")
# First lines of a text that is no list of prompts: of YAML, and the header of a table.
_SYNTAX = re.compile(
    r"---|%YAML.*|-?\s*[\"']?prompts?[\"']?\s*:.*|(\"?\w*\"?[,;\t])*\"?prompts?\"?([,;\t]\"?\w*\"?)*", re.I
)
_KEYS = ("prompts", "name", "seed", "seconds_per_prompt")
_OBJECT = re.compile(r"""\{\s*["'}]|\[\s*[{"']""")  # how JSON begins, whole or broken


class Story(NamedTuple):
    """One story. `name` is safe as a file name and differs from the other names of its file. seed, seconds_per_prompt:
    of this story alone; None = those of the request."""

    name: str
    prompts: list[str]
    seed: int | None = None
    seconds_per_prompt: float | None = None


@dataclass(frozen=True)
class Job:
    """One video. story: None = the one in the state that is resumed. state: what that state's file says of it."""

    story: Story | None
    output: Path
    report: Path | None
    state: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.story.name if self.story else self.state["name"]


def settings(story: Story, request: Request) -> dict[str, Any]:
    """Length and seed of a story, as `MemFlowPipeline.stream` takes them."""
    seconds = request.seconds_per_prompt if story.seconds_per_prompt is None else story.seconds_per_prompt
    seed = request.seed if story.seed is None else story.seed
    return {"seconds_per_prompt": 10.0 if seconds is None else seconds, "seed": seed or 0}


def read_stories(path: str | Path, bad: list[str] | None = None) -> list[Story]:
    """Read the stories of a file.

    Args:
        path: a `.jsonl` file has one story per line, `{"prompts": ["...", ...]}`, with an optional `"name"`, `"seed"`
            and `"seconds_per_prompt"`; a warning names other keys. A `.json` or `.yaml` file is a list of prompts, such
            an object or a list of them. A `.txt` file, or one without a suffix, has one prompt per line and makes one
            story. Blank lines do not count. `-` is stdin: lines or JSON.
        bad: where given, what is wrong with a story is added here, and the others are read.

    Returns:
        At least one story, unless all are in `bad`.

    Raises:
        MemFlowError: the file is of another kind, cannot be read or holds no story; the message names file and line.
    """
    path, text = Path(path), None
    kind = path.suffix.lower()
    if str(path) == "-":
        path = Path("stdin")
        text = _read(path, sys.stdin.buffer)
        first = text.lstrip().partition("\n")[0]
        # What begins as JSON and is broken is said to be so, in place of being told as a prompt.
        kind = ".json" if _is_json(text) else ".jsonl" if _is_json(first) or _OBJECT.match(first) else ".txt"
    if text is None:
        check_regular(path)
    if kind not in (*_TEXT, *_LINES, *_JSON, *_YAML):
        raise MemFlowError(f"{path}: no story file: .txt has one prompt per line, .json and .yaml are lists of prompts")
    text = _read(path) if text is None else text
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise MemFlowError(f"{path}: the file is empty, at least one prompt is needed")
    if kind in _TEXT:
        first = lines[0][1].strip()
        if _SYNTAX.fullmatch(first) or _OBJECT.match(first) or _is_json(text) or _is_json(first):
            raise MemFlowError(
                f"{path}: holds JSON, YAML or CSV, not one prompt per line; its name must say so (.jsonl)"
            )
        return [Story(_file_name(path.stem), _prompts([line.strip() for _, line in lines], str(path)))]
    if kind in _LINES:
        records = [(f"{path}, line {number}", line) for number, line in lines]
    else:
        content = _json(text, str(path)) if kind in _JSON else _yaml(text, str(path))
        several = isinstance(content, list) and any(isinstance(entry, dict) for entry in content)
        content = {"prompts": content} if isinstance(content, list) and not several else content
        records = (
            [(f"{path}, story {n}", entry) for n, entry in enumerate(content, 1)] if several else [(str(path), content)]
        )
    stories: dict[str, Story] = {}
    others: set[str] = set()
    for count, (where, record) in enumerate(records, start=1):
        default = path.stem if len(records) == 1 else f"{path.stem}-{count:0{len(str(len(records)))}d}"
        try:
            record = _json(record, where) if kind in _LINES else record
            story = _story(record, default, where)
            others.update(map(str, record.keys() - _KEYS))
            if story.name in stories:
                raise MemFlowError(f"{where}: a second story with the name {story.name!r}")
        except MemFlowError as error:
            if bad is None:
                raise
            bad.append(str(error))
        else:
            stories[story.name] = story
    if others:
        named = ", ".join(f"{key:.40}" for key in sorted(others)[:6]) + ", ..." * (len(others) > 6)
        warnings.warn(f"{path}: not used: {named}; a story has {', '.join(_KEYS)}", MemFlowWarning, stacklevel=2)
    return list(stories.values())


def jobs(request: Request) -> list[Job]:
    """The videos to make. MemFlowError for what cannot work and can be seen without loading a model."""
    if request.output is None:
        raise MemFlowError("where to? -o OUT.mp4 is needed (a folder if the story file holds several stories)")
    check_settings(request)
    if request.live and str(request.story) == "-":
        raise MemFlowError("--live reads further scenes from stdin: the story must be a file, or come with -p")
    if request.save_every is not None and request.save_state is None:
        raise MemFlowError("--save-every says how often the state is written, --save-state FILE where: it is missing")
    found = _resumed(request) if request.resume else _told(request)
    check_files(request, found)
    return found


def _resumed(request: Request) -> list[Job]:
    if given := request.given_again():
        raise MemFlowError(f"--resume takes story, seed and settings from the state: leave out {', '.join(given)}")
    if request.overwrite and not request.report:
        raise MemFlowError("--overwrite does nothing with --resume: an OUT that is there is continued")
    from memflow.stream.saved import read_header

    check_regular(request.resume)
    header = read_header(request.resume)
    missing = {"name", "model", "dtype", "video_frames", "video_checksum"} - set(header["extra"])
    if missing:
        raise MemFlowError(
            f"{request.resume}: not saved by `memflow generate` (it does not tell {', '.join(sorted(missing))})"
        )
    if header["plan"]["remaining"] == 0 and not header["plan"]["queue"]:
        raise MemFlowError(f"{request.resume}: this story has been told to its end, nothing is left to generate")
    return [_job(request, None, request.output, header["extra"])]


def _told(request: Request) -> list[Job]:
    if request.story is not None and request.prompts:
        raise MemFlowError("give the story either as a file or with -p, not both")
    if request.story is None and not request.prompts:
        raise MemFlowError("which story? Give a story file, or prompts with -p")
    if request.prompts:
        return [_job(request, Story(request.output.stem, _prompts(list(request.prompts), "-p")), request.output)]
    stories = read_stories(request.story)
    if len(stories) == 1:
        return [_job(request, stories[0], request.output)]
    if request.live:
        raise MemFlowError(f"--live is for one story, {request.story} holds {len(stories)}")
    if request.output.suffix.lower() == ".mp4":
        raise MemFlowError(f"{request.story} holds {len(stories)} stories: -o must be a folder, not {request.output}")
    if request.save_state is not None:
        raise MemFlowError(f"--save-state is for one story, {request.story} holds {len(stories)}")
    return [_job(request, story, request.output / f"{story.name}.mp4") for story in stories]


def _job(request: Request, story: Story | None, output: Path, state: dict[str, str] | None = None) -> Job:
    return Job(story, output, output.with_suffix(".png") if request.report else None, state or {})


def _read(path: Path, opened: BinaryIO | None = None) -> str:
    try:
        with opened or open(path, "rb") as file:
            data = file.read(_FILE + 1)
    except OSError as error:
        raise MemFlowError(f"{path}: cannot read the story: {error.strerror}") from None
    if len(data) > _FILE:
        raise MemFlowError(f"{path}: a story file has at most {_FILE // 2**20} MiB")
    for number, line in enumerate(data.split(b"\n"), start=1):
        if len(line) > _LINE:
            raise MemFlowError(
                f"{path}, line {number}: a line has at most {_LINE // 2**20} MiB, got {len(line):,} bytes"
            )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise MemFlowError(f"{path}: not a text file in UTF-8") from None


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), (list, dict))
    except (ValueError, RecursionError):
        return False


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=lambda pairs: _without_twins(pairs, where))
    except json.JSONDecodeError as error:
        raise MemFlowError(f"{where}: broken JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise MemFlowError(f"{where}: broken JSON: nested too deeply") from None
    except MemFlowError:  # of `_without_twins`
        raise
    except ValueError:  # what Python says of a whole number of more than 4300 digits
        raise MemFlowError(f"{where}: broken JSON: a number has too many digits") from None


def _without_twins(pairs: list[tuple[str, Any]], where: str) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise MemFlowError(f"{where}: a key stands twice in one object, only one of its values would count")
    return record


def _yaml(text: str, where: str) -> Any:
    import yaml  # comes with huggingface_hub

    class Loader(yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader):
        pass

    def mapping(loader: Loader, node: yaml.MappingNode) -> dict:
        loader.flatten_mapping(node)
        return _without_twins(loader.construct_pairs(node, deep=True), where)

    Loader.add_constructor(Loader.DEFAULT_MAPPING_TAG, mapping)
    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise MemFlowError(f"{where}: broken YAML: {' '.join(str(error).split())}") from None


def _story(record: Any, default: str, where: str) -> Story:
    if not isinstance(record, dict) or "prompts" not in record:
        raise MemFlowError(f'{where}: an object with a list of "prompts" is needed')
    name = record.get("name")
    if name is not None and not isinstance(name, str):
        raise MemFlowError(f'{where}: "name" must be a string, not {type(name).__name__}')
    seed, seconds = record.get("seed"), record.get("seconds_per_prompt")
    if seed is not None and not (type(seed) is int and 0 <= seed < 2**63):
        raise MemFlowError(f'{where}: "seed" must be a whole number from 0 to 2**63 - 1, got {_short(seed)}')
    if seconds is not None and not (type(seconds) in (int, float) and 0 < seconds < math.inf):
        raise MemFlowError(f'{where}: "seconds_per_prompt" must be above 0, got {_short(seconds)}')
    if seconds is not None and seconds > sys.float_info.max:  # a whole number that no float holds
        raise MemFlowError(f'{where}: "seconds_per_prompt" must be at most {sys.float_info.max:g}')
    return Story(_file_name(name or default), _prompts(record["prompts"], where), seed, seconds)


def _prompts(prompts: Any, where: str) -> list[str]:
    """`prompts`, if they make a story; MemFlowError, beginning with `where`, if not."""
    from memflow.stream.plan import check_text

    if not isinstance(prompts, list):
        raise MemFlowError(f'{where}: "prompts" must be a list of strings, not {type(prompts).__name__}')
    if not prompts:
        raise MemFlowError(f"{where}: the story has no prompts, at least one is needed")
    for number, prompt in enumerate(prompts, start=1):
        check_text(prompt, f"{where}: prompt {number}")
    return prompts


def _short(value: Any) -> str:
    """`value` for a sentence. A whole number may have more digits than Python writes."""
    try:
        text = repr(value)
    except ValueError:
        return "a number of too many digits"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _file_name(name: str) -> str:
    """`name` with all that could leave the output folder, hide the file or upset a shell replaced by a hyphen."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "story"
