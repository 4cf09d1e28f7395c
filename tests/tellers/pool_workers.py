"""Workers for the tests of the pool, without a model: what they do is in the task."""

import os
import signal
import time
import warnings
from pathlib import Path

from memflow.errors import MemFlowError, MemFlowWarning


class Counting:
    """Counts to `steps`. log: a file that gets a line for every beginning and end. die: "once" or "always", kills its
    own process at step 1. fail: raises."""

    def __init__(self, index: int):
        self.index = index

    def tell(self, task, stopping):
        def note(text):
            with open(task["log"], "a") as file:
                file.write(text + "\n")

        note("begin")
        if task.get("fail"):
            raise task["fail"]
        if task.get("warn"):
            warnings.warn(task["warn"], MemFlowWarning, stacklevel=2)
        for step in range(task["steps"]):
            if stopping():
                note(f"saved at {step}")
                return
            if step == 1 and task.get("die") and (task["die"] == "always" or len(lines(task["log"])) == 1):
                time.sleep(0.5)  # what was said before reaches the other side
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(task.get("pause", 0))
            yield {"step": step, "pid": os.getpid()}
        note("end")


class Broken:
    def __init__(self, index: int):
        raise MemFlowError("there is no such model")


class Dying:
    def __init__(self, index: int):
        os.kill(os.getpid(), signal.SIGKILL)


def lines(path) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
