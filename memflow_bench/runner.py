"""Runs experiments: every provider is checked against float64, those that are right are timed in turns."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from .experiments import DTYPES, Experiment
from .memory import peak_bytes
from .providers import Provider
from .rows import Row
from .timing import captured, in_turns
from .workloads import WORKLOADS, Workload

Run = Callable[[], object]
Timed = dict[int, tuple[Run, Workload]]  # by the number of the row


def run_experiment(
    experiment: Experiment,
    providers: Iterable[Provider],
    device: torch.device,
    *,
    wished: bool = False,
    cold: bool = True,
    graphs: bool = False,
    say: Callable[[str], None] = print,
) -> list[Row]:
    """One row per provider and mode. A row that is not right, or cannot run, has a reason and no time.

    wished: a user named these providers; all that know the workload take part.
    """
    dtype, kind = DTYPES[experiment.dtype], WORKLOADS[experiment.workload]
    modes = experiment.modes if kind.takes_top_k else (False,)
    rows: list[Row] = []
    timed: Timed = {}
    with torch.no_grad():
        for activated in modes:
            there = [p for p in providers if wished or not experiment.only or p.name in experiment.only]
            there = [provider for provider in there if hasattr(provider, experiment.workload)]
            try:
                workload = kind(experiment.case, activated, dtype, device)
            except Exception as error:  # a package is missing, the machine is too small, the case has no such thing
                missing = isinstance(error, ModuleNotFoundError)
                reason = f"the module {error.name} is not installed" if missing else in_a_line(error)
                say(f"  missing {reason}")
                rows += [_row(experiment, activated, p, device, "missing", reason) for p in there]
                continue
            for provider in there:
                say(f"  {provider.name}{', activated' if activated else ''} ...")  # named, should the process die
                row, run = _checked(experiment, workload, activated, provider, device)
                if row.status == "ok":
                    timed[len(rows)] = run, workload
                rows.append(row)
                say(f"  {provider.name}{', activated' if activated else ''}: {row.status} {row.reason}".rstrip())
        _time(rows, timed, experiment, device, cold)
        if graphs and device.type == "cuda":
            _time_graphs(rows, timed, experiment, device, cold)
    return rows


def _row(experiment: Experiment, activated: bool, provider: Provider, device: torch.device, *status: str) -> Row:
    where = experiment.workload, experiment.case.name, activated, experiment.dtype, device.type
    return Row(*where, provider.name, experiment.title, *status)


def _checked(
    experiment: Experiment, workload: Workload, activated: bool, provider: Provider, device: torch.device
) -> tuple[Row, Run | None]:
    row = _row(experiment, activated, provider, device)
    row.flops, row.nbytes = workload.flops(), workload.nbytes()
    run = None
    try:
        reason = provider.missing(device, workload.dtype)
        if reason is not None:
            row.status, row.reason = "missing", str(reason)
            return row, None
        with workload.inputs_kept():
            run = provider.prepare(experiment.workload, workload.state)
            if not callable(run):
                raise TypeError(f"{experiment.workload}(state) returned {type(run).__name__}, needed a callable")
            if workload.warm_first:
                run()
            returned, row.peak_bytes = peak_bytes(run, device)
        judge(row, workload, returned)
    except (Exception, SystemExit) as error:  # whatever a peer does wrong: it is reported, and the others go on
        judge(row, workload, error)
    return row, run


def judge(row: Row, workload: Workload, returned: object, later: bool = False) -> bool:
    """Whether a result, or the exception in its place, is right; if not the row says why, and loses its times.

    later: the result is that of a timed call, after the inputs have changed.
    """
    try:
        if isinstance(returned, BaseException):
            raise returned
        verdict = workload.check(returned)
    except (Exception, SystemExit) as error:
        row.status, row.reason = "failed", in_a_line(error)
    else:
        row.error, row.allowed = max(row.error or 0.0, verdict.error), verdict.allowed
        if verdict.right:
            return True
        row.status = "wrong"
        row.reason = f"relative error {verdict.error:.2g} against float64, allowed {verdict.allowed:.2g}"
        if later:
            row.reason += "; its first result was right: it does not follow inputs that change in place"
    row.seconds, row.graph_seconds = [], []
    return False


def in_a_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300].replace("|", "/")


def _time(rows: list[Row], timed: Timed, experiment: Experiment, device: torch.device, cold: bool) -> None:
    runs = {index: run for index, (run, _) in timed.items()}
    for samples in _rounds(rows, timed, runs, device, cold, experiment.budget, experiment.least):
        for index, seconds in samples.items():
            rows[index].seconds.append(seconds)


def _time_graphs(rows: list[Row], timed: Timed, experiment: Experiment, device: torch.device, cold: bool) -> None:
    replays = {}
    for index, (run, _) in timed.items():
        try:
            replays[index] = captured(run, device)
        except RuntimeError:
            torch.cuda.synchronize(device)  # it waits for the host somewhere: it has times by events only
    for samples in _rounds(rows, timed, replays, device, cold, experiment.budget / 2, experiment.least):
        for index, seconds in samples.items():
            rows[index].graph_seconds.append(seconds)


def _rounds(rows: list[Row], timed: Timed, runs: dict[int, Run], device, cold: bool, budget: float, least: int):
    """Rounds of the rows that are still right. Inputs change before each, and what is timed is checked."""
    runs = {index: run for index, run in runs.items() if rows[index].status == "ok"}
    if not runs:
        return iter(())
    workloads = {id(workload): workload for _, workload in timed.values()}.values()

    def turn() -> None:
        for workload in workloads:
            workload.turn()

    def right(index: int, returned: object) -> bool:
        workload = timed[index][1]
        if isinstance(returned, BaseException) or workload.turns:
            return judge(rows[index], workload, returned, later=True)
        return True  # its calls change the state, so that only the first has a known result

    return in_turns(runs, device, budget=budget, least=least, cold=cold, turn=turn, judge=right)
