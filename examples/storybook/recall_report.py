"""Tables and plots of what `evaluate` wrote line by line: rules of recall, kinds of activation, a story without end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from examples.storybook.recall import LAST, Share
from examples.storybook.results import paired, share
from examples.storybook.rules import BETTER, COVERED, ONCE, RULES, TODAY
from examples.storybook.told import ACTIVATED, COMPARED, endless_script
from examples.storybook.world import NAMES

_HEADINGS = {
    "retrieval": "Retrieval alone: stories as drawn, nothing generated",
    "generated": "Generated: stories that the model tells itself",
    "activation": "Activated: how much of the memory a head attends to",
    "endless": "A story of 5,000 chunks",
}


def table(lines: list[dict]) -> str:
    """All lines as Markdown."""
    parts = {name: [line for line in lines if line["about"]["part"] == name] for name in _HEADINGS}
    text = ["# What the memory shows", ""]
    for name, part in parts.items():
        if part:
            commands = sorted({line["how"]["command"] for line in part})
            machine = sorted({f"torch {line['how']['torch']}, {line['how']['threads']} thread" for line in part})
            text += [f"## {_HEADINGS[name]}", "", *(f"`{command}`" for command in commands), "", *machine, ""]
            text += [*_TABLES[name](part), ""]
    return "\n".join([*text, _NOTES])


def _retrieval(lines: list[dict]) -> Iterator[str]:
    labels = [label for label in RULES if any(line["about"]["rule"] == label for line in lines)]
    yield "Character and place both shown, of all returns (of pairs: both characters and the place)."
    yield ""
    yield f"| stories | held | bank | prompts | n | {' | '.join(labels)} |"
    yield "|---|---|---|---|---|" + "---|" * len(labels)
    for key, group in _groups(lines, ("stories", "held", "bank", "prompts")):
        cells = [_by_rule(group, label, "both") for label in labels]
        count = max(found.count for found in cells)
        yield f"| {' | '.join(map(str, key))} | {count} | {' | '.join(_cell(found) for found in cells)} |"


def _generated(lines: list[dict]) -> Iterator[str]:
    measures = ("both shown", *COMPARED, *LAST)
    yield f"| stories | held | rule | n | {' | '.join(measures)} |"
    yield "|---|---|---|---|" + "---|" * len(measures)
    for (stories, held), group in _groups(lines, ("stories", "held")):
        for label in RULES:
            here = [line for line in group if line["about"]["rule"] == label]
            if here:
                cells = [share(here, name) for name in measures]
                yield f"| {stories} | {held} | {label} | {cells[1].count} | {' | '.join(map(_cell, cells))} |"
    yield ""
    yield f"Paired, of what both rules were asked: returns right with `{BETTER}` alone, right with the other alone, and"
    yield "how likely that is by chance."
    yield ""
    asked = ("both shown", *COMPARED[:3], *LAST)
    yield "| stories | held | beside | " + " | ".join(asked) + " |"
    yield "|---|---|---|" + "---|" * len(asked)
    for (stories, held), group in _groups(lines, ("stories", "held")):
        one = [line for line in group if line["about"]["rule"] == BETTER]
        for label in (TODAY, COVERED, ONCE):
            other = [line for line in group if line["about"]["rule"] == label]
            if other:
                yield f"| {stories} | {held} | {label} | {' | '.join(_beside(one, other, name) for name in asked)} |"


def _activation(lines: list[dict]) -> Iterator[str]:
    yield f"| stories | shown | activated | n | {' | '.join(COMPARED[:3])} | landmarks beside all of it: gained, lost |"
    yield "|---|---|---|---|" + "---|" * 4
    for (stories, rule), group in _groups(lines, ("stories", "rule")):
        dense = [line for line in group if line["about"]["activated"] == "all"]
        for label in ACTIVATED:
            here = [line for line in group if line["about"]["activated"] == label]
            if here:
                cells = [share(here, name) for name in COMPARED[:3]]
                beside = "" if label == "all" else _beside(here, dense, "landmark")
                shares = " | ".join(map(_cell, cells))
                yield f"| {stories} | {rule} | {label} | {cells[0].count} | {shares} | {beside} |"


def _endless(lines: list[dict]) -> Iterator[str]:
    labels = [label for label in RULES if any(line["about"]["rule"] == label for line in lines)]
    measures = ("place", "colour", "first colour")
    yield "Place and colour in the last chunk of a scene, and the colour in its first, before the window copies it on."
    yield ""
    yield f"| scenes | {' | '.join(f'{label}: place | colour | first colour' for label in labels)} |"
    yield "|---|" + "---|" * len(measures) * len(labels)
    for (scenes,), group in _groups(lines, ("scenes",)):
        cells = [_by_rule(group, label, name) for label in labels for name in measures]
        counts = (f"{found.hits} of {found.count}" if found.count else "" for found in cells)
        yield f"| {scenes} | {' | '.join(counts)} |"
    yield ""
    better = [line for line in lines if line["about"]["rule"] == BETTER]
    for label in (TODAY, ONCE):
        other = [line for line in lines if line["about"]["rule"] == label]
        if better and other:
            last, first = (_beside(better, other, name) for name in measures[1:])
            yield f"Right with `{BETTER}` alone, with `{label}` alone: {last} in the last, {first} in the first chunk."
            yield ""
    yield "Colours right by character, last and first chunk; the story is the same under every rule."
    yield ""
    yield f"| character | {' | '.join(f'{label}: last | first' for label in labels)} |"
    yield "|---|" + "---|" * 2 * len(labels)
    for number, name in enumerate(NAMES):
        cells = [_of_character(lines, label, number, measure) for label in labels for measure in measures[1:]]
        yield f"| {name} | {' | '.join(cells)} |"


def _beside(one: list[dict], other: list[dict], measure: str) -> str:
    found = paired(one, other, measure)
    return "" if found is None else "{}, {} (p = {:.2g})".format(*found)


def _of_character(lines: list[dict], label: str, number: int, measure: str) -> str:
    scenes, found = endless_script().scenes, []
    for line in lines:
        if line["about"]["rule"] == label:
            first = int(line["about"]["scenes"].split()[0])
            told = zip(scenes[first:], line["outcomes"].get(measure, ""), strict=False)
            found += [right == "1" for scene, right in told if scene.name == number]
    return f"{sum(found)} of {len(found)}" if found else ""


_TABLES = {"retrieval": _retrieval, "generated": _generated, "activation": _activation, "endless": _endless}
_NOTES = """Intervals: 95 % (Wilson). A return: a character comes back to a place where it never was, with neither in
the sink nor in the window. Stories "n scenes of m": m chunks each, anybody anywhere, the last scenes are returns.
`held`: frames that the policy `original` holds, or the archive of all. Prompts: `looks` states the character's look
again; `unknown words` appends six words that the model does not know; `100 tokens` hides the sentence among some 90
others, unknown ones or ones of the world that name nobody and no place; `pairs` names two characters. What is measured
of generated scenes is their first chunk, and their last one where it says so.
"""


def _groups(lines: Iterable[dict], names: tuple[str, ...]) -> Iterator[tuple[tuple, list[dict]]]:
    """Lines with equal entries under `names`, in the order in which these came first."""
    groups: dict[tuple, list[dict]] = {}
    for line in lines:
        groups.setdefault(tuple(line["about"][name] for name in names), []).append(line)
    yield from groups.items()


def _by_rule(lines: list[dict], label: str, measure: str) -> Share:
    return share([line for line in lines if line["about"]["rule"] == label], measure)


def _cell(found: Share) -> str:
    if not found.count:
        return ""
    low, high = found.interval
    return f"{found.value:.3f} [{low:.3f} {high:.3f}]"


def plot(lines: list[dict], path: Path) -> None:
    """Two panels: shown, by case of retrieval alone; right, in generated stories."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 6.4), width_ratios=(1.7, 1))
    compared = [TODAY, "one per scene, then top", "coverage", COVERED, BETTER]
    retrieval = [line for line in lines if line["about"]["part"] == "retrieval"]
    cases = list(_groups(retrieval, ("stories", "held", "bank", "prompts")))[::-1]
    for place, label in enumerate(compared):
        shares = [_by_rule(group, label, "both") for _, group in cases]
        at = [i + 0.16 * (2 - place) for i in range(len(cases))]
        _points(left, shares, at, label)
    names = [f"{stories}, {held} held, bank {bank}, {kind}" for (stories, held, bank, kind), _ in cases]
    left.set_yticks(range(len(cases)), names, fontsize=7.5)
    left.set(xlim=(-0.02, 1.02), title="retrieval alone: character and place both shown")
    generated = [line for line in lines if line["about"]["part"] == "generated"]
    rows = [(held, name) for (held,), _ in _groups(generated, ("held",)) for name in ("both shown", *COMPARED[:3])][
        ::-1
    ]
    for place, label in enumerate(compared):
        shares = [_by_rule([x for x in generated if x["about"]["held"] == held], label, name) for held, name in rows]
        _points(right, shares, [i + 0.16 * (2 - place) for i in range(len(rows))], label)
    right.set_yticks(range(len(rows)), [f"{held} held: {name}" for held, name in rows], fontsize=8)
    right.set(xlim=(-0.02, 1.02), title="generated, scenes of 27 chunks")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    right.set_visible(bool(rows))
    figure.legend(*left.get_legend_handles_labels(), fontsize=8, loc="upper center", ncols=len(compared), frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.96))
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)


def _points(axis, shares: list[Share], at: list[float], label: str) -> None:
    known = [(found, y) for found, y in zip(shares, at, strict=True) if found.count]
    values = [found.value for found, _ in known]
    errors = [[f.value - f.interval[0] for f, _ in known], [f.interval[1] - f.value for f, _ in known]]
    axis.errorbar(values, [y for _, y in known], xerr=errors, fmt="o", ms=4, lw=1.2, label=label)
