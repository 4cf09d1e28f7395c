"""What the storybook model is trained for: the flow, and names that text and frames can be told apart by.

Without help the text path lets names collapse (they matter in few frames), and then no relevance can find a character.
So a linear read-out must tell the name from the mean text key, the mean frame key and the mean query, and the mean text
key of a prompt must point to the frames of its character and its place: the score that a stream's memory retrieves by.
Half of the heads are told to look at the character in past frames, which they would find out by themselves, but later.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from examples.storybook.processors import TrainingPass
from examples.storybook.world import NAMES

_SHARPNESS = 4.0  # of the retrieval loss: scores of normed keys differ by less than one
WEIGHTS = {"flow": 1.0, "text": 0.2, "frame": 0.1, "query": 0.1, "retrieve": 0.1, "attention": 0.1}


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
