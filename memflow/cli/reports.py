"""The report of a film that the command line makes."""

from __future__ import annotations

from pathlib import Path

from memflow.errors import MemFlowError


def new_report(name: str, stream):
    """A report of what `stream` remembers, to be filled."""
    from memflow.output.report import MemoryReport

    config = stream.config
    held = "" if config.held_frames is None else f", {config.held_frames} held"
    recall = "" if config.recall == "relevance" else f", shown by {config.recall}"
    recall += "" if config.scene_frame == "any" else f", {config.scene_frame} of a scene"
    facts = [
        f"memory: {'published' if config.published_mode else config.policy}{held}{recall}",
        f"sink {config.sink_frames}, window {config.window_frames}, bank {config.bank_frames} latent frames",
        f"every head attends to {_attended(config)} of sink and bank",
        f"seed {stream.seeds[0]}",
    ]
    title = name.replace("-", " ").replace("_", " ")
    return MemoryReport(title, fps=stream.pipeline.fps, subtitle="   ·   ".join(facts))


def _attended(config) -> str:
    blocks = "" if config.activation_block is None else f" in blocks of {config.activation_block} tokens"
    if config.activated is None:
        return "all" if config.top_k is None else f"{config.top_k}{blocks and ' frames'}{blocks}"
    amount = f"{config.activated:.0%}" if isinstance(config.activated, float) else f"{config.activated} tokens"
    return amount + blocks


def draw(report, path: Path, failed: bool) -> None:
    """Also when the run ends early, if there is anything to draw; what ended it is more important then."""
    try:
        if len(report):
            report.save(path)
    except MemFlowError:
        if not failed:
            raise
