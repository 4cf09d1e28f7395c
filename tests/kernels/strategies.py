"""Random sizes, layouts and dtypes for the property tests."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from memflow_kernels.testing import LAYOUTS, states

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass
class Case:
    batch: int
    queries: int
    heads: int
    head_dim: int
    tokens_per_frame: int
    frames: int
    dtype: torch.dtype
    layout: str
    seed: int

    def states(self, tokens, salt=0, mean=0.0):
        options = {"dtype": self.dtype, "layout": self.layout, "seed": 10 * self.seed + salt, "mean": mean}
        return states(self.batch, tokens, self.heads, self.head_dim, **options)

    def query(self):
        return self.states(self.queries, 0)

    def key(self):
        return self.states(self.frames * self.tokens_per_frame, 1)

    def value(self):
        return self.states(self.frames * self.tokens_per_frame, 2, mean=1.0)


def cases(head_dims=(1, 2, 3, 7, 8, 20), dtypes=DTYPES):
    return st.builds(
        Case,
        batch=st.integers(1, 2),
        queries=st.integers(1, 7),
        heads=st.integers(1, 3),
        head_dim=st.sampled_from(head_dims),
        tokens_per_frame=st.integers(1, 6),
        frames=st.integers(1, 6),
        dtype=st.sampled_from(dtypes),
        layout=st.sampled_from(LAYOUTS),
        seed=st.integers(0, 1000),
    )
