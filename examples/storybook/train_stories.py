"""Training of the storybook's transformer and text encoder: teacher forcing with the memory in the loop.

The losses are the flow's, and ones that keep names apart. Without help the text path lets names collapse (they matter
in few frames), and then no relevance can find a character. So a linear read-out must tell the name from the mean text
key, the mean frame key and the mean query, and the mean text key of a prompt must point to the frames of its character
and its place: the score that a stream's memory retrieves by. Half of the heads are trained to look at the character in
past frames, which they would learn by themselves, but later.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from examples.storybook.attention import IN_VIEW, TrainingPass, set_training_attention, visible_frames
from examples.storybook.drawing import MOODS, SHAPES
from examples.storybook.model import GRID, SHIFT, TEXT_LENGTH, encode_frames
from examples.storybook.stories import CHUNK, training_script
from examples.storybook.training_run import Muon, Run, average_gradients, learning_rate, step_generator, worker
from examples.storybook.world import NAMES, Frame, character_mask, landmark_mask
from examples.storybook.world import STEPS as PLACES_IN_A_ROW
from memflow.models.wan.text import encode_prompts

STEPS = 2000
STORIES, CHUNKS = 4, 12  # stories in a step, over all workers; chunks in a story
_MUON_RATE, _ADAM_RATE = 2.5e-3, 2.5e-3
CONTEXT_NOISE = 0.25  # at most this much noise on the clean frames: a stream remembers what it made itself
_FOREGROUND = 4.0  # weight of latent pixels that show the character or the landmark
_RECALLED, _UNKNOWABLE = 3.0, 0.3  # weights of chunks whose character the bank alone, or nothing at all, tells
_SHARPNESS = 4.0  # of the retrieval loss: scores of normed keys differ by less than one
WEIGHTS = {"flow": 1.0, "text": 0.2, "frame": 0.1, "query": 0.1, "retrieve": 0.1, "attention": 0.1}


class Batch(NamedTuple):
    """A batch of B stories of n chunks: numbers [B, n F] of frames, names and places [B, n], prompts of their scenes,
    prompt_of [B n], and what every chunk sees, as in `TrainingPass`."""

    numbers: Tensor
    names: Tensor
    places: Tensor
    prompts: list[str]
    prompt_of: Tensor
    seen: tuple[Tensor, Tensor, Tensor]


def draw_batch(generator: torch.Generator, stories: int, chunks: int) -> Batch:
    """Random stories and what their chunks remember."""
    random = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
    told = [training_script(random, chunks) for _ in range(stories)]
    seen = [visible_frames(story, random) for story in told]
    prompts: list[str] = []
    prompt_of = []
    for story in told:
        prompt_of.append(story.scene_of_chunks() + len(prompts))
        prompts += story.prompts()
    scenes = [[story.scenes[i] for i in story.scene_of_chunks()] for story in told]
    return Batch(
        numbers=torch.from_numpy(np.stack([story.frames() for story in told])),
        names=torch.tensor([[scene.name for scene in row] for row in scenes]),
        places=torch.tensor([[scene.place for scene in row] for row in scenes]),
        prompts=prompts,
        prompt_of=torch.from_numpy(np.concatenate(prompt_of)),
        seen=tuple(torch.from_numpy(np.stack(parts)) for parts in zip(*seen, strict=True)),
    )


class Trainer:
    """The model, its optimisers and one step of training.

    components: as `model.build` makes them; transformer and text encoder are trained, on their device, and the
    transformer is left with the attention of training. Its codec is trained already.
    stories: in a step, over all workers. chunks: of a story.
    """

    def __init__(self, components: dict, seed: int, steps: int = STEPS, stories: int = STORIES, chunks: int = CHUNKS):
        self.transformer, self.text_encoder = components["transformer"], components["text_encoder"]
        self.tokenizer, self.codec = components["tokenizer"], components["vae"].eval()
        self.seed, self.steps, self.stories, self.chunks = seed, steps, stories, chunks
        self.device = next(self.transformer.parameters()).device
        self.worker, self.workers = worker()
        config = self.transformer.config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.readout = NameReadout(config.num_layers, config.num_attention_heads * config.attention_head_dim)
        self.readout.to(self.device)
        self.context = set_training_attention(self.transformer)
        self.weights, self.tokens = (x.to(self.device) for x in _foreground())
        self.modules = nn.ModuleList([self.transformer, self.text_encoder, self.readout])
        matrices, rest = _split(self.modules)
        self.muon = Muon(matrices, lr=_MUON_RATE)
        self.adam = torch.optim.AdamW(rest, lr=_ADAM_RATE, betas=(0.9, 0.98), weight_decay=0.0)

    def run(self, folder: Path) -> Run:
        """The run of this training, with checkpoints in `folder`."""
        modules = {"model": self.modules, "muon": self.muon, "adam": self.adam}
        return Run("story model", folder, modules, self.steps, self.advance)

    def advance(self, step: int) -> dict[str, float]:
        """One step; returns the losses."""
        generator = step_generator(self.seed, step * self.workers + self.worker)
        losses = self.losses(draw_batch(generator, self.stories // self.workers, self.chunks), generator)
        sum(WEIGHTS[name] * value for name, value in losses.items()).backward()
        average_gradients(self.modules.parameters())
        nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
        for optimizer, rate in ((self.muon, _MUON_RATE), (self.adam, _ADAM_RATE)):
            for group in optimizer.param_groups:
                group["lr"] = rate * learning_rate(step, self.steps)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return {name: value.item() for name, value in losses.items()}

    def losses(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """The parts of the loss, unweighted."""
        clean = encode_frames(self.codec, batch.numbers).cpu()
        clean = clean.unflatten(1, (-1, CHUNK)).flatten(0, 1).transpose(1, 2)  # [B n, C, F, h, w]
        rows = clean.shape[0]
        noise = torch.randn(clean.shape, generator=generator)
        sigma = torch.rand(rows, generator=generator)
        sigma = SHIFT * sigma / (1 + (SHIFT - 1) * sigma)
        blur = CONTEXT_NOISE * torch.rand(rows, generator=generator) * (torch.rand(rows, generator=generator) < 0.7)
        latents = torch.cat(
            [_mix(clean, torch.randn(clean.shape, generator=generator), blur), _mix(clean, noise, sigma)]
        ).to(self.device)
        times = torch.cat([torch.zeros(rows), 1000 * sigma]).to(self.device)
        step = self.begin(batch)
        no_text = latents.new_empty(2 * rows, 0, self.transformer.config.text_dim)  # it is in the pass
        flow = self.transformer(latents, times, no_text, return_dict=False)
        names, places = batch.names.to(self.device), batch.places.to(self.device)
        return {
            "flow": flow_loss(flow[0][rows:], (noise - clean).to(self.device), self._foreground_of(batch)),
            **self.readout(step, names.flatten()),
            "retrieve": retrieval_loss(step, names, places),
            "attention": torch.stack(step.attention).mean(),
        }

    def begin(self, batch: Batch) -> TrainingPass:
        """The next call of the transformer is over `batch`."""
        embeds, mask = encode_prompts(self.tokenizer, self.text_encoder, batch.prompts, TEXT_LENGTH)
        frames, places, own = (x.to(self.device) for x in batch.seen)
        asking, wanted = self._characters(batch, frames)
        self.context.step = TrainingPass(
            frames=frames,
            places=places,
            own_places=own,
            grid=GRID,
            text=self.transformer.condition_embedder.text_embedder(embeds),
            text_mask=mask,
            prompt_of=batch.prompt_of.to(self.device),
            asking=asking,
            wanted=wanted,
        )
        return self.context.step

    def _characters(self, batch: Batch, frames: Tensor) -> tuple[Tensor, Tensor]:
        """`asking` and `wanted` of a `TrainingPass`, whose `frames` these are."""
        frame = Frame.of(batch.numbers.to(self.device))
        shown = self.tokens[frame.shape, frame.mood, frame.step]  # [B, n F, N]
        names = batch.names.to(self.device)
        story = torch.arange(len(names), device=self.device)[:, None, None]
        index = frames.clamp(min=0)
        same = (names[story, index // CHUNK] == names[:, :, None]) & (frames >= 0)
        wanted = shown[story, index] * same.unsqueeze(-1)
        return shown.unflatten(1, (-1, CHUNK)).flatten(2), wanted.flatten(2)

    def _foreground_of(self, batch: Batch) -> Tensor:
        frame = Frame.of(batch.numbers.to(self.device))
        weight = self.weights[frame.place, frame.shape, frame.mood, frame.step].unflatten(1, (-1, CHUNK))
        return (weight * self._emphasis(batch)[..., None, None, None]).flatten(0, 1)

    def _emphasis(self, batch: Batch) -> Tensor:
        """Weight of each chunk [B, n]."""
        frames, names, prompts = (x.to(self.device) for x in (batch.seen[0], batch.names, batch.prompt_of))
        prompts = prompts.view_as(names)
        story = torch.arange(len(names), device=self.device)[:, None, None]
        same = (names[story, frames.clamp(min=0) // CHUNK] == names[:, :, None]) & (frames >= 0)
        in_view = same[..., :IN_VIEW].any(-1)
        twins = names[:, :, None] == names[:, None]
        introduced = prompts == prompts[:, None].expand_as(twins).masked_fill(~twins, prompts.max() + 1).amin(-1)
        weight = torch.ones(names.shape, device=self.device)
        weight[same[..., IN_VIEW:].any(-1) & ~in_view & ~introduced] = _RECALLED
        weight[~same.any(-1) & ~introduced] = _UNKNOWABLE
        return weight


def _mix(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    sigma = sigma.view(-1, 1, 1, 1, 1)
    return (1 - sigma) * clean + sigma * noise


def _foreground() -> tuple[Tensor, Tensor]:
    """Weight of each latent pixel by place, shape, mood and step, [places, shapes, moods, steps, 8, 8]; and which
    tokens show the character, [shapes, moods, steps, N], 0 or 1."""
    sizes = (len(SHAPES), len(MOODS), PLACES_IN_A_ROW)
    shape, mood, step = (x.flatten() for x in torch.meshgrid(*map(torch.arange, sizes), indexing="ij"))
    character = nn.functional.max_pool2d(character_mask(shape, mood, step)[:, None], 16)[:, 0].unflatten(0, sizes)
    landmark = nn.functional.max_pool2d(landmark_mask()[:, None], 16)[:, 0]
    seen = torch.maximum(character[None], landmark[:, None, None, None])
    tokens = nn.functional.max_pool2d(character.flatten(0, 2)[:, None], 2).flatten(1).unflatten(0, sizes)
    return 1 + (_FOREGROUND - 1) * (seen > 0.2).float(), (tokens > 0.2).float()


def _split(modules: nn.Module) -> tuple[list, list]:
    """Hidden weight matrices, for Muon, and all other parameters."""
    matrices, rest = [], []
    for name, parameter in modules.named_parameters():
        inner = parameter.ndim == 2 and not any(
            part in name
            for part in ("shared", "embed_tokens", "relative_attention_bias", "proj_out", "condition_embedder.time")
        )
        (matrices if inner and parameter.shape[0] > 8 else rest).append(parameter)
    return matrices, rest


class NameReadout(nn.Module):
    """Linear classifiers of the name, one for each layer and kind of vector; used in training only."""

    def __init__(self, layers: int, dim: int):
        super().__init__()
        self.text = nn.ModuleList(nn.Linear(dim, len(NAMES)) for _ in range(layers))
        self.frame = nn.ModuleList(nn.Linear(dim, len(NAMES)) for _ in range(layers))
        self.query = nn.ModuleList(nn.Linear(dim, len(NAMES)) for _ in range(layers))

    def forward(self, step: TrainingPass, names: Tensor) -> dict[str, Tensor]:
        """Mean cross-entropies. names: [B * n] int64, the character of each chunk.

        The text in every layer; frames and queries not in the first, whose keys come before the text.
        """
        losses: dict[str, list[Tensor]] = {"text": [], "frame": [], "query": []}
        for layer, text in enumerate(step.text_means):
            losses["text"].append(cross_entropy(self.text[layer](text[step.prompt_of].flatten(1)), names))
            if layer:
                frame = step.frame_means[layer].flatten(0, 1).flatten(2)  # [B n, F, H D]
                logits = self.frame[layer](frame)
                losses["frame"].append(cross_entropy(logits.flatten(0, 1), names.repeat_interleave(frame.shape[1])))
                losses["query"].append(cross_entropy(self.query[layer](step.query_means[layer].flatten(1)), names))
        return {kind: torch.stack(values).mean() for kind, values in losses.items()}


def retrieval_loss(step: TrainingPass, names: Tensor, places: Tensor) -> Tensor:
    """Cross-entropy between a prompt's scores of the story's other chunks and who shares its character or place.

    names, places: [B, n] int64. Scores as in `memflow_kernels.prompt_relevance`, aggregate "mean", of the first frame
    of each chunk; every layer but the first by itself.
    """
    same = (names[:, :, None] == names[:, None]).float() + (places[:, :, None] == places[:, None]).float()
    itself = torch.eye(names.shape[1], dtype=torch.bool, device=names.device)
    same = same.masked_fill(itself, 0.0)
    asked = same.sum(-1) > 0
    target = same / same.sum(-1, keepdim=True).clamp(min=1.0)
    losses = []
    for text, frame in list(zip(step.text_means, step.frame_means, strict=True))[1:]:
        heads, size = text.shape[-2:]
        text = text[step.prompt_of].unflatten(0, names.shape)
        scores = torch.einsum("bnhd,bmhd->bnm", text, frame[:, :, 0]) / (heads * size**0.5)
        logs = (_SHARPNESS * scores).masked_fill(itself, -1e4).log_softmax(-1)
        losses.append(-(target * logs).sum(-1)[asked].mean())
    return torch.stack(losses).mean()


def flow_loss(flow: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean square error. flow, target: [rows, C, F, h, w]; weight: [rows, F, h, w]."""
    return ((flow - target).square().mean(1) * weight).sum() / weight.sum()
