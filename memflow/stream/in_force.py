"""The prompt of a `ChunkDriver`: the one in force and the one that comes next, as text and as the model encodes it."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING

from torch import Tensor

from memflow.stream.given import check_saved_text, check_unchanged

if TYPE_CHECKING:
    from memflow.memory.frames import Prompt
    from memflow.models.base import VideoModel

Text = tuple[Tensor, Tensor]  # embeddings [B, T, text_dim] and mask [B, T]


class PromptInForce:
    """Two prompts, which are encoded again where the model has changed: their keys and values are those of its weights.

    Args:
        model: that encodes them.

    Attributes:
        text: in force; None: none has been yet.
        prompt: `text` as the model has encoded it.
        next: the same two of what is in force from the next chunk on; None: nothing else.
    """

    def __init__(self, model: VideoModel):
        self.model = model
        self.clear()

    def clear(self) -> None:
        """Forget both."""
        self.text: Text | None = None
        self.prompt: Prompt | None = None
        self.next: tuple[Text, Prompt] | None = None
        self._version: Hashable = None  # of the model that they were encoded with

    @property
    def batch(self) -> int | None:
        """Stories that the coming chunk has a text for; None: there is no prompt."""
        text = self.next[0] if self.next else self.text
        return None if text is None else text[1].shape[0]

    def follow(self, embeds: Tensor, mask: Tensor) -> None:
        """Let a text be in force from the next chunk on."""
        text = embeds.to(self.model.device, self.model.dtype, copy=True), mask.to(self.model.device, copy=True)
        self.next = text, self.model.encode_prompt(*text)

    def switch(self) -> bool:
        """Let the next one come into force; False: there is none."""
        if self.next is None:
            return False
        (self.text, self.prompt), self.next = self.next, None
        return True

    def encode_again(self, pool: Tensor | None) -> bool:
        """Encode both anew where the model has changed since; whether it has.

        Args:
            pool: keys that the memory holds, which must fit the model still.
        """
        model, version = self.model, self.model.text_version()
        if pool is not None:
            check_unchanged("device", pool.device, model.device)
            if version != self._version:
                check_unchanged("dtype", pool.dtype, model.dtype)
        if version == self._version:
            return False
        if self.text is not None:
            self.text, self.prompt = self._encoded(*self.text)
        if self.next is not None:
            self.next = self._encoded(*self.next[0])
        self._version = version
        return True

    def state_dict(self) -> dict[str, Tensor]:
        """The texts, by name."""
        texts = {"text": self.text, "next": self.next and self.next[0]}
        parts = {name: text for name, text in texts.items() if text is not None}
        return {f"{name}.{part}": text[i] for name, text in parts.items() for i, part in enumerate(("embeds", "mask"))}

    def load_state_dict(self, tensors: dict[str, Tensor], batch: int) -> None:
        """Go on where `state_dict` was taken, for `batch` stories; ValueError where it is not of this model."""
        self.clear()
        found = {}
        for name in ("text", "next"):
            if f"{name}.embeds" in tensors:
                text = tensors[f"{name}.embeds"], tensors[f"{name}.mask"]
                check_saved_text(name, *text, batch, self.model.text_dim, self.model.dtype)
                found[name] = self._encoded(*text)
        self._version = self.model.text_version()
        self.text, self.prompt = found.get("text", (None, None))
        self.next = found.get("next")

    def _encoded(self, embeds: Tensor, mask: Tensor) -> tuple[Text, Prompt]:
        text = embeds.to(self.model.device, self.model.dtype), mask.to(self.model.device)
        return text, self.model.encode_prompt(*text)
