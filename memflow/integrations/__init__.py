"""MemFlow's attention inside generators that are not ours.

`patch(model)` for models with the self-attention of the causal Wan generators; `StreamingAttention` for diffusers'
WanTransformer3DModel without `MemFlowPipeline`.
"""

from memflow.integrations.cache import contents
from memflow.integrations.diffusers import StreamingAttention
from memflow.integrations.patching import patch, unpatch
from memflow.integrations.returns import PatchedCall

__all__ = ["PatchedCall", "StreamingAttention", "contents", "patch", "unpatch"]
