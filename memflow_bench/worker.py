"""One build's side of a comparison: reads wishes from stdin and answers on stdout, a line of JSON each."""

from __future__ import annotations

import json
import os
import sys

from .pinning import pin_threads

pin_threads()

import torch  # noqa: E402 (before anything else that brings an OpenMP runtime)

from .timing import Flush, sample  # noqa: E402


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what anything else prints does not get between the answers
    state: dict = {}
    for line in sys.stdin:
        try:
            answer = handle(json.loads(line), state)
        except Exception as error:  # the other side reports it and goes on
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def handle(wish: dict, state: dict) -> dict:

    torch.set_grad_enabled(False)
    if "sample" in wish:
        return {"seconds": sample(state["run"], state["device"], state["flush"])}
    state.clear()
    wanted = wish["prepare"]
    from memflow_kernels.backends import current_backend

    from .cases import Case
    from .providers import PROVIDERS
    from .runner import DTYPES
    from .workloads import WORKLOADS

    device = torch.device(wanted["device"])
    case = Case(**{**wanted["case"], "grid": tuple(wanted["case"]["grid"])})
    workload = WORKLOADS[wanted["workload"]](case, wanted["activated"], DTYPES[wanted["dtype"]], device)
    run = PROVIDERS[f"ours ({current_backend(device)})"].prepare(wanted["workload"], workload.state)
    verdict = workload.check(run())
    if not verdict.right:
        raise ValueError(f"wrong: relative error {verdict.error:.2g}, allowed {verdict.allowed:.2g}")
    state |= {"run": run, "device": device, "flush": Flush(device)}
    return {"error_against_float64": verdict.error}


if __name__ == "__main__":
    main()
