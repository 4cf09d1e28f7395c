"""Prompts to embeddings."""

from __future__ import annotations

import html

import ftfy
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def clean_prompt(prompt: str) -> str:
    """`prompt` as Wan's pipelines clean it (diffusers' `prompt_clean` of pipeline_wan.py): garbled Unicode repaired,
    curly quotes and ligatures made plain, HTML entities resolved (twice escaped ones too), each run of whitespace one
    space, none at the ends."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split())


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, text_encoder: PreTrainedModel, prompts: list[str], max_length: int
) -> tuple[Tensor, Tensor]:
    """Encodes one prompt per batch row, as Wan's pipelines do.

    Prompts are cleaned (`clean_prompt`). One of more than `max_length` tokens (bytes with ByT5) is cut, a shorter one
    padded; the encoder does not see the padding, and its embeddings are zero. Differentiable in the
    encoder's weights.

    Returns:
        embeddings [B, max_length, text_dim] and mask [B, max_length] bool (True = a token, False = padding), both on
        the encoder's device, the embeddings in its dtype.
    """
    if isinstance(prompts, str) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise TypeError(f"prompts must be a list of at least one string, got {prompts!r}")
    if max_length < 1:
        raise ValueError(f"max_length must be at least 1, got {max_length}")
    tokens = tokenizer(
        [clean_prompt(prompt) for prompt in prompts],
        padding="max_length",
        max_length=max_length,
        truncation=True,
        return_attention_mask=True,
        return_tensors="pt",
    ).to(text_encoder.device)
    hidden = text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
    mask = tokens.attention_mask.bool().to(hidden.device)  # under offloading the encoder has moved meanwhile
    return hidden.masked_fill(~mask[..., None], 0), mask
