"""The example programs run as they stand there, and say what they promise."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SAYS = {
    "causal_training.py": "the same as a mask per token: True\nteacher forcing: loss 1.",
    "diffusers_dispatch.py": "the bank holds [12, 6, 3]: the same to 1e-5: True",
    "diffusers_loop.py": "chunk 5: latents of std",
    "own_engine.py": "attention of [1, 45, 4, 24]; held frames by layer: [[",
    "own_model.py": "window [27, 28, 29, 30, 31, 32, 33, 34, 35]",
    "from_sdpa.py": "with the top 3 of 6 remembered frames per head: (1, 8, 72, 64)",
    "from_flash_attention.py": "with the top 3 of 6 remembered frames per head: (1, 72, 4, 64)",
}


def test_every_example_is_run():
    elsewhere = ["live_story.py"]  # needs a server: tests/serve/test_session.py
    assert sorted([*SAYS, *elsewhere]) == sorted(path.name for path in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("name", SAYS)
def test_example(name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [name])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert SAYS[name] in capsys.readouterr().out
