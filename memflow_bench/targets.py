"""What the project set out to reach, read off the rows: reached or not, in plain words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from .rows import Row
from .timing import ratio, spread

PUBLISHED = "published path"
TRAINING = ("training", "backward", "block_causal", "block_causal_step")
BASE = "wan-1.3b-480p"
# Rows that bound a stream from below, and what each supposes.
FLOORS = {
    "no memory attention at all": "memory attention",
    "torch's attention alone": "norm, rotation and write",
}


class Target(NamedTuple):
    what: str
    value: str
    needed: str
    verdict: str


def targets(rows: list[Row], ceilings: dict) -> list[Target]:
    """The targets that these rows can answer."""
    right = [row for row in rows if row.timed]
    found = [*layer_targets(right), *update_targets(right), *toy_targets(right)]
    found += training_targets(right)
    gpu = [row for row in right if row.device == "cuda"]
    return [*found, *attention_targets(gpu), *bandwidth_targets(gpu, ceilings), *chunk_targets(gpu)]


def at_least(what: str, value: float, needed: float, unit: str = "x") -> Target:
    shown = (f"{value:.0%}", f">= {needed:.0%}") if unit == "%" else (f"{value:.2f}{unit}", f">= {needed:g}{unit}")
    return Target(what, *shown, "reached" if value >= needed else "NOT reached")


def at_most(what: str, value: float, needed: float) -> Target:
    return Target(what, f"{value:.2f}x", f"<= {needed:g}x", "reached" if value <= needed else "NOT reached")


def training_targets(rows: list[Row]) -> Iterator[Target]:
    """Against torch's attention, whose time and memory are the unit; a backward of fewer frames against a dense one."""
    for group in dict.fromkeys(row.group for row in rows if row.workload in TRAINING):
        members = [row for row in rows if row.group == group]
        ours, few = (best_of_ours([row for row in members if row.activated == mode]) for mode in (False, True))
        sdpa = next((row for row in members if row.provider == "SDPA flash" and not row.activated), None)
        if ours is None or sdpa is None:
            continue
        if ours.workload == "training":
            time = ratio(sdpa.seconds, ours.seconds)
            yield at_most(f"{group}, dense, time against torch's attention", time, 1.5 if ours.case == "tiny" else 1.05)
            if ours.peak_bytes and sdpa.peak_bytes and ours.case != "tiny":
                yield at_most(f"{group}, dense, peak memory", ours.peak_bytes / sdpa.peak_bytes, 1.2)
        elif ours.workload == "backward" and few is not None:
            yield at_least(f"{group}, activated against dense", ratio(few.seconds, ours.seconds), 1.15)
        else:
            for peer in (row for row in members if row is not ours):
                yield at_least(f"{group} against {peer.provider}", ratio(ours.seconds, peer.seconds), 1.0)


def best_of_ours(rows: list[Row]) -> Row | None:
    """The fastest of our backends."""
    ours = [row for row in rows if row.provider.startswith("ours") and "no bank" not in row.provider]
    return min(ours, key=lambda row: spread(row.seconds)["median"], default=None)


def pairs(rows: list[Row], workload: str, cases: tuple[str, ...]) -> Iterator[tuple[Row, Row]]:
    """(ours, dense published path) per group and mode; activated, ours attends to fewer keys."""
    groups = dict.fromkeys(row.group for row in rows if row.workload == workload and row.case in cases)
    for group in groups:
        members = [row for row in rows if row.group == group]
        published = next((r for r in members if r.provider == PUBLISHED and not r.activated), None)
        for activated in (False, True):
            ours = best_of_ours([row for row in members if row.activated == activated])
            if ours is not None and published is not None:
                yield ours, published


def layer_targets(rows: list[Row]) -> Iterator[Target]:
    """Against the dense published path, the aim of the project; and like for like, which has no aim."""
    for ours, published in pairs([row for row in rows if row.device == "cpu"], "layer", (BASE,)):
        mode = "activated" if ours.activated else "dense"
        what = f"attention layer, {mode}, {ours.dtype}, against the dense published path"
        if ours.activated:
            what += " (fewer keys: not like for like)"
        yield at_least(what, ratio(ours.seconds, published.seconds), 1.3 if ours.activated else 1.1)
        same = [row for row in rows if row.group == ours.group and row.activated and row.provider == PUBLISHED]
        if ours.activated and same and len(same[0].seconds) == len(ours.seconds):
            what = f"attention layer, activated, {ours.dtype}, against the published path activated"
            yield Target(what, f"{ratio(ours.seconds, same[0].seconds):.2f}x", "", "like for like")


def update_targets(rows: list[Row]) -> Iterator[Target]:
    for ours, published in pairs([row for row in rows if row.device == "cpu"], "update", (BASE,)):
        yield at_least(
            f"memory update, {ours.dtype}, against the published path", ratio(ours.seconds, published.seconds), 20
        )


def toy_targets(rows: list[Row]) -> Iterator[Target]:
    for ours, published in pairs([row for row in rows if row.device == "cpu"], "stream", ("toy",)):
        if not ours.activated:
            yield at_least("toy stream, against the published path", ratio(ours.seconds, published.seconds), 1.5)
            for floor in (row for row in rows if row.provider in FLOORS and row.group == ours.group):
                most = f"{ratio(floor.seconds, published.seconds):.2f}x"
                what = f"the same if {FLOORS[floor.provider]} took no time"
                yield Target(what, most, "", "the most that can be reached")


def attention_targets(rows: list[Row]) -> Iterator[Target]:
    members = [r for r in rows if r.workload == "attention" and r.case == BASE and r.dtype == "bfloat16"]
    ours = best_of_ours([row for row in members if row.activated])
    peers = [r for r in members if not r.activated and not r.provider.startswith(("ours", PUBLISHED))]
    if ours is None or not peers:
        return
    best = min(peers, key=lambda row: spread(row.seconds)["median"])
    faster = ratio(ours.seconds, best.seconds)
    yield at_least(f"{ours.provider}, activated, against {best.provider}, dense", faster, 1.0)
    yield at_least("its TFLOP/s against theirs", faster * ours.flops / best.flops, 0.9)


def bandwidth_targets(rows: list[Row], ceilings: dict) -> Iterator[Target]:
    for workload in ("write", "means"):
        members = [r for r in rows if r.workload == workload and r.case == BASE and r.dtype == "bfloat16"]
        ours = best_of_ours(members)
        if ours is not None:
            best = spread(ours.graph_seconds or ours.seconds)["median"]
            share = ours.nbytes / best / ceilings["bfloat16"]["bytes"]
            yield at_least(f"{workload}: share of the copy bandwidth", share, 0.8, "%")


def chunk_targets(rows: list[Row]) -> Iterator[Target]:
    members = [row for row in rows if row.workload == "stream" and row.case == BASE]
    for ours, published in pairs(members, "stream", (BASE,)):
        mode = "activated" if ours.activated else "dense"
        yield at_least(f"1.3B chunk, {mode}, against the published path", ratio(ours.seconds, published.seconds), 2)
        bare = next((row for row in members if row.provider == f"{PUBLISHED}, no bank"), None)
        if bare is not None:
            yield at_least(
                f"the same against the published path without a bank, {mode}", ratio(ours.seconds, bare.seconds), 1
            )
        share = ours.parts.get("memory", 0.0) / max(sum(ours.parts.values()), 1e-12)
        verdict = "reached" if share <= 0.01 else "NOT reached"
        yield Target(f"memory update: share of a chunk, {mode}", f"{share:.2%}", "<= 1%", verdict)
