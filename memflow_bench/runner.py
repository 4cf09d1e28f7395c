"""Runs experiments: every provider is checked against float64, those that are right are timed in turns."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from .cases import Case
from .memory import peak_bytes
from .providers import Provider
from .rows import Row
from .timing import captured, in_turns
from .workloads import WORKLOADS, Workload

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Experiment:
    """A workload on a case, timed for all providers together, so that their samples alternate.

    modes: False = dense, True = activated; both are timed in the same rounds. budget: seconds of timing. least: rounds
    at any cost. only: names of the providers that take part; empty = all. dense_only: those that take part dense alone.
    """

    workload: str
    case: Case
    dtype: str
    modes: tuple[bool, ...] = (False, True)
    budget: float = 5.0
    least: int = 3
    only: tuple[str, ...] = ()
    dense_only: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        return f"{self.workload} {self.case.name} {self.dtype}"


def run_experiment(
    experiment: Experiment,
    providers: Iterable[Provider],
    device: torch.device,
    *,
    cold: bool = True,
    graphs: bool = False,
    say: Callable[[str], None] = print,
) -> list[Row]:
    """One row per provider and mode. A row that is not right, or cannot run, has a reason and no time."""
    dtype, kind = DTYPES[experiment.dtype], WORKLOADS[experiment.workload]
    modes = experiment.modes if kind.takes_top_k else (False,)
    rows: list[Row] = []
    timed: dict[int, Callable[[], object]] = {}
    with torch.no_grad():
        for activated in modes:
            workload = kind(experiment.case, activated, dtype, device)
            for provider in _taking_part(experiment, providers, activated):
                row, run = _checked(experiment, workload, activated, provider, device)
                if row.status == "ok":
                    timed[len(rows)] = run
                rows.append(row)
                say(f"  {provider.name}{', activated' if activated else ''}: {row.status} {row.reason}".rstrip())
        _time(rows, timed, experiment, device, cold)
        if graphs and device.type == "cuda":
            _time_graphs(rows, timed, experiment, device, cold)
    return rows


def _taking_part(experiment: Experiment, providers: Iterable[Provider], activated: bool) -> list[Provider]:
    chosen = [provider for provider in providers if not experiment.only or provider.name in experiment.only]
    if activated:
        chosen = [provider for provider in chosen if provider.name not in experiment.dense_only]
    return [provider for provider in chosen if hasattr(provider, experiment.workload)]


def _checked(
    experiment: Experiment, workload: Workload, activated: bool, provider: Provider, device: torch.device
) -> tuple[Row, Callable[[], object] | None]:
    row = Row(
        workload=experiment.workload,
        case=experiment.case.name,
        activated=activated,
        dtype=experiment.dtype,
        device=device.type,
        provider=provider.name,
        group=experiment.title,
        flops=workload.flops(),
        nbytes=workload.nbytes(),
    )
    reason = provider.missing(device, workload.dtype)
    if reason is not None:
        row.status, row.reason = "missing", reason
        return row, None
    run = None
    try:
        run = provider.prepare(experiment.workload, workload.state)
        if workload.warm_first:
            run()
        returned, row.peak_bytes = peak_bytes(run, device)
        verdict = workload.check(returned)
    except Exception as error:  # whatever a peer does wrong: it is reported, and the others go on
        row.status, row.reason = "failed", f"{type(error).__name__}: {error}".splitlines()[0][:300]
    else:
        row.error, row.allowed = verdict.error, verdict.allowed
        if not verdict.right:
            row.status = "wrong"
            row.reason = f"relative error {verdict.error:.2g} against float64, allowed {verdict.allowed:.2g}"
    return row, run


def _time(rows: list[Row], timed: dict, experiment: Experiment, device: torch.device, cold: bool) -> None:
    if not timed:
        return
    for samples in in_turns(timed, device, budget=experiment.budget, least=experiment.least, cold=cold):
        for index, seconds in samples.items():
            rows[index].seconds.append(seconds)


def _time_graphs(rows: list[Row], timed: dict, experiment: Experiment, device: torch.device, cold: bool) -> None:
    replays = {}
    for index, run in timed.items():
        try:
            replays[index] = captured(run, device)
        except RuntimeError:
            torch.cuda.synchronize(device)  # it waits for the host somewhere: it has times by events only
    if not replays:
        return
    for samples in in_turns(replays, device, budget=experiment.budget / 2, least=experiment.least, cold=cold):
        for index, seconds in samples.items():
            rows[index].graph_seconds.append(seconds)
