"""The number formats of the kernels."""

import torch

SUPPORTED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The format of means, scores, log-sum-exps and of every accumulation: float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32
