"""memory_attention_top_k: the choice of frames and the attention over them."""

from ..choosing import composed
from .attention import memory_attention
from .means import frame_means
from .selection import select_frames

memory_attention_top_k = composed(frame_means, select_frames, memory_attention)
