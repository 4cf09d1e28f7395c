"""Which Triton kernels a run of the tests needs, and how long they take to compile: without a GPU.

`python tests/kernels/launches.py record FILE PYTEST_ARGUMENTS...` runs tests through Triton's interpreter and writes
down every distinct specialisation that a GPU would compile. `... compile FILE --chip sm_90 --jobs 2` compiles them, in
parallel processes, and prints the table.
"""

from __future__ import annotations

import argparse
import collections
import importlib
import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent


def described(value: object) -> list:
    """A launch's argument by what Triton specialises on."""
    import torch
    from triton.tools.tensor_descriptor import TensorDescriptor

    if isinstance(value, torch.Tensor):
        return ["tensor", str(value.dtype).removeprefix("torch."), value.data_ptr() % 16]
    if isinstance(value, TensorDescriptor):
        return ["descriptor", str(value.base.dtype).removeprefix("torch."), list(value.block_shape), len(value.shape)]
    if isinstance(value, bool) or value is None:
        return ["is", value]
    if isinstance(value, int):
        return ["int", 1 if value == 1 else 16 if value % 16 == 0 else 3, abs(value) >= 2**31]
    if isinstance(value, float):
        return ["float"]
    return ["is", str(value)]


class Recorder:
    """A pytest plugin. launches: the distinct ones, as JSON; number: of all."""

    def __init__(self) -> None:
        self.launches: set[str] = set()
        self.number = 0

    def pytest_sessionstart(self) -> None:
        from triton.runtime.interpreter import GridExecutor

        run = GridExecutor.__call__

        def noted(executor, *args, **kwargs):
            fn = executor.fn
            names = list(fn.__code__.co_varnames[: fn.__code__.co_argcount])
            given = dict(zip(names, args, strict=False)) | kwargs
            constants = {n for n in names if "constexpr" in str(fn.__annotations__.get(n, ""))}
            free = set(unspecialised(fn))
            row = {"module": fn.__module__, "kernel": fn.__name__, "arguments": {}, "options": {}}
            for name, value in given.items():
                if name not in names or name in constants:
                    row["options"][name] = value
                else:
                    kind = described(value)
                    row["arguments"][name] = ["int", 3, False] if kind[0] == "int" and name in free else kind
            self.launches.add(json.dumps(row, sort_keys=True, default=str))
            self.number += 1
            return run(executor, *args, **kwargs)

        GridExecutor.__call__ = noted


def unspecialised(fn) -> list[str]:
    """The arguments that a kernel's decorator names as not to be specialised on."""
    import inspect
    import re

    source = inspect.getsource(fn)
    head = source[: source.index("def ")]
    return re.findall(r'"(\w+)"', head) if "do_not_specialize" in head else []


def record(file: Path, arguments: list[str]) -> int:
    import pytest

    recorder = Recorder()
    code = pytest.main(["-q", "-p", "no:cacheprovider", *arguments], plugins=[recorder])
    file.write_text("\n".join(sorted(recorder.launches)) + "\n")
    print(f"{recorder.number} launches, {len(recorder.launches)} distinct kernels")
    return int(code)


def rebuilt(kind: list):
    """A value that Triton specialises on as it did on the one described."""
    import torch
    from triton.tools.tensor_descriptor import TensorDescriptor

    if kind[0] == "tensor":
        dtype = getattr(torch, kind[1])
        at = kind[2] // dtype.itemsize
        return torch.empty(64, dtype=dtype, device="meta")[at:]
    if kind[0] == "descriptor":
        rank = kind[3]
        base = torch.empty(64, dtype=getattr(torch, kind[1]), device="meta")
        return TensorDescriptor(base, [1024] * rank, [4096] * (rank - 1) + [1], kind[2])
    if kind[0] == "int":
        return (1 if kind[1] == 1 else 32 if kind[1] == 16 else 33) + (2**32 if kind[2] and kind[1] != 1 else 0)
    return 0.5 if kind[0] == "float" else kind[1]


def compile_some(chip: str, lines: list[str]) -> list[tuple[str, float]]:
    """(kernel, seconds) of each launch."""
    sys.path.insert(0, str(HERE))
    sys.path.insert(0, str(HERE.parents[1]))
    import aot
    import torch
    import triton

    triton.runtime.driver.set_active(aot.Driver(aot.TARGETS[chip]))
    torch.Tensor.data_ptr = lambda x: x.storage_offset() * x.element_size()
    rows = []
    for line in lines:
        row = json.loads(line)
        kernel = getattr(importlib.import_module(row["module"]), row["kernel"])
        start = time.perf_counter()
        kernel.warmup(**{n: rebuilt(kind) for n, kind in row["arguments"].items()}, **row["options"], grid=(1,))
        rows.append((row["kernel"], time.perf_counter() - start))
    return rows


def compile_all(file: Path, chip: str, jobs: int) -> None:
    lines = file.read_text().splitlines()
    start = time.perf_counter()
    with ProcessPoolExecutor(jobs) as pool:
        shares = [lines[i :: jobs * 4] for i in range(jobs * 4)]
        done = [row for rows in pool.map(compile_some, [chip] * len(shares), shares) for row in rows]
    wall = time.perf_counter() - start
    by_kernel = collections.defaultdict(list)
    for kernel, seconds in done:
        by_kernel[kernel].append(seconds)
    print(f"{'kernel':28} {'number':>6} {'seconds':>8}")
    for kernel, seconds in sorted(by_kernel.items(), key=lambda item: -sum(item[1])):
        print(f"{kernel:28} {len(seconds):6} {sum(seconds):8.1f}")
    print(f"{'all':28} {len(done):6} {sum(s for _, s in done):8.1f}   {wall:.0f} s with {jobs} processes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=["record", "compile"])
    parser.add_argument("file", type=Path)
    parser.add_argument("--chip", default="sm_90")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options, rest = parser.parse_known_args()
    if options.action == "record":
        os.environ["TRITON_INTERPRET"] = "1"
        raise SystemExit(record(options.file, rest))
    os.environ.pop("TRITON_INTERPRET", None)
    compile_all(options.file, options.chip, options.jobs)
