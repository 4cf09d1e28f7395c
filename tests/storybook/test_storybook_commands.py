"""What `python -m examples.storybook` refuses before it begins to work, and the sheet that it draws."""

import pytest
from PIL import Image

from examples.storybook.__main__ import app
from memflow import MemFlowError


def command(*arguments) -> None:
    app([str(argument) for argument in arguments], standalone_mode=False)


def test_a_sheet_is_drawn(tmp_path):
    story = tmp_path / "story.txt"
    story.write_text("bo, a red ball, jumps on the beach.\nbo waits on the beach.\nbo jumps in the forest.\n")
    out = tmp_path / "new" / "sheet.png"
    command("sheet", story, "-o", out, "--seconds-per-prompt", 0.375)
    with Image.open(out) as sheet:
        assert sheet.size == (2 * 3 * 144 + 6, 2 * (144 + 40) + 6)
        pixels = sheet.convert("RGB").load()
    assert len({pixels[x, 60] for x in range(432)}) > 20  # a picture in the first cell
    assert {pixels[x, 250] for x in range(440, 870)} == {(255, 255, 255)}  # nothing where the fourth would be


def test_a_sheet_is_a_picture(tmp_path):
    story = tmp_path / "story.txt"
    story.write_text("bo waits on the beach.\n")
    with pytest.raises(MemFlowError, match=r"\.png.*got 'sheet.mp4'"):
        command("sheet", story, "-o", tmp_path / "sheet.mp4")


def test_an_evaluation_names_a_memory_and_a_json_file(tmp_path):
    with pytest.raises(MemFlowError, match=r"\.json.*r\.md"):
        command("evaluate", "-o", tmp_path / "r.md")
    with pytest.raises(MemFlowError, match="--memory: unknown: nonsense; there are none, sink"):
        command("evaluate", "-o", tmp_path / "r.json", "--memory", "nonsense")
