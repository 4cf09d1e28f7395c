"""What a kernel's loop does on the chip, read from its machine code: `python tests/kernels/machine_code.py CUBIN...`.

No GPU is needed. The loops that count are the innermost ones with products on the tensor cores. Their length is
counted along a path: the shortest is that of a full tile, the longest that of a tile whose end is masked; where a
barrier is not yet open a warp goes round a small loop of its own, which no path counts.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

PRODUCT = re.compile(r"\b(HGMMA|UTC\w*MMA|HMMA)\b")
MOST_FULL, MOST_MASKED = 560, 640  # instructions of a tile of 128 x 128 keys


class Instruction(NamedTuple):
    address: int
    text: str

    @property
    def target(self) -> int | None:
        """Where a branch leads."""
        found = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", self.text)
        return int(found[1], 16) if found else None

    @property
    def falls_through(self) -> bool:
        """Whether the next one can follow: not after a jump or an end without a condition."""
        kind, *modifiers = self.operation.split(".")
        conditional = self.text.startswith("@") or {"DIV", "CONV"} & {*modifiers} or re.search(r"\bUP\d", self.text)
        return bool(conditional) or kind not in ("BRA", "BRX", "JMP", "EXIT", "RET")

    @property
    def operation(self) -> str:
        return re.sub(r"^@!?U?P\w+\s+", "", self.text).split(maxsplit=1)[0]


def listing(cubin: bytes) -> list[Instruction]:
    """The instructions of a cubin of one kernel, in order of their addresses, by the cuobjdump that triton brings."""
    import triton  # the parser below needs none

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}  # cuobjdump runs nvdisasm
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tools / "cuobjdump", "--dump-sass", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return parse(said.stdout)


def parse(text: str) -> list[Instruction]:
    found = re.finditer(r"/\*([0-9a-f]{4,5})\*/\s+(.*?)\s*;", text)
    return [Instruction(int(m[1], 16), m[2]) for m in found]


def reached(starts: set[int], leads: dict[int, set[int]], but_for: int | None = None) -> set[int]:
    """Every address that the starts lead to, themselves included, on ways that do not meet `but_for`."""
    found, work = set(), list(starts - {but_for})
    while work:
        address = work.pop()
        if address not in found:
            found.add(address)
            work.extend(leads[address] - {but_for})
    return found


class Flow:
    """Where each instruction can go on, and where from it comes."""

    def __init__(self, code: list[Instruction]):
        after = {a.address: {b.address} for a, b in itertools.pairwise(code)}
        self.code = {i.address: i for i in code}
        self.leads = {
            i.address: ({i.target} & self.code.keys()) | (after.get(i.address, set()) if i.falls_through else set())
            for i in code
        }
        self.comes = {i.address: set() for i in code}
        for source, targets in self.leads.items():
            for target in targets:
                self.comes[target].add(source)
        # beside the first those that only a table of addresses leads to: the roles of warps
        self.entries = {code[0].address} | {a for a, sources in self.comes.items() if not sources}

    def loop(self, head: int, latch: int) -> Loop | None:
        """The loop that the jump at `latch` closes; None where it is none: not behind its head, or reached past it."""
        if latch not in reached({head}, self.leads) or latch in reached(self.entries, self.leads, but_for=head):
            return None
        inside = reached({latch}, self.comes, but_for=head) | {head}
        return Loop(head, latch, {a: self.code[a] for a in sorted(inside)}, self.leads)


class Loop:
    """One loop: its instructions by address, and where each goes on inside. body: with those that no path has."""

    def __init__(self, head: int, latch: int, code: dict[int, Instruction], leads: dict[int, set[int]]):
        self.head, self.latch, self.body = head, latch, code.keys()
        inner = {a: {t for t in leads[a] if t in code and t != head} for a in code}
        comes = {a: set() for a in code}
        for source, targets in inner.items():
            for target in targets:
                comes[target].add(source)
        # small loops in which a closed barrier is tried again: whatever lies between a jump back and its target
        back = [(source, target) for source, targets in inner.items() for target in targets if target <= source]
        waiting = [reached({target}, inner) & reached({source}, comes) for source, target in back]
        self.code = {a: i for a, i in code.items() if not any(a in loop for loop in waiting)}
        self.leads = {a: inner[a] & self.code.keys() for a in self.code}

    def path(self, longest: bool) -> list[Instruction]:
        """From the head to the jump back: the shortest way, or the longest."""
        best: dict[int, tuple | None] = {}
        for address in self._backwards():
            ways = [best[t] for t in self.leads[address] if best[t]]
            if address == self.latch:
                best[address] = (1, address, None)
            else:
                way = (max if longest else min)(ways, key=lambda x: x[0], default=None)
                best[address] = way and (way[0] + 1, address, way)
        found, way = [], best[self.head]
        while way:
            found.append(self.code[way[1]])
            way = way[2]
        return found

    def _backwards(self) -> list[int]:
        """All addresses after the head, each behind those that it leads to."""
        order, seen, work = [], {self.head}, [(self.head, iter(self.leads[self.head]))]
        while work:  # depth first, without recursion: the loop is long
            here, rest = work[-1]
            following = next((t for t in rest if t not in seen), None)
            if following is None:
                order.append(here)
                work.pop()
            else:
                seen.add(following)
                work.append((following, iter(self.leads[following])))
        return order


def loops(code: list[Instruction]) -> list[Loop]:
    """The innermost loops with at least 8 products."""
    flow = Flow(code)
    jumps = [i for i in code if i.operation == "BRA" and i.target is not None and i.target < i.address]
    found = [loop for i in jumps if (loop := flow.loop(i.target, i.address))]
    found = [x for x in found if sum(bool(PRODUCT.search(i.text)) for i in x.code.values()) >= 8]
    return [x for x in found if not any(y.body < x.body for y in found)]


class Reading(NamedTuple):
    """Of one loop: instructions of a full and of a masked tile, then what the bar looks at."""

    full: int
    masked: int
    products: int
    exponentials: int
    overlapped: int  # exponentials while a product is in flight
    block_barriers: int  # every warp of the block waits
    loads: int
    conversions: int  # numbers converted one by one
    barriers: tuple[str, ...]  # what is waited for, by its place in shared memory

    def faults(self) -> list[str]:
        """What keeps the loop below the bar."""
        found = {
            f"{self.block_barriers} block-wide barriers": self.block_barriers,
            f"{self.loads} loads by the warps that multiply": self.loads,
            f"{self.overlapped} of {self.exponentials} exponentials while a product is in flight": (
                2 * self.overlapped < self.exponentials
            ),
            f"{self.conversions} scalar conversions": self.conversions,
            f"{self.full} instructions for a full tile": self.full > MOST_FULL,
            f"{self.masked} instructions for a masked tile": self.masked > MOST_MASKED,
            f"only {len(self.barriers)} kinds of barriers waited for": len(self.barriers) < 2,
        }
        return [fault for fault, true in found.items() if true]


def _overlapped(path: list[Instruction]) -> int:
    """Exponentials of a loop that has been running for a while at which a group of products is in flight."""
    flying, found = 0, 0
    for _turn in range(2):
        found = 0
        for i in path:
            if PRODUCT.search(i.text) and "gsb0" in i.text:
                flying += 1
            if wait := re.search(r"DEPBAR\.LE gsb0, (0x[0-9a-f]+)", i.text):
                flying = min(flying, int(wait[1], 16))
            found += "MUFU.EX2" in i.text and flying > 0
    return found


def read(loop: Loop) -> Reading:
    full, masked = loop.path(longest=False), loop.path(longest=True)
    count = lambda pattern, path=masked: sum(bool(re.search(pattern, i.text)) for i in path)  # noqa: E731
    waits = (re.search(r"PHASECHK.*\[.*?(0x[0-9a-f]+)?\]", i.text) for i in masked)
    return Reading(
        full=len(full),
        masked=len(masked),
        products=count(PRODUCT),
        exponentials=count(r"MUFU\.EX2", full),
        overlapped=_overlapped(full),
        block_barriers=count(r"BAR\.SYNC\S* (0x[0-9a-f]+|R\d+)\s*$"),  # without a number of threads
        loads=count(r"\b(UTMALDG|UBLKCP|LDGSTS|LDG|LD)\b"),
        conversions=count(r"\bF2F\b"),
        barriers=tuple(sorted({w[1] or "0x0" for w in waits if w})),
    )


def spills(code: list[Instruction]) -> int:
    return sum(bool(re.search(r"\b(STL|LDL)\b", i.text)) for i in code)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        code = listing(Path(name).read_bytes())
        print(f"{name}: {len(code)} instructions, {spills(code)} of them spill")
        for loop in loops(code):
            reading = read(loop)
            print(f"  {reading}\n    {'; '.join(reading.faults()) or 'meets the bar'}")
