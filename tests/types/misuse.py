"""What a type checker must refuse: one mistake in every line that says so. See test_types.py."""

from __future__ import annotations

import torch

import memflow
from memflow import MemoryConfig
from memflow_kernels import memory_attention

query = torch.randn(1, 4, 2, 16)
pipe = memflow.MemFlowPipelines  # error
MemoryConfig(topk=3)  # error
MemoryConfig(window_frames="9")  # error
out, lse = memory_attention(query, query, query)  # error
shape = memory_attention(query, query, query, tokens_per_frame=4).shapes  # error
memory_attention(query, query, query, tokens_per_frame=4, layout="lbhd")  # error
MemoryConfig().top_k + 1  # error
