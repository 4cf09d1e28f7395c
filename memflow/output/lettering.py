"""Letters in a picture: fonts that have them, and texts that fit into the room there is without a broken word."""

from __future__ import annotations

import functools
import re
import textwrap
import unicodedata
from collections.abc import Iterable
from contextlib import suppress

from matplotlib import font_manager

# Whatever of these is installed is asked for letters that matplotlib's own font, the first, does not have.
_FAMILIES = (
    "DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Noto Sans JP", "Noto Sans KR",
    "Source Han Sans SC", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Droid Sans Fallback", "PingFang SC",
    "Hiragino Sans", "Apple SD Gothic Neo", "Arial Unicode MS", "Microsoft YaHei", "Yu Gothic", "Malgun Gothic",
    "Noto Sans", "Noto Sans Devanagari", "Noto Sans Bengali", "Noto Sans Tamil", "Noto Sans Thai", "Noto Sans Arabic",
    "Noto Sans Hebrew", "Nirmala UI", "Leelawadee UI", "Segoe UI Symbol", "Noto Sans Symbols2",
)  # fmt: skip

_UNSEEN = ("Cc", "Cf", "Zs", "Zl", "Zp")
_WIDE = "[\u1100-\u115f\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff\uff00-\uff60\U00020000-\U0003fffd]"
_CLOSING = "[\u2026\u3001\u3002\u3009\u300b\u300d\u300f\u3011\uff01\uff09\uff0c\uff0e\uff1a\uff1b\uff1f!?.,:;)]"
_WORD = re.compile(f"{_WIDE}{_CLOSING}*|(?:(?!{_WIDE}).)+")


def families(text: str) -> list[str]:
    """The fonts of this machine that `text` needs, in the order in which they are asked."""
    chosen, left = [], {ord(letter) for letter in text}
    for name, letters in _letters().items():
        if left & letters or not chosen:
            chosen.append(name)
            left -= letters
    return chosen


@functools.cache
def _letters() -> dict[str, frozenset[int]]:
    """Font family -> the code points that it has."""
    known = {entry.fname for entry in font_manager.fontManager.ttflist}
    for path in font_manager.findSystemFonts():  # matplotlib remembers those of its first start
        if path not in known:
            with suppress(Exception):  # a broken font is none
                font_manager.fontManager.addfont(path)
    found = {}
    for entry in font_manager.fontManager.ttflist:
        if entry.name in _FAMILIES and entry.name not in found:
            with suppress(OSError, RuntimeError):  # matplotlib remembers fonts that are gone, too
                found[entry.name] = frozenset(font_manager.get_font(entry.fname).get_charmap())
    return {name: found[name] for name in _FAMILIES if name in found}


def missing(texts: Iterable[str]) -> set[str]:
    """The letters of `texts` that no font here has: they would be drawn as boxes."""
    wanted = {letter for text in texts for letter in text if unicodedata.category(letter) not in _UNSEEN}
    known = frozenset().union(*_letters().values())
    return {letter for letter in wanted if ord(letter) not in known}


def wide(text: str) -> int:
    """Columns that `text` takes: Chinese, Japanese and Korean letters take two."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


def longest_word(text: str) -> int:
    """Columns of the longest part that may not be broken."""
    return max((wide(word) for _, word in _words(text)), default=0)


def fit(text: str, columns: int, lines: int) -> str:
    """`text` wrapped to at most `lines` lines; what is cut ends in "…". Empty if not even a word fits."""
    if columns < 6:
        return ""
    wrapped = [""]
    for space, word in _words(text):
        if wide(wrapped[-1] + space + word) <= columns:
            wrapped[-1] += space + word if wrapped[-1] else word
            continue
        first, *rest = textwrap.wrap(word, columns)  # one longer than a line has to be broken
        wrapped += [first, *rest] if wrapped[-1] else rest
        wrapped[0] = wrapped[0] or first
    if len(wrapped) > lines:
        last = wrapped[lines - 1]
        while last and wide(last) + 2 > columns:
            last = last[:-1]
        wrapped = [*wrapped[: lines - 1], f"{last.rstrip()} …"]
    return "\n".join(wrapped)


def _words(text: str) -> list[tuple[str, str]]:
    """(space before it, word): what may not be broken. A wide letter is a word, its punctuation with it."""
    found = []
    for part in text.split():
        space = " "
        for word in re.findall(_WORD, part):
            found.append((space if found else "", word))
            space = ""
    return found
