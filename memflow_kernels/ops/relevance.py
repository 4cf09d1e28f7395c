"""prompt_relevance: how much the prompt calls for each remembered frame."""

import torch
from torch import Tensor

from ..dtypes import statistics_dtype
from ..reference.relevance import prompt_relevance_mean_backward, prompt_relevance_token_backward
from . import _checks
from .means import frame_means
from .registration import Registered


def _fake_mean(text_key, frame_mean, text_mask, scale):
    return frame_mean.new_empty(frame_mean.shape[:2], dtype=statistics_dtype(text_key.dtype))


def _setup_mean(ctx, inputs, output):
    text_key, frame_mean, text_mask, ctx.scale = inputs
    ctx.save_for_backward(text_key, frame_mean, text_mask)


def _backward_mean(ctx, grad):
    return *prompt_relevance_mean_backward(grad, *ctx.saved_tensors, ctx.scale), None, None


def _fake_token(text_key, frame_mean, text_mask, scale):
    shape = (*text_key.shape[:2], frame_mean.shape[1])
    return text_key.new_empty(shape, dtype=statistics_dtype(text_key.dtype))


def _backward_token(ctx, grad):
    return *prompt_relevance_token_backward(grad, *ctx.saved_tensors, ctx.scale), None, None


def _fake_softmax(text_key, key, text_mask, tokens_per_frame, scale):
    return key.new_empty((key.shape[0], key.shape[1] // tokens_per_frame), dtype=statistics_dtype(key.dtype))


def _fake_softmax_backward(grad, text_key, key, *options):
    return text_key.new_empty(text_key.shape), key.new_empty(key.shape)


_relevance_mean = Registered("prompt_relevance_mean", _fake_mean, (_setup_mean, _backward_mean))
_relevance_softmax = Registered("prompt_relevance_softmax", _fake_softmax)
Registered("prompt_relevance_softmax_backward", _fake_softmax_backward)
_relevance_token = Registered("prompt_relevance_token", _fake_token, (_setup_mean, _backward_token))

AGGREGATES = ("mean", "softmax", "token")


def prompt_relevance(
    text_key: Tensor,
    key: Tensor | None = None,
    *,
    frame_mean: Tensor | None = None,
    tokens_per_frame: int | None = None,
    text_mask: Tensor | None = None,
    aggregate: str = "mean",
    scale: float | None = None,
) -> Tensor:
    """How much the prompt calls for each frame: one score per frame, or per text token and frame, shared by all heads.

    aggregate "mean": mean over heads of <mean text key, mean frame key> * scale; it needs the frame means alone.
    aggregate "token": the same for every text token by itself, which cover_frames takes: mean over heads of
    <text key, mean frame key> * scale. Its mean over the tokens that count is "mean".
    aggregate "softmax": the share of the attention mass on each frame when every text token of every head attends to
    the tokens of all frames together, mean over tokens and heads; the shares of a row add up to 1.
    Differentiable in text_key, key and frame_mean.

    Args:
        text_key: [B, T, H, D], the cross-attention keys of the prompt.
        key: [B, F*N, H, D], the frames' keys, in the dtype of text_key; needed for "softmax".
        frame_mean: [B, F, H, D], the frames' mean keys, for "mean" and "token"; taken from key by default. float32
            (float64 for float64).
        tokens_per_frame: N; needed with key.
        text_mask: [B, T] bool, True where a token counts; all of them by default.
        aggregate: "mean", as the published code computes it, "softmax", as the paper's formula means it, or "token".
        scale: of the products; D^-1/2 by default.

    Returns:
        [B, F] in float32 (float64 for float64), [B, T, F] for "token". A row whose text_mask is all False scores 0
        everywhere, and so does a token that does not count. Frames with equal means have equal scores.

    Raises:
        TypeError, ValueError: for wrong dtypes, devices or shapes, or where what the aggregate needs is missing.

    Source: arXiv 2512.14699, equation 1.

    Example:
        >>> import torch
        >>> from memflow_kernels import prompt_relevance
        >>> text_key, key = torch.randn(1, 7, 2, 16), torch.randn(1, 12, 2, 16)  # 3 frames of 4 tokens
        >>> score = prompt_relevance(text_key, key, tokens_per_frame=4, aggregate="softmax")
        >>> score.shape, round(score.sum().item(), 4)
        (torch.Size([1, 3]), 1.0)
    """
    if aggregate not in AGGREGATES:
        raise ValueError(f"aggregate must be one of {', '.join(AGGREGATES)}, got {aggregate!r}")
    _checks.states("text_key", text_key, "[B, T, H, D]")
    batch, tokens, heads, head_dim = text_key.shape
    scale = _checks.scale(scale, head_dim)
    if text_mask is not None:
        _checks.of_dtype("text_mask", text_mask, torch.bool)
        _checks.shape("text_mask", text_mask, (batch, tokens), "[B, T]")
        _checks.same_device("text_mask", text_mask, "text_key", text_key)
    if key is not None:
        _checks.states("key", key, "[B, F*N, H, D]", empty_tokens=True)
        _checks.shape("key", key, (batch, key.shape[1], heads, head_dim), "[B, F*N, H, D]")
        _checks.same_kind("key", key, "text_key", text_key)
        if tokens_per_frame is None:
            raise ValueError("tokens_per_frame is needed together with key, got None")
        _checks.frame_count("key", key.shape[1], tokens_per_frame)

    if aggregate == "softmax":
        if key is None:
            raise ValueError('key is needed for aggregate="softmax", got None')
        return _relevance_softmax(text_key, key, text_mask, tokens_per_frame, scale)
    if frame_mean is None:
        if key is None:
            needed = "frame_mean, or key and tokens_per_frame, is needed"
            raise ValueError(f'{needed} for aggregate="{aggregate}", got neither')
        frame_mean = frame_means(key, tokens_per_frame)
    _checks.states("frame_mean", frame_mean, "[B, F, H, D]", empty_tokens=True)
    _checks.shape("frame_mean", frame_mean, (batch, frame_mean.shape[1], heads, head_dim), "[B, F, H, D]")
    _checks.statistics("frame_mean", frame_mean, "text_key", text_key)
    scored = _relevance_token if aggregate == "token" else _relevance_mean
    return scored(text_key, frame_mean, text_mask, scale)
