"""Stories from JSONL and from plain text, and what is said about broken ones."""

import json

import pytest

from memflow.cli.story import Story, read_stories
from memflow.errors import MemFlowError


def write(path, *lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_text_is_one_story_with_one_prompt_per_line(tmp_path):
    path = write(tmp_path / "the-fox.txt", "A fox.", "", "  A hare.  ", "   ", "The fox again: ä, 狐.")
    assert read_stories(path) == [Story("the-fox", ["A fox.", "A hare.", "The fox again: ä, 狐."])]


def test_windows_text_is_read_too(tmp_path):
    path = tmp_path / "story.txt"
    path.write_bytes(b"\xef\xbb\xbfA fox.\r\nA hare.\r\n")
    assert read_stories(path) == [Story("story", ["A fox.", "A hare."])]


def test_a_single_jsonl_story_has_the_name_of_the_file(tmp_path):
    path = write(tmp_path / "fox.jsonl", '{"prompts": ["A fox.", "A hare."], "author": "me"}', "")
    assert read_stories(path) == [Story("fox", ["A fox.", "A hare."])]


def test_several_jsonl_stories_are_numbered_or_named(tmp_path):
    lines = [json.dumps({"prompts": [f"prompt {i}"]}) for i in range(10)]
    lines[3] = json.dumps({"name": "../The Keeper's Cat!", "prompts": ["cat"]})
    stories = read_stories(write(tmp_path / "many.jsonl", *lines))
    assert [story.name for story in stories][:5] == ["many-01", "many-02", "many-03", "The-Keeper-s-Cat", "many-05"]
    assert stories[9] == Story("many-10", ["prompt 9"])


def test_a_prompt_may_hold_a_line_separator_of_unicode(tmp_path):
    path = write(tmp_path / "a.jsonl", json.dumps({"prompts": ["one\u2028two"]}, ensure_ascii=False))
    assert read_stories(path) == [Story("a", ["one\u2028two"])]


GOOD = '{"prompts": ["a"]}'
BROKEN = {
    "cut off": ((GOOD, '{"prompts": ["a"'), "line 2: broken JSON"),
    "after a blank line": (("", "", "nonsense"), "line 3: broken JSON"),
    "a list": ((GOOD, '["a"]'), "line 2: an object"),
    "no prompts": (('{"prompt": "a"}',), "line 1: an object"),
    "prompts a string": (('{"prompts": "a"}',), 'line 1: "prompts" must be a list of strings, not str'),
    "no prompt in it": (('{"prompts": []}',), "line 1: the story has no prompts"),
    "a number": (('{"prompts": ["a", 7]}',), "line 1: prompt 2 must be a text that is not blank, got 7"),
    "a blank prompt": (('{"prompts": ["a", "  "]}',), "line 1: prompt 2 must be a text that is not blank"),
    "a name that is none": (('{"prompts": ["a"], "name": 1}',), 'line 1: "name" must be a string'),
    "the same name twice": (
        ('{"prompts": ["a"], "name": "x"}', '{"prompts": ["b"], "name": "x"}'),
        "line 2: a second story",
    ),
    "nothing": (("", "  "), "is empty"),
}


@pytest.mark.parametrize(("lines", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_story_is_named_with_its_line(tmp_path, lines, message):
    path = write(tmp_path / "bad.jsonl", *lines)
    with pytest.raises(MemFlowError) as error:
        read_stories(path)
    assert str(error.value).startswith(str(path))
    assert message in str(error.value)


def test_a_file_that_cannot_be_read(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for path, message in (("none.txt", "No such file"), ("latin.txt", "not a text file"), (".", "is a folder")):
        with pytest.raises(MemFlowError, match=message):
            read_stories(tmp_path / path)
