"""Prompt embeddings that outlive the text encoder: made once, kept on disk, so that 11 GB need not be loaded again."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memflow.models.wan.text import clean_prompt, encode_prompts

_SMALL = 32 * 2**20  # bytes of a file that is read wholly for its model's identity
_SAMPLES, _SAMPLE = 16, 2**16


class PromptBook:
    """Embeddings of prompts; the encoder is loaded for those that are in neither memory nor `folder`.

    tokenizer, text_length: as the pipeline's. load_encoder: is called when the encoder is needed. dtype: of the
    embeddings. folder: where they are kept, one file each; None = in memory only. An entry that is damaged or belongs
    to something else is made again; a folder that cannot be written to is no error.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        load_encoder: Callable[[], PreTrainedModel],
        text_length: int,
        *,
        dtype: torch.dtype,
        folder: Path | None = None,
    ):
        self.tokenizer = tokenizer
        self.text_length = text_length
        self.dtype = dtype
        self.folder = folder
        self._load_encoder = load_encoder
        self._encoder: PreTrainedModel | None = None
        self._known: dict[str, Tensor] = {}

    def prepare(self, texts: Iterable[str]) -> None:
        """Have the embeddings of `texts` ready and no encoder in memory."""
        for text in texts:
            self._row(text)
        if self._encoder is not None:
            self._encoder = None
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # its room is needed by tensors of quite other sizes

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """As `encode_prompts`, on the CPU: embeddings [B, text_length, text_dim], mask [B, text_length]. Leaves no
        encoder in memory."""
        self.prepare(texts)
        rows = [self._row(text) for text in texts]
        embeds = torch.zeros(len(rows), self.text_length, rows[0].shape[1], dtype=self.dtype)
        mask = torch.zeros(embeds.shape[:2], dtype=torch.bool)
        for index, row in enumerate(rows):
            embeds[index, : len(row)] = row
            mask[index, : len(row)] = True
        return embeds, mask

    def _row(self, text: str) -> Tensor:
        """The embeddings of the tokens of `text` alone, [tokens, text_dim]."""
        text = clean_prompt(text)
        if text not in self._known:
            row = self._read(text)
            if row is None:
                row = self._encode(text)
                self._write(text, row)
            self._known[text] = row
        return self._known[text]

    @torch.no_grad()  # a kept embedding that drags the encoder's graph along would keep the encoder too
    def _encode(self, text: str) -> Tensor:
        self._encoder = self._encoder or self._load_encoder()
        # One by one: what a prompt is encoded together with may change the last bits.
        embeds, mask = encode_prompts(self.tokenizer, self._encoder, [text], self.text_length)
        return embeds[0, mask[0]].to("cpu", self.dtype).contiguous()  # parts of the encoder may be in float32

    def _path(self, text: str) -> Path:
        key = hashlib.sha256(f"{self.text_length} {self.dtype} {text}".encode()).hexdigest()
        return self.folder / f"{key}.safetensors"

    def _read(self, text: str) -> Tensor | None:
        if self.folder is None or not (path := self._path(text)).is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                row, known = file.get_tensor("embeds").clone(), (file.metadata() or {}).get("text")
        except (OSError, SafetensorError):
            return None
        fits = row.ndim == 2 and 1 <= len(row) <= self.text_length and row.dtype == self.dtype
        return row if fits and known == text else None

    def _write(self, text: str, row: Tensor) -> None:
        if self.folder is None:
            return
        path = self._path(text)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file({"embeds": row}, partial, metadata={"text": text})
            partial.replace(path)
        except (OSError, SafetensorError):
            with suppress(OSError):
                partial.unlink()


def cache_folder(model: Path) -> Path:
    """Where the prompts of the pipeline in `model` are kept: one folder for all equal encoders, under XDG_CACHE_HOME.

    Equal are encoders and tokenizers of the same files: contents of small ones, size and samples of large ones.
    """
    digest = hashlib.sha256()
    for part in ("text_encoder", "tokenizer"):
        for path in sorted(path for path in (model / part).rglob("*") if path.is_file()):
            size = path.stat().st_size
            digest.update(f"{path.relative_to(model)} {size}\n".encode())
            with path.open("rb") as file:
                if size <= _SMALL:
                    digest.update(file.read())
                    continue
                for sample in range(_SAMPLES):
                    file.seek(sample * (size - _SAMPLE) // (_SAMPLES - 1))
                    digest.update(file.read(_SAMPLE))
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "memflow" / "prompts" / digest.hexdigest()[:32]
