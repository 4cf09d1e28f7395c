"""The operators of torch.ops.memflow: every name and schema, written once.

What runs an operator, `ops/`, every backend and the tests, reads this table. An operator `thing_backward` is the
gradient of `thing`: its arguments are found by name among the arguments and results of `thing`, and `grad_x` is the
gradient of x. memory_attention_top_k, which is memory_attention with the choice before it, has the gradient of
memory_attention.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import NamedTuple

# Of torch.ops. A copy of this package under another name (the kernels hub loads them so) has ops of its own beside it.
NAMESPACE = "memflow" if __package__ == "memflow_kernels" else f"memflow_{__package__}".replace(".", "_")

# `thing_unrecorded` is `thing` without a gradient, for calls of which autograd has nothing to record.
UNRECORDED = "_unrecorded"


class Operator(NamedTuple):
    """file: in ops/ and in every backend, of this operator. schema: arguments and results as torch writes them."""

    file: str
    schema: str

    @property
    def arguments(self) -> dict[str, str]:
        """Type by name."""
        return _named(self.schema.split(" -> ")[0])

    @property
    def results(self) -> dict[str, str]:
        """Type by name; for operators whose results are named."""
        return _named(self.schema.split(" -> ")[1])


def _named(listed: str) -> dict[str, str]:
    """{"key": "Tensor", "top_k": "SymInt"} of "(Tensor key, SymInt top_k)"."""
    words = (part.split("=")[0].rsplit(" ", 1) for part in listed.strip("()").split(", "))
    return {name: kind for kind, name in words}


_STATES = "Tensor query, Tensor key, Tensor value"
_FRAMES = "Tensor? frame_table, SymInt tokens_per_frame, SymInt candidate_frames, float scale, SymInt? query_block"
_CHOICE = (
    "Tensor? frame_mean, Tensor? query_mean, SymInt tokens_per_frame, SymInt candidate_frames, SymInt top_k, "
    "float scale, SymInt? query_block"
)
_PARTS = "Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b"
_SOFTMAX = "Tensor text_key, Tensor key, Tensor? text_mask, SymInt tokens_per_frame, float scale"
_PLACE = "float eps, SymInt rows, SymInt cols, SymInt start_frame, Tensor? start"
_WEIGHTS = f"Tensor weight_q, Tensor weight_k, {_PLACE}"
# Defaults are left out of a call: a kernel that knows nothing else need not take them.
_TURNS = "SymInt[]? axes=None, float theta=10000., bool per_head=False"
_POOL = "Tensor(a!) pool_key, Tensor(b!) pool_value, Tensor(c!) pool_frame_mean"

OPERATORS = {
    "cover_frames": Operator("covering", "(Tensor scores, Tensor weights, SymInt k, Tensor prior) -> Tensor"),
    "frame_means": Operator("means", "(Tensor key, SymInt tokens_per_frame) -> Tensor"),
    "memory_attention": Operator("attention", f"({_STATES}, {_FRAMES}) -> (Tensor out, Tensor lse)"),
    "memory_attention_backward": Operator(
        "attention",
        f"(Tensor grad_out, Tensor? grad_lse, {_STATES}, Tensor out, Tensor lse, {_FRAMES}) "
        "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value)",
    ),
    "memory_attention_top_k": Operator(
        "attention", f"({_STATES}, {_CHOICE}) -> (Tensor out, Tensor lse, Tensor frame_table)"
    ),
    "merge_attention": Operator("merge", f"({_PARTS}) -> (Tensor out, Tensor lse)"),
    "merge_attention_backward": Operator(
        "merge",
        f"(Tensor grad_out, Tensor grad_lse, {_PARTS}) "
        "-> (Tensor grad_out_a, Tensor grad_lse_a, Tensor grad_out_b, Tensor grad_lse_b)",
    ),
    "prompt_relevance_mean": Operator(
        "relevance", "(Tensor text_key, Tensor frame_mean, Tensor? text_mask, float scale) -> Tensor"
    ),
    "prompt_relevance_softmax": Operator("relevance", f"({_SOFTMAX}) -> Tensor score"),
    "prompt_relevance_softmax_backward": Operator(
        "relevance", f"(Tensor grad_score, {_SOFTMAX}) -> (Tensor grad_text_key, Tensor grad_key)"
    ),
    "prompt_relevance_token": Operator(
        "relevance", "(Tensor text_key, Tensor frame_mean, Tensor? text_mask, float scale) -> Tensor"
    ),
    "qk_norm_rope": Operator(
        "qk_norm_rope", f"(Tensor query, Tensor key, {_WEIGHTS}, {_TURNS}) -> (Tensor new_query, Tensor new_key)"
    ),
    "qk_norm_rope_backward": Operator(
        "qk_norm_rope",
        f"(Tensor grad_new_query, Tensor grad_new_key, Tensor query, Tensor key, {_WEIGHTS}, {_TURNS}) "
        "-> (Tensor grad_query, Tensor grad_key, Tensor grad_weight_q, Tensor grad_weight_k)",
    ),
    "qk_norm_rope_write": Operator(
        "qk_norm_rope",
        f"({_STATES}, Tensor? weight_q, Tensor? weight_k, {_PLACE}, {_POOL}, Tensor slots, bool query_mean, {_TURNS}) "
        "-> (Tensor, Tensor)",
    ),
    "replace_frame": Operator("replacement", f"({_POOL}, Tensor slot, Tensor source_slot) -> ()"),
    "rotate_keys": Operator(
        "rotation",
        "(Tensor key, Tensor places, SymInt tokens_per_frame, SymInt channels, float theta) -> Tensor",
    ),
    "rotate_keys_write": Operator(
        "rotation",
        "(Tensor key, Tensor frame_mean, Tensor places, float theta, "
        "Tensor(a!) pool_key, Tensor(b!) pool_frame_mean) -> ()",
    ),
    "select_frames": Operator(
        "selection", "(Tensor query, Tensor frame_mean, SymInt top_k, Tensor? valid, SymInt? query_block) -> Tensor"
    ),
}


def implementations(package: str) -> dict[str, Callable]:
    """The function of every operator in `package`, which has the files of the table; an operator may have its own."""
    found = {}
    for name, operator in OPERATORS.items():
        module = importlib.import_module(f"{package}.{operator.file}")
        if not hasattr(module, name):
            module = importlib.import_module(f"{package}.{name}")
        found[name] = getattr(module, name)
    return found
