"""Denoising passes as CUDA graphs: captured once per size of what attention sees, then replayed.

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
    from memflow.memory.frames import Pass, Prompt

EAGER_CALLS = 8  # of a size, before it is captured: most sizes of a memory that still grows are gone by then


@dataclass
class Captured:
    """A captured pass: where its inputs lie, how to run it again, and where its result is then. prompt: whose keys and
    values `step` holds a copy of."""

    latents: Tensor
    timestep: Tensor
    step: Pass
    prompt: Prompt
    replay: Callable[[], None]
    flow: Tensor


class GraphedDenoiser:
    """`denoise` for one stream: the same arguments, the same results.

    Args:
        transformer: on a GPU, its weights staying where they are while the stream runs.
        denoise: runs it: flow = denoise(latents, timestep, step).
    """

    def __init__(self, transformer: WanTransformer3DModel, denoise: Callable[[Tensor, float | Tensor, Pass], Tensor]):
        require_gpu(transformer)
        self.denoise = denoise
        self.record = Recorder(transformer.device)
        self.calls: Counter[Hashable] = Counter()
        self.captured: dict[Hashable, Captured] = {}
        self.layout: Hashable = None

    def follow(self, layout: Hashable) -> None:
        """Forget what was captured where `layout`, of the transformer's layers and weights, is another than before."""
        if layout != self.layout:
            self.captured.clear()
        self.layout = layout

    def __call__(self, latents: Tensor, timestep: float, step: Pass) -> Tensor:
        """Flow [B, C, F, h, w]."""
        size = _size(latents, step)
        if size not in self.captured:
            self.calls[size] += 1
            if self.calls[size] <= EAGER_CALLS:
                return self.denoise(latents, timestep, step)
            self.captured[size] = self._capture(latents, step)
        captured = self.captured[size]
        captured.latents.copy_(latents)
        captured.timestep.fill_(timestep)
        for place, value in zip(_changing(captured.step), _changing(step), strict=True):
            place.copy_(value)
        if captured.prompt is not step.prompt:
            captured.prompt = step.prompt
            for place, value in zip(captured.step.prompt, step.prompt, strict=True):
                place.copy_(value)
        captured.replay()
        return captured.flow.clone()

    def _capture(self, latents: Tensor, step: Pass) -> Captured:
        latents = latents.clone()
        timestep = torch.zeros(latents.shape[0], dtype=torch.float32, device=latents.device)
        own = {name: value.clone() for name, value in step._asdict().items() if isinstance(value, Tensor)}
        own_step = step._replace(**own, prompt=step.prompt._make(part.clone() for part in step.prompt))
        replay, flow = self.record(lambda: self.denoise(latents, timestep, own_step))
        return Captured(latents, timestep, own_step, step.prompt, replay, flow)


class Recorder:
    """Captures what one stream launches on `device`, which need not be the current one.

    Its graphs share a side stream and one pool of memory: they are replayed one at a time, each result being copied
    before the next, so that each can use again what the others used for passing results on.
    """

    def __init__(self, device: torch.device):
        self.device = device
        with torch.cuda.device(device):
            self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
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


def _size(latents: Tensor, step: Pass) -> Hashable:
    """All that a captured pass fixes: shapes, the numbers in `step`, and the place of the pool."""
    others = (step.prompt, step.pools)
    numbers = tuple(v for v in step if not isinstance(v, Tensor) and all(v is not other for other in others))
    shapes = tuple((tuple(x.shape), x.dtype) for x in (latents, *_changing(step), *step.prompt))
    return numbers, shapes, step.pools[0].key.data_ptr()
