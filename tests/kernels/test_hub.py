"""The layout for the Hugging Face kernels hub: what `kernels` loads from it, beside the package and beside itself."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOAD = """
import sys
from pathlib import Path
import torch
import memflow_kernels  # the installed package, beside the copies
{load}
torch.manual_seed(0)
query, (key, value) = torch.randn(1, 72, 4, 64), torch.randn(2, 1, 360, 4, 64)
sizes = {{"tokens_per_frame": 24, "candidate_frames": 6, "top_k": 3}}
expected = memflow_kernels.memory_attention(query, key, value, **sizes)
copies = [load(Path(folder)) for folder in sys.argv[1:]]
for copy in copies:
    assert copy.memory_attention is not memflow_kernels.memory_attention
    assert torch.equal(copy.memory_attention(query, key, value, **sizes), expected)
    query.requires_grad_().grad = None
    copy.memory_attention(query, key, value, **sizes).sum().backward()
    assert query.grad.isfinite().all()
    assert copy.available_backends().keys() == {{"torch", "triton", "cuda"}}
assert len({{copy.__name__ for copy in copies}}) == len(copies)
assert all(hasattr(torch.ops, "memflow_" + copy.__name__) for copy in copies)
with copies[0].use_backend("torch"):
    print(len(copies), "copies")
"""
# As `kernels` does it: a module called by the id in metadata.json, from the variant's __init__.py.
BY_HAND = """
import importlib.util, json
def load(folder):
    path = folder / "build" / "torch-universal"
    name = json.loads((path / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, path / "__init__.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
"""


@pytest.fixture(scope="module")
def layouts(tmp_path_factory) -> list[Path]:
    """Two versions that differ in a line."""
    spec = importlib.util.spec_from_file_location("make", ROOT / "hub" / "make.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    folder = tmp_path_factory.mktemp("hub")
    variants = [made.make(folder / name) for name in ("one", "two")]
    with (variants[1] / "__init__.py").open("a") as file:
        file.write("\nSECOND = True\n")
    about = json.loads((variants[1] / "metadata.json").read_text())
    about["id"] = f"memflow_kernels_{made.digest(variants[1])}"
    (variants[1] / "metadata.json").write_text(json.dumps(about))
    return [folder / "one", folder / "two"]


def run(load: str, layouts: list[Path]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LOAD.format(load=load), *map(str, layouts)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_layout(layouts):
    variant = layouts[0] / "build" / "torch-universal"
    about = json.loads((variant / "metadata.json").read_text())
    assert about["name"] == "memflow-kernels"
    assert about["id"].isidentifier()
    assert not [path for path in variant.rglob("*") if path.suffix in (".so", ".pyc", ".cu")]
    assert (layouts[0] / "README.md").read_text().startswith("---\nlicense: apache-2.0")


def test_two_versions_load_beside_the_package(layouts):
    done = run(BY_HAND, layouts)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "2 copies"


def test_kernels_loads_it(layouts):
    try:  # by its distribution: these tests themselves lie in a folder of that name
        metadata.version("kernels")
    except metadata.PackageNotFoundError:
        pytest.skip("the package kernels is not installed: pip install kernels")
    done = run("from kernels import get_local_kernel as load", layouts)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "2 copies"
