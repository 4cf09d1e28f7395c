"""Denoising and clean passes as CUDA graphs: captured once per size of what attention sees, then replayed.

A pass launches some thousand kernels; where the model is small or fast the host cannot keep up. All that changes from
pass to pass is copied into tensors that keep their place: latents, timestep, the pass's slots and first frame, and the
prompt. The keys and values of the memory stay where they are: a stream's pool never moves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from memflow.errors import MemFlowError

if TYPE_CHECKING:
    from memflow.memory.attention import Pass
    from memflow.memory.views import Prompt

EAGER_CALLS = 8  # of a size, before it is captured: most sizes of a memory that still grows are gone by then


@dataclass
class Captured:
    """A captured pass: where its inputs lie, how to run it again, and where its flow is then; a clean pass has none."""

    latents: Tensor
    timestep: Tensor
    step: Pass
    replay: Callable[[], None]
    flow: Tensor | None


@dataclass
class OwnPrompt:
    """A copy of a prompt's keys and values that stays where it is, and the prompt that it is of. All passes read it."""

    copy: Prompt
    of: Prompt


class GraphedPasses:
    """The passes of one stream: the same arguments, the same results.

    Args:
        transformer: on a GPU, its weights staying where they are while the stream runs.
        denoise: runs it: flow = denoise(latents, timestep, step).
        write_clean: runs it for what it writes: write_clean(latents, step).
    """

    def __init__(
        self,
        transformer: WanTransformer3DModel,
        denoise: Callable[[Tensor, float | Tensor, Pass], Tensor],
        write_clean: Callable[[Tensor, Pass], None],
    ):
        require_gpu(transformer)
        self._denoise, self._write_clean = denoise, write_clean
        self.record = Recorder(transformer.device)
        self.calls: Counter[Hashable] = Counter()
        self.captured: dict[Hashable, Captured] = {}
        self.prompts: dict[Hashable, OwnPrompt] = {}
        self.layout: Hashable = None

    def follow(self, layout: Hashable) -> None:
        """Forget what was captured where `layout`, of the transformer's layers and weights, is another than before."""
        if layout != self.layout:
            self.captured.clear()
            self.prompts.clear()
        self.layout = layout

    def denoise(self, latents: Tensor, timestep: float, step: Pass) -> Tensor:
        """Flow [B, C, F, h, w]."""
        captured = self._ready("denoise", self._denoise, latents, step)
        if captured is None:
            return self._denoise(latents, timestep, step)
        captured.timestep.fill_(timestep)
        captured.replay()
        return captured.flow.clone()

    def write_clean(self, latents: Tensor, step: Pass) -> None:
        """Keys and values of the pass's frames, into the memory."""
        run = lambda latents, timestep, step: self._write_clean(latents, step)  # noqa: E731 - it is always at time 0
        captured = self._ready("clean", run, latents, step)
        if captured is None:
            self._write_clean(latents, step)
        else:
            captured.replay()

    def _ready(self, kind: str, run: Callable, latents: Tensor, step: Pass) -> Captured | None:
        """The captured pass with these inputs in place, but for the time; None while sizes like these are new."""
        size = kind, _size(latents, step)
        if size not in self.captured:
            self.calls[size] += 1
            if self.calls[size] <= EAGER_CALLS:
                return None
            self.captured[size] = self._capture(run, latents, step)
        captured = self.captured[size]
        captured.latents.copy_(latents)
        for place, value in zip(_changing(captured.step), _changing(step), strict=True):
            place.copy_(value)
        self._own_prompt(step.prompt)
        return captured

    def _capture(self, run: Callable, latents: Tensor, step: Pass) -> Captured:
        latents = latents.clone()
        timestep = torch.zeros(latents.shape[0], dtype=torch.float32, device=latents.device)
        own = {name: value.clone() for name, value in step._asdict().items() if isinstance(value, Tensor)}
        own_step = step._replace(**own, prompt=self._own_prompt(step.prompt))
        replay, flow = self.record(lambda: run(latents, timestep, own_step))
        return Captured(latents, timestep, own_step, replay, flow)

    def _own_prompt(self, prompt: Prompt) -> Prompt:
        """The copy of `prompt` that captured passes read, which becomes one of it where it is of another."""
        shapes = tuple(_kind(part) for part in prompt)
        own = self.prompts.get(shapes)
        if own is None:
            own = self.prompts[shapes] = OwnPrompt(prompt._make(part.clone() for part in prompt), prompt)
        elif own.of is not prompt:
            for place, value in zip(own.copy, prompt, strict=True):
                place.copy_(value)
            own.of = prompt
        return own.copy


class Recorder:
    """Captures what one stream launches on `device`, which need not be the current one.

    Its graphs share a side stream and one pool of memory: they are replayed one at a time, each result being copied
    before the next, so that each can use again what the others used for passing results on.
    """

    def __init__(self, device: torch.device):
        self.device = device
        with torch.cuda.device(device):
            self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Tensor | None]) -> tuple[Callable[[], None], Tensor | None]:
        """A function that replays what `run` launches, and the tensor that then holds its result."""
        with torch.cuda.device(self.device):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                result = run()

        def replay() -> None:
            with torch.cuda.device(self.device):
                graph.replay()

        return replay, result


def require_gpu(transformer: WanTransformer3DModel) -> None:
    """MemFlowError where the transformer is not on a GPU for good."""
    if transformer.device.type != "cuda":
        raise MemFlowError(f"CUDA graphs need a model on a GPU; this one is on {transformer.device}")
    if hasattr(transformer, "_hf_hook"):
        raise MemFlowError("CUDA graphs need weights that stay where they are; this model is offloaded")


def _changing(step: Pass) -> list[Tensor]:
    """The fields of a pass that lie on the device."""
    return [value for value in step if isinstance(value, Tensor)]


def _kind(x: Tensor) -> Hashable:
    return tuple(x.shape), x.dtype


def _size(latents: Tensor, step: Pass) -> Hashable:
    """All that a captured pass fixes: shapes, the numbers in `step`, and the place of the pool and of what lies beside.

    The tensors of all layers are views of one, so that the first layer's say where they lie.
    """
    others = (step.prompt, step.pools, step.unplaced, step.block_means)
    numbers = tuple(v for v in step if not isinstance(v, Tensor) and all(v is not other for other in others))
    kinds = tuple(_kind(x) for x in (latents, *_changing(step), *step.prompt))
    beside = step.unplaced[0].key.data_ptr() if step.unplaced and step.unplaced[0] is not None else None
    return numbers, kinds, step.pools[0].key.data_ptr(), beside
