"""Prompts to text embeddings, as Wan's pipelines make them, and the cache that spares loading the encoder again."""

from __future__ import annotations

import hashlib
import html
import re
import string
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import accumulate
from pathlib import Path

import ftfy
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from memflow.files import write_whole
from memflow.modes import own_modes

_BEGIN = "\u2581"  # of a word, in sentencepiece's tokens
_SHOWN = 60  # characters of what is cut off
_READING = threading.Lock()


def clean_prompt(prompt: str) -> str:
    """`prompt` as Wan's pipelines clean it (diffusers' `prompt_clean` of pipeline_wan.py): garbled Unicode repaired,
    curly quotes and ligatures made plain, HTML entities resolved (twice escaped ones too), each run of whitespace one
    space, none at the ends."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split())


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, text_encoder: PreTrainedModel, prompts: list[str], max_length: int
) -> tuple[Tensor, Tensor]:
    """Encodes one prompt per batch row. Differentiable in the encoder's weights.

    Args:
        tokenizer: The encoder's.
        text_encoder: A T5 family encoder.
        prompts: Texts; they are cleaned (`clean_prompt`) first.
        max_length: Tokens (bytes with ByT5) that a prompt is cut or padded to. The encoder does not see the padding,
            and its embeddings are zero.

    Returns:
        embeddings [B, max_length, text_dim] and mask [B, max_length] bool (True = a token, False = padding), both on
        the encoder's device, the embeddings in its dtype.
    """
    if isinstance(prompts, str) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise TypeError(f"prompts must be a list of at least one string, got {prompts!r}")
    if max_length < 1:
        raise ValueError(f"max_length must be at least 1, got {max_length}")
    return _encode(tokenizer, text_encoder, [clean_prompt(prompt) for prompt in prompts], max_length)


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str | list[str], **settings) -> BatchEncoding:
    """A fast tokenizer keeps truncation and padding of its last call while it reads: a call in another thread (a prompt
    is sent while one is encoded) would give the first one the second one's."""
    with _READING:
        return tokenizer(text, **settings)


def _encode(tokenizer, text_encoder, clean: list[str], max_length: int) -> tuple[Tensor, Tensor]:
    tokens = _tokens(
        tokenizer,
        clean,
        padding="max_length",
        max_length=max_length,
        truncation=True,
        return_attention_mask=True,
        return_tensors="pt",
    ).to(text_encoder.device)
    hidden = text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
    mask = tokens.attention_mask.bool().to(hidden.device)  # under offloading the encoder has moved meanwhile
    return hidden.masked_fill(~mask[..., None], 0), mask


def losses(tokenizer: PreTrainedTokenizerBase, prompts: Iterable[str], max_length: int) -> list[str]:
    """What of prompts does not reach the model.

    Args:
        tokenizer: The encoder's.
        prompts: Texts.
        max_length: Tokens that a prompt is cut to.

    Returns:
        A sentence for each prompt of which the end is cut off, and one for all words that are not known.
    """
    found, words = [], {}
    for text in dict.fromkeys(map(clean_prompt, prompts)):
        end, unknown = unread(tokenizer, text, max_length)
        if end is not None:
            count = len(_tokens(tokenizer, text).input_ids)
            end = f"{end[:_SHOWN]}..." if len(end) > _SHOWN else end
            found.append(f"the prompt has {count} tokens, {max_length} are used: {end!r} is cut off")
        words |= dict.fromkeys(unknown)
    if words:
        found.append(f"the model does not know: {', '.join(words)}")
    return found


def token_words(tokenizer: PreTrainedTokenizerBase, prompt: str, max_length: int) -> list[str | None]:
    """The word that each token of a prompt is part of; None for tokens without letters or digits, such as its end.

    Args:
        tokenizer: The encoder's.
        prompt: A text; it is cleaned first.
        max_length: Tokens that it is cut to.
    """
    text = clean_prompt(prompt)
    settings = {"max_length": max_length, "truncation": True, "return_offsets_mapping": tokenizer.is_fast}
    tokens = _tokens(tokenizer, text, **settings)
    if tokenizer.is_fast:
        words = _words_at(text)
        found = [words.get(next((i for i in range(*span) if i in words), -1)) for span in tokens.offset_mapping]
    else:  # pieces of words, or bytes
        pieces, special = tokenizer.convert_ids_to_tokens(tokens.input_ids), tokenizer.all_special_tokens
        begins = [piece in special or piece[:1] in (" ", _BEGIN) for piece in pieces]
        number = list(accumulate(begins))
        spelt = [
            [p for p, n in zip(pieces, number, strict=True) if n == k and p not in special]
            for k in range(len(pieces) + 1)
        ]
        found = [tokenizer.convert_tokens_to_string(spelt[n]).strip(" " + string.punctuation) for n in number]
    return [word if word and any(map(str.isalnum, word)) else None for word in found]


def _words_at(text: str) -> dict[int, str]:
    """The word at each character of a text that is in one, without punctuation around it."""
    found = {}
    for match in re.finditer(r"\S+", text):
        word = match.group().strip(string.punctuation)
        begin = match.start() + match.group().find(word)
        found |= dict.fromkeys(range(begin, begin + len(word)), word)
    return found


def unread(tokenizer: PreTrainedTokenizerBase, prompt: str, max_length: int) -> tuple[str | None, list[str]]:
    """What of one prompt does not reach the model.

    Args:
        tokenizer: The encoder's.
        prompt: The text.
        max_length: Tokens that it is cut to.

    Returns:
        The end that is cut off (None: nothing is), and the words that are not known.
    """
    text, end = clean_prompt(prompt), None
    tokens = _tokens(tokenizer, text, return_offsets_mapping=tokenizer.is_fast)
    first_cut = max_length - 1  # the last one used is the end of the text
    if len(tokens.input_ids) > max_length:
        if tokenizer.is_fast:
            end = text[tokens.offset_mapping[first_cut][0] :].strip()
        else:
            end = tokenizer.decode(tokens.input_ids[first_cut:], skip_special_tokens=True).strip()
    words = list(dict.fromkeys(word.strip(string.punctuation) or word for word in text.split()))
    pieces = _tokens(tokenizer, words, add_special_tokens=False).input_ids if words else []
    return end, [word for word, ids in zip(words, pieces, strict=True) if tokenizer.unk_token_id in ids]


class PromptCache:
    """Embeddings of prompts; the encoder (11 GB of a real model) is loaded only for those that are not kept already.

    An entry is used only when the digest in it fits its numbers and its text; what is damaged, or belongs to something
    else, is made again. A folder that cannot be written to is no error.

    Args:
        tokenizer: The pipeline's.
        load_encoder: Is called when the encoder is needed.
        text_length: Tokens that a prompt is cut to.
        dtype: Of the embeddings.
        folder: Where they are kept, one file each; None = in memory only.
        text_dim: Channels that an embedding must have; None = any.
        encoder: Which encoder it is, for the states of streams (`encoder_digest`); None = nobody knows.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        load_encoder: Callable[[], PreTrainedModel],
        text_length: int,
        *,
        dtype: torch.dtype,
        folder: Path | None = None,
        text_dim: int | None = None,
        encoder: str | None = None,
    ):
        self.tokenizer = tokenizer
        self.text_length = text_length
        self.dtype = dtype
        self.folder = folder
        self.text_dim = text_dim
        self.encoder = encoder
        self._load_encoder = load_encoder
        self._encoder: PreTrainedModel | None = None
        self._known: dict[str, Tensor] = {}

    def prepare(self, texts: Iterable[str]) -> None:
        """Have the embeddings of `texts` ready and no encoder in memory."""
        self._prepare([clean_prompt(text) for text in texts])

    @own_modes()
    def _prepare(self, clean: list[str]) -> None:
        for text in clean:
            if text not in self._known:
                self._known[text] = self._row(text)
        if self._encoder is not None:
            self._encoder = None
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # its room is needed by tensors of quite other sizes

    @own_modes()  # without gradients: embeddings that drag the encoder's graph along would keep the encoder too
    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """As `encode_prompts`, on the CPU: embeddings [B, text_length, text_dim], mask [B, text_length]. Leaves no
        encoder in memory."""
        clean = [clean_prompt(text) for text in texts]
        self._prepare(clean)
        rows = [self._known[text] for text in clean]
        embeds = torch.zeros(len(rows), self.text_length, rows[0].shape[1], dtype=self.dtype)
        mask = torch.zeros(embeds.shape[:2], dtype=torch.bool)
        for index, row in enumerate(rows):
            embeds[index, : len(row)] = row
            mask[index, : len(row)] = True
        return embeds, mask

    def _row(self, text: str) -> Tensor:
        """The embeddings of the tokens of a clean text alone, [tokens, text_dim]."""
        row = self._read(text)
        if row is None:
            row = self._encode(text)
            self._write(text, row)
        return row

    def _encode(self, text: str) -> Tensor:
        self._encoder = self._encoder or self._load_encoder()
        # One by one: what a prompt is encoded together with may change the last bits.
        embeds, mask = _encode(self.tokenizer, self._encoder, [text], self.text_length)
        return embeds[0, mask[0]].to("cpu", self.dtype).contiguous()  # parts of the encoder may be in float32

    def _path(self, text: str) -> Path:
        key = hashlib.sha256(f"{self.text_length} {self.dtype} {text}".encode()).hexdigest()
        return self.folder / f"{key}.safetensors"

    def _read(self, text: str) -> Tensor | None:
        """The embeddings that were kept for a text; None where there are none, or what is there is not whole."""
        if self.folder is None or not _is_file(path := self._path(text)):
            return None
        try:
            with safe_open(path, framework="pt") as file:
                row, metadata = file.get_tensor("embeds").clone(), file.metadata() or {}
        except (OSError, RuntimeError, SafetensorError):  # torch says that a file is gone by a RuntimeError
            return None
        fits = row.ndim == 2 and 1 <= len(row) <= self.text_length and row.dtype == self.dtype
        if not fits or self.text_dim not in (None, row.shape[1]) or metadata.get("digest") != self._digest(text, row):
            return None
        return row if row.isfinite().all() else None

    def _write(self, text: str, row: Tensor) -> None:
        if self.folder is None or not row.isfinite().all():
            return
        path, metadata = self._path(text), {"digest": self._digest(text, row)}
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            if not _is_file(path):  # a link, whose target is not ours to write, or a pipe
                path.unlink(missing_ok=True)
            write_whole(path, lambda file: file.write(save({"embeds": row}, metadata=metadata)))

    def _digest(self, text: str, row: Tensor) -> str:
        """Of all that an entry says."""
        total = hashlib.sha256(f"{self.text_length} {row.dtype} {list(row.shape)} {text}".encode())
        total.update(row.contiguous().view(torch.uint8).numpy())
        return total.hexdigest()


def _is_file(path: Path) -> bool:
    """Whether it is a regular file itself, no link to one."""
    return path.is_file() and not path.is_symlink()
