"""MemFlow's attention inside generators that are not ours.

`patch(model)` for models with the self-attention of the causal Wan generators; `StreamingAttention` for diffusers'
WanTransformer3DModel without `MemFlowPipeline`.
"""

from __future__ import annotations

from diffusers import WanTransformer3DModel

from memflow.integrations.cache import contents
from memflow.integrations.caller import PatchedCall
from memflow.integrations.patching import patch, unpatch
from memflow.memory.config import MemoryConfig
from memflow.models.wan.adapter import WanModel
from memflow.stream.chunks import ChunkDriver

__all__ = ["PatchedCall", "StreamingAttention", "contents", "patch", "unpatch"]


class StreamingAttention(ChunkDriver):
    """`ChunkDriver` for a transformer of diffusers: gives it the attention processors of a stream, in place.

    Args:
        transformer: its weights, adapters and blocks stay what they are. Several of these on one can take turns.
        memory: what is remembered and activated; `MemoryConfig()` where not given.

    Raises:
        MemFlowError: a transformer that cannot have a memory, or no MemoryConfig.

    Example:
        >>> import torch
        >>> from diffusers import WanTransformer3DModel
        >>> sizes = {"num_attention_heads": 2, "attention_head_dim": 24, "ffn_dim": 96, "num_layers": 2, "text_dim": 32}
        >>> streaming = StreamingAttention(WanTransformer3DModel(**sizes), MemoryConfig(top_k=3))
        >>> streaming.prompt(torch.randn(1, 16, 32))
        >>> latents = torch.randn(1, 16, 3, 8, 8)
        >>> for chunk in range(3):
        ...     clean = latents - streaming.denoise(latents, 1000.0)
        ...     streaming.keep(clean)
        >>> streaming.snapshot().window
        [3, 4, 5, 6, 7, 8]
    """

    def __init__(self, transformer: WanTransformer3DModel, memory: MemoryConfig | None = None):
        super().__init__(WanModel(transformer), MemoryConfig() if memory is None else memory)

    def remove(self) -> None:
        """Give the transformer its own attention back."""
        self.model.remove()
