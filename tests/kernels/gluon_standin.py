"""Runs the source of a Gluon kernel, as it is or with a fault planted in it, on the machine of gluon_machine.py."""

from __future__ import annotations

import builtins
import importlib
import inspect
import linecache
from pathlib import Path
from types import SimpleNamespace

import gluon_language as simulated
import torch
from gluon_blackwell import blackwell
from gluon_machine import KERNEL, Machine

import memflow_kernels

TRITON = "memflow_kernels.triton"
# Modules of the kernels' own source, which are run; all others that a kernel file imports are the real ones.
RUN = {
    f"{TRITON}.{name}"
    for name in ("gluon.names", "gluon.attention_parts", "attention_schedule", "attention_tiles")
}  # fmt: skip
GLUON = SimpleNamespace(jit=simulated.jit, language=simulated.language)
REPLACED = {
    "triton": SimpleNamespace(jit=simulated.jit, language=simulated.language),
    "triton.language": simulated.language,
    "triton.experimental": SimpleNamespace(gluon=GLUON),
    "triton.experimental.gluon": GLUON,
    "triton.experimental.gluon.language.nvidia.hopper": simulated.hopper,
    "triton.experimental.gluon.language.nvidia.blackwell": blackwell,
}


class Source:
    """The modules of a kernel, run with Gluon replaced; each fault (is, becomes) stands once in all of their text."""

    def __init__(self, module: str, faults: tuple[tuple[str, str], ...] = ()):
        self.faults, self.found = faults, dict.fromkeys(faults, 0)
        self.modules: dict[str, SimpleNamespace] = {}
        self.main = self.run(module)
        wrong = [fault[0] for fault, times in self.found.items() if times != 1]
        if wrong:
            raise ValueError(f"not once in the source of {module}: {wrong}")

    def run(self, module: str) -> SimpleNamespace:
        if module in self.modules:
            return self.modules[module]
        package, _, name = module.rpartition(".")
        text = Path(memflow_kernels.__file__).parents[1].joinpath(*module.split(".")).with_suffix(".py").read_text()
        for is_, becomes in self.faults:
            self.found[is_, becomes] += text.count(is_)
            text = text.replace(is_, becomes)

        def import_(wanted, globals_=None, locals_=None, fromlist=(), level=0):
            if level:
                parts = package.split(".")
                wanted = ".".join([*parts[: len(parts) - level + 1], *([wanted] if wanted else [])])
            if wanted in REPLACED:
                return REPLACED[wanted if fromlist else wanted.partition(".")[0]]
            if wanted in RUN:
                return self.run(wanted)
            return importlib.import_module(wanted) if level else __import__(wanted, globals_, locals_, fromlist)

        file = f"{KERNEL}{name}>"
        linecache.cache[file] = (len(text), None, text.splitlines(True), file)
        names = {"__name__": module, "__builtins__": {**vars(builtins), "__import__": import_}}
        exec(compile(text, file, "exec"), names)
        self.modules[module] = SimpleNamespace(**names)
        return self.modules[module]


class StandIn:
    """Launched like the kernel: stand_in.run(*arguments, grid=...); a seed is an order of events."""

    def __init__(self, module: str, kernel: str, seed: int = 0, faults: tuple[tuple[str, str], ...] = ()):
        self.kernel, self.seed = getattr(Source(f"{TRITON}.gluon.{module}", faults).main, kernel), seed
        parameters = inspect.signature(self.kernel).parameters.values()
        self.__name__, self.arg_names = kernel, [parameter.name for parameter in parameters]
        self.constants = [str(parameter.annotation) == "gl.constexpr" for parameter in parameters]
        self.histories: list[list[str]] = []  # of every program so far

    @property
    def programs(self) -> int:
        return len(self.histories)

    def run(self, *arguments: object, grid: tuple[int], warmup: bool, num_warps: int) -> None:
        pairs = zip(arguments, self.constants, strict=True)
        arguments = [x if constant else self._argument(x) for x, constant in pairs]
        for program in range(grid[0]):
            machine = Machine(1000 * self.seed + program)
            simulated.language.program_id = lambda axis, program=program: simulated.Scalar(program)
            self.kernel(*arguments)
            self.histories.append(machine.history)

    @staticmethod
    def _argument(x):
        if isinstance(x, torch.Tensor):
            return simulated.Pointer(x)
        if isinstance(x, int):
            return simulated.Scalar(x)
        return simulated.Descriptor(x) if hasattr(x, "block_shape") else x
