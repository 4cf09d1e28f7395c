"""prompt_relevance: how much the prompt calls for each remembered frame.

Three aggregates: "mean", the bilinear score of the published code; "softmax", the share of the attention mass that the
paper's formula means (arXiv 2512.14699, equation 1, with the softmax over the tokens of all frames together); and
"token", the bilinear score of every text token by itself, whose mean over the tokens is "mean".
"""

import torch
from einops import einsum
from torch import Tensor

from ..dtypes import statistics_dtype

PRODUCTS = 2**17  # of text tokens and frames that exist at a time: they stay in the cache of one core


def token_weights(text_key: Tensor, text_mask: Tensor | None) -> Tensor:
    """[B, T] weights of the text tokens: equal over the tokens that count, adding up to 1 (0 where none counts)."""
    batch, tokens = text_key.shape[:2]
    wide = statistics_dtype(text_key.dtype)
    if text_mask is None:
        return text_key.new_full((batch, tokens), 1.0 / tokens, dtype=wide)
    return text_mask.to(wide) / text_mask.sum(1, keepdim=True).clamp(min=1)


def counted(text_key: Tensor, text_mask: Tensor | None) -> Tensor:
    """text_key [B, T, H, D] with 0 in the tokens that do not count, which may hold anything: 0 times NaN is NaN."""
    return text_key if text_mask is None else text_key.masked_fill(~text_mask[:, :, None, None], 0.0)


def prompt_relevance_mean(text_key: Tensor, frame_mean: Tensor, text_mask: Tensor | None, scale: float) -> Tensor:
    """text_key [B, T, H, D], frame_mean [B, F, H, D] -> [B, F]: scaled product of the means, averaged over heads."""
    wide = statistics_dtype(text_key.dtype)
    mean_text = einsum(
        token_weights(text_key, text_mask), counted(text_key, text_mask).to(wide), "b t, b t h d -> b h d"
    )
    return einsum(mean_text, frame_mean.to(wide), "b h d, b f h d -> b f") * (scale / text_key.shape[2])


def prompt_relevance_mean_backward(
    grad: Tensor, text_key: Tensor, frame_mean: Tensor, text_mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients of text_key and frame_mean for grad [B, F]: the score is bilinear in the two means."""
    wide = statistics_dtype(text_key.dtype)
    weights = token_weights(text_key, text_mask)
    grad = grad * (scale / text_key.shape[2])
    mean_text = einsum(weights, counted(text_key, text_mask).to(wide), "b t, b t h d -> b h d")
    wanted = einsum(grad, frame_mean.to(wide), "b f, b f h d -> b h d")
    grad_text = einsum(weights, wanted, "b t, b h d -> b t h d")
    grad_mean = einsum(grad, mean_text, "b f, b h d -> b f h d")
    return grad_text.to(text_key.dtype), grad_mean.to(frame_mean.dtype)


def prompt_relevance_token(text_key: Tensor, frame_mean: Tensor, text_mask: Tensor | None, scale: float) -> Tensor:
    """text_key [B, T, H, D], frame_mean [B, F, H, D] -> [B, T, F]: scaled product, averaged over heads."""
    batch, tokens, heads, head_dim = text_key.shape
    frames = frame_mean.shape[1]
    score = text_key.new_empty((batch, tokens, frames), dtype=statistics_dtype(text_key.dtype))
    # Products and sums of their own, as in select_frames: equal frames must have equal scores.
    rows = min(max(PRODUCTS // (heads * head_dim), 1), tokens)
    columns = max(PRODUCTS // (heads * head_dim * rows), 1)
    for b, words, means in zip(range(batch), counted(text_key, text_mask), frame_mean.flatten(2), strict=True):
        for row in range(0, tokens, rows):
            some = words[row : row + rows].to(score.dtype).flatten(1).unsqueeze(1)
            for column in range(0, frames, columns):
                part = (some * means[column : column + columns]).sum(-1)
                score[b, row : row + rows, column : column + columns] = part
    score *= scale / heads
    return score if text_mask is None else score.masked_fill_(~text_mask.unsqueeze(2), 0.0)


def prompt_relevance_token_backward(
    grad: Tensor, text_key: Tensor, frame_mean: Tensor, text_mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients of text_key and frame_mean for grad [B, T, F]."""
    wide = statistics_dtype(text_key.dtype)
    grad = grad * (scale / text_key.shape[2])
    if text_mask is not None:
        grad = grad.masked_fill(~text_mask.unsqueeze(2), 0.0)
    grad_text = einsum(grad, frame_mean.to(wide), "b t f, b f h d -> b t h d")
    grad_mean = einsum(grad, counted(text_key, text_mask).to(wide), "b t f, b t h d -> b f h d")
    return grad_text.to(text_key.dtype), grad_mean.to(frame_mean.dtype)


def _frame_logits(text_key: Tensor, key: Tensor, frame: int, tokens_per_frame: int, scale: float) -> Tensor:
    """Logits of all text tokens over one frame's tokens, [B, H, T, N]."""
    wide = statistics_dtype(text_key.dtype)
    frame_key = key[:, frame * tokens_per_frame : (frame + 1) * tokens_per_frame]
    # One product per batch row: with a common product the rows of a strided key would be copied together first.
    rows = zip(text_key.transpose(1, 2), frame_key.permute(0, 2, 3, 1), strict=True)
    return torch.stack([(text.to(wide) * scale) @ columns.to(wide) for text, columns in rows])


def _frame_lse(text_key: Tensor, key: Tensor, tokens_per_frame: int, scale: float) -> Tensor:
    """Log-sum-exp of the logits over each frame, [B, H, T, F]; the logits of one frame exist at a time."""
    batch, tokens, heads, _ = text_key.shape
    frames = key.shape[1] // tokens_per_frame
    lse = text_key.new_empty((batch, heads, tokens, frames), dtype=statistics_dtype(text_key.dtype))
    for frame in range(frames):
        lse[..., frame] = _frame_logits(text_key, key, frame, tokens_per_frame, scale).logsumexp(-1)
    return lse


def prompt_relevance_softmax(
    text_key: Tensor, key: Tensor, text_mask: Tensor | None, tokens_per_frame: int, scale: float
) -> Tensor:
    """text_key [B, T, H, D], key [B, F*N, H, D] -> [B, F]: share of the attention mass on each frame."""
    share = _frame_lse(counted(text_key, text_mask), key, tokens_per_frame, scale).softmax(-1)  # [B, H, T, F]
    return einsum(token_weights(text_key, text_mask), share.mean(1), "b t, b t f -> b f")


def prompt_relevance_softmax_backward(
    grad: Tensor, text_key: Tensor, key: Tensor, text_mask: Tensor | None, tokens_per_frame: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients of text_key and key for grad [B, F].

    With p the softmax over all tokens and P_f its sum over frame f: d logit = p (g_f - sum_e g_e P_e) * weight / H.
    """
    wide = statistics_dtype(text_key.dtype)
    text_key = counted(text_key, text_mask)
    lse = _frame_lse(text_key, key, tokens_per_frame, scale)  # [B, H, T, F]
    total = lse.logsumexp(-1, keepdim=True)  # [B, H, T, 1]
    centred = grad[:, None, None] - einsum(grad, lse.softmax(-1), "b f, b h t f -> b h t").unsqueeze(-1)
    centred = centred * (token_weights(text_key, text_mask)[:, None, :, None] / text_key.shape[2])  # [B, H, T, F]

    text = text_key.transpose(1, 2).to(wide)  # [B, H, T, D]
    grad_text = torch.zeros_like(text)
    grad_key = torch.empty_like(key, memory_format=torch.contiguous_format)
    for frame in range(lse.shape[-1]):
        tokens = slice(frame * tokens_per_frame, (frame + 1) * tokens_per_frame)
        share = torch.exp(_frame_logits(text_key, key, frame, tokens_per_frame, scale) - total)  # [B, H, T, N]
        grad_logits = share * centred[..., frame, None] * scale
        grad_text += grad_logits @ key[:, tokens].transpose(1, 2).to(wide)
        grad_key[:, tokens] = (grad_logits.mT @ text).transpose(1, 2)
    return grad_text.transpose(1, 2).to(text_key.dtype).contiguous(), grad_key
