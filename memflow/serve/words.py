"""What of a prompt does not reach the model: asked before it is sent, without waiting for the model."""

from __future__ import annotations

import asyncio
import copy
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from memflow.models.wan.text import unread

if TYPE_CHECKING:
    from memflow.stream.pipeline import MemFlowPipeline


class Words:
    """Reads prompts with a tokenizer of its own: one that two threads use at once fails.

    Args:
        pipeline: whose tokenizer is copied.
    """

    def __init__(self, pipeline: MemFlowPipeline):
        self._tokenizer, self._length = copy.deepcopy(pipeline.tokenizer), pipeline.config.text_length
        self._thread = ThreadPoolExecutor(1, "words")

    async def lost(self, prompt: str) -> dict[str, Any]:
        """The words of `prompt` that the model does not know, and its end where that is cut off (None: it is not)."""

        def ask() -> dict[str, Any]:
            cut, unknown = unread(self._tokenizer, prompt, self._length)
            return {"unknown": unknown, "cut": cut}

        return await asyncio.get_running_loop().run_in_executor(self._thread, ask)
