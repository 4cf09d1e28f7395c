"""Stories from JSONL and from plain text, and what is said about broken ones."""

import io
import json

import pytest

from memflow.cli.options import Request
from memflow.cli.story import Story, read_stories, settings
from memflow.errors import MemFlowError, MemFlowWarning


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
    path = write(tmp_path / "fox.jsonl", '{"prompts": ["A fox.", "A hare."]}', "")
    assert read_stories(path) == [Story("fox", ["A fox.", "A hare."])]


def test_several_jsonl_stories_are_numbered_or_named(tmp_path):
    lines = [json.dumps({"prompts": [f"prompt {i}"]}) for i in range(10)]
    lines[3] = json.dumps({"name": "../The Keeper's Cat!", "prompts": ["cat"]})
    stories = read_stories(write(tmp_path / "many.jsonl", *lines))
    assert [story.name for story in stories][:5] == ["many-01", "many-02", "many-03", "The-Keeper-s-Cat", "many-05"]
    assert stories[9] == Story("many-10", ["prompt 9"])


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.yaml"])
def test_a_key_without_effect_is_named_once(tmp_path, name):
    """A word that is wrong by a letter would be dropped in silence."""
    stories = [{"prompts": ["a"], "sead": 1, "author": "me"}, {"prompts": ["b"], "sead": 2, 3: 4}]
    lines = map(json.dumps, stories) if name == "a.jsonl" else [json.dumps(stories)]
    with pytest.warns(MemFlowWarning) as warned:
        assert len(read_stories(write(tmp_path / name, *lines))) == 2
    (said,) = (str(warning.message) for warning in warned)
    assert said == f"{tmp_path / name}: not used: 3, author, sead; a story has prompts, name, seed, seconds_per_prompt"


def test_seed_and_length_belong_to_a_story(tmp_path):
    first = json.dumps({"prompts": ["a"], "seed": 2**63 - 1, "seconds_per_prompt": 2})
    path = write(tmp_path / "a.jsonl", first, json.dumps({"prompts": ["b"], "seed": None}))
    one, two = read_stories(path)
    assert one == Story("a-1", ["a"], 2**63 - 1, 2) and two == Story("a-2", ["b"])
    request = Request(seed=5, seconds_per_prompt=3.0)
    assert settings(one, request) == {"seed": 2**63 - 1, "seconds_per_prompt": 2}
    assert settings(two, request) == {"seed": 5, "seconds_per_prompt": 3.0}
    assert settings(two, Request()) == {"seed": 0, "seconds_per_prompt": 10.0}


def test_bad_stories_are_collected_where_the_others_are_wanted(tmp_path):
    path, bad = write(tmp_path / "a.jsonl", "nonsense", GOOD, '{"prompts": []}', GOOD), []
    assert [story.name for story in read_stories(path, bad)] == ["a-2", "a-4"]
    assert [sentence.split(": ")[0] for sentence in bad] == [f"{path}, line 1", f"{path}, line 3"]
    bad.clear()
    assert read_stories(write(path, "[]"), bad) == [] and len(bad) == 1
    with pytest.raises(MemFlowError, match="is empty"):
        read_stories(write(path, ""), bad)


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
    "a seed below 0": (('{"prompts": ["a"], "seed": -1}',), 'line 1: "seed" must be a whole number from 0 to'),
    "a seed that is none": (('{"prompts": ["a"], "seed": true}',), 'line 1: "seed" must be a whole number'),
    "no time": (('{"prompts": ["a"], "seconds_per_prompt": 0}',), '"seconds_per_prompt" must be above 0, got 0'),
    "no number": (('{"prompts": ["a"], "seconds_per_prompt": NaN}',), "must be above 0, got nan"),
    "a text for a time": (('{"prompts": ["a"], "seconds_per_prompt": "3"}',), "must be above 0, got '3'"),
    "a time that no float holds": (
        ('{"prompts": ["a"], "seconds_per_prompt": 1' + "0" * 400 + "}",),
        '"seconds_per_prompt" must be at most',
    ),
    "a seed without end": (('{"prompts": ["a"], "seed": 1' + "0" * 4200 + "}",), '"seed" must be a whole number'),
    "a number without end": (('{"prompts": ["a"], "seed": 1' + "0" * 5000 + "}",), "a number has too many digits"),
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
    assert message in str(error.value) and len(str(error.value)) < 500


def test_a_file_that_cannot_be_read(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for path, message in (("none.txt", "No such file"), ("latin.txt", "not a text file"), (".", "is a folder")):
        with pytest.raises(MemFlowError, match=message):
            read_stories(tmp_path / path)


AB = ["A fox: red, #1.", "A hare"]
LISTS = {
    "a.json": json.dumps(AB),
    "b.json": json.dumps({"prompts": AB}, indent=2),
    "c.JSON": "\ufeff" + json.dumps([{"prompts": AB}]),
    "a.yaml": "prompts:\n  - 'A fox: red, #1.'\n  - A hare\n",
    "b.yml": "- 'A fox: red, #1.'\n- A hare\n",
    "c.yaml": "# a comment\n- name: c\n  prompts: ['A fox: red, #1.', A hare]\n",
    "a.ndjson": json.dumps({"prompts": AB}),
    "a": "A fox: red, #1.\nA hare\n",
    "a.text": "A fox: red, #1.\n\nA hare",
}


@pytest.mark.parametrize(("name", "content"), LISTS.items(), ids=LISTS)
def test_lists_of_prompts_are_read(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert read_stories(tmp_path / name) == [Story(name[0], AB)]


def test_several_stories_in_one_list(tmp_path):
    (tmp_path / "two.json").write_text('[{"prompts": ["a"]}, {"name": "x/y", "prompts": ["b"]}]')
    assert read_stories(tmp_path / "two.json") == [Story("two-1", ["a"]), Story("x-y", ["b"])]


JSON = '{"prompts": ["a fox", "a hare"]}'
REFUSED = {
    "s.csv": ("prompt\na fox\n", "no story file"),
    "s.md": ("# A fox\n", "no story file"),
    "s.toml": ('prompts = ["a"]', "no story file"),
    "s.jsonl.bak": (JSON, "no story file"),
    "s.docx": ("PK", "no story file"),
    "s.txt": (JSON, "holds JSON"),
    "s.jsonl.txt": (f"{JSON}\n{JSON}\n", "holds JSON"),
    "pretty.txt": (json.dumps(json.loads(JSON), indent=2), "holds JSON"),
    "list.txt": ('["a fox", "a hare"]', "holds JSON"),
    "noname": ("prompts:\n  - a fox\n", "holds JSON, YAML or CSV"),
    "marker.txt": ("---\n- a fox\n", "holds JSON, YAML or CSV"),
    "table.txt": ('name,"prompt"\n1,a fox\n', "holds JSON, YAML or CSV"),
    "tabs.txt": ("id\tPrompt\tseconds\n1\ta fox\t3\n", "holds JSON, YAML or CSV"),
    "twice.json": ('{"prompts": ["a"], "prompts": ["b"]}', "a key stands twice"),
    "twice.jsonl": ('{"prompts": ["a"], "name": "x", "name": "y"}', "line 1: a key stands twice"),
    "number.json": ("7", "an object with a list"),
    "mixed.json": ('["a fox", {"prompts": ["a hare"]}]', "story 1: an object with a list"),
    "deep.json": ("[" * 100_000, "nested too deeply"),
    "constant.json": ('{"prompts": [NaN]}', "prompt 1 must be a text"),
    "twice.yaml": ("prompts: [a]\nname: x\nprompts: [b]\n", "a key stands twice"),
    "within.yaml": ("- prompts: [a]\n- {prompts: [a], prompts: [b]}\n", "a key stands twice"),
    "keys.yaml": ("? [a]\n: b\n", "broken YAML"),
    "cut.yaml": ("prompts: [a fox", "broken YAML"),
    "object.yaml": ("prompts: !!python/object/apply:os.getcwd []", "broken YAML"),
    "colon.yaml": ("- a fox: red", "an object with a list"),
    "yes.yaml": ("- yes", "prompt 1 must be a text"),
    "two.yaml": ("- a\n---\n- b\n", "broken YAML"),
    "deep.yaml": ("[" * 3000, "broken YAML"),
    "long.json": ('{"prompts": ["a"], "seed": ' + "1" * 5000 + "}", "too many digits"),
    "hex.yaml": ("prompts: [a]\nseed: 0x" + "f" * 5000, '"seed" must be a whole number'),
    "cut.txt": ('{"prompts": ["a fox"', "holds JSON"),
    "first_cut.txt": (f'{{"prompts": ["a fox"\n{JSON}', "holds JSON"),
    "list_cut.txt": ('["a fox",', "holds JSON"),
    "braces.txt": ("{red} fox\n[a fox] runs", None),
    "zero.txt": ("a\0fox\n" * 3, None),
    "speech.txt": ("[Scene 1] a fox {red}\n", None),
    "words.txt": ("A prompt, kind fox\nprompts are read", None),
}


@pytest.mark.parametrize(("name", "case"), REFUSED.items(), ids=REFUSED)
def test_syntax_is_never_told_as_a_prompt(tmp_path, name, case):
    (tmp_path / name).write_text(case[0])
    if case[1] is None:
        assert read_stories(tmp_path / name)
        return
    with pytest.raises(MemFlowError, match=case[1]) as error:
        read_stories(tmp_path / name)
    assert str(error.value).startswith(str(tmp_path / name)) and len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"x" * (2**20 + 1), "line 1: a line has at most 1 MiB, got 1,048,577 bytes"),
        ("a.jsonl", b"\n" + b"[" * (2**20 + 1), "line 2: a line has at most 1 MiB"),
        ("a.json", b'["' + b"x\n" * 2**21 + b'"]', "a story file has at most 4 MiB"),
        ("a.txt", b"x" * 20_001, "prompt 1 must have at most 20,000 characters, got 20,001"),
        ("a.jsonl", json.dumps({"prompts": ["a", "x" * 20_001]}).encode(), "line 1: prompt 2 must have at most 20,000"),
        ("a.json", b'["\\ud800"]', "prompt 1 must be valid Unicode"),
    ],
)
def test_sizes_are_bounded_and_the_bound_is_said(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MemFlowError, match=message):
        read_stories(tmp_path / name)


def test_a_file_of_a_gigabyte_is_refused_at_once(tmp_path):
    with open(tmp_path / "a.txt", "wb") as file:
        file.truncate(2**30)
    with pytest.raises(MemFlowError, match="a story file has at most 4 MiB"):
        read_stories(tmp_path / "a.txt")


def test_a_list_that_unfolds_for_ever_is_refused(tmp_path):
    lines = ["a0: &a0 [x, x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12))]
    for name, content in {"a.yaml": "\n".join([*lines, "prompts: [*a11]"]), "b.yaml": "&a [*a, *a]"}.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(MemFlowError, match="prompt 1 must be a text"):
            read_stories(tmp_path / name)


def test_what_is_given_is_not_changed(tmp_path):
    """Prompts are cleaned in one place, where they are encoded."""
    (tmp_path / "a.json").write_text(json.dumps(["  two  blanks\t", "a&amp;b"]))
    assert read_stories(tmp_path / "a.json")[0].prompts == ["  two  blanks\t", "a&amp;b"]


@pytest.mark.parametrize("text", ['{"prompts": ["a"', '{"prompts": ["a"], "seed": ' + "1" * 5000 + "}", '["a fox",'])
def test_broken_json_from_stdin_is_not_told_as_a_prompt(monkeypatch, text):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    with pytest.raises(MemFlowError, match=r"^stdin, line 1: broken JSON"):
        read_stories("-")
