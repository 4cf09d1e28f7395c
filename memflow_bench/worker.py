"""One side of a comparison: reads wishes from stdin and answers on stdout, a line of JSON each."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial

from .pinning import pin_threads

pin_threads()

import torch  # noqa: E402 (before anything else that brings an OpenMP runtime)

from .cases import Case  # noqa: E402
from .experiments import DTYPES  # noqa: E402
from .providers.choice import provider_named  # noqa: E402
from .runner import in_a_line  # noqa: E402
from .timing import Flush, sample  # noqa: E402
from .workloads import WORKLOADS  # noqa: E402

WARM = 3  # calls before the first that counts
PATIENCE = 0.001  # seconds: the other side's threads spin for a while after their last call


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is answered by the process that started this one
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what anything else prints does not get between the answers
    torch.set_grad_enabled(False)
    side: Side | None = None
    for line in sys.stdin:
        wish = json.loads(line)
        try:
            if "prepare" in wish:
                side = None  # its memory goes before the next one's comes
                side = Side(**wish["prepare"])
                answer = {"seconds": side.warm()}
            else:
                answer = {"seconds": side.sample(**wish["sample"])}
        except (Exception, SystemExit) as error:  # the other side reports it and goes on
            answer = {"error": in_a_line(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


class Side:
    """A provider on a workload, checked and compiled."""

    def __init__(
        self,
        workload: str,
        case: dict,
        dtype: str,
        activated: bool,
        device: str,
        provider: str,
        threads: int,
        cold: bool,
    ):
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        self.device = torch.device(device)
        sizes = Case(**{**case, "grid": tuple(case["grid"])})
        self.workload = WORKLOADS[workload](sizes, activated, DTYPES[dtype], self.device)
        chosen = provider_named(provider, self.device)
        reason = chosen.missing(self.device, DTYPES[dtype])
        if reason is not None:
            raise ValueError(f"{chosen.name} cannot run here: {reason}")
        self.run = chosen.prepare(workload, self.workload.state)
        if self.run is None:
            raise ValueError(f"{chosen.name} has no method {workload!r}")
        self.flush = Flush(self.device) if cold else None

    def warm(self) -> float:
        """Seconds that a call takes with all that goes before it, after the first few; every one is checked."""
        self.check(self.run())
        for _ in range(WARM):
            begin = time.perf_counter()
            self.workload.turn()
            _, returned = sample(self.run, self.device, self.flush)
            seconds = time.perf_counter() - begin
            if self.workload.turns:
                self.check(returned)
        return seconds

    def sample(self, calls: int, slower: float = 0.0) -> float:
        """Seconds of one call, the fastest of `calls`, each with other inputs than the one before; the last is checked.

        What other work does to a call only makes it longer, so that the fastest says most about the call itself.
        slower: holds up every call by this share of its time.
        """
        time.sleep(PATIENCE)
        run = self.run if not slower else partial(_slowed, self.run, slower)
        taken, returned = [], None
        for _ in range(calls):
            self.workload.turn()
            seconds, returned = sample(run, self.device, self.flush)
            taken.append(seconds)
        if self.workload.turns:
            self.check(returned)
        return min(taken)

    def check(self, returned: object) -> None:
        verdict = self.workload.check(returned)
        if not verdict.right:
            raise ValueError(f"wrong: relative error {verdict.error:.2g}, allowed {verdict.allowed:.2g}")


def _slowed(run: Callable[[], object], share: float) -> object:
    """`run`, held up for this share of the time that it took, by a loop that keeps the core busy. Work of a fixed size
    would have to be measured first: meant to be 5 %, it was 5 to 7, as caches and other work would have it."""
    begin = time.perf_counter()
    returned = run()
    end = begin + (time.perf_counter() - begin) * (1 + share)
    while time.perf_counter() < end:
        pass
    return returned


if __name__ == "__main__":
    main()
