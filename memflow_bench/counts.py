"""Useful floating-point operations and bytes of a workload, from its sizes alone.

An operation is a multiplication or an addition of the matrix products; exponentials, norms and rotations are not
counted. A byte counts once when it has to be read and once when it has to be written, however often a kernel does so.
"""

from __future__ import annotations

from .cases import Case


def attention_flops(case: Case, activated: bool) -> int:
    """Two products, logits and outputs, over the keys that each head attends to."""
    keys = case.attended_keys(activated)
    return 4 * case.batch * case.heads * case.queries * keys * case.head_dim


def attention_bytes(case: Case, activated: bool, size: int) -> int:
    """Queries in, outputs out, and the K and V that each head attends to; `size`: bytes of an element."""
    keys = case.attended_keys(activated)
    return size * case.batch * case.dim * (2 * case.queries + 2 * keys)


def means_bytes(case: Case, size: int) -> int:
    """The candidates' keys in, their means (float32) out."""
    return case.batch * case.dim * case.candidates * (case.tokens * size + 4)


def write_bytes(case: Case, size: int) -> int:
    """Query, key and value of a chunk in and out, and the new frame means (float32) out."""
    return case.batch * case.dim * (6 * case.queries * size + 4 * case.chunk)


def update_bytes(case: Case, size: int, layers: int) -> int:
    """Per layer: text keys and the bank's means (float32) in, one frame of K and V and its mean moved."""
    read = case.text_tokens * size + case.bank * 4
    moved = 2 * (2 * case.tokens * size + 4)
    return layers * case.batch * case.dim * (read + moved)


def linear_flops(case: Case) -> int:
    """The four projections of self-attention over the tokens of a chunk."""
    return 2 * 4 * case.batch * case.queries * case.dim**2
