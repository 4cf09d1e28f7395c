"""The report: what it records, and that it can be drawn for every kind of story."""

import os
import subprocess
import sys
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
from films import clip
from matplotlib import font_manager
from PIL import Image

from memflow.errors import MemFlowError, MemFlowWarning
from memflow.output import texts
from memflow.output.report import MemoryReport, _bank, _called
from memflow.output.texts import CALLED_HEIGHT, fit, longest_word, missing, scene_of
from memflow.output.timeline import _RELEVANCE, Held, Timeline, _scenes


def memory(held, relevance, recalled=None, **spans):
    """A `MemorySnapshot`; held, relevance and recalled (default: all that is held) of batch row 0, [layers, n]."""
    rows = {"held": held, "relevance": relevance, "recalled": held if recalled is None else recalled}
    return SimpleNamespace(**{name: np.asarray(x)[:, None] for name, x in rows.items()}, **spans)


def record(
    chunks,
    *,
    layers=2,
    bank=3,
    shown=None,
    per_prompt=4,
    first=0,
    prompt="Prompt number {}, with quite a few words in it.",
):
    """A report of a stream that keeps the newest frames that left its window of three chunks, and shows the first."""
    report = MemoryReport("A story", fps=16, subtitle="settings")
    for index in range(first, first + chunks):
        newest = [3 * c for c in range(1, index - 1)][-bank:] if bank else []
        held = np.full((layers, bank), -1)
        held[:, : len(newest)] = newest
        relevance = np.where(held < 0, np.nan, np.sin(held + np.arange(layers)[:, None]))
        stop = 3 * index + 3
        chunk = SimpleNamespace(
            index=index,
            prompts=[prompt.format(index // per_prompt)],
            latents=np.zeros((1, 4, 3, 6, 8)),
            frames=clip(index)[None],
        )
        report.add(
            chunk,
            memory(held, relevance, held[:, :shown], sink=[0, 1, 2], window=list(range(max(3, stop - 9), stop))),
        )
    return report


def test_a_report_of_a_resumed_story_says_so(toy):
    stream = toy.stream(["a fox"], height=32, width=32)
    whole = MemoryReport.of(stream, "tale").subtitle
    next(stream), next(stream)
    assert MemoryReport.of(stream, "tale").subtitle == f"resumed: from chunk 3 on   ·   {whole}"


@pytest.mark.parametrize(
    "settings",
    [
        {"chunks": 12},
        {"chunks": 1},
        {"chunks": 5, "bank": 0},
        {"chunks": 6, "first": 40},
        {"chunks": 20, "bank": 9, "shown": 2},
        {"chunks": 30, "per_prompt": 1, "layers": 1},
        {"chunks": 12, "prompt": "A_word_that_has_no_end_" * 40 + "{}"},
        {"chunks": 60, "per_prompt": 3, "bank": 9, "shown": 4},
        {"chunks": 120, "per_prompt": 2, "bank": 9, "shown": 4},
        {"chunks": 6, "prompt": "$\\frac{{$ ж {}"},
    ],
    ids=[
        "usual",
        "one chunk",
        "no bank",
        "from chunk 40 on",
        "held and not shown",
        "a prompt per chunk",
        "one long word",
        "20 prompts",
        "60 prompts",
        "odd characters",
    ],
)
@pytest.mark.filterwarnings("error")
def test_every_story_can_be_drawn(tmp_path, settings):
    record(**settings).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == "PNG"
        assert image.width > 1200 and image.height > 1000
        assert len(image.convert("RGB").getcolors(1 << 22)) > 500


def test_what_is_held_is_seen_in_the_picture(tmp_path):
    pictures = []
    for layers in ([[0, 3, 6]] * 2, [[0, 3, 6], [0, 3, 9]]):
        report = record(12)
        entry = report._entries[-1]
        held = np.array(layers)
        report._entries[-1] = entry._replace(bank=_bank(memory(held, held.astype(float)), 3))
        report.save(tmp_path / "a.png")
        pictures.append(np.asarray(Image.open(tmp_path / "a.png")))
    assert not np.array_equal(*pictures)


def test_a_bank_is_summed_up_over_its_layers():
    held = np.array([[3, 9, -1], [3, 12, 30]])
    relevance = np.array([[0.1, 0.5, np.nan], [2.0, 1.0, 5.0]])
    # Layer 0: frame 3 least, 9 most. Layer 1: 12 least, 30 most, 3 a quarter of the way.
    expected = [(1, 1.0, 0.125), (3, 0.5, 1.0), (4, 0.5, 0.0), (10, 0.5, 1.0)]
    bank = _bank(memory(held, relevance), 3)
    assert [entry[:4] for entry in bank] == [(chunk, held, held, score) for chunk, held, score in expected]


def test_what_is_recalled_is_told_from_what_is_held():
    held, recalled = np.array([[3, 9, 12], [3, 9, 12]]), np.array([[9, -1], [12, 9]])
    bank = _bank(memory(held, held.astype(float), recalled), 3)
    assert [(entry.chunk, entry.held, entry.shown) for entry in bank] == [(1, 1, 0), (3, 1, 1), (4, 1, 0.5)]
    assert [entry.places for entry in bank] == [0, 0.5, 0.25]


def test_a_frame_that_is_shown_twice_fills_twice_as_much_of_the_bank():
    held, recalled = np.array([[3, 9, 12]]), np.array([[9, 12, 9, 9]])
    bank = _bank(memory(held, held.astype(float), recalled), 3)
    assert [(entry.chunk, entry.shown, entry.places) for entry in bank] == [(1, 0, 0), (3, 1, 0.75), (4, 1, 0.25)]


def test_frames_that_no_word_called_for_come_last():
    snapshot = memory([[3, 9, 12]], [[1.0, 2.0, 3.0]])
    snapshot.words = [{3: [], 9: ["bo", "on"], 12: ["beach"]}]
    assert _called(snapshot, 3) == [(3, "bo, on"), (4, "beach"), (1, "")]


def test_frames_without_a_picture_here_have_no_row():
    entries = record(6, first=40)._entries  # as of a resumed story; prompts begin with chunks 40 and 44
    heights = []
    for chunk, shown in ((44, 41), (44, 3), (43, 41)):
        called = [entry._replace(called=[(shown, "bo")] if entry.index == chunk else []) for entry in entries]
        heights.append(Timeline(called, "", "", 1.0).draw().get_figheight())
    assert heights[0] - CALLED_HEIGHT == heights[1] == heights[2]


def test_equal_relevance_is_neither_least_nor_most():
    assert _bank(memory([[3, -1]], [[0.7, np.nan]]), 3) == [Held(1, 1.0, 1.0, 0.5, 0.5)]
    assert _bank(memory([[3, 6]], [[0.7, 0.7]]), 3) == [Held(1, 1.0, 1.0, 0.5, 0.5), Held(2, 1.0, 1.0, 0.5, 0.5)]
    assert _bank(memory([[-1, -1]], [[np.nan, np.nan]]), 3) == []


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_a_frame_without_a_relevance_is_drawn_between_the_others(number):
    """Also where a layer has none at all, or holds nothing."""
    held, relevance = [[3, 6, 9], [3, -1, -1], [-1, -1, -1]], [[1.0, number, 2.0], [number] * 3, [np.nan] * 3]
    bank = {entry.chunk: entry.relevance for entry in _bank(memory(held, relevance), 3)}
    assert bank == {1: 0.25, 2: 0.5, 3: 1.0}


def test_the_copies_of_a_frame_in_one_layer_count_once():
    assert _bank(memory([[27, 27, 27]], [[1.0, 1.0, 1.0]]), 3) == [Held(9, 1.0, 1.0, 0.5, 1.0)]


def test_scenes_are_stretches_under_one_prompt():
    scenes = [(start, stop) for start, stop, _ in _scenes(record(10, per_prompt=4, first=2)._entries)]
    assert scenes == [(2, 4), (4, 8), (8, 12)]


def test_prompts_are_wrapped_and_shortened():
    text = fit("one two three four five six seven eight nine ten", 12, 3)
    assert text.splitlines() == ["one two", "three four", "five six …"]
    assert fit("short", 40, 3) == "short"
    assert fit("anything", 3, 3) == ""


@pytest.mark.parametrize(("chunks", "per_prompt"), [(12, 4), (60, 3), (120, 2)], ids=["3", "20", "60 prompts"])
def test_every_prompt_is_in_the_picture_without_a_broken_word(chunks, per_prompt):
    prompt = "the keeper of the lighthouse waits on the mountain, number {}"
    report = record(chunks, per_prompt=per_prompt, prompt=prompt)
    figure = Timeline(report._entries, "A story", "", 0.75).draw()
    said = [" ".join(text.get_text().split()) for axes in figure.axes for text in axes.texts]
    assert {prompt.format(number) for number in range(chunks // per_prompt)} <= set(said)
    names = {str(number + 1) for number in range(chunks // per_prompt)}
    assert chunks == 12 or sum(text in names for text in said) == 2 * len(names)  # in the strip and in the list


def test_a_picture_of_many_prompts_has_an_end(monkeypatch):
    monkeypatch.setattr(texts, "_LISTED", 40)
    monkeypatch.setattr(texts, "_NUMBERED", 20)
    entry = record(1)._entries[0]
    bank = [Held(chunk, 1.0, 1.0, 0.5, 1 / 6) for chunk in range(0, 60, 10)]
    heights = []
    for count in (70, 100):
        entries = [entry._replace(index=n, prompt=f"the fox, number {n}", bank=bank) for n in range(count)]
        figure = Timeline(entries, "A story", "", 0.75).draw()
        heights.append(figure.get_size_inches()[1])
    assert heights[0] == heights[1]
    said = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert "and 60 more" in said and "the fox, number 39" in said and "the fox, number 40" not in said
    assert {"1", "6", "96"} <= set(said)  # every fifth in the strip


def test_the_scene_of_a_chunk():
    scenes = [(40, 44, "a"), (44, 45, "b"), (45, 60, "a")]
    assert [scene_of(scenes, chunk) for chunk in (0, 39, 40, 43, 44, 45, 59, 60)] == [None, None, 0, 0, 1, 2, 2, None]


def test_colours_of_prompts_are_no_colours_of_relevance():
    """Prompts are cold, blue over red; relevance is warm."""
    for count in (3, 10, 11, 60):
        timeline = Timeline(record(count, per_prompt=1)._entries, "", "", 1.0)
        colours = [timeline._prompt_colour(number)[:3] for number in range(count)]
        assert len(set(colours)) == count
        assert all(max(green, blue) > red for red, green, blue in colours)
    for share in np.linspace(0, 1, 9):
        red, green, blue, _ = _RELEVANCE(share)
        assert red > green > blue


def test_letters_that_no_font_has_are_named(tmp_path):
    cuneiform = "\U00012000"
    with pytest.warns(MemFlowWarning, match=f"no font here has the letters {cuneiform} of the report"):
        record(4, prompt=f"{cuneiform} {{}}").save(tmp_path / "a.png")
    assert missing(["plain\n text", cuneiform]) == {cuneiform}


def test_wide_letters_take_two_columns_and_break_anywhere():
    text = "\u4e00\u53ea\u7ea2\u8272\u7684\u72d0\u72f8\u3002 and then"
    assert longest_word(text) == 4  # the last one, and its full stop, which begins no line
    assert [len(line) for line in fit(text, 8, 5).splitlines()] == [4, 4, 8]


def test_a_record_is_small():
    report = record(20)
    size = sum(len(entry.thumbnail) for entry in report._entries) / 20
    assert size < 16_000


def test_what_cannot_be_saved_is_said(tmp_path):
    with pytest.raises(ValueError, match="nothing was recorded"):
        MemoryReport("A story", fps=16).save(tmp_path / "a.png")
    with pytest.raises(MemFlowError, match=r"none/a\.png: cannot be written"):
        record(2).save(tmp_path / "none" / "a.png")


def test_a_picture_is_written_whole_or_the_older_one_stays(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    record(2).save(path)
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MemFlowError, match=r"a\.png: cannot be written: No space left on device"):
        record(3).save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.png"]


def test_a_thumbnail_that_cannot_be_made_is_said(monkeypatch):
    def save(*arguments, **options):
        raise OSError("encoder jpeg not available")

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(MemFlowError, match="a picture of 64 x 48 cannot be encoded: encoder jpeg not available"):
        record(1)


def test_settings_of_the_callers_plots_do_not_count(tmp_path):
    record(2).save(tmp_path / "a.png")
    others = {"text.usetex": True, "savefig.bbox": "tight", "font.size": 30, "savefig.transparent": True}
    with matplotlib.rc_context(others):
        record(2).save(tmp_path / "b.png")
        assert matplotlib.rcParams["font.size"] == 30
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_font_that_is_gone_is_none(monkeypatch):
    gone = font_manager.FontEntry(fname="/nowhere/noto.ttc", name="Noto Sans CJK SC")
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [gone, *font_manager.fontManager.ttflist])
    texts._letters.cache_clear()
    try:
        assert "DejaVu Sans" in texts._letters()
    finally:
        texts._letters.cache_clear()


def test_a_matplotlib_that_does_not_start_is_one_sentence(tmp_path):
    command = [sys.executable, "-m", "memflow", "generate", "-p", "A fox.", "-o", str(tmp_path / "a.mp4"), "--report"]
    environment = os.environ | {"MPLBACKEND": "nonsense"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    said = "memflow: matplotlib, which draws the report, does not start: Key backend: 'nonsense' is not a valid value"
    assert ended.returncode == 2 and ended.stderr.startswith(said) and ended.stderr.count("\n") == 1, ended.stderr
    assert os.listdir(tmp_path) == []
