"""The choice of few frames on the host, and memory_attention_top_k from the operators of a backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor


def best_of_few(rows: Sequence[Sequence[float]], top_k: int) -> list[list[int]] | None:
    """The choice [rows][k] from scores [rows][F]; None where some may be NaN."""
    total = sum(map(sum, rows))
    if total != total:  # NaN, or infinities of both signs
        return None
    frames = range(len(rows[0]))
    # sorted is stable: of equal scores, the lower index
    return [sorted(sorted(frames, key=row.__getitem__, reverse=True)[:top_k]) for row in rows]


def composed(frame_means: Callable, select_frames: Callable, memory_attention: Callable) -> Callable:
    """The operator, from three others of the backend."""

    def memory_attention_top_k(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        frame_mean: Tensor | None,
        query_mean: Tensor | None,
        tokens_per_frame: int,
        candidate_frames: int,
        top_k: int,
        scale: float,
        query_block: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if frame_mean is None:
            frame_mean = frame_means(key[:, : candidate_frames * tokens_per_frame], tokens_per_frame)
        choosing = query if query_mean is None else query_mean.unsqueeze(1)
        frame_table = select_frames(choosing, frame_mean, top_k, None, query_block)
        sizes = (tokens_per_frame, candidate_frames, scale, query_block)
        return *memory_attention(query, key, value, frame_table, *sizes), frame_table

    return memory_attention_top_k
