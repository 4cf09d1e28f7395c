"""What can be measured, as data: one class per kind of experiment. Needs torch alone; what runs them may need more."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from .cases import Case

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Experiment:
    """A workload on a case, timed for all providers together, so that their samples alternate.

    modes: False = dense, True = activated; both are timed in the same rounds. budget: seconds of timing. least: rounds
    at any cost. only: names of the providers that take part; empty = all. Those that a user names always take part.
    """

    workload: str
    case: Case
    dtype: str
    modes: tuple[bool, ...] = (False, True)
    budget: float = 5.0
    least: int = 3
    only: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        return f"{self.workload} {self.case.name} {self.dtype}"


@dataclass(frozen=True)
class StreamExperiment:
    """case "toy": a whole story of the embedded model, decoded; any other: chunks in the middle of a story of a random
    model of the case's size. backends: of ours. budget: seconds of timing."""

    case: Case
    dtype: str = "float32"
    backends: tuple[str, ...] = ("torch",)
    modes: tuple[bool, ...] = (False, True)
    without_memory: bool = False
    budget: float = 20.0
    least: int = 2

    @property
    def title(self) -> str:
        return f"stream {self.case.name} {self.dtype}"


@dataclass(frozen=True)
class Way:
    """A way of running the loop. allowed: relative error of a chunk's latents against the plain way."""

    name: str
    allowed: float
    compiled: bool = False
    graphs: bool = False
    float8: bool = False


PLAIN = Way("eager", 0.0)
WAYS = (
    PLAIN,
    Way("compiled", 2e-2, compiled=True),
    Way("compiled, CUDA graphs", 2e-2, compiled=True, graphs=True),
    Way("compiled, float8", 0.3, compiled=True, float8=True),
    Way("compiled, float8, CUDA graphs", 0.3, compiled=True, graphs=True, float8=True),
)


@dataclass(frozen=True)
class RealtimeExperiment:
    """vae: arguments of AutoencoderKLWan, by default those of Wan 2.1; tiny: those of TinyVideoDecoder (taew2_1)."""

    case: Case
    dtype: str = "bfloat16"
    ways: tuple[Way, ...] = WAYS
    vae: dict = field(default_factory=dict)
    tiny: dict = field(default_factory=dict)
    budget: float = 60.0
    least: int = 3

    @property
    def title(self) -> str:
        return f"realtime {self.case.name} {self.dtype}"


AnyExperiment = Experiment | StreamExperiment | RealtimeExperiment


def workload_of(experiment: AnyExperiment) -> str:
    return experiment.workload if isinstance(experiment, Experiment) else experiment.title.split()[0]
