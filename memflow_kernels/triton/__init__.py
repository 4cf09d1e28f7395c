"""The ops as Triton kernels: the backend `triton`, named and called like memflow_kernels.reference.

The kernels compute in float32. float64 tensors, which exist to check results, are handed to the torch backend. The
values of index tensors are not read on the host: what a slot or a table names outside the pool is not touched.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

import torch

from .. import reference
from ..operators import implementations


def _rest_by_torch(kernels: Callable) -> Callable:
    """`kernels`, or torch's formula for float64 and where an option is given that they do not take."""
    specification, taken = getattr(reference, kernels.__name__), len(inspect.signature(kernels).parameters)

    @functools.wraps(kernels)
    def run(first: torch.Tensor, *rest: object):
        unserved = first.dtype == torch.float64 or 1 + len(rest) > taken
        return (specification if unserved else kernels)(first, *rest)

    return run


# modules of these names give way to their ops
globals().update({name: _rest_by_torch(run) for name, run in implementations(__name__).items()})
